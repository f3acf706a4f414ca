"""What an option of a request's body is: its type, what its neutral value is, and where it goes.

The fields of a body, annotated with `Option` or `Only`, are the table of options: they validate requests, and the
documentation (`docs/api.md`) and the OpenAPI schema are made of them. Knows nothing of single options.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from deployments.config import explain, first_field
from lorauter.errors import InvalidRequest

Goes = Literal["model", "prompt", "routing", "sampling", "answer", "encoder", "catalog", "nowhere"]
"""What an option changes. What goes nowhere is taken, since it changes no answer, and has no effect."""


@dataclass(frozen=True)
class Option:
    """An option that is taken.

    Attributes:
        says: what it does, for people.
        goes: where.
        neutral: values that are the same as leaving it out, beside null.
    """

    says: str
    goes: Goes
    neutral: tuple[Any, ...] = ()


class Only:
    """An option that is not supported: taken at values that ask for nothing, refused by its name at others.

    Args:
        neutral: those values; null, which is left out before, is one too.
        because: what to do instead, or why not.
    """

    def __init__(self, *neutral: Any, because: str = "") -> None:
        self.neutral = neutral
        self.because = because

    def _check(self, value: Any) -> None:
        if not any(_same(value, neutral) for neutral in self.neutral):
            needed = " or ".join(json.dumps(neutral) for neutral in self.neutral) or "null"
            because = f" ({self.because})" if self.because else ""
            told = "is not supported{because}; leave it out, or give {needed}"
            raise PydanticCustomError("unsupported", told, {"because": because, "needed": needed})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.neutral)} if self.neutral else {"type": "null"}


class OneOf:
    """Says in its own words what a field of several types needs, instead of what each of the types has against it."""

    def __init__(self, needed: str) -> None:
        self.needed = needed

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: Any = handler(source)
        assert schema["type"] == "union"
        return {**schema, "custom_error_type": "one_of", "custom_error_message": f"Input should be {self.needed}"}


class TextOrList:
    """A text is told from a list by itself, so that what is wrong with an item is told with its place.

    Args:
        items: what they are called.
    """

    def __init__(self, items: str) -> None:
        self.items = items

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        [listed] = [kind for kind in get_args(source) if kind is not str]

        def check(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Any:
            if isinstance(value, str):
                return value
            if not isinstance(value, list):
                raise PydanticCustomError("text", "Input should be a text, or a list of {items}", {"items": self.items})
            return validate(value)

        items = handler.generate_schema(listed)
        return core_schema.no_info_wrap_validator_function(check, items, json_schema_input_schema=handler(source))


class ByType:
    """An object is of the kind that its `type` names, and what is wrong with it is told with its place alone.

    Args:
        kinds: the kinds by their types.
        default: the type of what names none.
    """

    def __init__(self, kinds: Mapping[str, type[BaseModel]], default: str | None = None) -> None:
        self.kinds = kinds
        self.default = default

    def _check(self, value: Any) -> BaseModel:
        if not isinstance(value, dict):
            raise PydanticCustomError("object", "Input should be an object")
        named = self.default if value.get("type") is None else value["type"]
        kind = self.kinds.get(named) if isinstance(named, str) else None
        if kind is None:
            *others, last = map(repr, self.kinds)
            needed = {"others": ", ".join(others), "last": last}
            wrong = PydanticCustomError("type", "is not supported; needed {others} or {last}", needed)
            line: InitErrorDetails = {"type": wrong, "loc": ("type",), "input": named}
            raise ValidationError.from_exception_data("object", [line])
        return kind.model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check, json_schema_input_schema=handler(source))


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    """Raise what pydantic takes for an error where a number is none that JSON has: a parser makes one of 1e999."""
    unchecked: list[Any] = [value]
    while unchecked:
        part = unchecked.pop()
        if isinstance(part, dict | list):
            unchecked += part.values() if isinstance(part, dict) else part
        elif isinstance(part, float) and not math.isfinite(part):
            raise PydanticCustomError("finite", "Input should hold finite numbers alone; got {part}", {"part": part})
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_finite)]
"""An object of whatever JSON has."""


def _same(value: Any, other: Any) -> bool:
    """Equality in JSON: a number is no boolean."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def without_nulls(value: Any) -> Any:
    """An object without its fields that are null: left out by other words, as data bases and Arrow have it."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Body(BaseModel):
    """A request's body: an option that is null is one that is left out, and one that is not known is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any) -> Any:
        return without_nulls(value)


