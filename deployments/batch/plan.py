"""The plan of a job: its input's files, cut into shards of so many rows. Knows stores and formats, and no answers."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from deployments.batch.config import Format
from deployments.batch.formats import FORMATS, read_rows, scan
from deployments.batch.rows import SourceRow
from lorauter.adapters.store import ObjectStore, open_store
from lorauter.errors import ConfigError, InvalidRequest, ObjectNotFound

_FIRST_ROWS = 64  # of the first shard
_GROWTH = 3  # times the rows before it are a shard's at most
_ENDINGS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class InputFile:
    """A file of the input: its key, bytes, and a tag that changes with its content."""

    key: str
    size: int
    tag: str


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
    """

    root: str
    kind: Format
    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]
    schema: pa.Schema | None

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    def read(self, shard: Shard) -> list[SourceRow]:
        """A shard's rows. Raises InvalidRequest: the file has changed, or is damaged."""
        with open_store(self.root).open(shard.key) as file:
            try:
                return [
                    SourceRow(shard.first + place, values, fault)
                    for place, (values, fault) in enumerate(read_rows(file, self.kind, shard.start, shard.rows))
                ]
            except (InvalidRequest, pa.ArrowException, OSError) as error:
                raise InvalidRequest(f"{self.root}/{shard.key}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        schema = None if self.schema is None else base64.b64encode(self.schema.serialize()).decode()
        return {
            "root": self.root,
            "kind": self.kind,
            "files": [vars(file) for file in self.files],
            "shards": [list(vars(shard).values()) for shard in self.shards],
            "schema": schema,
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
        )


def find_files(uri: str) -> tuple[ObjectStore, Format, tuple[InputFile, ...]]:
    """The files of an input: the one that it names, or those of its folder.

    Names that begin with "_" or "." are left out, as other readers of data sets do.

    Raises:
        ConfigError: there is none, or they are of several formats.
    """
    if PurePosixPath(uri).suffix in _ENDINGS:
        parent, separator, name = uri.rstrip("/").rpartition("/")
        store = open_store(parent or ("/" if separator else "."))
        keys = [name]
    else:
        store = open_store(uri)
        found = [key for key in store.files() if PurePosixPath(key).suffix in _ENDINGS]
        keys = [key for key in found if not any(part.startswith("_") for part in key.split("/"))]
    kinds = sorted({_ENDINGS[PurePosixPath(key).suffix] for key in keys})
    if len(kinds) != 1:
        raise ConfigError(
            f"input {uri}: got files of {', '.join(kinds) or 'no known format'}, needed one of "
            f"{', '.join(FORMATS)} in all of them (told by their names' ends)",
            setting="input",
        )
    try:
        return store, kinds[0], tuple(InputFile(key, *store.fingerprint(key)) for key in keys)
    except ObjectNotFound as error:
        raise ConfigError(f"input {uri} does not exist", setting="input") from error


def _shard_rows(most: int, before: int, rows: int) -> int:
    """Rows of a shard, at most, that begins after `rows` of its file and all files `before`: few of the first ones.

    Answering then starts at once, and each shard is routed in less time than answering those before it takes.
    """
    return min(most, max(_FIRST_ROWS, _GROWTH * (before + rows)))


def make_plan(store: ObjectStore, kind: Format, files: tuple[InputFile, ...], shard_rows: int, output: Format) -> Plan:
    """Cut an input into shards; reads it through once. Raises ConfigError, naming a file that is not of its kind."""
    shards: list[Shard] = []
    schemas: list[pa.Schema] = []
    first = 0
    for file in files:
        try:
            with store.open(file.key) as content:
                found = scan(content, kind, partial(_shard_rows, shard_rows, first), columns=output != "jsonl")
        except InvalidRequest as error:
            raise ConfigError(f"{store.uri}/{file.key}: {error}", setting="input") from error
        for start, rows in found.starts:
            shards.append(Shard(len(shards), file.key, start, rows, first))
            first += rows
        if found.schema is not None:
            schemas.append(found.schema)
    return Plan(store.uri, kind, files, tuple(shards), None if output == "jsonl" else _unified(schemas))


def _unified(schemas: list[pa.Schema]) -> pa.Schema:
    fields: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            known = fields.setdefault(field.name, field.type)
            if known != field.type:
                numbers = {known, field.type} == {pa.int64(), pa.float64()}
                fields[field.name] = pa.float64() if numbers else pa.large_string()
    return pa.schema(list(fields.items()))
