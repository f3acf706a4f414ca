"""What is told of a choice: its text and its calls, how probable its tokens were, the tokens themselves, the prompt.

Knows OpenAI's shapes and vLLM's additions to them; knows nothing of where answers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deployments.answers import Piece, Reason
from deployments.calls import Admitted
from deployments.openai_types import ChatBody, CompletionBody
from lorauter.engine.types import Chunk, Logprob, PromptLogprobs, TokenLogprobs
from lorauter.tools.formats import FORMATS
from lorauter.tools.reading import CallReader, joined

_Told = tuple[tuple[int, bytes], TokenLogprobs | None]
"""A token's id and text, and how probable it was, if anything is known of that."""


class Telling:
    """Tells a choice's chunks, in their order.

    Args:
        body: says what is wanted.
        admitted: of the choice's prompt, with its tokens if they are wanted.
        text: the prompt's text, if it has one.
    """

    def __init__(self, body: ChatBody | CompletionBody, admitted: Admitted, text: str | None) -> None:
        self._body = body
        self._admitted = admitted
        self._text = text
        self._is_first = True
        self._offset = 0
        self._reader: CallReader | None = None
        use, format = body.tool_use, admitted.tool_format
        if use is not None and format is not None:
            names = {tool.name for tool in use.tools}
            how = {"eager": body.stream, "several": use.several, "forced": use.forced}
            self._reader = CallReader(FORMATS[format], names, **how)

    @staticmethod
    def wants_prompt(body: ChatBody | CompletionBody) -> bool:
        """Whether the prompt's tokens are needed."""
        return bool(body.echo or body.return_token_ids)

    def counted(self, chunk: Chunk) -> int:
        """How many tokens of a chunk are the answer's: none where nothing but the prompt is wanted."""
        return 0 if self._body.max_tokens == 0 else len(chunk.token_ids)

    def tell(self, chunk: Chunk, prompt: PromptLogprobs = ()) -> Piece:
        """What there is to say of a chunk.

        Args:
            chunk: the next one.
            prompt: of the prompt's tokens, in place of the chunk's own.
        """
        body, text = self._body, chunk.text
        first, self._is_first = self._is_first, False
        tokens: list[_Told] = [((one.own.token_id, one.own.token), one) for one in chunk.logprobs]
        ids = chunk.token_ids
        if body.max_tokens == 0:  # nothing but the prompt is wanted
            text, tokens, ids = "", [], ()
        prompt = chunk.prompt_logprobs or prompt
        choice: dict[str, Any] = {}
        beside: dict[str, Any] = {}
        if first and body.echo:
            told = self._admitted.prompt
            said = b"".join(token for _, token in told).decode(errors="replace")
            text = (said if self._text is None else self._text) + text
            tokens = [*zip(told, prompt, strict=False), *tokens]
        if body.ranks is not None:
            choice["logprobs"] = self._chat(tokens) if isinstance(body, ChatBody) else self._plain(tokens)
        if body.return_token_ids:
            choice["token_ids"] = list(ids)
        if first and body.prompt_logprobs is not None:
            of_prompt = beside if isinstance(body, ChatBody) else choice
            of_prompt["prompt_logprobs"] = [None if one is None else _by_id(one) for one in prompt]
        if self._reader is None:
            return Piece(text, chunk.finish_reason, choice, beside, chunk.stop_string)
        reason: Reason | None = chunk.finish_reason
        text, calls = self._reader.read(text)
        if reason is not None:
            last, more = self._reader.end(cut=reason == "length" or chunk.stop_string is not None)
            text, calls = text + last, (*calls, *more)
            if reason == "stop" and self._reader.called:
                reason = "tool_calls"
        if not body.stream:
            calls = joined(calls)
        return Piece(text, reason, choice, beside, chunk.stop_string, calls)

    def _plain(self, tokens: Sequence[_Told]) -> dict[str, Any]:
        """OpenAI's older shape, of plain completions."""
        offsets = []
        for (_, token), _ in tokens:
            offsets.append(self._offset)
            self._offset += len(token.decode(errors="replace"))
        return {
            "tokens": [self._name(*token) for token, _ in tokens],
            "token_logprobs": [None if one is None else one.own.logprob for _, one in tokens],
            "top_logprobs": [
                None
                if one is None
                else {self._name(each.token_id, each.token): each.logprob for each in (one.own, *one.top)}
                for _, one in tokens
            ],
            "text_offset": offsets,
        }

    def _chat(self, tokens: Sequence[_Told]) -> dict[str, Any]:
        """OpenAI's newer shape, of chats."""
        content = [
            {**self._of(one.own), "top_logprobs": [self._of(each) for each in one.top]}
            for _, one in tokens
            if one is not None
        ]
        return {"content": content, "refusal": None}

    def _of(self, one: Logprob) -> dict[str, Any]:
        return {"token": self._name(one.token_id, one.token), "logprob": one.logprob, "bytes": list(one.token)}

    def _name(self, token_id: int, token: bytes) -> str:
        return f"token_id:{token_id}" if self._body.return_tokens_as_token_ids else _text(token)


def likelihood(chunk: Chunk) -> float:
    """The mean logarithm of an answer's tokens' probabilities."""
    return sum(one.own.logprob for one in chunk.logprobs) / len(chunk.logprobs)


def _by_id(one: TokenLogprobs) -> dict[str, Any]:
    """vLLM's shape, of prompts."""
    return {
        str(each.token_id): {"logprob": each.logprob, "rank": each.rank, "decoded_token": _text(each.token)}
        for each in (one.own, *one.top)
    }


def _text(token: bytes) -> str:
    """A token's text, or its bytes where they are no text."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
