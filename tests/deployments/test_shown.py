"""Examples before a question, over HTTP and in calls: what is sent, what is told, and where they have no place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import counting
import pytest
from fake_service import CHAT, COMPLETIONS, DECISION, ROUTE, FakeService, chat, events, post, text

from deployments.calls import Admitted, Begun, GenerateCall
from deployments.model import LoraModel
from deployments.tokenizing import Tokenizing
from lorauter.engine import Chunk, EngineConfig, MultiLoraEngine, SamplingParams
from lorauter.engine.types import Prompt
from lorauter.errors import AdapterNotFound
from lorauter.names import AdapterKey
from lorauter.routing import AdapterWeight, RoutingDecision, RoutingOptions
from lorauter.routing.examples import Shown
from lorauter.turns import ExampleTurns

TURNS = (ExampleTurns(7, "2 + 2", "4"), ExampleTurns(3, "1 + 1", "2"))
MESSAGES = "/v1/messages"


@dataclass
class ShowingService(FakeService):
    """Shows as many examples as it is asked for, and the base model answers after them; there is room for some.

    Attributes:
        room: for so many.
    """

    room: int = 2

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        await super().route(texts, options)
        if not options.examples:
            return [DECISION] * len(texts)
        shown = Shown(TURNS[: options.examples], "base")
        return [replace(DECISION, adapters=(), unshown=DECISION.adapters, shown=shown)] * len(texts)

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        async for item in super().generate(call):
            yield replace(item, examples=min(self.room, len(call.examples))) if isinstance(item, Admitted) else item


ASKED = {"lorauter": {"examples": 2}}
BY_BASE = {"task": "sums", "places": [3, 7], "by": "base"}


def test_examples_go_with_a_lone_question_whole_and_streamed() -> None:
    service = ShowingService()
    answer = post(service, CHAT, chat(**ASKED)).json()
    assert answer["lorauter"]["shown"] == BY_BASE and answer["lorauter"]["adapters"] == []
    assert service.routed[0][1].examples == 2
    [call] = service.calls
    assert (call.examples, call.adapters, call.unshown) == (TURNS, (), DECISION.adapters)
    assert call.prompt.messages == ({"role": "user", "content": "hi"},)
    streamed = events(post(service, CHAT, chat(stream=True, **ASKED)))
    assert streamed[0]["lorauter"]["shown"] == BY_BASE
    assert post(service, ROUTE, {"input": "hi", "examples": 1}).json()["data"][0]["shown"]["places"] == [7]
    said = post(service, MESSAGES, {**chat(**ASKED), "max_tokens": 5}).json()
    assert said["lorauter"]["shown"] == BY_BASE


@pytest.mark.parametrize("body", [chat(), text(), chat("base", **ASKED), chat("adder", **ASKED)])
def test_nothing_is_said_of_them_where_nobody_asks_or_nothing_is_routed(body: dict[str, Any]) -> None:
    service = ShowingService()
    answer = post(service, COMPLETIONS if "prompt" in body else CHAT, body).json()
    assert "shown" not in answer["lorauter"]
    assert service.calls[0].examples == ()


SYSTEM, USER, SAID = ({"role": role, "content": role} for role in ("system", "user", "assistant"))


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        (CHAT, {"messages": [SYSTEM, USER]}, "not_one_turn"),
        (CHAT, {"messages": [USER, SAID, USER]}, "not_one_turn"),
        (CHAT, {"messages": [USER], "continue_final_message": True, "add_generation_prompt": False}, "not_one_turn"),
        (CHAT, {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}, "not_one_turn"),
        (COMPLETIONS, {"prompt": "hi"}, "not_one_turn"),
        (COMPLETIONS, {"prompt": [[104, 105]]}, "not_one_turn"),
        (CHAT, {"messages": [USER], "response_format": {"type": "json_object"}}, "held"),
    ],
)  # fmt: skip
def test_they_have_no_place_in_anything_else(path: str, body: dict[str, Any], why: str) -> None:
    """And the mixture answers, as it would without them."""
    service = ShowingService()
    answer = post(service, path, {"model": "lorauter", **body, **ASKED}).json()
    assert answer["lorauter"]["shown"] == {"places": [], "why": why}
    [call] = service.calls
    assert (call.examples, call.adapters) == ((), DECISION.adapters)


@pytest.mark.parametrize(
    ("room", "shown", "adapters"),
    [(1, {"task": "sums", "places": [7], "by": "base"}, []), (0, {"places": [], "why": "no_room"}, ["adder", "poet"])],
)
def test_what_there_was_no_room_for_is_told(room: int, shown: dict[str, Any], adapters: list[str]) -> None:
    told = post(ShowingService(room=room), CHAT, chat(**ASKED)).json()["lorauter"]
    assert told["shown"] == shown
    assert [adapter["name"] for adapter in told["adapters"]] == adapters


@pytest.mark.parametrize("wrong", [-1, 17, 1.5, True, "2"])
def test_what_is_no_number_of_examples_is_refused(wrong: Any) -> None:
    answer = post(ShowingService(), CHAT, chat(lorauter={"examples": wrong}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "lorauter.examples"


# in a replica


@pytest.fixture
def replica() -> Iterator[Any]:
    """One whose model counts, and whose adapters are not to be had."""

    class Adapters:
        def ready(self, keys: Sequence[AdapterKey]) -> list[Any] | None:
            return None if keys else []

        async def get(self, key: AdapterKey, *, patient: bool) -> Any:
            raise AdapterNotFound("gone", adapter=key.name)

    made: Any = object.__new__(LoraModel.func_or_class)
    config = EngineConfig(max_batch=2, max_model_len=100, adapter_bytes=1 << 12, device="cpu")
    made._engine = MultiLoraEngine(*counting.load(), config)
    made._adapters, made._adapter_wait_s, made._first_token_s, made._streams = Adapters(), 1.0, 60.0, 0
    yield made
    made._engine.close()


def ask(replica: Any, said: str, *, max_tokens: int = 4, **call: Any) -> Admitted:
    prompt = Prompt(messages=({"role": "user", "content": said},))
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    asked = GenerateCall(prompt, (), sampling, tells_prompt=True, tenant="t", **call)

    async def generated(call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        assert call.prompt.token_ids is not None
        async with aclosing(replica.generate(call)) as stream:  # the model ends in an error after four tokens
            begun = await anext(stream)
            assert isinstance(begun, Begun)
            yield begun.admitted

    async def run() -> Any:
        call, words = await Tokenizing(replica.tokenizer).asked(asked)
        async with aclosing(generated(call)) as stream:
            return words.of(await anext(stream))

    admitted = asyncio.run(run())
    assert isinstance(admitted, Admitted)
    return admitted


def test_the_ingress_puts_them_before_the_question_as_far_as_there_is_room(replica: Any) -> None:
    alone = ask(replica, "hi")
    both = ask(replica, "hi", examples=TURNS)
    said = b"".join(piece for _, piece in both.prompt).decode()
    assert said.index("1 + 1") < said.index("2 + 2") < said.index("hi")
    assert (alone.examples, both.examples) == (0, 2)
    assert both.prompt_tokens > alone.prompt_tokens
    one = ask(replica, "hi", examples=TURNS, max_tokens=100 - both.prompt_tokens + 1)
    said = b"".join(piece for _, piece in one.prompt).decode()
    assert one.examples == 1 and "2 + 2" in said and "1 + 1" not in said


def test_queries_that_are_given_the_same_examples_share_what_is_computed(replica: Any) -> None:
    long = (ExampleTurns(1, "a" * 20, "b"), ExampleTurns(0, "c" * 8, "d"))
    first = ask(replica, "hi", examples=long)
    other = ask(replica, "ho", examples=long[::-1])  # the other one is the nearest
    assert (first.cached_tokens, other.examples) == (0, 2)
    assert other.cached_tokens >= 16


def test_where_there_is_room_for_none_the_mixture_answers(replica: Any) -> None:
    adapters = (AdapterWeight("a", "1", 1.0),)
    assert ask(replica, "hi", examples=TURNS, unshown=adapters).examples == 2, "it was not asked for"
    with pytest.raises(AdapterNotFound):
        ask(replica, "h" * 80, examples=TURNS, unshown=adapters)
