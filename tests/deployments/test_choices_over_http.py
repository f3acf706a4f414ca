"""What a request may ask of its answers beside their text: several of them, probabilities, tokens, and a form.

The service is an engine on the counting model, which knows the next letter; its clients' types are OpenAI's own.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import counting
import openai.types as of_openai
import openai.types.chat as of_chat
import pytest
from engine_service import EngineService
from fake_service import CHAT, COMPLETIONS, ROUTE, FakeService, chat, events, post, refused, text

from lorauter.engine import EngineConfig, MultiLoraEngine


@pytest.fixture(scope="module")
def service() -> Iterator[EngineService]:
    engine = MultiLoraEngine(*counting.load(), EngineConfig(max_batch=8, max_model_len=512, adapter_bytes=1 << 16))
    yield EngineService(engine)
    engine.close()


def answered(service: FakeService, path: str, body: Any) -> Any:
    response = post(service, path, body)
    assert response.status_code == 200, response.text
    answer = response.json()
    if "echo" not in body:  # the first token of a prompt has null in its place, which OpenAI's own types do not say
        (of_chat.ChatCompletion if path == CHAT else of_openai.Completion).model_validate(answer, strict=True)
    return answer


def pieces(service: FakeService, path: str, body: Any) -> list[Any]:
    """What each choice of a stream has said: its choices in their order."""
    came = events(post(service, path, {**body, "stream": True}))
    assert came[-1] == "[DONE]"
    kind: Any = of_chat.ChatCompletionChunk if path == CHAT else of_openai.Completion
    for one in came[:-1]:
        assert "error" not in one, one
        if path == CHAT:
            kind.model_validate(one)
    return [choice for one in came[:-1] for choice in one["choices"]]


ALL = {"temperature": 1.0, "seed": 3, "logit_bias": {str(i): 30 for i in range(98, 123, 2)}}


def test_several_answers(service: EngineService) -> None:
    for path, body in ((CHAT, chat), (COMPLETIONS, text)):
        one = answered(service, path, body("base", max_tokens=8, **ALL))["choices"]
        four = answered(service, path, body("base", max_tokens=8, n=4, **ALL))
        said = [choice["message"]["content"] if path == CHAT else choice["text"] for choice in four["choices"]]
        assert [choice["index"] for choice in four["choices"]] == [0, 1, 2, 3]
        assert len(set(said)) > 1
        assert said[0] == (one[0]["message"]["content"] if path == CHAT else one[0]["text"])
        assert four["usage"]["completion_tokens"] == 32
        streamed = ["", "", "", ""]
        ends = []
        for piece in pieces(service, path, body("base", max_tokens=8, n=4, **ALL)):
            streamed[piece["index"]] += piece["delta"].get("content") or "" if path == CHAT else piece["text"]
            ends += [piece["index"]] if piece["finish_reason"] else []
        assert streamed == said
        assert sorted(ends) == [0, 1, 2, 3]


def test_several_answers_to_several_prompts(service: EngineService) -> None:
    answer = answered(service, COMPLETIONS, text("base", ["a", "h"], max_tokens=2, n=2))
    assert [choice["text"] for choice in answer["choices"]] == ["bc", "bc", "ij", "ij"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    streamed: dict[int, str] = {}
    for piece in pieces(service, COMPLETIONS, text("base", ["a", "h"], max_tokens=2, n=2)):
        streamed[piece["index"]] = streamed.get(piece["index"], "") + piece["text"]
    assert streamed == {0: "bc", 1: "bc", 2: "ij", 3: "ij"}


def test_the_best_of_some(service: EngineService) -> None:
    asked = {"max_tokens": 6, "temperature": 2.0, "seed": 1, "allowed_token_ids": list(range(98, 123))}
    many = answered(service, COMPLETIONS, text("base", "a", n=6, logprobs=0, **asked))["choices"]

    def mean(choice: Any) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    best = answered(service, COMPLETIONS, text("base", "a", n=2, best_of=6, **asked))
    assert [choice["text"] for choice in best["choices"]] == [
        choice["text"] for choice in sorted(many, key=mean, reverse=True)[:2]
    ]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == 36
    for wrong in ({"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}):
        assert refused(post(service, COMPLETIONS, text("base", "a", **wrong)), 400)["param"] == "best_of"


SURE = 9 - math.log(math.exp(9) + counting.VOCABULARY - 1)  # the counting model's, of the next letter
ELSE = -math.log(math.exp(9) + counting.VOCABULARY - 1)


def test_logprobs_of_chats(service: EngineService) -> None:
    asked = chat("base", max_tokens=3, logprobs=True, top_logprobs=2, logit_bias={"233": 90})
    [choice] = answered(service, CHAT, asked)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 3
    assert content[0]["token"] == "bytes:\\xe9"
    assert content[0]["bytes"] == [0xE9]
    assert content[0]["logprob"] == pytest.approx(ELSE, abs=1e-4)
    assert content[0]["top_logprobs"][0] == {"token": ";", "logprob": pytest.approx(SURE, abs=1e-4), "bytes": [59]}
    assert [len(one["top_logprobs"]) for one in content] == [2, 2, 2]
    streamed = [one for piece in pieces(service, CHAT, asked) for one in (piece["logprobs"] or {}).get("content", [])]
    assert streamed == content
    [plain] = answered(service, CHAT, chat("base", max_tokens=3, logprobs=True))["choices"]
    assert [one["top_logprobs"] for one in plain["logprobs"]["content"]] == [[], [], []]
    assert answered(service, CHAT, chat("base", max_tokens=3))["choices"][0]["logprobs"] is None
    assert refused(post(service, CHAT, chat("base", top_logprobs=2)), 400)["param"] == "top_logprobs"
    assert refused(post(service, CHAT, chat("base", logprobs=True, top_logprobs=21)), 400)["param"] == "top_logprobs"


@pytest.mark.parametrize("most", [0, 3])
def test_logprobs_of_completions(service: EngineService, most: int) -> None:
    asked = text("base", "abc", max_tokens=2, logprobs=most)
    [choice] = answered(service, COMPLETIONS, asked)["choices"]
    told = choice["logprobs"]
    assert told["tokens"] == ["d", "e"]
    assert told["token_logprobs"] == pytest.approx([SURE, SURE], abs=1e-4)
    assert told["text_offset"] == [0, 1]
    assert [len(one) for one in told["top_logprobs"]] == [max(most, 1)] * 2
    assert all(one["d"] > -0.1 for one in told["top_logprobs"][:1])
    streamed = [piece["logprobs"] for piece in pieces(service, COMPLETIONS, asked) if piece["logprobs"]]
    assert [token for one in streamed for token in one["tokens"]] == ["d", "e"]
    assert [offset for one in streamed for offset in one["text_offset"]] == [0, 1]


@pytest.mark.parametrize("prompt", ["abq", [97, 98, 113]])
@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_prompt_is_told_as_evaluations_ask_for_it(service: EngineService, prompt: Any, most: int) -> None:
    """lm-eval sends `echo`, `logprobs` and one token or none."""
    [choice] = answered(service, COMPLETIONS, text("base", prompt, max_tokens=most, echo=True, logprobs=1))["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "abq" + "rs"[:most]
    assert told["tokens"] == [*"abqrs"][: 3 + most]
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    expected = [SURE, ELSE, SURE, SURE][: 2 + most]
    assert told["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert max(told["top_logprobs"][2].values()) == pytest.approx(SURE, abs=1e-4)
    assert told["text_offset"] == list(range(3 + most))
    assert choice["finish_reason"] == "length"
    streamed = pieces(service, COMPLETIONS, text("base", prompt, max_tokens=most, echo=True, logprobs=1))
    assert "".join(piece["text"] for piece in streamed) == choice["text"]
    assert [token for piece in streamed for token in (piece["logprobs"] or {}).get("tokens", [])] == told["tokens"]


def test_echo_alone_and_no_tokens_alone(service: EngineService) -> None:
    asked = text("base", "ab", max_tokens=0, echo=True)
    answer = answered(service, COMPLETIONS, asked)
    assert answer["choices"][0]["text"] == "ab"
    assert answer["usage"]["completion_tokens"] == 0
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    assert events(post(service, COMPLETIONS, streamed))[-2]["usage"] == answer["usage"]
    [one, two] = answered(service, COMPLETIONS, text("base", "ab", max_tokens=1, echo=True, n=2, logprobs=0))["choices"]
    assert one["logprobs"] == two["logprobs"]
    assert refused(post(service, COMPLETIONS, text("base", "ab", max_tokens=0)), 400)["param"] == "max_tokens"


def test_prompt_logprobs_and_token_ids(service: EngineService) -> None:
    asked: dict[str, Any] = {"max_tokens": 2, "prompt_logprobs": 1, "return_token_ids": True}
    [choice] = answered(service, COMPLETIONS, text("base", "aby", **asked))["choices"]
    assert choice["prompt_token_ids"] == [97, 98, 121]
    assert choice["token_ids"] == [122, 97]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1] == {
        "98": {"logprob": pytest.approx(SURE, abs=1e-4), "rank": 1, "decoded_token": "b"}
    }
    assert set(choice["prompt_logprobs"][2]) == {"121", "99"}
    answer = answered(service, CHAT, chat("base", **asked))
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert answer["choices"][0]["token_ids"]
    came = events(post(service, CHAT, {**chat("base", **asked), "stream": True}))[:-1]
    assert [one["prompt_token_ids"] for one in came if "prompt_token_ids" in one] == [answer["prompt_token_ids"]]


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["n"]} | {
    "additionalProperties": False
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ({"response_format": FORMAT}, lambda said: 1 <= json.loads(said)["n"] <= 9),
        ({"response_format": {"type": "json_object"}, "max_tokens": 400}, lambda said: said.lstrip().startswith("{")),
        ({"structured_outputs": {"json": SCHEMA}}, lambda said: 1 <= json.loads(said)["n"] <= 9),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, lambda said: 1 <= json.loads(said)["n"] <= 9),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, lambda said: len(said) == 3 and said.isdigit()),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, lambda said: said in ("red", "blue")),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]'}}, lambda said: said[0] == "x" and len(said) == 2),
        ({"guided_json": SCHEMA}, lambda said: 1 <= json.loads(said)["n"] <= 9),
        ({"guided_regex": "[xy]{2}"}, lambda said: len(said) == 2),
        ({"guided_choice": ["yes", "no"]}, lambda said: said in ("yes", "no")),
        ({"guided_grammar": 'start: "a" | "b"'}, lambda said: said in ("a", "b")),
    ],
)
def test_answers_of_a_form(service: EngineService, asked: dict[str, Any], fits: Any) -> None:
    for path, body in ((CHAT, chat), (COMPLETIONS, text)):
        [choice] = answered(service, path, body("base", **{"max_tokens": 60, "temperature": 1, "seed": 2, **asked}))[
            "choices"
        ]
        said = choice["message"]["content"] if path == CHAT else choice["text"]
        assert fits(said), said
        assert choice["finish_reason"] == "stop" or "max_tokens" in asked


@pytest.mark.parametrize(
    ("asked", "param", "needle"),
    [
        ({"guided_regex": "a(b"}, "guided_regex", "unclosed"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar", "nowhere"),
        (
            {
                "response_format": {
                    **FORMAT,
                    "json_schema": {"name": "x", "schema": {"properties": {"a": {"type": "x"}}}},
                }
            },
            "response_format",
            "at properties.a ",
        ),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", "not"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", ""),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "one grammar"),
        ({"response_format": {"type": "json_schema"}}, None, "json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
    ],
)
def test_a_form_that_cannot_be_had_is_a_400(
    service: EngineService, asked: dict[str, Any], param: str | None, needle: str
) -> None:
    for stream in (False, True):
        error = refused(post(service, COMPLETIONS, text("base", stream=stream, **asked)), 400)
        assert param is None or error["param"] == param
        assert needle in error["message"]


def test_sampling_options_reach_the_engine(service: EngineService) -> None:
    def said(**asked: Any) -> str:
        return str(
            answered(service, COMPLETIONS, text("base", "a", **{"max_tokens": 4, **asked}))["choices"][0]["text"]
        )

    assert said() == "bcde"
    assert said(stop_token_ids=[100]) == "bc"
    assert said(stop=["d"], include_stop_str_in_output=True) == "bcd"
    assert said(stop=["c"], min_tokens=3) == "bcde"
    assert said(allowed_token_ids=[98, 120]) == "bbbb"
    assert said(bad_words=["c"], allowed_token_ids=list(range(98, 123))) == "bbbb"
    assert said(logit_bias={"257": 99}, skip_special_tokens=False) == "<end>" * 4
    assert (
        refused(post(service, COMPLETIONS, text("base", "a", stop_token_ids=[1000])), 400)["param"] == "stop_token_ids"
    )
    assert (
        refused(post(service, COMPLETIONS, text("base", "a", max_tokens=2, min_tokens=3)), 400)["param"] == "min_tokens"
    )


def test_who_leaves_takes_all_choices_along(service: EngineService) -> None:
    post(service, COMPLETIONS, text("base", "a", max_tokens=3, n=5))

    async def drained() -> None:
        while service.engine.load != (0, 0):
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(drained(), 5))


def test_the_tokens_of_the_prompt_come_with_the_first_event_of_a_stream(service: EngineService) -> None:
    asked = {"max_tokens": 2, "return_token_ids": True}
    first, *_ = events(post(service, CHAT, chat("base", "ab", stream=True, **asked)))
    assert first["prompt_token_ids"] == answered(service, CHAT, chat("base", "ab", **asked))["prompt_token_ids"]
    first, *_ = events(post(service, COMPLETIONS, text("base", ["ab", "x"], stream=True, **asked)))
    assert first["choices"][0]["prompt_token_ids"] == [97, 98]


def test_logprobs_may_name_tokens_by_their_ids(service: EngineService) -> None:
    named = {"return_tokens_as_token_ids": True, "max_tokens": 2}
    [token, _] = answered(service, CHAT, chat("base", "ab", logprobs=True, top_logprobs=1, **named))["choices"][0][
        "logprobs"
    ]["content"]
    assert (token["token"], token["top_logprobs"][0]["token"]) == ("token_id:59", "token_id:59")
    told = answered(service, COMPLETIONS, text("base", "ab", logprobs=1, echo=True, **named))["choices"][0]["logprobs"]
    assert told["tokens"] == ["token_id:97", "token_id:98", "token_id:99", "token_id:100"]
    assert told["top_logprobs"][2].keys() >= {"token_id:99"}


@pytest.fixture
def known(service: EngineService) -> Iterator[EngineService]:
    """A service whose task's answers are known."""
    service.answers = ("zebra", "quagga")
    yield service
    service.answers = None


