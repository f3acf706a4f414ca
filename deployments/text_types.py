"""The options of the endpoints that generate nothing: each field is a row of the table in `docs/api.md`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.conversations import Message
from deployments.openai_types import (
    ROUTED_MODEL,
    AddGenerationPrompt,
    AddSpecialTokens,
    ContinueFinalMessage,
    Ignored,
    ParseSpecial,
    PositiveInt,
    TemplateKwargs,
    TokenId,
    chat_prompt,
    check_end,
)
from deployments.options import Body, OneOf, Only, Option
from deployments.tool_types import Tools, shown
from lorauter.engine.types import Prompt
from lorauter.errors import InvalidRequest
from lorauter.routing.options import RoutingOptions


class RouteBody(RoutingOptions):
    """`POST /v1/route`: a text or texts, and the routing options beside them."""

    input: Annotated[
        Annotated[str | list[str], OneOf("a text, or a list of texts")], Option("what is routed", "routing")
    ]

    def texts(self) -> list[str]:
        """The texts, at least one. Raises InvalidRequest."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not texts:
            raise InvalidRequest("input is empty; give a text or a list of texts", param="input")
        return texts

    def options(self) -> RoutingOptions:
        """The options alone, which are the same for many texts, and known by what they are."""
        return RoutingOptions(**self.plain())


class EmbeddingsBody(Body):
    """`POST /v1/embeddings`."""

    input: Annotated[
        Annotated[str | list[str], OneOf("a text, or a list of texts")], Option("what is embedded", "encoder")
    ]
    model: Annotated[str, Option(f"`{ROUTED_MODEL}`, or the encoder's name", "encoder")]
    dimensions: Annotated[
        PositiveInt | None, Option("so many of an embedding's first numbers, to unit length", "encoder")
    ] = None
    encoding_format: Annotated[
        Literal["float", "base64"], Option("base64 is of little-endian float32", "answer", ("float",))
    ] = "float"

    user: Ignored = None
    request_id: Ignored = None
    add_special_tokens: Annotated[None, Only(True)] = None
    priority: Annotated[None, Only(0)] = None
    truncate_prompt_tokens: Annotated[None, Only()] = None

    def texts(self) -> list[str]:
        """The texts, at least one. Raises InvalidRequest."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not texts:
            raise InvalidRequest("input is empty; give a text or a list of texts", param="input")
        return texts


class TokenizeBody(Body):
    """`POST /tokenize`: a prompt, or a chat."""

    model: Annotated[str | None, Option("all have the same tokens", "nowhere")] = None
    prompt: Annotated[str | None, Option("a text", "prompt")] = None
    messages: Annotated[
        Annotated[list[Message], Field(min_length=1)] | None, Option("a conversation, in its place", "prompt")
    ] = None
    add_special_tokens: AddSpecialTokens = True
    parse_special: ParseSpecial = False
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = False
    chat_template_kwargs: TemplateKwargs = None

    return_token_strs: Annotated[None, Only(False)] = None
    chat_template: Annotated[None, Only(because="the model's own is used")] = None
    tools: Tools = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give prompt or messages, one of them")
        check_end(self.add_generation_prompt, self.continue_final_message)
        return self

    def prompt_given(self) -> Prompt:
        """What is to be encoded."""
        if self.messages is None:
            return Prompt(
                text=self.prompt, add_special_tokens=self.add_special_tokens, parse_special=self.parse_special
            )
        end = self.add_generation_prompt, self.continue_final_message
        return chat_prompt(self.messages, *end, self.chat_template_kwargs, shown(self.tools or []))


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: Annotated[str | None, Option("all have the same tokens", "nowhere")] = None
    tokens: Annotated[list[TokenId], Option("ids", "prompt")]
    skip_special_tokens: Annotated[bool, Option("leave control tokens out", "answer", (False,))] = False


class LoadAdapterBody(Body):
    """`POST /v1/load_lora_adapter`: vLLM's words for an adapter that the store has."""

    lora_name: Annotated[str, Option("the adapter's name in the store", "catalog")]
    lora_path: Annotated[
        str | None, Option("the same name: no other place than the service's store is read", "catalog")
    ] = None
    load_inplace: Annotated[bool, Option("an adapter that is there is always replaced", "nowhere")] = False


class CompositionBody(Body):
    """`POST /v1/compositions`: an adapter is to be composed for a task from the others."""

    task: Annotated[str, Option("the task's name", "catalog")]


class UnloadAdapterBody(Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: Annotated[str, Option("the adapter's name", "catalog")]
    lora_int_id: Annotated[int | None, Option("", "nowhere")] = None
