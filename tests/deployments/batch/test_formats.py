import csv
import io
import json
import struct
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deployments.batch.formats import FORMATS, arrow_rows, encode, read_rows, scan
from lorauter.errors import InvalidRequest


def parquet(rows, **options):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def every_row(content, kind, shard_rows):
    """All rows, shard by shard, and the shards' sizes."""
    file = io.BytesIO(content)
    starts = scan(file, kind, lambda before: shard_rows).starts
    return [list(read_rows(io.BytesIO(content), kind, *start)) for start in starts], [rows for _, rows in starts]


ROWS = [{"id": str(i), "text": f'Zeile "{i}",\nzwei ü'} for i in range(7)]


@pytest.mark.parametrize("shard_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("kind", FORMATS)
def test_shards_hold_every_row_once_and_in_order(kind, shard_rows) -> None:
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    shards, sizes = every_row(encode(ROWS, kind, schema), kind, shard_rows)
    assert [values for shard in shards for values, _ in shard] == ROWS
    assert sizes == [len(shard) for shard in shards]
    assert all(size == shard_rows for size in sizes[:-1])
    assert all(fault is None for shard in shards for _, fault in shard)


@pytest.mark.parametrize("kind", FORMATS)
def test_shards_may_grow_with_what_is_before_them(kind) -> None:
    content = encode(ROWS, kind, pa.schema([("id", pa.string()), ("text", pa.string())]))
    starts = scan(io.BytesIO(content), kind, lambda before: max(1, 2 * before)).starts
    assert [rows for _, rows in starts] == [1, 2, 4]


def test_rows_of_parquet_are_found_across_row_groups() -> None:
    rows = [{"n": i} for i in range(100)]
    shards, _ = every_row(parquet(rows, row_group_size=7), "parquet", 11)
    assert [values for shard in shards for values, _ in shard] == rows


def test_lines_that_are_no_rows_are_faults_and_blank_ones_nothing() -> None:
    content = b'{"a": 1}\n\n  \nnot json\n[1]\n{"a": \xff}\n{"\\ud800": 1}\n{"a": 2}'
    [shard], _ = every_row(content, "jsonl", 10)
    assert [values for values, _ in shard] == [{"a": 1}, {}, {}, {}, {}, {"a": 2}]
    assert [fault is None for _, fault in shard] == [True, False, False, False, False, True]


def test_a_line_that_is_nested_deeper_than_can_be_written_is_a_fault() -> None:
    def nested(levels: int) -> bytes:
        return b'{"id": 1, "a": ' + b"[" * levels + b"NaN" + b"]" * levels + b"}\n"

    [shard], _ = every_row(nested(98) + nested(150) + nested(400) + b'{"a": "' + b"[" * 200 + b'"}\n', "jsonl", 10)
    assert ["nested" in (fault or "") for _, fault in shard] == [False, True, True, False]
    assert shard[2][0] == {"id": 1}
    encode([values for values, _ in shard], "jsonl", None)


def test_a_lone_carriage_return_of_csv_comes_back() -> None:
    rows = [{"a": "one\rtwo", "b": ""}, {"a": "\r", "b": "x"}, {"a": "y", "b": "z"}]
    content = encode(rows, "csv", pa.schema([("a", pa.string()), ("b", pa.string())]))
    [shard], _ = every_row(content, "csv", 10)
    assert [values for values, _ in shard] == rows == list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def test_csv_rows_of_another_length_are_faults() -> None:
    [shard], _ = every_row(b"\xef\xbb\xbfa,b\r\n1,2\r\n3\r\n4,5,6\r\n\r\n7,8\r\n", "csv", 10)
    assert [fault is None for _, fault in shard] == [True, False, False, True]
    assert shard[0][0] == {"a": "1", "b": "2"}


def test_rows_of_arrow_that_python_cannot_hold_are_faults() -> None:
    offsets = pa.py_buffer(struct.pack("3i", 0, 2, 4))
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ok\xff\xfe")])
    file = io.BytesIO()
    table = pa.table({"id": [1, 2], "text": text, "day": pa.array([1, 10**7], pa.date32())})
    pq.write_table(table, file)
    [shard], _ = every_row(file.getvalue(), "parquet", 10)
    assert shard == list(arrow_rows(table))
    assert shard[0] == ({"id": 1, "text": "ok", "day": date(1970, 1, 2)}, None)
    assert shard[1][0] == {"id": 2}
    assert "cannot be read" in str(shard[1][1])


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"a,a\n1,2\n", "csv"),
        (b"", "csv"),
        (b'a,b\n1,2\n3,"the rest\n5,6\n7,8\n', "csv"),  # two rows would be lost in the last field
        (b"PAR1 no", "parquet"),
    ],
)
def test_what_is_no_file_of_its_kind_is_refused(content, kind) -> None:
    with pytest.raises(InvalidRequest):
        scan(io.BytesIO(content), kind, lambda before: 10)


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        ("prompt,catégorie\nhello,1\n".encode("latin-1"), "csv", "header is not UTF-8.*catégorie.*iconv"),
        ("prompt,catégorie\nhello,1\n".encode("utf-16"), "csv", "UTF-16.*iconv"),
        ("prompt,id\nhello,1\n".encode("utf-16-le"), "csv", "UTF-16-LE"),
        ("prompt,id\nhello,1\n".encode("utf-32"), "csv", "UTF-32"),
        ('{"prompt": "a"}\n'.encode("utf-16"), "jsonl", "UTF-16"),
        ('{"prompt": "a"}\n'.encode("utf-16-be"), "jsonl", "UTF-16-BE"),
        (b'[{"prompt": "a"},\n {"prompt": "b"}]\n', "jsonl", "JSON lines.*jq"),
        (b'\n[\n  {"prompt": "a"}\n]\n', "jsonl", "JSON lines.*jq"),
        (b'{\n  "prompt": "a"\n}\n', "jsonl", "JSON lines.*jq"),
    ],
)
def test_what_would_make_every_row_wrong_is_one_clear_line(content, kind, said) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        scan(io.BytesIO(content), kind, lambda before: 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark_of_utf_8_is_no_part_of_the_text(kind) -> None:
    content = {"jsonl": '{"a": "ü"}\n', "csv": "a\nü\n"}[kind].encode("utf-8-sig")
    assert every_row(content, kind, 10)[0] == [[({"a": "ü"}, None)]]


def test_a_row_in_another_encoding_says_so_and_is_not_lost() -> None:
    [shard], _ = every_row("a,b\n1,ü\n2,x\n".encode("latin-1"), "csv", 10)
    (values, fault), good = shard
    assert values["a"] == "1"
    assert "not UTF-8" in fault
    assert "'ü' in Latin-1" in fault
    assert good == ({"a": "2", "b": "x"}, None)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_has_shrunk_is_not_read_as_if_it_had_not(kind) -> None:
    content = encode(ROWS, kind, pa.schema([("id", pa.string()), ("text", pa.string())]))
    [(start, rows)] = scan(io.BytesIO(content), kind, lambda before: 10).starts
    with pytest.raises(InvalidRequest, match="changed"):
        list(read_rows(io.BytesIO(content), kind, start, rows + 1))


def test_columns_of_jsonl_have_the_type_that_fits_all_rows() -> None:
    rows = [
        {"int": 1, "real": 2**60 + 1, "text": None, "mixed": 1, "nested": {"a": 1}, "empty": None},
        {"int": 2, "real": 0.5, "text": "x", "mixed": "y", "late": True, "big": 1 << 70},
    ]
    content = encode(rows, "jsonl", None)
    schema = scan(io.BytesIO(content), "jsonl", lambda before: 10).schema
    assert schema is not None
    table = pq.read_table(io.BytesIO(encode(rows, "parquet", schema)))
    assert table.to_pylist() == [
        {
            "int": 1,
            "real": float(2**60),
            "text": None,
            "mixed": "1",
            "nested": '{"a": 1}',
            "empty": None,
            "late": None,
            "big": None,
        },
        {
            "int": 2,
            "real": 0.5,
            "text": "x",
            "mixed": "y",
            "nested": None,
            "empty": None,
            "late": True,
            "big": str(1 << 70),
        },
    ]


def test_parquets_own_types_come_through_every_format() -> None:
    row = {"day": date(2026, 1, 2), "raw": b"\x00\xff", "list": [1, 2], "text": "ü"}
    schema = pa.Table.from_pylist([row]).schema
    assert pq.read_table(io.BytesIO(encode([row], "parquet", schema))).to_pylist() == [row]
    assert json.loads(encode([row], "jsonl", None)) == {**row, "day": "2026-01-02", "raw": "AP8="}
    assert encode([row], "csv", schema).decode().splitlines()[1].endswith('"[1, 2]",ü')


@pytest.mark.parametrize("kind", FORMATS)
def test_half_a_character_stops_no_part(kind) -> None:
    schema = pa.schema([("text", pa.string())])
    assert encode([{"text": "half \ud800"}, {"text": "whole"}], kind, schema).count(b"whole") >= 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_numbers_that_json_has_not_make_no_line_that_is_none(kind) -> None:
    """Data frames have NaN where a number is missing."""
    schema = pa.schema([("text", pa.string()), ("nested", pa.large_string())])
    row = {"text": "ü", "nested": {"a": [float("nan"), 1.5, float("-inf")], "b": (float("inf"),)}}
    content = encode([row if kind == "csv" else {**row, "plain": float("nan")}], kind, schema)
    if kind == "jsonl":
        read = json.loads(content, parse_constant=pytest.fail)
        assert (read["text"], read["plain"]) == ("ü", None)
        nested = read["nested"]
    elif kind == "csv":
        nested = json.loads(next(csv.DictReader(io.StringIO(content.decode())))["nested"], parse_constant=pytest.fail)
    else:
        nested = json.loads(pq.read_table(io.BytesIO(content)).to_pylist()[0]["nested"], parse_constant=pytest.fail)
    assert nested == {"a": [None, 1.5, None], "b": [None]}