B = TypeVar("B", bound=BaseModel)


def parse_body(kind: type[B], raw: str | bytes) -> B:
    """A body of JSON, validated. Raises InvalidRequest with the name of the option that is wrong."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise InvalidRequest(explain(error, "option"), param=first_field(error)) from error


def build_body(kind: type[B], options: Mapping[str, Any]) -> B:
    """A body of options that another body has, validated. Raises InvalidRequest."""
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise InvalidRequest(explain(error, "option"), param=first_field(error)) from error


def reword(error: InvalidRequest, named: Callable[[str], str]) -> None:
    """Have an error call options as another API does: its own where its message begins with it, too, and others whose
    names are no words."""
    # Without its beginning, a long word would be looked at from each of its letters.
    told = re.sub(r"\b\w+(?:[._]\w+)+", lambda match: named(match[0]), str(error))
    own = error.param
    if own and (name := named(own)) != own:
        error.param = name
        told = re.sub(rf"^(option )?{re.escape(own)}\b", lambda match: f"{match[1] or ''}{name}", told)
    error.args = (told,)


@contextmanager
def reworded(named: Callable[[str], str]) -> Iterator[None]:
    """Have the errors that are raised while this is entered call options as another API does."""
    try:
        yield
    except InvalidRequest as error:
        reword(error, named)
        raise


@dataclass(frozen=True)
class Row:
    """A row of the table: an option of an endpoint."""

    name: str
    takes: str
    neutral: tuple[Any, ...]
    goes: str
    says: str


def rows_of(kind: type[BaseModel], prefix: str = "") -> list[Row]:
    """The options of a body, those of its objects after them. A field with a mere description is one of routing."""
    schema = kind.model_json_schema()
    rows = []
    for name, field in kind.model_fields.items():
        told = prefix + (field.alias or name)
        marks: list[Option | Only] = [mark for mark in field.metadata if isinstance(mark, Option | Only)]
        if not marks and field.description is not None:
            marks = [Option(field.description, "routing")]
        if len(marks) != 1:
            raise TypeError(f"{kind.__name__}.{name} needs one Option, or Only")
        mark = marks[0]
        if isinstance(mark, Only):
            rows.append(Row(told, "", mark.neutral, "refused", mark.because))
            continue
        takes = _takes(schema["properties"][field.alias or name], schema.get("$defs", {}))
        needed = " (needed)" if field.is_required() else ""
        rows.append(Row(told, takes + needed, mark.neutral, mark.goes, mark.says))
        for of in _alternatives(field.annotation):
            if isinstance(of, type) and issubclass(of, BaseModel):
                rows += rows_of(of, f"{told}.")
    return rows


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _takes(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        return _takes(defs[schema["$ref"].rpartition("/")[2]], defs)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_takes(of, defs) for of in schema["anyOf"] if of != {"type": "null"}))
    if "enum" in schema or "const" in schema:
        return " or ".join(map(json.dumps, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type")
    if kind == "array":
        most = f" (at most {schema['maxItems']})" if "maxItems" in schema else ""
        return f"list of {_takes(schema['items'], defs)}{most}"
    word = {"integer": "integer", "number": "number", "string": "text", "boolean": "boolean", "object": "object"}
    return word.get(str(kind), "anything") + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    names = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "maxLength": "of at most"}
    return "".join(f" {word} {schema[name]:g}" for name, word in names.items() if name in schema)


def table(endpoints: Mapping[str, type[BaseModel]]) -> str:
    """The options of some endpoints, by their names, in Markdown; one that several take alike has one line."""
    where: dict[str, list[str]] = {}
    for endpoint, kind in endpoints.items():
        for row in rows_of(kind):
            neutral = ", ".join(f"`{json.dumps(value)}`" for value in row.neutral)
            cells = " | ".join((row.takes, neutral, row.goes, row.says))
            where.setdefault(f"| `{row.name}` | {{}} | {cells} |\n", []).append(endpoint)
    lines = ["| option | of | takes | neutral | goes to | |\n", "| --- | --- | --- | --- | --- | --- |\n"]
    lines += [line.replace("{}", ", ".join(of), 1) for line, of in where.items()]
    return "".join(" ".join(line.split()) + "\n" for line in lines)
