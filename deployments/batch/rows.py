"""Rows in and rows out: what a row asks, validated, and the columns that its answer adds. Knows no Ray and no files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from deployments.batch.config import BatchConfig, Columns, row_seed
from deployments.config import explain
from deployments.openai_types import Message
from lorauter.engine import SamplingParams
from lorauter.errors import InvalidRequest, LorauterError
from lorauter.names import is_valid_name
from lorauter.routing import RoutingDecision, RoutingOptions, check_text
from lorauter.routing.compose import AdapterWeight
from lorauter.tasks import is_encodable

_MAX_ADAPTERS = 64
_SAMPLED = ("max_tokens", "temperature", "top_p", "stop", "seed")
_Weighted = list[tuple[str, float]]
_MESSAGES = TypeAdapter(Annotated[list[Message], Field(min_length=1)])

_TASK = pa.struct([("name", pa.string()), ("score", pa.float64()), ("probability", pa.float64())])
_ADAPTER = pa.struct([("name", pa.string()), ("weight", pa.float64())])
_DECISION = [("tasks", pa.list_(_TASK)), ("adapters", pa.list_(_ADAPTER)), ("confidence", pa.float64())]
_ANSWER = [
    ("answer", pa.string()),
    *_DECISION,
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int64()),
    ("completion_tokens", pa.int64()),
    ("latency_s", pa.float64()),
]


def result_schema(*, route_only: bool) -> pa.Schema:
    """The columns that a job adds to each row, with their types; a row's own columns of these names are replaced."""
    return pa.schema([*(_DECISION if route_only else _ANSWER), ("error", pa.string())])


@dataclass(frozen=True)
class SourceRow:
    """A row as it was read: its columns, and its number in the whole input; `fault` says why it could not be read."""

    number: int
    values: dict[str, Any]
    fault: str | None = None


@dataclass(frozen=True)
class RowRequest:
    """What a row asks.

    Attributes:
        text: what is routed; empty where adapters were chosen by hand.
        options: of routing.
        decision: of adapters chosen by hand, else None.
        messages, prompt: a chat, or a plain prompt.
        sampling: how it is answered.
    """

    text: str
    options: RoutingOptions
    decision: RoutingDecision | None
    messages: tuple[dict[str, str], ...]
    prompt: str | None
    sampling: SamplingParams


@dataclass
class Work:
    """A piece of the data set on its way through the stages, whole: a shard, or a batch of a data set.

    Attributes:
        shard: its number in the job's plan.
        rows: the rows.
        decisions: for each row where it goes, or its error; set by routing.
        order: places of the rows, those with the same adapters together; set by routing.
        results: for each row the columns that are added; set in the end.
        facts: what the worker that answered them says of itself.
    """

    shard: int
    rows: list[SourceRow]
    decisions: list[RoutingDecision | Exception] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class _Sampling(BaseModel):
    """A row's own sampling; numbers may come as text, as CSV has them."""

    model_config = ConfigDict(frozen=True)

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    stop: tuple[str, ...] | None = None
    seed: int | None = None


def read_request(row: SourceRow, config: BatchConfig) -> RowRequest:
    """What a row asks. Raises InvalidRequest, saying what is wrong with the row."""
    if row.fault is not None:
        raise InvalidRequest(row.fault)
    values, columns = row.values, config.columns
    messages, prompt = _conversation(values, config)
    decision = _by_hand(_given(values, columns.adapters))
    options, text = RoutingOptions(), ""
    if decision is None:
        options = _options(_given(values, columns.options))
        text = _routed_text(messages, config.route_on) if prompt is None else prompt
        check_text(text, param=columns.prompt)
    sampling = SamplingParams() if config.route_only else _sampling(values, columns, config, row.number)
    return RowRequest(text, options, decision, messages, prompt, sampling)


def _given(values: Mapping[str, Any], column: str | None) -> Any:
    """What a row has in a column; None for what CSV and Arrow have in place of nothing."""
    value = None if column is None else values.get(column)
    if (isinstance(value, float) and math.isnan(value)) or value == "":
        return None
    return value


def _decoded(value: Any, *, opening: str) -> Any:
    """JSON in a text column, told by how it begins."""
    if not isinstance(value, str) or not value.lstrip().startswith(tuple(opening)):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{value[:80]!r} is no JSON: {error}") from error


