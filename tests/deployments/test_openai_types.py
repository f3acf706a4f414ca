from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.conversations import routed_text
from deployments.openai_types import ChatBody, CompletionBody
from deployments.text_types import RouteBody
from lorauter.engine.types import Prompt, SamplingParams
from lorauter.errors import InvalidRequest

DEFAULTS: dict[str, Any] = {"max_tokens": 99, "temperature": 0.3}


def chat(**options: Any) -> ChatBody:
    return ChatBody.model_validate_json(
        json.dumps({"model": "lorauter", "messages": [{"role": "user", "content": "hi"}], **options})
    )


def turns(body: ChatBody) -> Any:
    [prompt] = body.prompts()
    return prompt.messages


def completion(**options: Any) -> CompletionBody:
    return CompletionBody.model_validate_json(json.dumps({"model": "lorauter", "prompt": "hi", **options}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SamplingParams(max_tokens=99, temperature=0.3)),
        ({"max_tokens": None, "temperature": None, "top_p": None, "stop": None, "seed": None, "n": None}, ...),
        ({"max_tokens": 5, "temperature": 0}, SamplingParams(max_tokens=5, temperature=0.0)),
        ({"temperature": 2, "top_p": 1}, SamplingParams(max_tokens=99, temperature=2.0, top_p=1.0)),
        ({"stop": "end", "seed": -1}, SamplingParams(max_tokens=99, temperature=0.3, stop=("end",), seed=-1)),
        ({"stop": ["a", "b"]}, SamplingParams(max_tokens=99, temperature=0.3, stop=("a", "b"))),
        ({"stop": []}, ...),
    ],
)
def test_sampling_is_what_was_asked_for_and_defaults_otherwise(options: dict[str, Any], expected: Any) -> None:
    default = SamplingParams(max_tokens=99, temperature=0.3)
    for make in (chat, completion):
        assert make(**options).sampling(**DEFAULTS) == (default if expected is ... else expected)


def test_a_chats_newer_bound_goes_before_the_older() -> None:
    assert chat(max_completion_tokens=3, max_tokens=7).sampling(**DEFAULTS).max_tokens == 3


@pytest.mark.parametrize("stop", ["", [""], ["fine", ""]])
def test_an_empty_stop_is_refused(stop: Any) -> None:
    with pytest.raises(InvalidRequest, match="stop"):
        chat(stop=stop).sampling(**DEFAULTS)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "metadata": {"a": "b"}},
        {"presence_penalty": -0.0, "logprobs": None, "lorauter": {}},
        {"stream_options": {"include_usage": True, "include_obfuscation": False}},
    ],
)
def test_options_at_their_neutral_value_are_taken(options: dict[str, Any]) -> None:
    chat(**options, logprobs=False) if "logprobs" not in options else chat(**options)
    completion(**options, echo=False, best_of=1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n": 129}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"model": None}, "model"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"usage": True}}, "usage"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": 0.5}, "seed"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "0"}, "frequency_penalty"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"lorauter": {"top_k": 0}}, "top_k"),
        ({"lorauter": {"top_k": "3"}}, "top_k"),
        ({"lorauter": {"temperature": 0}}, "temperature"),
        ({"lorauter": {"exclude_tasks": "sst2"}}, "exclude_tasks"),
        ({"lorauter": {"adapters": ["sst2"]}}, "adapters"),
        ({"lorauter": {"adapters": {"sst2": "1"}}}, "sst2"),
        ({"lorauter": {"adapters": {"sst2": True}}}, "sst2"),
        ({"lorauter": {"exclude": []}}, "exclude"),
    ],
)
def test_anything_else_is_refused_by_its_field(options: dict[str, Any], field: str) -> None:
    for make in (chat, completion):
        with pytest.raises(ValidationError) as caught:
            make(**options)
        assert all(field in error["loc"] for error in caught.value.errors())


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [{"role": "user"}],
        [{"content": "hi"}],
        [{"role": "tool", "content": "hi"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": "hi", "tool_calls": []}],
    ],
)
def test_messages_that_are_none(messages: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(messages=messages)
    assert all(error["loc"][0] == "messages" for error in caught.value.errors())


def test_messages_are_taken_as_clients_send_them_back() -> None:
    dumped = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    body = chat(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "W?", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": "x", "weight": 0, "name": None, **dumped},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "user", "content": "So?", "id": "msg_1", "tool_calls": None},
        ]
    )
    assert [turn["content"] for turn in turns(body)] == ["W?", "x", "", "So?"]


