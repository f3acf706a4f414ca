from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import counting
import pytest

from deployments.calls import Admitted, Choice, GenerateCall
from deployments.tokenizing import Tokenizing, packed
from lorauter.engine import Chunk, SamplingParams
from lorauter.engine.types import Prompt
from lorauter.errors import InvalidRequest, ServiceUnavailable

PACKED = packed(counting.load()[1], 4096)
CALL = GenerateCall(Prompt(text="hé"), (), SamplingParams(max_tokens=9), choices=(Choice(0), Choice(1)))


class Replica:
    """Sends its tokenizer, the first times in vain, and answers with what it is told to."""

    def __init__(self, *items: Admitted | Chunk, failures: int = 0) -> None:
        self.items = items
        self.failures = failures
        self.fetched = 0
        self.calls: list[GenerateCall] = []
        self.closed = False

    async def fetch(self) -> bytes:
        self.fetched += 1
        await asyncio.sleep(0)
        if self.fetched <= self.failures:
            raise ServiceUnavailable("no replica")
        return PACKED

    async def ask(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        self.calls.append(call)
        try:
            for item in self.items:
                yield item
        finally:
            self.closed = True


def answered(replica: Replica, call: GenerateCall) -> list[Any]:
    async def run() -> list[Any]:
        asked, words = await Tokenizing(replica.fetch).asked(call)
        return [words.of(item) async for item in replica.ask(asked)]

    return asyncio.run(run())


def test_a_replica_takes_and_gives_tokens_and_each_answer_has_its_text() -> None:
    """A character may come in halves, and with another answer's tokens between them."""
    first, second = "aé".encode(), b"xyz"
    replica = Replica(
        Admitted(3, cached_tokens=1),
        Chunk("", tuple(first[:2]), cached_tokens=1),
        Chunk("", tuple(second), "length", index=1),
        Chunk("", tuple(first[2:])),
        Chunk("", (0,), "stop"),
    )
    items = answered(replica, CALL)
    assert items[0] == Admitted(3, cached_tokens=1)
    assert [(item.text, item.index, item.finish_reason) for item in items[1:]] == [
        ("a", 0, None),
        ("xyz", 1, "length"),
        ("é", 0, None),
        ("", 0, "stop"),
    ]
    assert [item.token_ids for item in items[1:]] == [item.token_ids for item in replica.items[1:]]  # type: ignore[union-attr]
    assert items[1].cached_tokens == 1
    [call] = replica.calls
    assert call.prompt == Prompt(token_ids=array("i", list("hé".encode())))
    assert not call.sampling.detokenize
    assert replica.closed


@pytest.mark.parametrize("asked", [{"stop": ("z",)}, {"logprobs": 2}, {"prompt_logprobs": 0}])
def test_a_replica_makes_the_text_that_ends_an_answer_or_tells_of_tokens(asked: dict[str, Any]) -> None:
    replica = Replica(Admitted(3), Chunk("said there", (1, 2), "stop"))
    assert answered(replica, replace(CALL, sampling=SamplingParams(**asked))) == list(replica.items)
    assert replica.calls[0].sampling == SamplingParams(**asked)


def test_what_was_half_said_is_told_in_the_end() -> None:
    replica = Replica(Admitted(1), Chunk("", ("é".encode()[0],)), Chunk("", (97,), "length"))
    assert "".join(item.text for item in answered(replica, CALL)[1:]).endswith("a")


def test_a_prompt_without_tokens_is_refused_before_anybody_is_asked() -> None:
    replica = Replica()
    with pytest.raises(InvalidRequest, match="no tokens") as refused:
        answered(replica, replace(CALL, prompt=Prompt(text="")))
    assert refused.value.param == "prompt"
    assert not replica.calls


def test_the_tokenizer_is_fetched_once_for_all_who_come_and_again_where_that_failed() -> None:
    replica = Replica(failures=1)

    async def run() -> None:
        tokenizing = Tokenizing(replica.fetch)
        prompt = Prompt(text="ab")
        for failed in await asyncio.gather(*(tokenizing.encode(prompt) for _ in range(3)), return_exceptions=True):
            assert isinstance(failed, ServiceUnavailable)
        assert replica.fetched == 1
        assert await asyncio.gather(*(tokenizing.encode(prompt) for _ in range(3))) == [(97, 98)] * 3
        tokenizing.begin()
        assert replica.fetched == 2
        long = "ab" * 4000  # a thread's
        ids = await tokenizing.encode(Prompt(text=long))
        assert await tokenizing.decode(ids, skip_special_tokens=True) == long
        with pytest.raises(InvalidRequest, match="token id -1"):
            await tokenizing.decode([-1], skip_special_tokens=False)

    asyncio.run(run())


def test_token_ids_that_are_none_travel_as_they_are_to_be_refused() -> None:
    async def run(tokens: tuple[int, ...]) -> Prompt:
        asked, _ = await Tokenizing(Replica().fetch).asked(replace(CALL, prompt=Prompt(token_ids=tokens)))
        return asked.prompt

    for tokens in ((1, 1 << 40), (1, -5)):
        assert list(asyncio.run(run(tokens)).token_ids or ()) == list(tokens)
