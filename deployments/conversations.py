"""Conversations as clients send them, their own dumps of answers among them, and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from deployments.options import TextOrList, without_nulls
from lorauter.errors import InvalidRequest

_FUNCTION_ID = "function0"  # of calls and results by their older name, which have none; as long as Mistral's
Turn = dict[str, Any]
"""A message as a chat template takes it."""


class TextPart(BaseModel):
    """A piece of a message's content. Only text is taken; what clients note beside it has no effect."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str = ""
    refusal: str = ""
    id: Any = None
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None
    annotations: Any = None
    logprobs: Any = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any) -> Any:
        return without_nulls(value)

    @model_validator(mode="after")
    def _says_something(self) -> TextPart:
        said = "refusal" if self.type == "refusal" else "text"
        if said not in self.model_fields_set:
            raise PydanticCustomError(
                "part", "a part of the type {type} needs {said}", {"type": self.type, "said": said}
            )
        return self


Said = Annotated[str | list[TextPart], TextOrList("parts")]
"""A text, whole or in parts."""


def text_of(said: str | list[TextPart]) -> str:
    """It as one."""
    return said if isinstance(said, str) else "".join(part.text + part.refusal for part in said)


class _Function(BaseModel):
    """A call of a function, in an assistant's message: `arguments` is JSON."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    arguments: str = "{}"

    def turn(self, id: str | None) -> dict[str, Any]:
        """The call as a chat template takes it: with its arguments decoded, if they are what they should be."""
        arguments: Any = self.arguments
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):
            decoded = None
        arguments = decoded if isinstance(decoded, dict) else arguments
        return {"id": id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class _ToolCall(BaseModel):
    """A call of a tool, in an assistant's message."""

    model_config = ConfigDict(frozen=True, strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class Message(BaseModel):
    """One message of a chat, as clients send back what they were sent: fields that are not known are left out.

    What is no text, and no tool's name or arguments, is taken only where it is empty: the model would not see it.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Said | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    function_call: _Function | None = None
    audio: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.role == "assistant":
            return self
        if self.content is None:
            raise PydanticCustomError("content", "a message of the role {role} needs content", {"role": self.role})
        if self.tool_calls is not None or self.function_call is not None:
            raise PydanticCustomError("tool_calls", "tool_calls are an assistant's, not {role}'s", {"role": self.role})
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("tool_call_id", "a message of the role tool needs tool_call_id")
        return self

    @property
    def text(self) -> str:
        """The content as one string; of an assistant that said nothing, none."""
        return text_of(self.content if self.content is not None else self.refusal or "")

    def turn(self) -> Turn:
        """The message as a chat template takes it."""
        turn: Turn = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        calls = [call.function.turn(call.id) for call in self.tool_calls or ()]
        if self.function_call is not None:
            calls.append(self.function_call.turn(_FUNCTION_ID))
        if calls:
            turn["tool_calls"] = calls
        if self.role in ("tool", "function"):
            turn["role"] = "tool"
            turn["tool_call_id"] = self.tool_call_id or _FUNCTION_ID
        return turn


def add_text(messages: list[dict[str, Any]], role: str, text: str) -> None:
    """Add what somebody said to messages as clients send them, as a paragraph to what the same one said just before."""
    if not messages or messages[-1]["role"] != role:
        messages.append({"role": role})
    messages[-1]["content"] = "\n\n".join(filter(None, [messages[-1].get("content"), text]))


def add_call(messages: list[dict[str, Any]], id: str, name: str, arguments: str) -> None:
    """Add a call of a tool to messages as clients send them: it is part of what the assistant said just before, if it
    said something."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages[-1].setdefault("tool_calls", []).append(call)


def turns_of(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """Messages as a chat template takes them: a result with the name of what was called, which some need."""
    turns, names = [], dict[str | None, str]()
    for message in messages:
        turn = message.turn()
        names |= {call["id"]: call["function"]["name"] for call in turn.get("tool_calls", ())}
        if turn["role"] == "tool" and (name := message.name or names.get(turn["tool_call_id"])):
            turn["name"] = name
        turns.append(turn)
    return tuple(turns)


def routed_text(turns: Sequence[Mapping[str, Any]], route_on: str) -> str:
    """The text of a chat that decides the adapters: of a chat that no user has begun, what the system says.

    Raises InvalidRequest if there is none.
    """
    if route_on == "conversation":
        return "\n".join(turn["content"] for turn in turns)
    for role in ("user", "system"):
        for turn in reversed(turns):
            if turn["role"] == role:
                return str(turn["content"])
    raise InvalidRequest("there is no user message to route by", param="messages")
