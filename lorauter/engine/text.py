"""Between text and tokens: prompts in, streamed text with stop strings out.

Knows a transformers tokenizer and its chat template; knows nothing of models or requests.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.chat_template_utils import mark_control_tokens

from lorauter.engine.types import FinishReason, Logprob, Prompt, SamplingParams, TokenLogprobs
from lorauter.errors import InvalidRequest
from lorauter.tools.formats import FORMATS, FormatSetting, ToolFormat, found_in, knows_tools
from lorauter.tools.writing import with_tools, without_tools

# What is put around a text that looks like a control token, in the words of templates that escape it: then it is lost.
_AROUND = mark_control_tokens(".", re.compile(r"\.")).split(".")
_LOST = [escape(mark)[1:-1] for mark in _AROUND for escape in (repr, json.dumps)]


class TextCodec:
    """Encodes prompts and decodes answers, from any thread.

    Only a chat's template makes control tokens: what looks like one in a prompt is encoded as any text is, so that
    nobody who writes a part of a conversation can end it, or speak as somebody else.

    Args:
        tokenizer: a fast transformers tokenizer.
        eos_ids: further ids that end an answer, beside the tokenizer's own.
        tool_format: how the model calls tools; "auto" finds it in the chat template.

    Attributes:
        chats: whether the model has a chat template.
        tool_format: the same, if it is known.
    """

    def __init__(self, tokenizer: Any, *, eos_ids: Sequence[int] = (), tool_format: FormatSetting = "auto") -> None:
        self._tokenizer = tokenizer
        template = str(tokenizer.chat_template or "")
        self.chats = bool(template)
        self._template_knows_tools = knows_tools(template)
        self.tool_format: ToolFormat | None
        if tool_format == "auto":
            self.tool_format = found_in(template) if self._template_knows_tools else None
        else:
            self.tool_format = FORMATS[tool_format]
        self.backend = tokenizer.backend_tokenizer
        # What a tokenizer.json may carry from somebody's training: prompts are never cut or filled up in silence.
        self.backend.no_truncation()
        self.backend.no_padding()
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_ids = frozenset([*own, *eos_ids])
        self.bytes_of = TokenBytes(self.backend)
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._copied = threading.Lock()
        marks = self.tool_format.marks if self.tool_format is not None else ()
        special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._marks = {special[mark]: mark for mark in marks if mark in special}
        self._reserved = inspect.signature(tokenizer.apply_chat_template).parameters.keys() | {"messages"}

    def __reduce__(self) -> tuple[Any, ...]:
        """It travels as what it is made of."""
        format = self.tool_format.name if self.tool_format is not None else "auto"
        return partial(TextCodec, eos_ids=tuple(self.eos_ids), tool_format=format), (self._tokenizer,)

    def encode(self, prompt: Prompt) -> Sequence[int]:
        """Ids of a prompt. Raises InvalidRequest: there is no chat template, or it refuses the chat or its tools."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.text is not None:
            return self.plain(
                prompt.text, add_special_tokens=prompt.add_special_tokens, parse_special=prompt.parse_special
            )
        return self.chat(
            prompt.messages,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            template_kwargs=prompt.template_kwargs,
            tools=prompt.tools,
        )

    def plain(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> tuple[int, ...]:
        """Ids of a plain prompt.

        Args:
            text: the prompt.
            add_special_tokens: with whatever the tokenizer puts before one.
            parse_special: what looks like a control token is one.
        """
        backend = self.backend if parse_special or not self._added.search(text) else self._literal
        return tuple(backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[int, ...]:
        """Ids of a chat.

        Args:
            messages: `{"role", "content", "tool_calls"?, "tool_call_id"?}`.
            add_generation_prompt: up to where the assistant's answer begins.
            continue_final_message: up to the end of the last message's content, which the answer goes on with.
            template_kwargs: variables of the template.
            tools: what the answer may call, `{"type": "function", "function": {...}}`.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses these messages, or knows no tools.
        """
        template = self._tokenizer.chat_template
        if not template:
            raise InvalidRequest("the base model has no chat template; use /v1/completions", param="messages")
        variables = dict(template_kwargs or {})
        if reserved := sorted(variables.keys() & self._reserved):
            raise InvalidRequest(
                f"chat_template_kwargs: {', '.join(reserved)} cannot be set by it", param="chat_template_kwargs"
            )
        turns = [dict(message) for message in (messages if "tool" in str(template) else without_tools(messages))]
        if tools:
            self._check_tools()
            if not self._template_knows_tools:
                turns, tools = with_tools(turns, tools), ()
        how = {
            "tools": [dict(tool) for tool in tools] or None,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **variables,
        }
        try:
            if self._looks_controlled([turns, variables, *tools]):
                marked = self._with_marked_keys({"turns": turns, **how})
                with self._copied:  # a transformers tokenizer is not for two threads at once
                    ids = self._copy.apply_chat_template(
                        marked.pop("turns"), tokenize=True, return_dict=False, sanitize_control_tokens=True, **marked
                    )
                text = self.backend.decode(ids, skip_special_tokens=False)
                if any(lost in text for lost in _LOST):
                    raise ValueError("what looks like a control token would be one in it; leave that out")
                return tuple(ids)
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, **how)
        except Exception as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}", param="messages") from error
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def _check_tools(self) -> None:
        """Raise InvalidRequest if it is not known how the model is told of tools, and calls them."""
        format = self.tool_format
        if format is None or (not self._template_knows_tools and format.name != "hermes"):
            problem = (
                "shows tools in a way that is not known; set engine.tool_format to the one that it means, if it is one "
                f"of {', '.join(FORMATS)}"
                if self._template_knows_tools
                else "knows no tools; leave tools out, or set engine.tool_format: hermes, which describes them in the "
                "system message"
            )
            raise InvalidRequest(f"tools: the base model's chat template {problem}", param="tools")

    def forms(self, word: str) -> list[tuple[int, ...]]:
        """The tokens of a word, alone and after a space."""
        texts = (word, f" {word.lstrip()}")
        forms = dict.fromkeys(tuple(self.backend.encode(text, add_special_tokens=False).ids) for text in texts)
        return [form for form in forms if form]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids. Raises InvalidRequest: there is no such token."""
        known = self.backend.get_vocab_size()
        if unknown := [token for token in ids if not 0 <= token < known]:
            raise InvalidRequest(f"got the token id {unknown[0]}, needed one from 0 to {known - 1}", param="tokens")
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def _looks_controlled(self, value: Any) -> bool:
        """Whether a text in it looks like a token that was added to the vocabulary, as control tokens are."""
        if isinstance(value, str):
            return self._added.search(value) is not None
        if isinstance(value, dict | Mapping):  # the first is told at once
            return any(map(self._looks_controlled, value)) or any(map(self._looks_controlled, value.values()))
        return isinstance(value, list | tuple) and any(map(self._looks_controlled, value))

    def _with_marked_keys(self, value: Any) -> Any:
        """The same, with control tokens in keys marked as text, as transformers does it with values alone."""
        if isinstance(value, Mapping):
            return {mark_control_tokens(key, self._added): self._with_marked_keys(item) for key, item in value.items()}
        return list(map(self._with_marked_keys, value)) if isinstance(value, list | tuple) else value

    @cached_property
    def _literal(self) -> Any:
        """A tokenizer to which control tokens are text."""
        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _copy(self) -> Any:
        return copy.deepcopy(self._tokenizer)

    def stream(self, sampling: SamplingParams | None = None) -> TextStream:
        """A decoder for one answer."""
        sampling = sampling or SamplingParams()
        return TextStream(self.backend, sampling, self.bytes_of, self._marks if sampling.calls is not None else {})


class TokenBytes:
    """The text of single tokens, which need not be whole characters.

    Attributes:
        is_all: whether the bytes of tokens, one after the other, are the text of them together.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._special = {id for id, token in backend.get_added_tokens_decoder().items()}
        self._by_character = {character: byte for byte, character in bytes_to_unicode().items()}
        kinds = _kinds(json.loads(backend.to_str())["decoder"])
        self._is_byte_level = "ByteLevel" in kinds
        self.is_all = kinds == {"ByteLevel"}
        self._known: dict[int, bytes] = {}

    def __call__(self, token: int) -> bytes:
        """A token's text; of one that the tokenizer has not, none."""
        if token not in self._known:
            self._known[token] = self._made(token)
        return self._known[token]

    def _made(self, token: int) -> bytes:
        text: str = self._backend.id_to_token(token) or ""
        if token in self._special:
            return text.encode()
        if self._is_byte_level:
            return bytes(self._by_character[character] for character in text)
        if match := re.fullmatch("<0x([0-9A-F]{2})>", text):
            return bytes.fromhex(match[1])
        return text.replace("\u2581", " ").encode()  # SentencePiece's space


