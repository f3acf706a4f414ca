"""JSONL, CSV and Parquet: where a file's rows begin, some of its rows, and rows as a file. Knows no stores, no jobs."""

from __future__ import annotations

import base64
import codecs
import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from deployments.batch.config import Format, OutputFormat
from lorauter.errors import InvalidRequest
from lorauter.tasks import is_encodable

FORMATS: tuple[Format, ...] = ("jsonl", "csv", "parquet")
Parsed = tuple[dict[str, Any], str | None]
"""A row's columns, and why it could not be read."""

_FIELD_LIMIT = 1 << 27  # characters of a CSV field
_DEEPEST = 100  # levels of a row: what pickles, or writes, it goes no deeper than Python does
_INT64 = range(-(1 << 63), 1 << 63)
_KINDS: Mapping[type, pa.DataType] = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
}


@dataclass
class Scan:
    """What a first reading finds out.

    Attributes:
        starts: of each shard's rows the place of the first (a byte, or in Parquet a row) and how many they are.
        schema: the columns as Parquet has them.
    """

    starts: list[tuple[int, int]]
    schema: pa.Schema


def scan(file: BinaryIO, kind: Format, shard_rows: Callable[[int], int]) -> Scan:
    """Read a file through once, or of Parquet its footer.

    Args:
        shard_rows: how many rows a shard takes at most, by the number of the file's rows before it.

    Raises:
        InvalidRequest: it is no file of its kind.
    """
    file.seek(0)
    if kind == "parquet":
        parquet = _parquet(file)
        total, start, found = parquet.metadata.num_rows, 0, []
        while start < total:
            found.append((start, min(shard_rows(start), total - start)))
            start += found[-1][1]
        return Scan(found, parquet.schema_arrow)
    _check_text(file, kind)
    if kind == "csv":
        schema = pa.schema([(name, pa.string()) for name in csv_header(file)])
        file.seek(0)
        return Scan(list(_cut((start for start, _ in _csv_rows(file)), shard_rows)), schema)
    seen: dict[str, pa.DataType] = {}

    def starts() -> Iterator[int]:
        for start, (values, _) in _json_rows(file):
            for name, value in values.items():
                seen[name] = _joined(seen.get(name), value)
            yield start

    cut = list(_cut(starts(), shard_rows))
    return Scan(cut, pa.schema([(n, pa.string() if pa.types.is_null(t) else t) for n, t in seen.items()]))


