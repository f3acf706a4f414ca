import gzip
import json

import pytest

from deployments.batch.inputs import InputFile, InputFiles, find_files, format_of
from deployments.batch.plan import ShardReader, make_plan
from lorauter.adapters import open_store
from lorauter.adapters.store import MemoryStore
from lorauter.errors import ConfigError, InvalidRequest


def lines(*numbers):
    return "".join(json.dumps({"n": n}) + "\n" for n in numbers).encode()


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path) -> str:
    """An empty place for files."""
    return str(tmp_path / "in") if request.param == "folder" else request.getfixturevalue("bucket") + "/in"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.JSONL", "jsonl"),
        ("a.ndjson.gz", "jsonl"),
        ("b/a.Json", "jsonl"),
        ("a.v1.csv.GZ", "csv"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.jsonl.zst", None),
        ("a", None),
        ("jsonl", None),
    ],
)
def test_a_format_is_told_by_the_names_end(name, kind) -> None:
    assert format_of(name) == kind


def test_every_file_of_a_folder_is_read_or_said_to_be_left_out(place) -> None:
    store = open_store(place)
    store.write("part-0.jsonl", lines(0))
    store.write("part-1.jsonl.gz", gzip.compress(lines(1)))
    store.write("part-2.json", lines(2))
    store.write("part-3.JSONL", lines(3))
    store.write("part-4.jsonl", gzip.compress(lines(4)))  # packed, whatever it is called
    store.write("part-5.jsonl.gz", lines(5))  # and unpacked on its way here
    left_out = ["_old/part-9.jsonl", "README.txt", "part-6.jsonl.zst", *[f"x{i}.bin" for i in range(9)]]
    for key in left_out:
        store.write(key, b"x")
    said = []
    found = find_files(place, said.append)
    plan = make_plan(*found, 10, "jsonl")
    assert [row.values for shard in plan.shards for row in plan.read(shard)] == [{"n": n} for n in range(6)]
    [told] = said
    assert f"{len(left_out)} files" in told
    assert all(name in told for name in ("_old/part-9.jsonl", "README.txt", "part-6.jsonl.zst", "and 7 more"))


def test_a_folder_may_be_called_like_a_file(place) -> None:
    open_store(place).write("rows.jsonl/part-0.jsonl", lines(1))
    plan = make_plan(*find_files(f"{place}/rows.jsonl"), 10, "jsonl")
    assert [file.key for file in plan.files] == ["part-0.jsonl"]


def test_what_is_not_read_is_named_where_nothing_else_is_there(place) -> None:
    open_store(place).write("rows.xlsx", b"x")
    for uri in (place, f"{place}/rows.xlsx"):
        with pytest.raises(ConfigError, match=r"no known format.*\.jsonl") as caught:
            find_files(uri)
        assert "rows.xlsx" in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_compressed_file_is_unpacked_once_however_many_shards_it_has(kind, monkeypatch) -> None:
    content = lines(*range(500)) if kind == "jsonl" else b"n\n" + b"".join(b"%d\n" % n for n in range(500))
    store = MemoryStore({f"a.{kind}.gz": gzip.compress(content), f"b.{kind}": content})
    monkeypatch.setattr("deployments.batch.plan.open_store", lambda uri: store)
    files = tuple(InputFile(key, *store.fingerprint(key)) for key in store.files())
    plan = make_plan(store, kind, files, 64, "jsonl")
    store.reads.clear()
    reader = ShardReader(plan)
    rows = [row for shard in plan.shards for row in reader.read(shard)]
    assert [int(row.values["n"]) for row in rows] == [*range(500)] * 2
    assert store.reads.count(f"a.{kind}.gz") == 1
    assert reader.read(plan.shards[0]) == plan.read(plan.shards[0])  # back to the first, as a lost worker's
    reader.close()


@pytest.mark.parametrize("damage", [lambda raw: raw[:-20], lambda raw: raw[:40] + b"\xff" * 40 + raw[80:]])
def test_a_damaged_compressed_file_is_refused_by_its_name(place, damage) -> None:
    packed = gzip.compress("".join(f'{{"n": "{n * 7919 % 1000}"}}\n' for n in range(1000)).encode())
    store = open_store(place)
    store.write("a.jsonl.gz", packed)
    plan = make_plan(*find_files(place), 400, "jsonl")
    store.write("a.jsonl.gz", damage(packed))
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz"):
        make_plan(*find_files(place), 400, "jsonl")
    with pytest.raises(InvalidRequest, match=r"a\.jsonl\.gz"):
        plan.read(plan.shards[-1])


def test_what_was_opened_is_closed(tmp_path) -> None:
    store = open_store(tmp_path)
    store.write("a.gz", gzip.compress(b"x"))
    store.write("b", b"y")
    files = InputFiles(store)
    for _ in range(2):
        with files.open("a.gz") as kept:
            kept.seek(0)
            assert kept.read() == b"x"
        with files.open("b") as file:
            assert file.read() == b"y"
        assert file.closed
    assert not kept.closed
    files.close()
    assert kept.closed