HELD = {"lorauter": {"constrain": True}}


def test_an_answer_may_be_held_to_the_answers_of_its_task(known: EngineService) -> None:
    for path, body in ((CHAT, chat), (COMPLETIONS, text)):
        answer = answered(known, path, body(**HELD))
        [choice] = answer["choices"]
        assert (choice["message"]["content"] if path == CHAT else choice["text"]) in ("zebra", "quagga")
        assert answer["lorauter"]["constrained"] == "sums"
        assert events(post(known, path, body(**HELD, stream=True)))[0]["lorauter"]["constrained"] == "sums"
    several = answered(known, COMPLETIONS, text(prompt=["a", "b"], **HELD))["choices"]
    assert {choice["text"] for choice in several} <= {"zebra", "quagga"}
    assert [choice["lorauter"]["constrained"] for choice in several] == ["sums", "sums"]
    assert post(known, ROUTE, {"input": "a", "constrain": True}).json()["data"][0]["constrained"] == "sums"


def test_the_answers_of_a_task_may_be_a_schema(known: EngineService) -> None:
    seven = {"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"], "additionalProperties": False}
    known.answers = seven
    answer = answered(known, CHAT, chat(**HELD))
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"a": 7}


def test_what_is_not_held_to_a_tasks_answers_is_free_and_where_it_was_asked_that_is_said(known: EngineService) -> None:
    free = answered(known, CHAT, chat(max_tokens=4))
    known.answers = None
    asked = answered(known, CHAT, chat(max_tokens=4, **HELD))
    assert asked["choices"] == free["choices"]
    assert (asked["lorauter"]["constrained"], "constrained" in free["lorauter"]) == (None, False)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"response_format": {"type": "json_object"}}, "got response_format and lorauter.constrain, needed one"),
        ({"guided_choice": ["a", "b"]}, "got guided_choice and lorauter.constrain, needed one"),
        ({"model": "base"}, "this request names its adapters"),
        ({"model": "adder"}, "this request names its adapters"),
        ({"lorauter": {"constrain": True, "adapters": {"adder": 1}}}, "this request names its adapters"),
        ({"lorauter": {"constrain": True, "adapters": {}}}, "this request names its adapters"),
    ],
)
def test_what_does_not_go_with_being_held_to_a_tasks_answers_is_refused(
    known: EngineService, beside: dict[str, Any], message: str
) -> None:
    error = refused(post(known, CHAT, {**chat(**HELD), **beside}), 400)
    assert (message in error["message"], error["param"]) == (True, "lorauter.constrain")
