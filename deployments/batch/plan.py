"""The plan of a job: its input's files, cut into shards of so many rows. Knows stores and formats, and no answers."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from deployments.batch.config import Format, OutputFormat
from deployments.batch.formats import csv_header, read_rows, scan
from deployments.batch.inputs import DAMAGE, InputFile, InputFiles
from deployments.batch.rows import SourceRow, kept_names
from lorauter.adapters.store import ObjectStore, open_store
from lorauter.errors import ConfigError, InvalidRequest

_FIRST_ROWS = 64  # of the first shard
_GROWTH = 3  # times the rows before it are a shard's at most


@dataclass(frozen=True)
class Shard:
    """Rows that are done together.

    Attributes:
        number: of all the job's shards.
        key, start, rows: the file, the place in it that `formats.scan` gave, and how many.
        first: the number of its first row in the whole input.
    """

    number: int
    key: str
    start: int
    rows: int
    first: int


@dataclass(frozen=True)
class Plan:
    """The whole input.

    Attributes:
        root: the store's URI that the files' keys are of.
        kind: the files' format.
        schema: their columns, where the output's format needs them.
        renamed: columns that are kept by another name, as they have that of a column which is added.
    """

    root: str
    kind: Format
    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]
    schema: pa.Schema | None
    renamed: Mapping[str, str]

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    def read(self, shard: Shard) -> list[SourceRow]:
        """A shard's rows. Raises as `ShardReader.read`."""
        with closing(ShardReader(self)) as reader:
            return reader.read(shard)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        schema = None if self.schema is None else base64.b64encode(self.schema.serialize()).decode()
        return {
            "root": self.root,
            "kind": self.kind,
            "files": [vars(file) for file in self.files],
            "shards": [list(vars(shard).values()) for shard in self.shards],
            "schema": schema,
            "renamed": dict(self.renamed),
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The plan that a manifest holds."""
        schema = data["schema"]
        return cls(
            data["root"],
            data["kind"],
            tuple(InputFile(**file) for file in data["files"]),
            tuple(Shard(*shard) for shard in data["shards"]),
            None if schema is None else pa.ipc.read_schema(pa.py_buffer(base64.b64decode(schema))),
            data.get("renamed", {}),  # jobs begun before lorauter kept such columns end as they began
        )


def plan_in(uri: str, manifest: Mapping[str, Any]) -> Plan:
    """The plan of an output's job that was begun before. Raises ConfigError."""
    try:
        return Plan.from_json(manifest["plan"])
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"the manifest of {uri} is damaged ({error!r}); choose another output") from error


class ShardReader:
    """Reads shards of a plan, best one after another: what a file's shards have in common is then read once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._files = InputFiles(open_store(plan.root))
        self._header: tuple[str, Sequence[str] | None] = "", None

    def read(self, shard: Shard) -> list[SourceRow]:
        """A shard's rows. Raises InvalidRequest: the file has changed, or is damaged."""
        kind = self._plan.kind
        try:
            with self._files.open(shard.key) as file:
                if self._header[0] != shard.key:
                    self._header = shard.key, csv_header(file) if kind == "csv" else None
                rows = read_rows(file, kind, shard.start, shard.rows, self._header[1])
                return [
                    SourceRow(shard.first + place, values, fault, is_text=kind == "csv")
                    for place, (values, fault) in enumerate(rows)
                ]
        except (InvalidRequest, pa.ArrowException, *DAMAGE) as error:
            raise InvalidRequest(f"{self._plan.root}/{shard.key}: {error}") from error

    def close(self) -> None:
        """Keep no file open."""
        self._files.close()


def _shard_rows(most: int, before: int, rows: int) -> int:
    """Rows of a shard, at most, that begins after `rows` of its file and all files `before`: few of the first ones.

    Answering then starts at once, and each shard is routed in less time than answering those before it takes.
    """
    return min(most, max(_FIRST_ROWS, _GROWTH * (before + rows)))


def make_plan(
    store: ObjectStore,
    kind: Format,
    files: tuple[InputFile, ...],
    shard_rows: int,
    output: OutputFormat,
    added: Collection[str] = (),
) -> Plan:
    """Cut an input into shards; reads it through once.

    Args:
        added: the columns that the output has beside the input's.

    Raises:
        ConfigError: a file is not of its kind.
    """
    shards: list[Shard] = []
    schemas: list[pa.Schema] = []
    names: set[str] = set()
    first = 0
    with closing(InputFiles(store)) as opened:
        for file in files:
            try:
                with opened.open(file.key) as content:
                    found = scan(content, kind, partial(_shard_rows, shard_rows, first))
            except (InvalidRequest, *DAMAGE) as error:
                raise ConfigError(f"{store.uri}/{file.key}: {error}", setting="input") from error
            for start, rows in found.starts:
                shards.append(Shard(len(shards), file.key, start, rows, first))
                first += rows
            names |= set(found.schema.names)
            schemas.append(found.schema)
    tabular = output in ("csv", "parquet")
    return Plan(store.uri, kind, files, tuple(shards), _unified(schemas) if tabular else None, kept_names(names, added))


def _unified(schemas: list[pa.Schema]) -> pa.Schema:
    fields: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            known = fields.setdefault(field.name, field.type)
            if known != field.type:
                numbers = {known, field.type} == {pa.int64(), pa.float64()}
                fields[field.name] = pa.float64() if numbers else pa.large_string()
    return pa.schema(list(fields.items()))
