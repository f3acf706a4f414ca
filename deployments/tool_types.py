"""Tools as a request names them: their options, checked, and what they ask of the answer.

Knows OpenAI's words for them; knows nothing of how calls are written or read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from deployments.options import Body, JsonObject, OneOf, Option
from lorauter.errors import InvalidRequest
from lorauter.tools.types import Tool, ToolUse

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
_MOST = 128
_LONGEST = 300  # characters of where something is, as it is told
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_SEVERAL = ("anyOf", "allOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


class FunctionDefinition(Body):
    """A function that may be called: `parameters` is the JSON schema of its arguments, left out it takes none."""

    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class FunctionTool(Body):
    """A tool: a function."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """A tool by its name."""

    type: Literal["function"] = "function"
    function: NamedFunction


class Allowed(Body):
    """Some of the tools, and whether one of them has to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedTools(Body):
    """OpenAI's object for the same."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


Tools = Annotated[
    Annotated[list[FunctionTool], Field(max_length=_MOST)] | None,
    Option('what may be called: `{"type": "function", "function": {"name", "description", "parameters", "strict"}}`',
           "prompt", ([],)),
]  # fmt: skip
_Choice = Literal["none", "auto", "required"] | NamedTool | AllowedTools
_CHOICES = '"none", "auto", "required", {"type": "function", "function": {"name"}}, or an object of allowed_tools'


class ToolOptions(Body):
    """Which tools there are, and whether the answer has to call one."""

    tools: Tools = None
    tool_choice: Annotated[
        Annotated[_Choice, OneOf(_CHOICES)] | None,
        Option("`auto` leaves it to the model, `required` or a name has one called, `none` has none", "sampling"),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Option("an answer may have several calls, if the model can", "sampling", (True,))
    ] = None
    functions: Annotated[
        Annotated[list[FunctionDefinition], Field(max_length=_MOST)] | None,
        Option("`tools` by an older name; one is called, and the answer is in the older shape", "prompt", ([],)),
    ] = None
    function_call: Annotated[
        Annotated[Literal["none", "auto"] | NamedFunction, OneOf('"none", "auto", or {"name"}')] | None,
        Option("`tool_choice` of `functions`", "sampling"),
    ] = None

    @property
    def names_a_tool(self) -> bool:
        """Whether one is to be called, and which one it is."""
        return isinstance(self.tool_choice, NamedTool) or isinstance(self.function_call, NamedFunction)

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """What the answer may call, or has to; None is nothing. Raises InvalidRequest."""
        given = dict(self._given())
        choice: Any = self.function_call if self.functions else self.tool_choice
        option = "function_call" if self.functions else "tool_choice"
        if not given:
            for name in ("tool_choice", "function_call"):
                if getattr(self, name) not in (None, "none", "auto"):
                    needed = "tools" if name == "tool_choice" else "functions"
                    raise InvalidRequest(f"{name} is given, and there are no {needed}; give both or none", param=name)
            return None
        for name in {"tool_choice", "function_call"} - {option}:
            if getattr(self, name) not in (None, "none", "auto"):
                got, of = ("functions", "tools") if self.functions else ("tools", "functions")
                raise InvalidRequest(f"{name} goes with {of}, and {got} are given; use {option}", param=name)
        if choice == "none":
            return None
        forced, several = choice == "required", self.parallel_tool_calls is not False and not self.functions
        names = list(given)
        if isinstance(choice, NamedTool | NamedFunction):
            forced, several = True, False
            names = [choice.name if isinstance(choice, NamedFunction) else choice.function.name]
        elif isinstance(choice, AllowedTools):
            forced = choice.allowed_tools.mode == "required"
            names = list(dict.fromkeys(tool.function.name for tool in choice.allowed_tools.tools))
        for name in names:
            if name not in given:
                there = ", ".join(list(given)[:10])
                raise InvalidRequest(f"{option}: there is no tool {name[:128]!r}, but {there}", param=option)
        return ToolUse(tuple(given[name] for name in names), forced, several)

    def shown_tools(self) -> tuple[Mapping[str, Any], ...]:
        """What the chat template is to show of them: nothing where none may be called. Raises InvalidRequest."""
        return () if self.tool_use is None else shown([*(self.tools or ()), *(self.functions or ())])

    def _given(self) -> Iterator[tuple[str, Tool]]:
        if self.tools and self.functions:
            raise InvalidRequest("got tools and functions, which are the same; give tools alone", param="functions")
        definitions = [(f"tools.{place}.function", tool.function) for place, tool in enumerate(self.tools or ())]
        definitions += [(f"functions.{place}", function) for place, function in enumerate(self.functions or ())]
        seen = set()
        for where, definition in definitions:
            if definition.name in seen:
                raise InvalidRequest(f"{where}.name: there are two tools {definition.name!r}", param=f"{where}.name")
            seen.add(definition.name)
            schema = definition.parameters or {}
            param = f"{where}.parameters"
            if schema.get("type", "object") != "object":
                problem = f"got the type {json.dumps(schema['type'])[:80]}, needed object"
                raise InvalidRequest(f"{param}.type: {problem}: arguments have names", param=f"{param}.type")
            check_schema(schema, param)
            yield definition.name, Tool(definition.name, json.dumps(schema), param, bool(definition.strict))


def shown(tools: Sequence[FunctionTool | FunctionDefinition]) -> tuple[Mapping[str, Any], ...]:
    """Tools as chat templates take them."""
    functions = [tool.function if isinstance(tool, FunctionTool) else tool for tool in tools]
    return tuple(
        {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",  # some templates cannot do without
                "parameters": function.parameters or {"type": "object", "properties": {}},
            },
        }
        for function in functions
    )


class _Place(NamedTuple):
    """Where a part of a schema is. It is put in words where something is to be told of it alone: a name may be as long
    as a body, and stand before as many parts as there is room for."""

    name: str
    within: _Place | None = None

    def __str__(self) -> str:
        names, place = [self.name], self.within
        while place is not None:
            names.append(place.name)
            place = place.within
        told = ".".join(reversed(names))
        return told if len(told) <= _LONGEST else f"{told[: _LONGEST - 3]}..."


def check_schema(schema: Any, where: str) -> None:
    """Raise InvalidRequest, with the place, for what no JSON schema has; not for all that cannot be compiled."""
    unchecked = [(schema, _Place(where))]
    while unchecked:
        schema, place = unchecked.pop()
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, dict):
            raise InvalidRequest(f"{place}: got {_kind(schema)}, needed a JSON schema", param=str(place))
        for name in schema.keys() & _KINDS.keys():
            problem = _KINDS[name](schema[name])
            if problem:
                raise InvalidRequest(f"{place}.{name}: {problem}", param=f"{place}.{name}")
        parts = [(name, schema[name]) for name in _ONE if name in schema and not isinstance(schema[name], list)]
        parts += [(f"{name}.{key}", part) for name in _NAMED for key, part in schema.get(name, {}).items()]
        parts += [(f"{name}.{nth}", part) for name in _SEVERAL for nth, part in enumerate(schema.get(name, []))]
        unchecked += [(part, _Place(name, place)) for name, part in parts]


def _kind(value: Any) -> str:
    kinds = {str: "a text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _type(value: Any) -> str:
    types = value if isinstance(value, list) else [value]
    wrong = [one for one in types if one not in _TYPES]
    return f"got {json.dumps(wrong[0])[:80]}, needed one of {', '.join(_TYPES)}" if wrong else ""


def _is(kind: type, needed: str) -> Any:
    return lambda value: "" if isinstance(value, kind) else f"got {_kind(value)}, needed {needed}"


def _texts(value: Any) -> str:
    fits = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return "" if fits else "needed a list of names"


_KINDS: Mapping[str, Any] = {
    "type": _type,
    "required": _texts,
    "enum": _is(list, "a list of values"),
    **dict.fromkeys(_NAMED, _is(dict, "an object of schemas")),
    **dict.fromkeys(_SEVERAL, _is(list, "a list of schemas")),
}
