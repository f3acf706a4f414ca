"""What an answer has to be, as OpenAI's and vLLM's clients say it. Knows nothing of how answers are held to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.options import Body, JsonObject, OneOf, Only, Option
from lorauter.engine.types import Grammar, GrammarKind, SamplingParams
from lorauter.errors import InvalidRequest
from lorauter.routing.compose import RoutingDecision
from lorauter.routing.options import RoutingOptions

Schema = Annotated[JsonObject | str, OneOf("a JSON schema, as an object or as text")]
Choices = Annotated[list[str], Field(min_length=1)]

_OBJECT = '{"type": "object"}'
_CONSTRAIN = "lorauter.constrain"


class JsonSchema(Body):
    """The `json_schema` of a response format."""

    name: Annotated[str | None, Option("", "nowhere")] = None
    description: Annotated[str | None, Option("", "nowhere")] = None
    json_schema: Annotated[
        JsonObject | None, Field(alias="schema"), Option("the schema; left out, any object", "sampling")
    ] = None
    strict: Annotated[bool | None, Option("every answer is of its schema", "nowhere")] = None


class ResponseFormat(Body):
    """What an answer has to be."""

    type: Annotated[Literal["text", "json_object", "json_schema"], Option("which", "sampling", ("text",))] = "text"
    json_schema: Annotated[JsonSchema | None, Option("of the type `json_schema`", "sampling")] = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> ResponseFormat:
        if (self.json_schema in (None, JsonSchema())) == (self.type == "json_schema"):
            raise PydanticCustomError("json_schema", "the type json_schema, and no other, needs json_schema")
        return self

    def grammars(self) -> list[Grammar]:
        """The same for an engine."""
        if self.type == "text":
            return []
        schema = self.json_schema.json_schema if self.json_schema is not None else None
        return [Grammar("json", _OBJECT if schema is None else json.dumps(schema), "response_format")]


class StructuredOutputs(Body):
    """vLLM's object for what an answer has to be."""

    json_schema: Annotated[Schema | None, Field(alias="json"), Option("a JSON schema", "sampling")] = None
    json_object: Annotated[bool | None, Option("any JSON object", "sampling", (False,))] = None
    regex: Annotated[str | None, Option("a regular expression", "sampling")] = None
    choice: Annotated[Choices | None, Option("one of some texts", "sampling")] = None
    grammar: Annotated[str | None, Option("a grammar, in Lark's or GBNF's language", "sampling")] = None
    whitespace_pattern: Annotated[
        str | None, Option("a regular expression of what may be between JSON's tokens", "sampling")
    ] = None
    structural_tag: Annotated[None, Only()] = None
    disable_any_whitespace: Annotated[bool, Option("there is little", "nowhere")] = False
    disable_additional_properties: Annotated[None, Only(False)] = None
    disable_fallback: Annotated[bool, Option("there is none", "nowhere")] = False
    backend: Annotated[str | None, Option("", "nowhere")] = None

    def grammars(self) -> list[Grammar]:
        """The same for an engine."""
        within = "structured_outputs."
        grammars = grammars_of(
            within,
            schema=self.json_schema,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            whitespace=self.whitespace_pattern,
        )
        if self.json_object:
            grammars.append(Grammar("json", _OBJECT, f"{within}json_object", self.whitespace_pattern))
        return grammars


def grammars_of(
    prefix: str,
    *,
    schema: dict[str, Any] | str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    whitespace: str | None,
) -> list[Grammar]:
    """The grammars that are given, by names that begin so."""
    text = json.dumps(schema) if isinstance(schema, dict) else schema
    listed = None if choice is None else json.dumps(choice)
    kinds: list[tuple[GrammarKind, str | None]] = [
        ("json", text), ("regex", regex), ("choice", listed), ("grammar", grammar)
    ]  # fmt: skip
    return [
        Grammar(kind, given, prefix + kind, whitespace if kind == "json" else None)
        for kind, given in kinds
        if given is not None
    ]


def one_of(grammars: Sequence[Grammar]) -> Grammar | None:
    """The one that there is. Raises InvalidRequest: there are several."""
    if len(grammars) > 1:
        names = ", ".join(grammar.param for grammar in grammars)
        raise InvalidRequest(f"got {names}, needed one: an answer is held to one grammar", param=grammars[1].param)
    return grammars[0] if grammars else None


def held_to(sampling: SamplingParams, decision: RoutingDecision) -> SamplingParams:
    """The same for an answer that is held to its task's answers, if the decision has any."""
    if decision.answers is None:
        return sampling
    return replace(sampling, grammar=Grammar.of_answers(decision.answers, param=_CONSTRAIN))


def check_constrain(options: RoutingOptions, sampling: SamplingParams, *, routed: bool) -> None:
    """Raise InvalidRequest where an answer is to be held to its task's answers, and cannot be."""
    if not options.constrain:
        return
    if not routed:
        raise InvalidRequest(
            f"{_CONSTRAIN} holds an answer to the task that it is routed by, and this request names its adapters; "
            "leave it out, or name none",
            param=_CONSTRAIN,
        )
    if sampling.grammar is not None:
        raise InvalidRequest(
            f"got {sampling.grammar.param} and {_CONSTRAIN}, needed one: an answer is held to one grammar",
            param=_CONSTRAIN,
        )
