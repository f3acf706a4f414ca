"""JSONL, CSV and Parquet: where a file's rows begin, some of its rows, and rows as a file. Knows no stores, no jobs."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from deployments.batch.config import Format
from lorauter.errors import InvalidRequest
from lorauter.tasks import is_encodable

FORMATS: tuple[Format, ...] = ("jsonl", "csv", "parquet")
Parsed = tuple[dict[str, Any], str | None]
"""A row's columns, and why it could not be read."""

_FIELD_LIMIT = 1 << 27  # characters of a CSV field
_INT64 = range(-(1 << 63), 1 << 63)
_KINDS: Mapping[type, pa.DataType] = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
}


class Scan:
    """What a first reading finds out.

    Attributes:
        starts: of each shard's rows the place of the first (a byte, or in Parquet a row) and how many they are.
        schema: the columns as Parquet has them; for JSONL only if they are asked for.
    """

    def __init__(self) -> None:
        self.starts: list[tuple[int, int]] = []
        self.schema: pa.Schema | None = None


def scan(file: BinaryIO, kind: Format, shard_rows: Callable[[int], int], *, columns: bool) -> Scan:
    """Read a file through once, or of Parquet its footer.

    Args:
        shard_rows: how many rows a shard takes at most, by the number of the file's rows before it.
        columns: whether the columns of JSONL are wanted, for which every row is parsed.

    Raises:
        InvalidRequest: it is no file of its kind.
    """
    result = Scan()
    if kind == "parquet":
        parquet = _parquet(file)
        total, start = parquet.metadata.num_rows, 0
        while start < total:
            result.starts.append((start, min(shard_rows(start), total - start)))
            start += result.starts[-1][1]
        result.schema = parquet.schema_arrow
        return result
    seen: dict[str, pa.DataType] = {}
    rows = _csv_rows(file) if kind == "csv" else _json_rows(file, parse=columns)
    end = 0
    for number, (start, (values, _)) in enumerate(rows):
        if number == end:
            result.starts.append((start, 0))
            end += shard_rows(number)
        result.starts[-1] = (result.starts[-1][0], result.starts[-1][1] + 1)
        if kind == "jsonl" and columns:
            for name, value in values.items():
                seen[name] = _joined(seen.get(name), value)
    if kind == "csv":
        file.seek(0)
        result.schema = pa.schema([(name, pa.string()) for name in csv_header(file)])
    elif columns:
        result.schema = pa.schema([(n, pa.string() if pa.types.is_null(t) else t) for n, t in seen.items()])
    return result


def read_rows(file: BinaryIO, kind: Format, start: int, count: int) -> Iterator[Parsed]:
    """`count` rows from a place that `scan` found. Raises InvalidRequest: there are fewer."""
    if kind == "parquet":
        rows = _parquet_rows(_parquet(file), start, count)
    elif kind == "csv":
        header = csv_header(file)
        file.seek(start)
        rows = (row for _, row in _csv_rows(file, header))
    else:
        file.seek(start)
        rows = (row for _, row in _json_rows(file, parse=True))
    for place in range(count):
        row = next(rows, None)
        if row is None:
            raise InvalidRequest(f"the file ends {count - place} rows early; it has changed since the job began")
        yield row


def _json_rows(file: BinaryIO, *, parse: bool) -> Iterator[tuple[int, Parsed]]:
    """Rows with where their lines begin; blank lines are none."""
    place = 0 if not file.seekable() else file.tell()
    for line in file:
        if line.strip():
            yield place, _json_row(line) if parse else ({}, None)
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
    return values, None


def csv_header(file: BinaryIO) -> list[str]:
    """The names of the columns. Raises InvalidRequest."""
    file.seek(0)
    header = next(_records(file), (0, []))[1]
    if not header or len(set(header)) < len(header):
        raise InvalidRequest(f"the first line of a CSV file names its columns, each once; got {header[:20]}")
    return header


def _csv_rows(file: BinaryIO, header: list[str] | None = None) -> Iterator[tuple[int, Parsed]]:
    if header is None:
        header = csv_header(file)
        file.seek(0)
        records = _records(file)
        next(records)
    else:
        records = _records(file)
    for start, record in records:
        if len(record) == len(header):
            yield start, (dict(zip(header, record, strict=True)), None)
        else:
            fault = f"the row has {len(record)} fields, but there are {len(header)} columns"
            yield start, (dict(zip(header, record, strict=False)), fault)


def _records(file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """CSV records with where they begin; one may run over several lines."""
    csv.field_size_limit(_FIELD_LIMIT)
    begin = place = file.tell()

    def lines() -> Iterator[str]:
        nonlocal place
        for line in file:
            encoding = "utf-8-sig" if place == 0 else "utf-8"
            place += len(line)
            yield line.decode(encoding, errors="surrogateescape")

    try:
        for record in csv.reader(lines()):
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


def encode(rows: Iterable[Mapping[str, Any]], kind: Format, schema: pa.Schema | None) -> bytes:
    """Rows as a file.

    Args:
        schema: the columns, for CSV and Parquet. Columns of large strings hold JSON, whatever the value.
    """
    if kind == "jsonl":
        return b"".join(_json_line(row) for row in rows)
    assert schema is not None
    if kind == "csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(schema.names)
        writer.writerows([_csv_field(row.get(name)) for name in schema.names] for row in rows)
        return text.getvalue().encode(errors="replace")
    rows = list(rows)
    columns = [pa.array([_arrow_value(row.get(f.name), f.type) for row in rows], f.type) for f in schema]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), sink)
    return sink.getvalue()


def _json_line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, default=_plain).encode() + b"\n"
    except UnicodeEncodeError:  # half a character: JSON can say it with escapes
        return json.dumps(row, default=_plain).encode() + b"\n"


def _plain(value: Any) -> str:
    """What Parquet holds and JSON does not."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _csv_field(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=_plain) if isinstance(value, list | dict) else value


def _arrow_value(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_large_string(kind) and value is not None and not isinstance(value, str):
        return json.dumps(value, default=_plain)
    if pa.types.is_float64(kind) and isinstance(value, int):
        return float(value)  # Arrow takes no integers that lose digits
    return value.encode(errors="replace").decode() if isinstance(value, str) else value
