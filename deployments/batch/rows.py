"""Rows in and rows out: what a row asks, validated, and the columns that its answer adds. Knows no Ray and no files."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field, TypeAdapter, ValidationError

from deployments.batch.config import BatchConfig, Sampling, row_seed
from deployments.batch.openai_format import is_request, read_body
from deployments.config import explain
from deployments.conversations import Message, routed_text, turns_of
from deployments.forms import check_constrain
from deployments.openai_types import SamplingOptions
from deployments.options import without_nulls
from lorauter.engine import SamplingParams
from lorauter.engine.types import Prompt
from lorauter.errors import ConfigError, InvalidRequest, LorauterError
from lorauter.names import is_valid_name
from lorauter.routing import RoutingDecision, RoutingOptions, check_text
from lorauter.tasks import is_encodable

_MAX_ADAPTERS = 64
_SAMPLED = tuple(SamplingOptions.model_fields)
_OBJECTS = ("logit_bias", "response_format", "structured_outputs")
_LISTS = ("stop_token_ids", "allowed_token_ids", "bad_words", "guided_choice")
_Weighted = list[tuple[str, float]]
_MESSAGES = TypeAdapter(Annotated[list[Message], Field(min_length=1)])

_TASK = pa.struct([("name", pa.string()), ("score", pa.float64()), ("probability", pa.float64())])
_ADAPTER = pa.struct([("name", pa.string()), ("version", pa.string()), ("weight", pa.float64())])
_LEFT_OUT = pa.struct([("name", pa.string()), ("version", pa.string()), ("cause", pa.string())])
_SHOWN = pa.struct([("task", pa.string()), ("places", pa.list_(pa.int64())), ("by", pa.string()), ("why", pa.string())])
_DECISION = [
    ("tasks", pa.list_(_TASK)),
    ("adapters", pa.list_(_ADAPTER)),
    ("confidence", pa.float64()),
    ("constrained", pa.string()),
    ("shown", _SHOWN),
]
_ANSWER = [
    ("answer", pa.string()),
    *_DECISION,
    ("left_out", pa.list_(_LEFT_OUT)),
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int64()),
    ("completion_tokens", pa.int64()),
    ("latency_s", pa.float64()),
]


def result_schema(*, route_only: bool) -> pa.Schema:
    """The columns that a job adds to each row, with their types."""
    return pa.schema([*(_DECISION if route_only else _ANSWER), ("error", pa.string())])


def kept_names(columns: Collection[str], added: Collection[str]) -> dict[str, str]:
    """Other names for the columns that have those of added ones: with `input_` before them, as often as it takes."""
    taken = {*columns, *added}
    renamed = {}
    for name in sorted(set(columns).intersection(added)):
        kept = f"input_{name}"
        while kept in taken:
            kept = f"input_{kept}"
        taken.add(kept)
        renamed[name] = kept
    return renamed


def check_clash(renamed: Mapping[str, str], config: BatchConfig) -> None:
    """Raise ConfigError if columns are to be renamed, and the job refuses that."""
    if renamed and config.column_clash == "refuse":
        raise ConfigError(
            f"the input has the columns {', '.join(renamed)}, and columns of these names are added; rename them, or "
            f"choose column_clash: keep, which writes them as {', '.join(renamed.values())}",
            setting="column_clash",
        )


@dataclass(frozen=True)
class SourceRow:
    """A row as it was read.

    Attributes:
        number: its own in the whole input.
        values: its columns.
        fault: why it could not be read.
        is_text: whether its format has nothing but text, so that lists and objects are written as JSON.
    """

    number: int
    values: dict[str, Any]
    fault: str | None = None
    is_text: bool = False


@dataclass(frozen=True)
class RowRequest:
    """What a row asks.

    Attributes:
        text: what is routed; empty where adapters were chosen by hand.
        options: of routing.
        chosen: adapters chosen by hand, with their weights; None where the row is to be routed.
        prompt: what is answered.
        sampling: how it is answered.
    """

    text: str
    options: RoutingOptions
    chosen: _Weighted | None
    prompt: Prompt
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
        errors: by the places of rows that were not answered, what the HTTP API would say: status and body.
        facts: what the worker that answered them says of itself.
    """

    shard: int
    rows: list[SourceRow]
    decisions: list[RoutingDecision | Exception] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[int, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def read_request(row: SourceRow, config: BatchConfig) -> RowRequest:
    """What a row asks. Raises InvalidRequest, saying what is wrong with the row."""
    if row.fault is not None:
        raise InvalidRequest(row.fault)
    values, columns = row.values, config.columns
    if is_request(values):
        return _openai_request(row, config)
    prompt = _conversation(values, config)
    chosen = _by_hand(_given(values, columns.adapters))
    options, text = RoutingOptions(), ""
    if chosen is None:
        options = _options(_given(values, columns.options))
        text = routed_text(prompt.messages, config.route_on) if prompt.text is None else prompt.text
        check_text(text, param=columns.prompt)
    sampling = SamplingParams() if config.route_only else _sampling(row, config)
    check_constrain(options, sampling, routed=chosen is None)
    return RowRequest(text, options, chosen, prompt, sampling)


def _openai_request(row: SourceRow, config: BatchConfig) -> RowRequest:
    body = read_body(row.values)
    prompts = body.prompts()
    if len(prompts) > 1:
        raise InvalidRequest(f"got {len(prompts)} prompts, needed one; a row has one answer", param="prompt")
    [prompt] = prompts
    if (name := body.unlike_a_row) is not None:
        raise InvalidRequest(f"{name}: not supported in a batch, where a row is answered by one text", param=name)
    if prompt.text is not None:
        check_text(prompt.text, param="prompt")
    chosen, text = body.chosen(), ""
    if chosen is None:
        if prompt.token_ids is not None:
            raise InvalidRequest("token ids have no text to route by; name a model or adapters", param="prompt")
        text = routed_text(prompt.messages, config.route_on) if prompt.text is None else prompt.text
        check_text(text, param="messages" if prompt.text is None else "prompt")
    by_hand = None if chosen is None else _checked(list(chosen.items()))
    sampling = body.sampled(_jobs_sampling(row, config))
    check_constrain(body.lorauter, sampling, routed=chosen is None)
    return RowRequest(text, body.lorauter, by_hand, prompt, sampling)


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


def _conversation(values: Mapping[str, Any], config: BatchConfig) -> Prompt:
    """The chat, or else the plain prompt."""
    columns = config.columns
    given = _decoded(_given(values, columns.messages), opening="[")
    if given is not None:
        try:
            chat = _MESSAGES.validate_python(given)
        except ValidationError as error:
            raise InvalidRequest(f"{columns.messages}: {explain(error, 'field')}", param=columns.messages) from error
        if not all(is_encodable(m.text) for m in chat):
            raise InvalidRequest(f"{columns.messages} holds half a character (a lone surrogate)")
        return Prompt(messages=turns_of(chat))
    if columns.prompt not in values:
        there = ", ".join(sorted(map(str, values))[:10]) or "none"
        raise InvalidRequest(f"there is no column {columns.prompt!r}, the row has: {there}", param=columns.prompt)
    prompt = values[columns.prompt]
    check_text(prompt, param=columns.prompt)
    if config.prompts == "plain":
        return Prompt(text=prompt)
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    return Prompt(messages=(*system, {"role": "user", "content": prompt}))


def _options(given: Any) -> RoutingOptions:
    given = without_nulls(_decoded(given, opening="{"))
    try:
        return RoutingOptions() if given is None else RoutingOptions.model_validate(given)
    except ValidationError as error:
        raise InvalidRequest(f"routing options: {explain(error, 'option')}", param="lorauter") from error


def _by_hand(given: Any) -> _Weighted | None:
    """The adapters that a row brings along; None where it is to be routed."""
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
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"adapters: got {str(given)[:80]!r}, needed a name, {{name: weight}} or [{{'name', 'weight'}}, ...]",
            param="adapters",
        ) from error
    return _checked(weighted)


