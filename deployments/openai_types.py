"""The bodies of the HTTP API's requests, in OpenAI's shape, validated. Knows nothing of how they are answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lorauter.engine.types import SamplingParams
from lorauter.errors import InvalidRequest
from lorauter.routing.options import RoutingOptions

ROUTED_MODEL = "lorauter"
BASE_MODEL = "base"


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LorauterOptions(RoutingOptions):
    """The `lorauter` object of a request: routing options, or adapters chosen by hand."""

    adapters: dict[str, FiniteFloat] | None = None


class TextPart(_Body):
    """A piece of a message's content; only text is taken."""

    type: Literal["text"]
    text: str
    cache_control: Any = None
    annotations: Any = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any) -> Any:
        return without_nulls(value)


class Message(BaseModel):
    """One message of a chat, as clients send back what they were sent: fields that are not known are left out.

    What is no text is taken only where it is empty, since the model would not see it.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.role != "assistant":
            if self.content is None:
                raise PydanticCustomError("content", "a message of the role {role} needs content", {"role": self.role})
            if self.tool_calls is not None:
                raise PydanticCustomError(
                    "tool_calls", "tool_calls are an assistant's, not {role}'s", {"role": self.role}
                )
        return self

    @property
    def text(self) -> str:
        """The content as one string; of an assistant that said nothing, none."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""


def without_nulls(value: Any) -> Any:
    """An object without its fields that are null: left out by other words, as data bases and Arrow have it."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def turns_of(messages: Sequence[Message]) -> tuple[dict[str, str], ...]:
    """Messages as a chat template takes them."""
    return tuple({"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages)


def routed_text(turns: Sequence[Mapping[str, str]], route_on: str) -> str:
    """The text of a chat that decides the adapters. Raises InvalidRequest if there is none."""
    if route_on == "conversation":
        return "\n".join(turn["content"] for turn in turns)
    for turn in reversed(turns):
        if turn["role"] == "user":
            return turn["content"]
    raise InvalidRequest("messages hold no user message to route by", param="messages")


class StreamOptions(_Body):
    """What a stream carries beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(_Body):
    """What chats and plain completions have in common.

    Options of OpenAI's that would change the answer and are not implemented are taken only at their neutral value.
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = None
    n: Literal[1] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    lorauter: LorauterOptions = LorauterOptions()

    @field_validator("lorauter", mode="before")
    @classmethod
    def _none_chooses_nothing(cls, value: Any) -> Any:
        return LorauterOptions() if value is None else value

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _neutral(cls, value: Any) -> Any:
        return int(value) if value == 0 and not isinstance(value, bool) else value

    @property
    def token_limit(self) -> int | None:
        """The answer's bound, if the request gives one."""
        return self.max_tokens

    def chosen(self) -> Mapping[str, float] | None:
        """The adapters that a request asks for, by hand or as its model; None where it is to be routed.

        Raises InvalidRequest.
        """
        by_hand = self.lorauter.adapters
        if self.model == ROUTED_MODEL:
            return by_hand
        if by_hand is not None:
            raise InvalidRequest(f"lorauter.adapters goes with model {ROUTED_MODEL!r} alone", param="lorauter.adapters")
        return {} if self.model == BASE_MODEL else {self.model: 1.0}

    def sampling(self, *, max_tokens: int, temperature: float) -> SamplingParams:
        """The sampling asked for, with defaults for what was left out. Raises InvalidRequest."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=self.token_limit or max_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=stop,
            seed=self.seed,
        )


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def turns(self) -> tuple[dict[str, str], ...]:
        """The messages as a chat template takes them."""
        return turns_of(self.messages)

    def routed_text(self, route_on: str) -> str:
        """The text that decides the adapters. Raises InvalidRequest if there is none."""
        return routed_text(self.turns(), route_on)


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Literal[0] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class RouteBody(RoutingOptions):
    """`POST /v1/route`: a text or texts, and the routing options beside them."""

    input: str | list[str]

    def texts(self) -> list[str]:
        """The texts, at least one. Raises InvalidRequest."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not texts:
            raise InvalidRequest("input is empty; give a text or a list of texts", param="input")
        return texts
