"""The options of OpenAI's Responses API, as those of a chat.

Each field is a row of the table in `docs/api.md`. Nothing is stored, so that a request has to bring its conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.conversations import Said, add_call, add_text, text_of
from deployments.openai_types import (
    CacheSalt,
    ChatBody,
    Ignored,
    IgnoredObject,
    Logprobs,
    LorauterOptions,
    Model,
    PositiveInt,
    Routing,
    StoredNowhere,
    Streamed,
    TemplateKwargs,
    TokenOptions,
)
from deployments.options import Body, ByType, JsonObject, OneOf, Only, Option, TextOrList, build_body, reworded
from lorauter.errors import InvalidRequest

LOGPROBS = "message.output_text.logprobs"
_STATELESS = "nothing is stored; give the conversation in input"


class _Sent(BaseModel):
    """What clients send back as they were sent it: fields that are not known are left out."""

    model_config = ConfigDict(frozen=True, strict=True)


class MessageItem(_Sent):
    """What somebody said."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Said

    def add_to(self, messages: list[dict[str, Any]]) -> None:
        """Add it to a chat's messages. An assistant's turn is one message, and so is what is said before all others."""
        role = "system" if self.role == "developer" else self.role
        of_turn = role == "assistant" and messages and "tool_calls" in messages[-1]
        if of_turn or (role == "system" and [message["role"] for message in messages] == ["system"]):
            add_text(messages, role, text_of(self.content))
        else:
            messages.append({"role": role, "content": text_of(self.content)})


class CallItem(_Sent):
    """A call of a tool by the assistant; `arguments` is JSON."""

    call_id: str
    name: str
    arguments: str

    def add_to(self, messages: list[dict[str, Any]]) -> None:
        """Add it to a chat's messages."""
        add_call(messages, self.call_id, self.name, self.arguments)


class CallOutputItem(_Sent):
    """What a tool answered."""

    call_id: str
    output: Said

    def add_to(self, messages: list[dict[str, Any]]) -> None:
        """Add it to a chat's messages."""
        messages.append({"role": "tool", "tool_call_id": self.call_id, "content": text_of(self.output)})


class ReasoningItem(_Sent):
    """What another model thought: no part of what was said."""

    def add_to(self, messages: list[dict[str, Any]]) -> None:
        """Add nothing."""


Item = Annotated[
    MessageItem | CallItem | CallOutputItem | ReasoningItem,
    ByType(
        {
            "message": MessageItem,
            "function_call": CallItem,
            "function_call_output": CallOutputItem,
            "reasoning": ReasoningItem,
        },
        default="message",
    ),
]


class TextFormat(Body):
    """What an answer has to be."""

    type: Annotated[Literal["text", "json_object", "json_schema"], Option("which", "sampling", ("text",))] = "text"
    name: Ignored = None
    description: Ignored = None
    json_schema: Annotated[
        JsonObject | None, Field(alias="schema"), Option("of the type `json_schema`", "sampling")
    ] = None
    strict: Annotated[bool | None, Option("every answer is of its schema", "nowhere")] = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> TextFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise PydanticCustomError("schema", "the type json_schema, and no other, needs schema")
        return self

    def of_chat(self) -> dict[str, Any]:
        """The same in a chat's words."""
        schema = {} if self.json_schema is None else {"json_schema": {"schema": self.json_schema}}
        return {"type": self.type, **schema}

    def told(self) -> dict[str, Any]:
        """The same in its own words."""
        return self.model_dump(by_alias=True, exclude_unset=True) | {"type": self.type}


class TextOptions(Body):
    """How the text of an answer is."""

    format: Annotated[TextFormat | None, Option("what it has to be", "sampling", ({"type": "text"},))] = None
    verbosity: Annotated[None, Only("medium")] = None


class Tool(_Sent):
    """A tool that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    def of_chat(self) -> dict[str, Any]:
        """The same in a chat's words."""
        return {"type": self.type, "function": self.model_dump(exclude={"type"})}


class NamedTool(_Sent):
    """The one tool that the model has to call, or one of those that it may."""

    type: Literal["function"]
    name: str

    def of_chat(self) -> dict[str, Any]:
        """The same in a chat's words."""
        return {"type": self.type, "function": {"name": self.name}}