def _cut(starts: Iterable[int], shard_rows: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Where each shard's first row is, and how many it has, given where every row is."""
    first, rows, most = 0, 0, 0
    for number, start in enumerate(starts):
        if rows == most:
            if rows:
                yield first, rows
            first, rows, most = start, 0, shard_rows(number)
        rows += 1
    if rows:
        yield first, rows


def _check_text(file: BinaryIO, kind: Format) -> None:
    """Raise InvalidRequest for what would make every row wrong: another encoding, one JSON document over all lines."""
    begin = file.read(1 << 12)
    file.seek(0)
    encoding = json.detect_encoding(begin)
    if not encoding.startswith("utf-8"):
        raise InvalidRequest(
            f"it is {encoding.upper()} text, needed UTF-8; convert it: iconv -f {encoding.upper()} -t UTF-8 FILE"
        )
    first = begin.removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n")[0].rstrip()
    if kind == "jsonl" and (first == b"{" or first.startswith((b"[{", b"[ {")) or first == b"["):
        raise InvalidRequest(
            "it is one JSON document, needed JSON lines, an object on each; convert it: jq -c '.[]' FILE (of an "
            "array; jq -c . FILE of objects over several lines)"
        )


def read_rows(
    file: BinaryIO, kind: Format, start: int, count: int, header: Sequence[str] | None = None
) -> Iterator[Parsed]:
    """`count` rows from a place that `scan` found. Raises InvalidRequest: there are fewer.

    Args:
        header: of a CSV file, if it is known; else it is read again.
    """
    if kind == "parquet":
        rows = _parquet_rows(_parquet(file), start, count)
    elif kind == "csv":
        header = header or csv_header(file)
        file.seek(start)
        rows = (row for _, row in _csv_rows(file, header))
    else:
        file.seek(start)
        rows = (row for _, row in _json_rows(file))
    for place in range(count):
        row = next(rows, None)
        if row is None:
            raise InvalidRequest(f"the file ends {count - place} rows early; it has changed since the job began")
        yield row


def _json_rows(file: BinaryIO) -> Iterator[tuple[int, Parsed]]:
    """Rows with where their lines begin; blank lines are none."""
    place = file.tell()
    for line in file:
        if line.strip():
            yield place, _json_row(line)
        place += len(line)


def _json_row(line: bytes) -> Parsed:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"the line is no JSON ({error}): {line[:80].decode(errors='replace').strip()!r}"
    if not isinstance(values, dict):
        return {}, f"the line is no JSON object: {line[:80].decode(errors='replace').strip()!r}"
    if not is_encodable("".join(values)):  # no output could name such a column
        return {}, f"a column's name holds half a character: {line[:80].decode(errors='replace').strip()!r}"
    if line.count(b"[") + line.count(b"{") > _DEEPEST and _is_deep(values):
        shallow = {name: value for name, value in values.items() if not isinstance(value, dict | list)}
        head = line[:80].decode(errors="replace").strip()
        return shallow, f"the line is nested over {_DEEPEST} levels deep: {head!r}"
    return values, None


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        nested = [of.values() if isinstance(of, dict) else of for of in level if isinstance(of, dict | list)]
        level = [item for of in nested for item in of]
    return bool(level)


def csv_header(file: BinaryIO) -> list[str]:
    """The names of the columns. Raises InvalidRequest."""
    file.seek(0)
    header = next(_records(file), (0, []))[1]
    if not header or len(set(header)) < len(header):
        raise InvalidRequest(f"the first line of a CSV file names its columns, each once; got {header[:20]}")
    if fault := _not_utf8(header):
        raise InvalidRequest(f"its header {fault}")
    return header


def _not_utf8(fields: Iterable[str]) -> str | None:
    """What is wrong with fields that are in another encoding."""
    for text in fields:
        if not is_encodable(text):
            raw = text.encode(errors="surrogateescape")[:40]
            return (
                f"is not UTF-8: got {raw!r}, which would be {raw.decode('latin-1')!r} in Latin-1; convert the file, "
                "for instance with iconv -f LATIN1 -t UTF-8 FILE"
            )
    return None


def _csv_rows(file: BinaryIO, header: Sequence[str] | None = None) -> Iterator[tuple[int, Parsed]]:
    if header is None:
        header = csv_header(file)
        file.seek(0)
        records = _records(file)
        next(records)
    else:
        records = _records(file)
    for start, record in records:
        fault = None
        if len(record) != len(header):
            fault = f"the row has {len(record)} fields, but there are {len(header)} columns"
        elif wrong := _not_utf8(record):
            fault = f"the row {wrong}"
        yield start, (dict(zip(header, record, strict=False)), fault)


def _records(file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """CSV records with where they begin; one may run over several lines."""
    csv.field_size_limit(_FIELD_LIMIT)
    begin = place = file.tell()
    ended = False

    def lines() -> Iterator[str]:
        nonlocal place, ended
        for line in file:
            encoding = "utf-8-sig" if place == 0 else "utf-8"
            place += len(line)
            yield line.decode(encoding, errors="surrogateescape")
        ended = True

    try:
        for record in csv.reader(lines()):
            if ended:  # within a record: whatever followed its open quote would be one field of it
                raise InvalidRequest(f"it is no CSV: the row at byte {begin} opens a quote that nothing closes")
            if record:
                yield begin, record
            begin = place
    except csv.Error as error:
        raise InvalidRequest(f"it is no CSV, near byte {place}: {error}") from error


def _parquet(file: BinaryIO) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    except pa.ArrowException as error:
        raise InvalidRequest(f"it is no Parquet file: {error}") from error


def _parquet_rows(file: pq.ParquetFile, start: int, count: int) -> Iterator[Parsed]:
    """Rows of the row groups in question; what goes before them in their first group is decoded and dropped."""
    groups: list[int] = []
    skip = start
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if not groups and skip >= size:
            skip -= size
            continue
        groups.append(group)
    for batch in file.iter_batches(batch_size=1024, row_groups=groups):
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        yield from arrow_rows(batch.slice(skip))
        skip = 0


def arrow_rows(batch: pa.RecordBatch | pa.Table) -> Iterator[Parsed]:
    """A batch's rows; what Python cannot hold (text that is no UTF-8, a day too late) makes only its own row bad."""
    try:
        for values in batch.to_pylist():
            yield values, None
    except (ValueError, OverflowError):
        for place in range(batch.num_rows):
            yield _arrow_row(batch.slice(place, 1))


def _arrow_row(row: pa.RecordBatch | pa.Table) -> Parsed:
    values, fault = {}, None
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            [values[name]] = column.to_pylist()
        except (ValueError, OverflowError) as error:
            fault = f"{name} cannot be read: {error}"
    return values, fault


def _joined(known: pa.DataType | None, value: Any) -> pa.DataType:
    """The type of a column that has held `known` and now holds `value`; text, in JSON, where nothing else fits both."""
    found = pa.null() if value is None else _KINDS.get(type(value), pa.large_string())
    if isinstance(value, int) and value not in _INT64:
        found = pa.large_string()
    if known is None or pa.types.is_null(known) or known == found:
        return found
    if pa.types.is_null(found):
        return known
    return pa.float64() if {known, found} == {pa.int64(), pa.float64()} else pa.large_string()


def encode(rows: Iterable[Mapping[str, Any]], kind: OutputFormat, schema: pa.Schema | None) -> bytes:
    """Rows as a file; those of OpenAI's format are JSON lines.

    Args:
        schema: the columns, for CSV and Parquet. Columns of large strings hold JSON, whatever the value.
    """
    if kind in ("jsonl", "openai"):
        return b"".join(_json_line(row) for row in rows)
    assert schema is not None
    if kind == "csv":
        text = io.StringIO(newline="")
        _write_csv(text, schema.names)
        for row in rows:
            _write_csv(text, [_csv_field(row.get(name)) for name in schema.names])
        return text.getvalue().encode(errors="replace")
    rows = list(rows)
    columns = [pa.array([_arrow_value(row.get(f.name), f.type) for row in rows], f.type) for f in schema]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), sink)
    return sink.getvalue()


def _json_line(row: Mapping[str, Any]) -> bytes:
    try:
        return _json_text(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a character: JSON can say it with escapes
        return _json_text(row).encode() + b"\n"


def _json_text(value: Any, *, ensure_ascii: bool = True) -> str:
    """Numbers that JSON has not, as data frames have them for what is missing, are null."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, default=_plain, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=ensure_ascii, default=_plain)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return list(map(_finite, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> str:
    """What Parquet holds and JSON does not."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _write_csv(text: io.StringIO, fields: Sequence[Any]) -> None:
    """A line. Quotes are also put around a lone carriage return, which Python before 3.13 leaves bare."""
    bare = any(isinstance(field, str) and "\r" in field for field in fields)
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL).writerow(fields)


def _csv_field(value: Any) -> Any:
    return _json_text(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _arrow_value(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_large_string(kind) and value is not None and not isinstance(value, str):
        return _json_text(value)
    if pa.types.is_float64(kind) and isinstance(value, int):
        return float(value)  # Arrow takes no integers that lose digits
    return value.encode(errors="replace").decode() if isinstance(value, str) else value
