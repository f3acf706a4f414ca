"""The options of Anthropic's Messages API, as those of a chat.

Each field is a row of the table in `docs/api.md`.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from pydantic_core import PydanticCustomError

from deployments.conversations import add_call, add_text
from deployments.openai_types import (
    CacheSalt,
    ChatBody,
    Ignored,
    IgnoredObject,
    LorauterOptions,
    Model,
    PositiveInt,
    Routing,
    Streamed,
    TemplateKwargs,
    TokenOptions,
)
from deployments.options import Body, ByType, JsonObject, Only, Option, TextOrList, build_body, reworded
from lorauter.errors import InvalidRequest


class _Sent(BaseModel):
    """What clients send back as they were sent it, or mark for a cache: fields that are not known are left out."""

    model_config = ConfigDict(frozen=True, strict=True)


class TextBlock(_Sent):
    """A paragraph."""

    text: str


Paragraphs = Annotated[str | list[Annotated[TextBlock, ByType({"text": TextBlock})]], TextOrList("blocks")]


class ToolUseBlock(_Sent):
    """A call of a tool by the assistant."""

    id: str
    name: str
    input: JsonObject


class ToolResultBlock(_Sent):
    """What a tool answered."""

    tool_use_id: str
    content: Paragraphs | None = None
    is_error: bool | None = None


class ThinkingBlock(_Sent):
    """What another model thought: no part of what was said."""


Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock,
    ByType(
        {
            "text": TextBlock,
            "tool_use": ToolUseBlock,
            "tool_result": ToolResultBlock,
            "thinking": ThinkingBlock,
            "redacted_thinking": ThinkingBlock,
        }
    ),
]


class Message(_Sent):
    """What somebody said, and called, or was answered."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[str | list[Block], TextOrList("blocks")]

    @model_validator(mode="after")
    def _blocks_are_of_their_roles(self) -> Message:
        for block in self.blocks:
            if isinstance(block, ToolUseBlock) and self.role != "assistant":
                raise PydanticCustomError("content", "a block of the type tool_use is of the role assistant")
            if isinstance(block, ToolResultBlock) and self.role != "user":
                raise PydanticCustomError("content", "a block of the type tool_result is of the role user")
        return self

    @property
    def blocks(self) -> list[Any]:
        """The content as blocks."""
        return [TextBlock(text=self.content)] if isinstance(self.content, str) else self.content


class Tool(_Sent):
    """A tool that the model may call."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: JsonObject
    strict: bool | None = None

    def of_chat(self) -> dict[str, Any]:
        """The same in a chat's words."""
        told = {"name": self.name, "description": self.description, "strict": self.strict}
        return {"type": "function", "function": {**told, "parameters": self.input_schema}}


