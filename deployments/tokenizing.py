"""The base model's text at the ingress: prompts into tokens, and answers' tokens into text.

A replica of LoraModel sends its tokenizer once, so that nothing is loaded here and all agree. From then on replicas
take and give tokens, and have their interpreter for the engine alone; only answers that text ends, or whose tokens are
told one by one, they put in words themselves.
"""

from __future__ import annotations

import asyncio
import pickle
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from deployments.calls import Admitted, GenerateCall
from lorauter.engine.types import Chunk, Prompt
from lorauter.errors import InvalidRequest
from lorauter.turns import ExampleTurns, encoded

if TYPE_CHECKING:
    from lorauter.engine.text import TextCodec, TextStream

_SHORT = 4000  # characters, or tokens: to convert them takes no longer than to have a thread do it


class _Known(NamedTuple):
    """The tokenizer, and how many tokens a prompt and its answer can take together."""

    codec: TextCodec
    context: int


def packed(codec: TextCodec, context: int) -> bytes:
    """What a replica sends."""
    return pickle.dumps((codec, context))


class Tokenizing:
    """Converts.

    Args:
        fetch: what a replica sends, as `packed` makes it.
    """

    def __init__(self, fetch: Callable[[], Awaitable[bytes]]) -> None:
        self._fetch = fetch
        self._known: _Known | None = None
        self._loading: asyncio.Task[_Known] | None = None

    async def prepare(self) -> None:
        """Load the code that a tokenizer needs, which takes seconds."""
        await asyncio.to_thread(import_module, "lorauter.engine.text")

    def begin(self) -> asyncio.Task[_Known]:
        """Fetch the tokenizer, if it is not here: there is somebody to ask."""
        if self._loading is None or (self._loading.done() and self._known is None):
            self._loading = asyncio.create_task(self._load(), context=Context())  # it is no request's
            self._loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # who needs it is told
        return self._loading

    async def _fetched(self) -> _Known:
        """What was fetched. Raises what `fetch` raises."""
        return await asyncio.shield(self.begin()) if self._known is None else self._known

    async def _load(self) -> _Known:
        await self.prepare()
        sent = await self._fetch()
        known = self._known = _Known(*await asyncio.to_thread(pickle.loads, sent))
        return known

    async def encode(self, prompt: Prompt) -> Sequence[int]:
        """A prompt's tokens. Raises InvalidRequest."""
        tokens, _ = await self._encoded(prompt)
        return tokens

    async def _encoded(
        self, prompt: Prompt, examples: Sequence[ExampleTurns] = (), max_tokens: int = 0
    ) -> tuple[Sequence[int], int]:
        """A prompt's tokens, and how many examples are among them."""
        codec, context = await self._fetched()
        how = partial(encoded, codec.encode, prompt, examples, context=context, max_tokens=max_tokens)
        short = prompt.characters + sum(len(e.input) + len(e.target) for e in examples) < _SHORT
        return how() if short else await asyncio.to_thread(how)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens. Raises InvalidRequest."""
        decode = partial((await self._fetched()).codec.decode, token_ids, skip_special_tokens=skip_special_tokens)
        return decode() if len(token_ids) < _SHORT else await asyncio.to_thread(decode)

    async def asked(self, call: GenerateCall) -> tuple[GenerateCall, Words]:
        """A call whose prompt is tokens, examples among them, and what puts its answer in words.

        Raises:
            InvalidRequest: it has none.
        """
        adapters, sampling = call.adapters, call.sampling
        tokens, shown = await self._encoded(call.prompt, call.examples, sampling.max_tokens)
        if not tokens:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if call.examples and not shown:
            adapters = adapters or call.unshown
        texts = {}
        if not sampling.needs_text:
            codec, _ = await self._fetched()
            texts = {choice.place: codec.stream(sampling) for choice in call.choices}
            sampling = sampling.but(detokenize=False)
        prompt = Prompt(token_ids=_packed(tokens), tools=call.prompt.tools)
        asked = call.but(prompt=prompt, adapters=adapters, sampling=sampling, examples=(), unshown=())
        return asked, Words(texts, shown)


def _packed(tokens: Sequence[int]) -> Sequence[int]:
    """Token ids as they travel fastest; the engine refuses what are none."""
    try:
        return array("i", tokens)
    except OverflowError:
        return tokens


class Words:
    """Puts an answer in words.

    Args:
        texts: what makes text of each choice's tokens; nothing where the replica does.
        shown: examples that went before the prompt.
    """

    def __init__(self, texts: Mapping[int, TextStream], shown: int) -> None:
        self._texts = texts
        self._shown = shown

    def of(self, item: Admitted | Chunk) -> Admitted | Chunk:
        """What a replica says of the answer, in words; each in its turn."""
        if isinstance(item, Admitted):
            return item.but(examples=self._shown) if self._shown else item
        if not self._texts:
            return item
        return item.but(text=self._texts[item.index].extended(item.token_ids, item.finish_reason))