def _checked(weighted: _Weighted) -> _Weighted:
    """Adapters that were chosen by hand. Raises InvalidRequest: too many, or something that is no name."""
    if len(weighted) > _MAX_ADAPTERS:
        raise InvalidRequest(f"got {len(weighted)} adapters; at most {_MAX_ADAPTERS} can be mixed", param="adapters")
    for name, _ in weighted:
        if not is_valid_name(name):
            raise InvalidRequest(f"adapters: {str(name)[:80]!r} is no adapter's name", param="adapters")
    return weighted


def _weight(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(weight := float(value)):
        raise ValueError(f"{value!r} is no weight")
    return weight


def _sampling(row: SourceRow, config: BatchConfig) -> SamplingParams:
    given = {name: _given(row.values, getattr(config.columns, name)) for name in _SAMPLED}
    given["stop"] = _stop(given["stop"], is_text=row.is_text)
    for name in _OBJECTS:
        given[name] = _decoded(given[name], opening="{")
    for name in _LISTS:
        given[name] = _decoded(given[name], opening="[")
    try:
        own = Sampling.model_validate(given)
    except ValidationError as error:
        raise InvalidRequest(explain(error, "setting"), param="sampling") from error
    return own.sampled(_jobs_sampling(row, config))


def _jobs_sampling(row: SourceRow, config: BatchConfig) -> SamplingParams:
    return replace(config.sampling.sampled(SamplingParams()), seed=row_seed(config.sampling.seed or 0, row.number))


def _stop(given: Any, *, is_text: bool) -> Any:
    """Stop strings: a text is one, whatever it looks like; where there is nothing but text, a JSON list is many."""
    if isinstance(given, str) and is_text:
        with suppress(ValueError, RecursionError):
            coded = json.loads(given)
            if isinstance(coded, list) and all(isinstance(stop, str) for stop in coded):
                return coded
    return (given,) if isinstance(given, str) else given


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
    return f"{kind}: {' '.join(str(error).split())}".encode(errors="replace").decode()  # it may quote the row


def decision_columns(decision: RoutingDecision | Exception) -> dict[str, Any]:
    """The columns of a decision, or of the error in its place."""
    if isinstance(decision, Exception):
        return {**dict.fromkeys(name for name, _ in _DECISION), "error": described(decision)}
    found = decision.to_json()
    return {**{name: found.get(name) for name, _ in _DECISION}, "error": None}
