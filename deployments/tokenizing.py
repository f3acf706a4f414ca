"""The base model's text at the ingress: prompts into tokens, and answers' tokens into text.

A replica of LoraModel sends its tokenizer once, so that nothing is loaded here and all agree. From then on replicas
take and give tokens, and have their interpreter for the engine alone; only answers that text ends, or whose tokens are
told one by one, they put in words themselves.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from deployments.calls import Admitted, GenerateCall
from lorauter.engine.types import Chunk, Prompt
from lorauter.errors import InvalidRequest

if TYPE_CHECKING:
    from lorauter.engine.text import TextCodec

_SHORT = 4000  # characters, or tokens: to convert them takes no longer than to have a thread do it

Answer = AsyncGenerator[Admitted | Chunk]


class Tokenizing:
    """Converts.

    Args:
        fetch: the tokenizer, a pickled `TextCodec`, from a replica.
    """

    def __init__(self, fetch: Callable[[], Awaitable[bytes]]) -> None:
        self._fetch = fetch
        self._codec: TextCodec | None = None
        self._loading: asyncio.Task[TextCodec] | None = None

    async def prepare(self) -> None:
        """Load the code that a tokenizer needs, which takes seconds."""
        await asyncio.to_thread(import_module, "lorauter.engine.text")

    def begin(self) -> asyncio.Task[TextCodec]:
        """Fetch the tokenizer, if it is not here: there is somebody to ask."""
        if self._loading is None or (self._loading.done() and self._codec is None):
            self._loading = asyncio.create_task(self._load())
            self._loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # who needs it is told
        return self._loading

    async def codec(self) -> TextCodec:
        """The tokenizer. Raises what `fetch` raises."""
        return await asyncio.shield(self.begin()) if self._codec is None else self._codec

    async def _load(self) -> TextCodec:
        await self.prepare()
        packed = await self._fetch()
        codec: TextCodec = await asyncio.to_thread(pickle.loads, packed)
        self._codec = codec
        return codec

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """A prompt's tokens. Raises InvalidRequest."""
        encode = (await self.codec()).encode
        return encode(prompt) if prompt.characters < _SHORT else await asyncio.to_thread(encode, prompt)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens. Raises InvalidRequest."""
        decode = (await self.codec()).decode
        if len(token_ids) < _SHORT:
            return decode(token_ids, skip_special_tokens=skip_special_tokens)
        return await asyncio.to_thread(decode, token_ids, skip_special_tokens=skip_special_tokens)

    async def answered(self, call: GenerateCall, ask: Callable[[GenerateCall], Answer]) -> Answer:
        """The answer to a call, in words.

        Args:
            ask: answers a call whose prompt is tokens, with tokens alone where the call says so.
        """
        codec, tokens = await self.codec(), await self.encode(call.prompt)
        if not tokens:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        prompt = Prompt(token_ids=tokens, tools=call.prompt.tools)
        if call.sampling.needs_text:
            stream = ask(replace(call, prompt=prompt))
            texts = {}
        else:
            stream = ask(replace(call, prompt=prompt, sampling=replace(call.sampling, detokenize=False)))
            texts = {choice.place: codec.stream(call.sampling) for choice in call.choices}
        try:
            async for item in stream:
                if texts and isinstance(item, Chunk):
                    text = texts[item.index].extended(item.token_ids, item.finish_reason)
                    yield Chunk(text, item.token_ids, item.finish_reason, item.cached_tokens, item.waited_s, item.index)
                else:
                    yield item
        finally:
            await stream.aclose()