def _kinds(decoder: Any) -> set[str]:
    """The kinds of a tokenizer's decoders."""
    if not decoder:
        return set()
    return {decoder["type"]}.union(*map(_kinds, decoder.get("decoders", ())))


class TextStream:
    """Turns one answer's tokens into text as they come, holding back what may yet become a stop string.

    Attributes:
        sampling: what the answer ends with, and whether special tokens are part of it.
        stopped_by: the stop string that has ended it.

    Args:
        marks: special tokens that are part of the text all the same.
    """

    def __init__(
        self,
        backend: Any,
        sampling: SamplingParams,
        bytes_of: TokenBytes,
        marks: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._backend = backend
        self._bytes_of = bytes_of
        self._marks = marks
        self.sampling = sampling
        self.stopped_by: str | None = None
        self._decoder = self._new_decoder()
        self._stop = sampling.stop
        self._hold = max((len(text) - 1 for text in self._stop), default=0)
        self._pending = ""
        self._tokens = 0

    def _new_decoder(self) -> DecodeStream:
        return DecodeStream(skip_special_tokens=self.sampling.skip_special_tokens)

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string ended it."""
        self._tokens += 1
        try:
            self._pending += self._decoder.step(self._backend, token) or self._marks.get(token, "")
        except Exception:  # noqa: BLE001 (tokenizers raises no narrower one)
            # Invalid UTF-8 from a byte-fallback vocabulary can change text already given out: begin anew after it.
            self._decoder = self._new_decoder()
            self._pending += self._decoder.step(self._backend, token) or ""
        if self._tokens < self.sampling.min_tokens:
            return self.flush(), False
        cuts = [(place, len(text), text) for text in self._stop if (place := self._pending.find(text)) >= 0]
        if cuts:
            place, length, self.stopped_by = min(cuts)
            text = self._pending[: place + length if self.sampling.include_stop_str_in_output else place]
            self._pending = ""
            return text, True
        keep = len(self._pending) - self._hold
        text, self._pending = (self._pending[:keep], self._pending[keep:]) if keep > 0 else ("", self._pending)
        return text, False

    def logprobs(self, ranked: Iterable[tuple[Sequence[int], Sequence[float], int]]) -> list[TokenLogprobs]:
        """Tokens' logarithms, as `lorauter.engine.logprobs.Ranked` has them, with their texts."""
        return [
            TokenLogprobs(
                Logprob(ids[0], values[0], rank, self._bytes_of(ids[0])),
                tuple(
                    Logprob(id, value, place, self._bytes_of(id))
                    for place, (id, value) in enumerate(zip(ids[1:], values[1:], strict=True), 1)
                ),
            )
            for ids, values, rank in ranked
        ]

    def extended(self, tokens: Sequence[int], reason: FinishReason | None) -> str:
        """The text that further tokens add, with the reason if the answer ends with them. There are no stop strings."""
        if reason == "stop":
            return self._pushed(tokens[:-1]) + self.end(tokens[-1]) + self.flush()
        text = self._pushed(tokens)
        return text if reason is None else text + self.flush()

    def _pushed(self, tokens: Sequence[int]) -> str:
        """The same as by `push`, without stop strings; in one go where the text of tokens is that of their bytes, and
        it ends with a whole character."""
        if len(tokens) > 1 and self._bytes_of.is_all and not self._marks:
            before = copy.copy(self._decoder)
            with suppress(Exception):  # tokenizers raises no narrower one
                text: str | None = self._decoder.step(self._backend, list(tokens))
                if text is not None:
                    return text
            self._decoder = before
        return "".join([self.push(token)[0] for token in tokens])

    def end(self, token: int) -> str:
        """What a token that ends the answer of itself adds to its text."""
        if not self.sampling.include_stop_str_in_output:
            return ""
        self._stop, self._hold = (), 0
        return self.push(token)[0]

    def flush(self) -> str:
        """What was held back, once the answer has ended otherwise."""
        text, self._pending = self._pending, ""
        return text