@pytest.mark.parametrize(
    "lost", [{"tool_calls": [{"id": "1"}]}, {"function_call": {"arguments": "{}"}}, {"audio": {"id": "a"}}]
)
def test_what_a_message_says_beside_its_text_is_not_dropped(lost: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(lost))):
        chat(messages=[{"role": "assistant", "content": "so", **lost}, {"role": "user", "content": "hi"}])


def test_messages_become_turns_and_a_text_to_route() -> None:
    body = chat(
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "so", "name": "me"},
            {"role": "user", "content": [{"type": "text", "text": "sec"}, {"type": "text", "text": "ond"}]},
            {"role": "assistant", "content": "Well,"},
        ]
    )
    assert [turn["role"] for turn in turns(body)] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in turns(body)] == ["Be short.", "first", "so", "second", "Well,"]
    assert routed_text(turns(body), "last_user_message") == "second"
    assert routed_text(turns(body), "conversation") == "Be short.\nfirst\nso\nsecond\nWell,"


def test_a_chat_that_no_user_has_begun_is_routed_by_what_the_system_says() -> None:
    begun = [{"role": "system", "content": "Be short."}, {"role": "assistant", "content": "Well,"}]
    assert routed_text(turns(chat(messages=begun)), "last_user_message") == "Be short."
    with pytest.raises(InvalidRequest, match="user"):
        routed_text(turns(chat(messages=begun[1:])), "last_user_message")


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", [Prompt(text="a")]),
        (["a"], [Prompt(text="a")]),
        (["a", "b"], [Prompt(text="a"), Prompt(text="b")]),
        ([1, 2], [Prompt(token_ids=(1, 2))]),
        ([[1, 2], [3]], [Prompt(token_ids=(1, 2)), Prompt(token_ids=(3,))]),
    ],
)
def test_prompts_are_texts_or_token_ids(given: Any, prompts: list[Prompt]) -> None:
    assert completion(prompt=given).prompts() == prompts


@pytest.mark.parametrize("given", [5, None, ["a", 1], [1, "a"], [[1], 2], [True], [1.0], [-1], [["a"]], {}])
def test_what_is_no_prompt(given: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(prompt=given)
    assert [error["loc"] for error in caught.value.errors()] == [("prompt",)]


def test_route_takes_a_text_or_texts_with_options_beside() -> None:
    body = RouteBody.model_validate_json('{"input": "a", "top_k": 2, "exclude_tasks": ["x"], "allow_adapters": []}')
    assert (body.texts(), body.top_k, body.exclude_tasks, body.allow_adapters) == (["a"], 2, {"x"}, frozenset())
    assert RouteBody.model_validate_json('{"input": ["a", "b"]}').texts() == ["a", "b"]
    with pytest.raises(InvalidRequest, match="input"):
        RouteBody.model_validate_json('{"input": []}').texts()
    for wrong in ("{}", '{"input": 5}', '{"input": [5]}', '{"input": "a", "adapters": {"b": 1}}', '{"text": "a"}'):
        with pytest.raises(ValidationError):
            RouteBody.model_validate_json(wrong)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_a_seed_has_64_bits(seed) -> None:
    assert chat(seed=seed).sampling(**DEFAULTS).seed == seed
    for beyond in (-(2**63) - 1, 2**63):
        with pytest.raises(InvalidRequest, match="seed") as refused:
            chat(seed=beyond).sampling(**DEFAULTS)
        assert refused.value.param == "seed"