class AllowedTools(_Sent):
    """The tools of the request that the model may call, or has to call one of."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class Reasoning(Body):
    """How the model is to think, which it does not apart from its answer."""

    effort: Annotated[None, Only("none")] = None
    summary: Annotated[str | None, Option("there is none", "nowhere")] = None
    generate_summary: Annotated[str | None, Option("there is none", "nowhere")] = None
    context: Ignored = None
    mode: Annotated[None, Only("standard")] = None


class EventOptions(Body):
    """What a stream carries beside the answer."""

    include_obfuscation: Annotated[bool, Option("events are never padded", "nowhere")] = False


class ResponsesBody(TokenOptions):
    """`POST /v1/responses`."""

    model: Model
    input: Annotated[
        Annotated[str | list[Item], TextOrList("items")],
        Option(
            "what the user says, or the conversation as items of the types `message` (of text), `function_call`, "
            "`function_call_output`, and `reasoning`, which is left out",
            "prompt",
        ),
    ]
    instructions: Annotated[str | None, Option("the system's message before it", "prompt")] = None
    max_output_tokens: Annotated[PositiveInt | None, Option("tokens of the answer at most", "sampling")] = None
    text: Annotated[TextOptions | None, Option("how the answer's text is", "sampling", ({},))] = None
    tools: Annotated[list[Tool] | None, Option("functions that the model may call", "prompt", ([],))] = None
    tool_choice: Annotated[
        Annotated[
            Literal["none", "auto", "required"] | NamedTool | AllowedTools,
            OneOf('"none", "auto", "required", a function by name, or allowed tools that are functions'),
        ]
        | None,
        Option("whether the model calls one, and which", "sampling"),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Option("whether it may call several", "sampling", (True,))] = None
    top_logprobs: Annotated[
        Logprobs | None, Option("tell how probable each token was, and so many of the likeliest", "answer", (0,))
    ] = None
    include: Annotated[
        list[str] | None, Option(f"`{LOGPROBS}`: how probable each token was; of the rest there is none", "answer")
    ] = None
    stream: Streamed = False
    stream_options: Annotated[EventOptions | None, Option("", "nowhere", ({},))] = None
    metadata: Annotated[dict[str, str] | None, Option("comes back with the answer", "nowhere", ({},))] = None
    lorauter: Routing = LorauterOptions()
    cache_salt: CacheSalt = None
    chat_template_kwargs: TemplateKwargs = None

    reasoning: Annotated[Reasoning | None, Option("there is none apart from the answer", "nowhere", ({},))] = None
    store: StoredNowhere = None
    user: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: IgnoredObject = None
    request_id: Ignored = None
    max_tool_calls: Annotated[int | None, Option("of built-in tools, which there are none of", "nowhere")] = None

    previous_response_id: Annotated[None, Only(because=_STATELESS)] = None
    conversation: Annotated[None, Only(because=_STATELESS)] = None
    prompt: Annotated[None, Only(because="no prompts are stored")] = None
    background: Annotated[None, Only(False)] = None
    background_options: Annotated[None, Only({})] = None
    truncation: Annotated[None, Only("disabled", because="a prompt is never cut in silence")] = None
    context_management: Annotated[None, Only([])] = None
    moderation: Annotated[None, Only()] = None
    access_programs: Annotated[None, Only()] = None
    image: Annotated[None, Only({})] = None

    def messages(self) -> list[dict[str, Any]]:
        """The conversation in a chat's words. Raises InvalidRequest: there is none."""
        if self.input == []:
            raise InvalidRequest("input is empty; give a text, or a list of items", param="input")
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            for item in self.input:
                item.add_to(messages)
        return messages

    def chat(self) -> ChatBody:
        """The same as a chat. Raises InvalidRequest."""
        with reworded(named):
            return build_body(ChatBody, self._of_chat())

    def _of_chat(self) -> dict[str, Any]:
        same: Mapping[str, Any] = {name: getattr(self, name) for name in (*TokenOptions.model_fields, *_SAME)}
        return {
            **same,
            "messages": self.messages(),
            "max_tokens": self.max_output_tokens,
            "response_format": self.text.format.of_chat() if self.text and self.text.format else None,
            "logprobs": LOGPROBS in (self.include or ()) or bool(self.top_logprobs),
            "tools": [tool.of_chat() for tool in self.tools or ()],
            "tool_choice": self._choice(),
        }

    def _choice(self) -> Any:
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            return choice.of_chat()
        if isinstance(choice, AllowedTools):
            allowed = {"mode": choice.mode, "tools": [tool.of_chat() for tool in choice.tools]}
            return {"type": choice.type, "allowed_tools": allowed}
        return choice


def named(option: str) -> str:
    """What an option of a chat is called here."""
    return _NAMES.get(option, re.sub(r"^(tools\.\d+)\.function\b", r"\1", option))


_NAMES = {"prompt": "input", "messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
_SAME = (
    "model",
    "top_logprobs",
    "stream",
    "lorauter",
    "cache_salt",
    "chat_template_kwargs",
    "parallel_tool_calls",
)
