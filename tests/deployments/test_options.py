"""The table of options: it is the documentation, and null and neutral values ask for nothing."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from anthropic.types import message_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from deployments.openai_types import ChatBody, CompletionBody
from deployments.openapi import DOCS, ENDPOINTS, with_table
from deployments.options import Row, parse_body, reword, rows_of
from lorauter.errors import InvalidRequest

LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "base", "prompt": "hi"},
    "/v1/responses": {"model": "base", "input": "hi"},
    "/v1/messages": {"model": "base", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
}
GENERATING: list[tuple[str, Row]] = [(path, row) for path in LEAST for row in rows_of(ENDPOINTS[path])]
IDS = [f"{path.rpartition('/v1/')[2]} {row.name}" for path, row in GENERATING]

# vLLM's beside OpenAI's own (0.26's protocol; guided_* are older names).
VLLM = set(
    """
    use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words
    add_special_tokens structured_outputs priority request_id session_id return_tokens_as_token_ids
    return_token_ids routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt
    kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval thinking_token_budget
    response_format guided_json guided_regex guided_choice guided_grammar logits_processors
    guided_decoding_backend guided_whitespace_pattern stream
    """.split()
)
VLLM_CHAT = set(
    "include_reasoning echo add_generation_prompt continue_final_message documents chat_template chat_template_kwargs "
    "media_io_kwargs mm_processor_kwargs return_prompt_text".split()
)


def asked(path: str, **options: Any) -> Any:
    """What a request asks for, as far as a replica and the answer are concerned."""
    kind: Any = ENDPOINTS[path]
    given: Any = parse_body(kind, json.dumps({**LEAST[path], **options}))
    body = given if isinstance(given, ChatBody | CompletionBody) else given.chat()
    assert isinstance(body, ChatBody | CompletionBody)
    streams = (body.stream_options and body.stream_options.model_dump(exclude_defaults=True)) or None
    sampling = body.sampling(max_tokens=9, temperature=0.5)
    return body.prompts(), sampling, body.lorauter, body.model, body.stream, streams, body.cache_salt


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def test_the_documentation_is_the_table() -> None:
    text = DOCS.read_text()
    assert text == with_table(text), "run `python -m deployments.openapi`"
    assert text.count("\n| `") > 100


def test_the_options_of_openais_api_and_of_vllms_are_in_the_table() -> None:
    chat, plain, responses, messages = ({row.name for row in rows_of(ENDPOINTS[path])} for path in LEAST)
    assert set(chat_params.CompletionCreateParamsBase.__annotations__) | VLLM | VLLM_CHAT <= chat
    assert set(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"prompt_embeds"} | VLLM <= plain
    assert set(message_create_params.MessageCreateParamsBase.__annotations__) | {"stream"} <= messages
    assert set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"} <= responses


@pytest.mark.parametrize(("path", "row"), GENERATING, ids=IDS)
def test_null_and_neutral_values_are_the_same_as_none(path: str, row: Row) -> None:
    for value in (*row.neutral, None):
        if value is not None or "(needed)" not in row.takes:
            assert asked(path, **nested(row.name, value)) == asked(path)


@pytest.mark.parametrize(("path", "row"), GENERATING, ids=IDS)
def test_what_an_option_does_not_take_is_refused_by_its_name(path: str, row: Row) -> None:
    for value in ({"sur": {"prise": 1}}, [[{}]], "surprise", -7.25, True):
        free = row.takes.startswith(("object", "boolean", "text")) or value in row.neutral
        if not free:
            with pytest.raises(InvalidRequest) as caught:
                asked(path, **nested(row.name, value))
            assert (caught.value.param or "").startswith(row.name)
            assert row.name in str(caught.value)


@pytest.mark.parametrize("path", LEAST)
def test_what_goes_nowhere_changes_nothing(path: str) -> None:
    examples = {"text": "x", "object": {"a": "b"}, "boolean": True, "integer": 3, '"left"': "left"}
    rows = rows_of(ENDPOINTS[path])
    whole = {row.name for row in rows} - {row.name.rpartition(".")[0] for row in rows}
    for row in rows:
        if row.goes == "nowhere" and "." not in row.name and row.name in whole:
            assert asked(path, **{row.name: examples[row.takes.split()[0]]}) == asked(path)


@pytest.mark.parametrize(
    ("given", "sampled"),
    [
        ({"top_k": 5, "min_p": 0.1}, {"top_k": 5, "min_p": 0.1}),
        ({"presence_penalty": 1, "frequency_penalty": -1.5}, {"presence_penalty": 1, "frequency_penalty": -1.5}),
        ({"repetition_penalty": 1.2, "ignore_eos": True}, {"repetition_penalty": 1.2, "ignore_eos": True}),
        ({"logit_bias": {"7": -100, "12": 2.5}}, {"logit_bias": ((7, -100), (12, 2.5))}),
    ],
)
@pytest.mark.parametrize("path", LEAST)
def test_sampling_reaches_the_engine(path: str, given: dict[str, Any], sampled: dict[str, Any]) -> None:
    sampling = asked(path, **given)[1]
    assert {name: getattr(sampling, name) for name in sampled} == sampled


@pytest.mark.parametrize("bias", [{"a": 1}, {"-1": 1}, {"1.0": 1}, {"²": 1}, {"1" * 5000: 1}, {"1": 101}, {"1": "2"}])
def test_a_bias_is_of_a_tokens_id(bias: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked("/v1/completions", logit_bias=bias)
    assert (caught.value.param or "").startswith("logit_bias")


def test_an_error_of_long_words_is_reworded_in_no_time() -> None:
    word, used = "a" * 100_000, time.process_time()
    error = InvalidRequest(f"got -{word}-, needed what lorauter.adapters has, {word}_{word}", param="max_tokens")
    reword(error, str.upper)
    assert str(error) == f"got -{word}-, needed what LORAUTER.ADAPTERS has, {word.upper()}_{word.upper()}"
    assert error.param == "MAX_TOKENS"
    assert time.process_time() - used < 1
