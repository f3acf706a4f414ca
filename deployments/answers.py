"""What there is to say of a request's answers, and who says it in the words of an API. Knows no API's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lorauter.engine.types import FinishReason
from lorauter.tools.types import CallPiece

if TYPE_CHECKING:
    from deployments.openai_types import ChatBody, CompletionBody


Reason = FinishReason | Literal["tool_calls"]


@dataclass(frozen=True)
class Opening:
    """What is known of a request's answers once all of them have begun.

    Attributes:
        body: what was asked.
        decisions: of each prompt, as its reader may see it.
        fingerprint: of what answers.
        prompt_tokens: of all prompts.
        cached_tokens: how many of these were found computed.
        prompts: of each prompt its tokens, if they are wanted.
    """

    body: ChatBody | CompletionBody
    decisions: Sequence[Mapping[str, Any]]
    fingerprint: str
    prompt_tokens: int
    cached_tokens: int
    prompts: Sequence[Sequence[int]] = ()

    @property
    def choices(self) -> int:
        """The number of answers; those to a prompt follow one another."""
        return (self.body.n or 1) * len(self.decisions)

    def decision(self, choice: int) -> Mapping[str, Any]:
        """Of a choice, by its place."""
        return self.decisions[choice // (self.body.n or 1)]


@dataclass(frozen=True)
class Piece:
    """A piece of a choice, or all of it.

    Attributes:
        text: new text; what is part of a call is not.
        finish_reason: in the last one, why it ended; `tool_calls` where it did of itself, and has whole calls.
        within: what goes beside it in the choice: OpenAI's and vLLM's words for logprobs and tokens.
        beside: what goes beside the choices.
        stop_string: in the last one, which of the stop strings ended it, if one did.
        calls: new pieces of calls of tools, each call's pieces after those of the calls before it. In an answer that
            is whole each is a whole call.
        ending: what goes beside the choices in the event that has the reason.
    """

    text: str
    finish_reason: Reason | None = None
    within: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    stop_string: str | None = None
    calls: tuple[CallPiece, ...] = ()
    ending: Mapping[str, Any] = field(default_factory=dict)

    def parts(self, told: int) -> Iterator[str | CallPiece]:
        """Its text and its calls, one after the other as the model had them.

        Args:
            told: characters of the choice's text before this piece.
        """
        done = 0
        for call in self.calls:
            place = call.after - told
            if place > done:
                yield self.text[done:place]
                done = place
            yield call
        if done < len(self.text):
            yield self.text[done:]


class Writer(Protocol):
    """Writes the answers to one request. `tokens` are those of all answers so far."""

    def whole(self, pieces: Sequence[Piece], tokens: int) -> dict[str, Any]:
        """The body of an answer that is whole: a piece for each choice."""

    def first(self) -> bytes:
        """The events before the answers' own."""

    def piece(self, choice: int, piece: Piece, tokens: int) -> bytes:
        """The events of a piece that is not empty."""

    def end(self, tokens: int) -> bytes:
        """The events after all pieces."""

    def error(self, status: int, body: Mapping[str, Any]) -> bytes:
        """The events of an error that ends a stream, as `openai_answers.error_answer` has it."""


class AnswerShape(Protocol):
    """How an endpoint's answers look.

    Attributes:
        ping: what says in a stream that nothing is new.
    """

    @property
    def ping(self) -> bytes: ...

    def named(self, option: str) -> str:
        """What its clients call an option of a chat; `prompt` is whatever holds the prompt."""

    def open(self, opening: Opening) -> Writer:
        """What writes the answers to a request."""
