"""The output of a job: parts that appear whole, a record beside each, and a manifest. Knows no Ray.

    _manifest.json              what is made of what, with which settings, and the counts
    part-00000.jsonl ...        the shards, in the order of the input
    _shards/part-00000.json     the shard's counts; written last, so that it says that the part is there

Names with an underscore are what readers of data sets leave out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from deployments.batch.config import OutputFormat
from deployments.batch.formats import encode
from deployments.batch.openai_format import output_line
from deployments.batch.rows import Work
from deployments.batch.tally import Tally
from lorauter.adapters.store import open_store
from lorauter.errors import ConfigError, ObjectNotFound

MANIFEST = "_manifest.json"
MANIFEST_FORMAT = 1
_READERS = 16


@dataclass(frozen=True)
class Output:
    """Where a job writes.

    Attributes:
        uri: a folder, or `s3://bucket/prefix`.
        kind: the format of its parts.
        source: the columns of the input, where the format needs them.
        added: the columns that the job adds.
        renamed: columns of the input that are written by another name.
        plain: whether prompts are texts that are continued, which OpenAI's format says in other words than of chats.
    """

    uri: str
    kind: OutputFormat
    source: pa.Schema | None
    added: pa.Schema
    renamed: Mapping[str, str] = field(default_factory=dict)
    plain: bool = False

    def write(self, work: Work) -> Tally:
        """Write a shard's part, then its record. Written again, it is the same again. Raises StoreError."""
        assert len(work.results) == len(work.rows)
        schema = None
        if self.source is not None:
            kept = [column.with_name(self.renamed.get(column.name, column.name)) for column in self.source]
            schema = pa.schema([*kept, *self.added])
        tally = Tally.of(work.results)
        store = open_store(self.uri)
        store.write(self._part(work.shard), encode(self._rows(work), self.kind, schema))
        store.write(_record(work.shard), json.dumps(tally.to_json()).encode())
        return tally

    def _rows(self, work: Work) -> Iterator[Mapping[str, Any]]:
        for place, (row, result) in enumerate(zip(work.rows, work.results, strict=True)):
            if self.kind == "openai":
                source, error = (row.number, row.values), work.errors.get(place)
                yield output_line(source, work.decisions[place], result, error, plain=self.plain)
            else:
                yield {**{self.renamed.get(name, name): value for name, value in row.values.items()}, **result}

    def done(self, shards: int) -> dict[int, Tally]:
        """The counts of the shards, of so many, that are there already. Raises StoreError."""
        store = open_store(self.uri)
        there = store.files()
        numbers = [number for number in range(shards) if {self._part(number), _record(number)} <= there.keys()]
        with ThreadPoolExecutor(_READERS) as pool:
            contents = pool.map(lambda number: store.read(_record(number)), numbers)
            return {number: Tally(**json.loads(content)) for number, content in zip(numbers, contents, strict=True)}

    def _part(self, shard: int) -> str:
        return f"part-{shard:05d}.{'jsonl' if self.kind == 'openai' else self.kind}"


def _record(shard: int) -> str:
    return f"_shards/part-{shard:05d}.json"


def read_manifest(uri: str) -> dict[str, Any] | None:
    """The manifest of an output; None where there is nothing yet.

    Raises:
        ConfigError: there are files but no manifest, or one that this version does not know.
    """
    store = open_store(uri)
    try:
        manifest = json.loads(store.read(MANIFEST))
        if manifest["format"] != MANIFEST_FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
    except ObjectNotFound:
        if there := list(store.files()):
            raise ConfigError(
                f"output {uri} holds {there[0]} but no {MANIFEST}: it is not a batch job's; choose an empty place",
                setting="output",
            ) from None
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{uri}/{MANIFEST} cannot be used ({error}); choose another output", setting="output"
        ) from error
    assert isinstance(manifest, dict)
    return manifest


def write_manifest(uri: str, manifest: Mapping[str, Any]) -> None:
    """Write it whole. Raises StoreError."""
    open_store(uri).write(MANIFEST, json.dumps(manifest, indent=1).encode())


def check_same(uri: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a job that is started again is the same: `before` and `now` describe both."""
    differing = _differing(before, now)
    if differing:
        name, (was, is_now) = next(iter(differing.items()))
        more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        raise ConfigError(
            f"output {uri} was begun with other settings: {name} was {_short(was)}, and is {_short(is_now)} now{more}; "
            "start it as before to finish it, or choose another output",
            setting=name,
        )


def _differing(before: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        pairs = [_differing(before.get(k), now.get(k), f"{name}.{k}" if name else k) for k in keys]
        return {key: pair for found in pairs for key, pair in found.items()}
    return {} if before == now else {name: (before, now)}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
