"""Between text and tokens: prompts in, streamed text with stop strings out.

Knows a transformers tokenizer and its chat template; knows nothing of models or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from lorauter.errors import InvalidRequest


class TextCodec:
    """Encodes prompts and decodes answers, from any thread.

    Args:
        tokenizer: a fast transformers tokenizer.
        eos_ids: further ids that end an answer, beside the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, *, eos_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        # What a tokenizer.json may carry from somebody's training: prompts are never cut or filled up in silence.
        self.backend.no_truncation()
        self.backend.no_padding()
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_ids = frozenset([*own, *eos_ids])

    def plain(self, text: str) -> tuple[int, ...]:
        """Ids of a plain prompt, with whatever the tokenizer puts before one."""
        return tuple(self.backend.encode(text).ids)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Ids of a chat of `{"role", "content"}`, up to where the assistant's answer begins.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest("the base model has no chat template; use /v1/completions", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}", param="messages") from error
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A decoder for one answer."""
        return TextStream(self.backend, stop)


class TextStream:
    """Turns one answer's tokens into text as they come, holding back what may yet become a stop string."""

    def __init__(self, backend: Any, stop: Sequence[str]) -> None:
        self._backend = backend
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._hold = max((len(text) - 1 for text in self._stop), default=0)
        self._pending = ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string ended it."""
        try:
            self._pending += self._decoder.step(self._backend, token) or ""
        except Exception:  # noqa: BLE001 (tokenizers raises no narrower one)
            # Invalid UTF-8 from a byte-fallback vocabulary can change text already given out: begin anew after it.
            self._decoder = DecodeStream(skip_special_tokens=True)
            self._pending += self._decoder.step(self._backend, token) or ""
        cuts = [place for text in self._stop if (place := self._pending.find(text)) >= 0]
        if cuts:
            text, self._pending = self._pending[: min(cuts)], ""
            return text, True
        keep = len(self._pending) - self._hold
        text, self._pending = (self._pending[:keep], self._pending[keep:]) if keep > 0 else ("", self._pending)
        return text, False

    def flush(self) -> str:
        """What was held back, once the answer has ended otherwise."""
        text, self._pending = self._pending, ""
        return text
