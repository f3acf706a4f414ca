"""Requests as clients of other servers send them: conversations, neutral options, prompts of all forms, streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import pytest
from fake_service import BOTH, CHAT, COMPLETIONS, DECISION, FakeService, chat, events, post, refused, text

from deployments.api import build_api
from deployments.calls import Admitted, GenerateCall
from deployments.config import ApiSettings
from lorauter.engine.types import Chunk, Prompt
from lorauter.errors import AdapterRejected, ContextLengthExceeded, InvalidRequest

USER = {"role": "user", "content": "Say hi."}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
DUMPED = {
    "content": "Hi",
    "refusal": None,
    "role": "assistant",
    "annotations": None,
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}


def talk(*messages: Any, **options: Any) -> dict[str, Any]:
    return {"model": "base", "messages": list(messages), "max_tokens": 4, **options}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": None}, USER],
        [USER, DUMPED, USER],
        [USER, {"role": "assistant", "content": "Hi", "tool_calls": []}, USER],
        [USER, {**DUMPED, "id": "msg_1", "reasoning_content": None, "parsed": None}, {**USER, "id": "msg_2"}],
        [{"role": "user", "content": [{"type": "text", "text": "Say hi.", "cache_control": {"type": "ephemeral"}}]}],
        [{"role": "user", "content": [{"type": "input_text", "text": "Say"}, {"type": "text", "text": " hi."}]}],
        [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER],
        [USER, {"role": "assistant", "content": None, "refusal": "No."}, USER],
        [USER, {"role": "assistant", "content": "hi"}, {"role": "user", "content": ""}],
        [{"role": "system", "content": "Say hi."}],
        [{"role": "assistant", "content": "Hi"}],
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "Sunny"},
        ],
    ],
)
def test_conversations_are_taken_as_clients_keep_them(messages: list[Any]) -> None:
    service = FakeService()
    assert post(service, CHAT, talk(*messages)).status_code == 200
    said = service.calls[0].prompt.messages
    assert len(said) == len(messages)
    assert all(isinstance(turn["content"], str) for turn in said)


def test_what_a_conversation_says_reaches_the_template() -> None:
    service = FakeService()
    refusal = {"role": "assistant", "content": None, "refusal": "No."}
    answer = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Sunny"}]}
    post(service, CHAT, talk(USER, refusal, {"role": "assistant", "content": None, "tool_calls": [CALL]}, answer))
    assert service.calls[0].prompt.messages == (
        USER,
        {"role": "assistant", "content": "No."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "Sunny", "tool_call_id": "c1", "name": "f"},
    )


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {}},
        {"response_format": {"type": "text"}},
        {"service_tier": "auto"},
        {"store": False},
        {"stream": None},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"tool_choice": "none"},
        {"tools": []},
        {"tools": None},
        {"top_logprobs": None},
        {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0},
    ],
)
def test_options_that_ask_for_nothing_are_taken(options: dict[str, Any]) -> None:
    assert post(FakeService(), CHAT, talk(USER, **options)).status_code == 200


@pytest.mark.parametrize("prompt", [["The capital of France is", "The capital of Spain is"], [504, 3575, 282]])
@pytest.mark.parametrize("options", [{}, {"suffix": None, "logprobs": 0}])
def test_prompts_are_taken_in_all_their_forms(prompt: list[Any], options: dict[str, Any]) -> None:
    assert post(FakeService(), COMPLETIONS, text("base", prompt, max_tokens=4, **options)).status_code == 200


def test_a_model_that_is_not_there_is_told_without_a_place() -> None:
    error = refused(post(FakeService(), CHAT, chat("gpt-4o-mini")), 404, "model_not_found")
    assert error["param"] == "model"
    by_hand = post(FakeService(), CHAT, chat(lorauter={"adapters": {"nowhere": 1}}))
    assert refused(by_hand, 404, "model_not_found")["param"] == "lorauter.adapters"
    assert "gpt-4o-mini" in error["message"]
    assert "/tmp" not in error["message"]


@BOTH
@pytest.mark.parametrize("model", ["base", "poet"])
def test_who_names_the_model_needs_no_text_to_route_by(path: str, body: Any, model: str) -> None:
    for blank in (" \n", ""):
        service = FakeService()
        assert post(service, path, body(model, blank)).status_code == 200
        assert len(service.calls) == 1
        refused(post(service, path, body("lorauter", blank)), 400)


def test_a_chat_of_a_system_message_alone_is_routed_by_it() -> None:
    service = FakeService()
    body = {"model": "lorauter", "messages": [{"role": "developer", "content": "Add numbers."}]}
    assert post(service, CHAT, body).status_code == 200
    assert service.routed[0][0] == ["Add numbers."]


@dataclass
class Echo(FakeService):
    """Answers with the prompt in two pieces, the later prompts first."""

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        self.calls.append(call)
        self.running += 1
        try:
            said = call.prompt.text or str(call.prompt.token_ids)
            if self.first_error and said == "bad":
                raise self.first_error
            yield Admitted(len(said), cached_tokens=1)
            await asyncio.sleep(0.05 * (9 - len(said)))
            yield Chunk(said[:1], (1,))
            if self.late_error and said == "bad":
                raise self.late_error
            yield Chunk(said[1:], (2, 3), "length")
        finally:
            self.running -= 1


def test_several_prompts_are_several_choices() -> None:
    service = Echo()
    answer = post(service, COMPLETIONS, text(prompt=["ab", "cde", "f"])).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "ab"), (1, "cde"), (2, "f")]
    assert [choice["lorauter"] for choice in answer["choices"]] == [DECISION.to_json()] * 3
    assert "lorauter" not in answer
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    [(routed, _)] = service.routed  # in one go
    assert routed == ["ab", "cde", "f"]
    assert service.running == 0


def test_several_prompts_stream_as_they_come_each_to_its_own_choice() -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, usage, done = events(post(Echo(), COMPLETIONS, text(prompt=["ab", "cde"], **options)))
    assert done == "[DONE]"
    assert usage["usage"]["total_tokens"] == 11
    assert usage["choices"] == []
    choices = [piece["choices"][0] for piece in pieces]
    assert [piece["lorauter"] for piece in pieces if "lorauter" in piece] == [DECISION.to_json()] * 2
    for index, said in enumerate(["ab", "cde"]):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == said
        assert [choice["finish_reason"] for choice in own] == [None, None, None, "length"]
        assert own[-1]["text"] == ""
    assert [choice["index"] for choice in choices if choice["finish_reason"]] == [1, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_of_several_prompts_one_that_fails_ends_all(stream: bool) -> None:
    body = text(prompt=["a", "bad", "c"], stream=stream)
    service = Echo(first_error=ContextLengthExceeded(9, 5))
    assert refused(post(service, COMPLETIONS, body), 400, "context_length_exceeded")["param"] == "prompt"
    assert service.running == 0
    service = Echo(late_error=AdapterRejected("has NaNs", adapter="poet"))
    response = post(service, COMPLETIONS, body)
    if stream:
        *_, error, done = events(response)
        assert error["error"]["code"] == "adapter_rejected"
        assert done == "[DONE]"
    else:
        refused(response, 422, "adapter_rejected")
    assert service.running == 0


@BOTH
def test_an_error_names_the_prompt_as_the_client_does(path: str, body: Any) -> None:
    for error in (ContextLengthExceeded(9, 5), InvalidRequest("no tokens", param="prompt")):
        told = post(FakeService(first_error=error), path, body()).json()["error"]
        assert told["param"] == ("prompt" if path == COMPLETIONS else "messages")


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_do_not_fill_the_queue(stream: bool) -> None:
    class Queue(FakeService):
        waiting = most = 0

        async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            await asyncio.sleep(0)
            self.waiting -= 1
            async for item in super().generate(call):
                yield item

    service = Queue()
    response = post(service, COMPLETIONS, text(prompt=["a"] * 100, stream=stream))
    told = [c for event in events(response)[:-1] for c in event["choices"]] if stream else response.json()["choices"]
    said = sum(choice["finish_reason"] == "stop" for choice in told)
    assert said == 100
    assert 1 < service.most <= 32


def test_a_client_that_leaves_ends_all_of_its_answers() -> None:
    async def leave() -> int:
        gone = asyncio.Event()
        service = FakeService(pause=asyncio.Event().wait)
        requests = [{"type": "http.request", "body": json.dumps(text(prompt=["a", "b", "c"], stream=True)).encode()}]

        async def receive() -> Any:
            if requests:
                return requests.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def give(message: Any) -> None:
            if b"H\xc3\xa9" in message.get("body", b""):
                gone.set()

        scope = {"type": "http", "asgi": {"spec_version": "2.0"}, "method": "POST", "path": COMPLETIONS}
        headers = [(b"content-type", b"application/json")]
        app: Any = build_api(service, ApiSettings())
        async with asyncio.timeout(5):
            await app({**scope, "headers": headers, "query_string": b""}, receive, give)
        assert len(service.calls) == 3
        return service.running

    assert asyncio.run(leave()) == 0


def test_token_ids_go_to_the_model_as_they_are_and_are_routed_by_their_text() -> None:
    service = FakeService()
    post(service, COMPLETIONS, text(prompt=list(b"Roses")))
    post(service, COMPLETIONS, text("base", prompt=[[1, 2], [3]]))
    assert [texts for texts, _ in service.routed] == [["Roses"]]
    assert [call.prompt.token_ids for call in service.calls] == [tuple(b"Roses"), (1, 2), (3,)]


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({}, {}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"continue_final_message": True}, {"continue_final_message": True, "add_generation_prompt": False}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"template_kwargs": {"enable_thinking": False}}),
    ],
)
def test_how_a_chat_becomes_a_prompt(options: dict[str, Any], prompt: dict[str, Any]) -> None:
    service = FakeService()
    post(service, CHAT, chat("base", **options))
    assert service.calls[0].prompt == Prompt(messages=({"role": "user", "content": "hi"},), **prompt)


def test_a_message_cannot_both_go_on_and_be_over() -> None:
    body = chat("base", continue_final_message=True, add_generation_prompt=True)
    assert "exclude each other" in refused(post(FakeService(), CHAT, body), 400)["message"]


def test_a_salt_keeps_what_is_computed_of_a_prompt_apart() -> None:
    service = FakeService()
    for salt in (None, "a", "b"):
        post(service, CHAT, chat("base", cache_salt=salt))
    assert len({call.tenant for call in service.calls}) == 3


@BOTH
def test_a_stream_is_not_kept_by_anybody_on_its_way(path: str, body: Any) -> None:
    headers = post(FakeService(), path, body(stream=True)).headers
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


@BOTH
def test_the_usage_so_far_goes_with_each_event(path: str, body: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, _ = events(post(FakeService(), path, body(stream=True, stream_options=options)))
    assert [piece["usage"]["completion_tokens"] for piece in pieces] == [0, 1, 3, 3, 3]
    assert {piece["usage"]["prompt_tokens"] for piece in pieces} == {7}


def test_the_fingerprint_changes_with_what_answers() -> None:
    def fingerprint(model: str) -> str:
        answer: str = json.loads(post(FakeService(), CHAT, chat(model)).content)["system_fingerprint"]
        return answer

    assert len({fingerprint(model) for model in ("lorauter", "base", "poet", "adder")}) == 4
    assert fingerprint("lorauter") == fingerprint("lorauter")
