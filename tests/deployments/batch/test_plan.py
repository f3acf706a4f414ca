import json

import pytest

from deployments.batch.inputs import find_files
from deployments.batch.plan import Plan, make_plan
from lorauter.adapters import open_store
from lorauter.errors import ConfigError, InvalidRequest


def lines(*numbers):
    return "".join(json.dumps({"n": n}) + "\n" for n in numbers).encode()


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path) -> str:
    """An empty place for files."""
    return str(tmp_path / "in") if request.param == "folder" else request.getfixturevalue("bucket") + "/in"


def planned(uri, shard_rows=3, output="jsonl"):
    return make_plan(*find_files(uri), shard_rows, output)


def test_a_folders_files_are_one_input_and_hidden_ones_none(place) -> None:
    store = open_store(place)
    store.write("b.jsonl", lines(*range(4, 6)))
    store.write("a/one.jsonl", lines(*range(4)))
    store.write("_old/c.jsonl", lines(9))
    store.write("README.txt", b"words")
    plan = Plan.from_json(json.loads(json.dumps(planned(place).to_json())))
    assert [file.key for file in plan.files] == ["a/one.jsonl", "b.jsonl"]
    assert plan.rows == 6
    rows = [row for shard in plan.shards for row in plan.read(shard)]
    assert [row.values["n"] for row in rows] == [row.number for row in rows] == list(range(6))
    assert [shard.rows for shard in plan.shards] == [3, 1, 2]


def test_shards_grow_over_all_files_up_to_the_most(place) -> None:
    store = open_store(place)
    store.write("a.jsonl", lines(*range(100)))
    store.write("b.jsonl", lines(*range(900)))
    assert [shard.rows for shard in planned(place, 300).shards] == [64, 36, 300, 300, 300]
    assert [shard.rows for shard in planned(place, 1000).shards] == [64, 36, 300, 600]


def test_one_file_is_an_input(place) -> None:
    open_store(place).write("a.csv", b"x,y\n1,2\n3,4\n")
    plan = planned(f"{place}/a.csv", output="parquet")
    assert [row.values for shard in plan.shards for row in plan.read(shard)] == [
        {"x": "1", "y": "2"},
        {"x": "3", "y": "4"},
    ]
    assert plan.schema.names == ["x", "y"]


def test_what_is_no_input_is_refused(place) -> None:
    store = open_store(place)
    for uri in (place, f"{place}/none.jsonl"):
        with pytest.raises(ConfigError):
            find_files(uri)
    store.write("a.jsonl", lines(1))
    store.write("b.csv", b"x\n1\n")
    with pytest.raises(ConfigError, match="csv, jsonl"):
        find_files(place)
    store.write("bad.parquet", b"no")
    with pytest.raises(ConfigError, match=r"bad\.parquet"):
        planned(f"{place}/bad.parquet")


def test_a_file_that_changes_under_the_job_is_noticed(place) -> None:
    store = open_store(place)
    store.write("a.jsonl", lines(1, 2, 3))
    plan = planned(place)
    store.write("a.jsonl", lines(1))
    with pytest.raises(InvalidRequest, match=r"a\.jsonl"):
        plan.read(plan.shards[0])


def test_an_empty_file_has_no_shards(place) -> None:
    open_store(place).write("a.jsonl", b"\n")
    assert planned(place).shards == ()


@pytest.mark.parametrize("output", ["jsonl", "parquet"])
def test_columns_of_added_names_are_renamed_alike_in_all_rows(place, output) -> None:
    store = open_store(place)
    store.write("a.jsonl", b'{"answer": "x"}\n{"error": "old", "input_answer": 1}\n')
    store.write("b.jsonl", b'{"prompt": "y"}\n')
    plan = Plan.from_json(json.loads(json.dumps(make_plan(*find_files(place), 3, output, ["answer"]).to_json())))
    assert plan.renamed == {"answer": "input_input_answer"}