def _conversation(values: Mapping[str, Any], config: BatchConfig) -> tuple[tuple[dict[str, str], ...], str | None]:
    """The chat, or else the plain prompt."""
    columns = config.columns
    given = _decoded(_given(values, columns.messages), opening="[")
    if given is not None:
        try:
            chat = _MESSAGES.validate_python([_without_nulls(m) for m in given] if isinstance(given, list) else given)
        except ValidationError as error:
            raise InvalidRequest(f"{columns.messages}: {explain(error, 'field')}", param=columns.messages) from error
        if not all(is_encodable(m.text) for m in chat):
            raise InvalidRequest(f"{columns.messages} holds half a character (a lone surrogate)")
        return tuple({"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in chat), None
    if columns.prompt not in values:
        there = ", ".join(sorted(map(str, values))[:10]) or "none"
        raise InvalidRequest(f"there is no column {columns.prompt!r}, the row has: {there}", param=columns.prompt)
    prompt = values[columns.prompt]
    check_text(prompt, param=columns.prompt)
    if config.prompts == "plain":
        return (), prompt
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    return (*system, {"role": "user", "content": prompt}), None


def _without_nulls(value: Any) -> Any:
    """An object without the fields that Arrow fills up with null."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _routed_text(messages: Sequence[Mapping[str, str]], route_on: str) -> str:
    if route_on == "conversation":
        return "\n".join(message["content"] for message in messages)
    for message in reversed(messages):
        if message["role"] == "user":
            return message["content"]
    raise InvalidRequest("messages hold no user message to route by", param="messages")


def _options(given: Any) -> RoutingOptions:
    given = _without_nulls(_decoded(given, opening="{"))
    try:
        return RoutingOptions() if given is None else RoutingOptions.model_validate(given)
    except ValidationError as error:
        raise InvalidRequest(f"routing options: {explain(error, 'option')}", param="lorauter") from error


def _by_hand(given: Any) -> RoutingDecision | None:
    """The decision that a row brings along; None where it is to be routed."""
    given = _decoded(given, opening="[{")
    if given is None:
        return None
    weighted: _Weighted = []
    try:
        if isinstance(given, str):
            weighted = [(given.strip(), 1.0)]
        elif isinstance(given, Mapping):
            weighted = [(name, _weight(weight)) for name, weight in given.items() if weight is not None]
        else:
            weighted = [(item["name"], _weight(item["weight"])) for item in given]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"adapters: got {str(given)[:80]!r}, needed a name, {{name: weight}} or [{{'name', 'weight'}}, ...]",
            param="adapters",
        ) from error
    if len(weighted) > _MAX_ADAPTERS:
        raise InvalidRequest(f"got {len(weighted)} adapters; at most {_MAX_ADAPTERS} can be mixed", param="adapters")
    for name, _ in weighted:
        if not is_valid_name(name):
            raise InvalidRequest(f"adapters: {str(name)[:80]!r} is no adapter's name", param="adapters")
    return RoutingDecision(None, (), tuple(AdapterWeight(name, weight) for name, weight in weighted))


def _weight(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(weight := float(value)):
        raise ValueError(f"{value!r} is no weight")
    return weight


def _sampling(values: Mapping[str, Any], columns: Columns, config: BatchConfig, number: int) -> SamplingParams:
    given = {name: _given(values, getattr(columns, name)) for name in _SAMPLED}
    stop = _decoded(given["stop"], opening="[")
    given["stop"] = (stop,) if isinstance(stop, str) else stop
    try:
        own = _Sampling.model_validate(given).model_dump(exclude_none=True)
    except ValidationError as error:
        raise InvalidRequest(explain(error, "setting"), param="sampling") from error
    job = config.sampling
    return SamplingParams(
        **{
            **{name: getattr(job, name) for name in _SAMPLED},
            "seed": row_seed(job.seed, number),
            **own,
        }
    )


def order_by_adapters(decisions: Sequence[RoutingDecision | Exception]) -> list[int]:
    """Places of rows so that those with the same adapters, the heaviest above all, are next to each other."""

    def key(place: int) -> tuple[list[str], int]:
        decision = decisions[place]
        names = [] if isinstance(decision, Exception) else [adapter.name for adapter in decision.adapters]
        return names, place

    return sorted(range(len(decisions)), key=key)


def described(error: Exception) -> str:
    """An error as the `error` column has it: its kind and what it says."""
    kind = type(error).__name__ if isinstance(error, LorauterError) else f"internal {type(error).__name__}"
    return f"{kind}: {' '.join(str(error).split())}"


def decision_columns(decision: RoutingDecision | Exception) -> dict[str, Any]:
    """The columns of a decision, or of the error in its place."""
    if isinstance(decision, Exception):
        return {"tasks": None, "adapters": None, "confidence": None, "error": described(decision)}
    found = decision.to_json()
    return {**{name: found[name] for name in ("tasks", "adapters", "confidence")}, "error": None}