class ToolChoice(Body):
    """Whether the model calls a tool."""

    type: Annotated[
        Literal["auto", "any", "tool", "none"],
        Option("as it likes, one of them, the one of a name, none", "sampling", ("auto",)),
    ] = "auto"
    name: Annotated[str | None, Option("of the type `tool`", "sampling")] = None
    disable_parallel_tool_use: Annotated[bool, Option("at most one", "sampling", (False,))] = False

    @model_validator(mode="after")
    def _tool_has_a_name(self) -> ToolChoice:
        if (self.name is None) == (self.type == "tool"):
            raise PydanticCustomError("name", "the type tool, and no other, needs name")
        return self

    def of_chat(self) -> Any:
        """The same in a chat's words."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Format(Body):
    """What an answer has to be."""

    type: Annotated[Literal["json_schema"], Option("it", "sampling")]
    json_schema: Annotated[JsonObject, Field(alias="schema"), Option("the schema", "sampling")]


class OutputConfig(Body):
    """How an answer is."""

    format: Annotated[Format | None, Option("what it has to be", "sampling")] = None
    effort: Annotated[None, Only("high")] = None


class CountTokensBody(Body):
    """`POST /v1/messages/count_tokens`: what there is to read."""

    model: Model
    messages: Annotated[
        Annotated[list[Message], Field(min_length=1)],
        Option(
            "the conversation: `role`, `content` (a text, or blocks of the types `text`, `tool_use`, `tool_result`, "
            "and `thinking`, which is left out); the answer goes on with a last message of the assistant",
            "prompt",
        ),
    ]
    system: Annotated[Paragraphs | None, Option("the system's message before it", "prompt")] = None
    tools: Annotated[list[Tool] | None, Option("that the model may call", "prompt", ([],))] = None
    tool_choice: Annotated[ToolChoice | None, Option("whether it calls one, and which", "sampling")] = None
    output_config: Annotated[OutputConfig | None, Option("how the answer is", "sampling", ({},))] = None
    chat_template_kwargs: TemplateKwargs = None

    cache_control: IgnoredObject = None
    thinking: Annotated[None, Only({"type": "disabled"}, {"type": "adaptive"})] = None
    speed: Annotated[None, Only("standard")] = None
    mcp_servers: Annotated[None, Only([])] = None
    context_management: Annotated[None, Only({})] = None

    def turns(self) -> list[dict[str, Any]]:
        """The conversation as a chat's messages: one after the other of the same role are one, and what the system says
        between others is part of what it says before them, as chat templates have it nowhere else."""
        said: list[dict[str, Any]] = []
        of_system = [] if self.system is None else [_text(self.system)]
        for message in self.messages:
            for block in message.blocks:
                if isinstance(block, TextBlock) and message.role == "system":
                    of_system.append(block.text)
                elif isinstance(block, TextBlock):
                    add_text(said, message.role, block.text)
                elif isinstance(block, ToolUseBlock):
                    add_call(said, block.id, block.name, json.dumps(block.input, ensure_ascii=False))
                elif isinstance(block, ToolResultBlock):
                    content = ("Error: " if block.is_error else "") + _text(block.content or "")
                    said.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        return [*([{"role": "system", "content": "\n\n".join(of_system)}] if of_system else []), *said]

    def chat(self) -> ChatBody:
        """The same as a chat. Raises InvalidRequest."""
        with reworded(named):
            return build_body(ChatBody, self._of_chat())

    def _of_chat(self) -> dict[str, Any]:
        said, choice = self.turns(), self.tool_choice
        if said and said[-1] == {"role": "assistant", "content": ""}:
            said.pop()  # there is nothing to go on with
        if not said:
            raise InvalidRequest("messages say nothing; give a text", param="messages")
        schema = self.output_config.format.json_schema if self.output_config and self.output_config.format else None
        return {
            "model": self.model,
            "messages": said,
            "chat_template_kwargs": self.chat_template_kwargs,
            "continue_final_message": said[-1]["role"] == "assistant" and "tool_calls" not in said[-1],
            "tools": [tool.of_chat() for tool in self.tools or ()],
            "tool_choice": None if choice is None else choice.of_chat(),
            "parallel_tool_calls": None if choice is None else not choice.disable_parallel_tool_use,
            "response_format": None if schema is None else {"type": "json_schema", "json_schema": {"schema": schema}},
        }


class MessagesBody(TokenOptions, CountTokensBody):
    """`POST /v1/messages`."""

    max_tokens: Annotated[PositiveInt, Option("tokens of the answer at most", "sampling")]
    stop_sequences: Annotated[
        Annotated[list[str], Field(max_length=16)] | None, Option("texts that end the answer", "sampling", ([],))
    ] = None
    stop: Annotated[None, Only([], because="it is called stop_sequences")] = None
    temperature: Annotated[
        Annotated[FiniteFloat, Field(ge=0, le=1)] | None, Option("0 takes the likeliest tokens", "sampling")
    ] = None
    stream: Streamed = False
    lorauter: Routing = LorauterOptions()
    cache_salt: CacheSalt = None

    metadata: IgnoredObject = None
    service_tier: Ignored = None
    inference_geo: Ignored = None
    user_profile_id: Ignored = None
    workspace_id: Ignored = None
    container: Annotated[None, Only()] = None
    diagnostics: Annotated[None, Only({})] = None

    def _of_chat(self) -> dict[str, Any]:
        same = (*TokenOptions.model_fields, "max_tokens", "stream", "lorauter", "cache_salt")
        own = {name: getattr(self, name) for name in same}
        return {**super()._of_chat(), **own, "stop": self.stop_sequences}


def named(option: str) -> str:
    """What an option of a chat is called here."""
    option = re.sub(r"^(tools\.\d+)\.function\.parameters\b", r"\1.input_schema", option)
    return _NAMES.get(option, re.sub(r"^(tools\.\d+)\.function\b", r"\1", option))


_NAMES = {"prompt": "messages", "stop": "stop_sequences", "response_format": "output_config.format"}


def _text(paragraphs: str | list[TextBlock]) -> str:
    return paragraphs if isinstance(paragraphs, str) else "\n\n".join(block.text for block in paragraphs)
