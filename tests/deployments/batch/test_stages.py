"""The stages as Ray Data calls them, without Ray."""

import json

import pyarrow as pa
import pytest
import torch
from ray.data._internal.execution.interfaces import TaskContext

from deployments.batch.answering import Answering
from deployments.batch.config import BatchConfig
from deployments.batch.formats import FORMATS, encode
from deployments.batch.inputs import find_files
from deployments.batch.output import Output
from deployments.batch.pipeline import _gather, _scatter
from deployments.batch.plan import make_plan
from deployments.batch.routing import route_rows
from deployments.batch.rows import Work, order_by_adapters, read_request, result_schema
from deployments.batch.stages import Files, RouteStage, pack, unpack, unpacked
from lorauter.encoder import HashingEncoder
from lorauter.errors import ConfigError


@pytest.fixture
def stage(router, tmp_path, monkeypatch):
    """`stage(files)`: the routing stage of a route-only job."""
    version = router.catalog.save(tmp_path / "catalog")
    monkeypatch.setattr("deployments.batch.stages.load_encoder", lambda name: HashingEncoder())
    config = BatchConfig.parse({"catalog": str(tmp_path / "catalog"), "route_only": True})
    threads = torch.get_num_threads()
    yield lambda files=None: RouteStage(config, version, files)
    torch.set_num_threads(threads)


def test_a_shard_is_read_routed_and_written(stage, tmp_path) -> None:
    rows = [{"prompt": "add numbers"}, {"prompt": "rhyme lines", "x": 1}, {}, {"prompt": "add numbers"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = make_plan(*find_files(f"{tmp_path}/in.jsonl"), 3, "jsonl")
    route = stage(Files(plan, Output(str(tmp_path / "out"), "jsonl", None, result_schema(route_only=True))))
    for shard, (count, errors) in zip(plan.shards, ((3, 1), (1, 0)), strict=True):
        [row] = route(pack(shard)).to_pylist()
        done = unpacked(row)
        assert (done.shard, done.tally.rows, done.tally.errors) == (shard.number, count, errors)
    lines = [json.loads(line) for line in (tmp_path / "out" / "part-00000.jsonl").read_text().splitlines()]
    assert [line["tasks"] and line["tasks"][0]["name"] for line in lines] == ["sums", "poems", None]
    assert lines[1]["x"] == 1


@pytest.fixture
def task():
    """`task(number)`: be this task of Ray Data's."""
    yield lambda number: TaskContext.set_current(TaskContext(number, "gather"))
    TaskContext.reset_current()


@pytest.fixture
def gathered(task):
    """A batch of a data set as a piece of work."""
    task(0)
    return lambda table, **settings: _gather(table, BatchConfig.parse(settings), result_schema(route_only=True))


def test_rows_of_a_data_set_keep_their_columns_and_types(stage, gathered) -> None:
    table = pa.table({"prompt": ["add numbers", ""], "n": pa.array([1, 2], pa.int8()), "error": ["old", "older"]})
    work = gathered(table)
    assert [list(row.values) for row in unpack(work).rows] == [table.column_names] * 2
    routed = stage()(work)
    assert unpack(routed).order[0] == 1  # no adapters
    answered = _scatter(routed, result_schema(route_only=True))
    assert answered.schema.field("n").type == pa.int8()
    assert answered["n"].to_pylist() == [1, 2]
    assert answered["input_error"].to_pylist() == ["old", "older"]
    good, bad = answered["error"].to_pylist()
    assert good is None
    assert "empty" in bad
    assert answered["tasks"][0][0]["name"].as_py() == "sums"


def test_a_data_set_with_columns_of_the_added_names_may_be_refused(gathered) -> None:
    with pytest.raises(ConfigError, match="error"):
        gathered(pa.table({"prompt": ["x"], "error": ["old"]}), column_clash="refuse")


def test_equal_rows_of_a_data_set_draw_from_different_numbers_again_the_same(gathered, task) -> None:
    def seeds(number):
        task(number)
        batches = [pa.table({"prompt": ["Tell me a joke"] * 3}), pa.table({"x": [1], "prompt": ["Tell me a joke"]})]
        rows = [row for batch in batches for row in unpack(gathered(batch)).rows]
        return [read_request(row, BatchConfig()).sampling.seed for row in rows]

    assert len({*seeds(0), *seeds(1), *seeds(2)}) == 12
    assert seeds(1) == seeds(1)


@pytest.mark.parametrize("kind", FORMATS)
def test_bad_rows_of_any_kind_and_format_are_recorded_and_the_others_answered(
    kind, router, echoing, adapters, tmp_path
) -> None:
    rows = [
        {"prompt": "add numbers"},
        {"prompt": ""},
        {"prompt": None},
        {"prompt": "add numbers " * 9},
        {"prompt": "add numbers", "adapters": "missing"},
        {"prompt": "add numbers", "max_tokens": "many"},
        {"prompt": "rhyme", "adapters": '{"sums": 1}'},
    ]
    content = encode(rows, kind, pa.schema([(name, pa.string()) for name in ("prompt", "adapters", "max_tokens")]))
    broken = {"jsonl": b"{oh\n", "csv": b"oh\n", "parquet": b""}[kind]
    (tmp_path / f"in.{kind}").write_bytes(content + broken)
    plan = make_plan(*find_files(f"{tmp_path}/in.{kind}"), 10, "jsonl")
    work, config = Work(0, plan.read(plan.shards[0])), BatchConfig(prompts="plain")
    work.decisions = route_rows(router, work.rows, config)
    work.order = order_by_adapters(work.decisions)
    Answering(echoing, adapters, config).answer(work)
    tally = Output(str(tmp_path / "out"), "jsonl", None, result_schema(route_only=False)).write(work)
    answered = [json.loads(line) for line in (tmp_path / "out" / "part-00000.jsonl").read_text().splitlines()]
    said = ["", "empty", "empty" if kind == "csv" else "NoneType", "ContextLength", "AdapterNotFound", "max_tokens", ""]
    said += {"jsonl": ["no JSON"], "csv": ["1 fields"], "parquet": []}[kind]
    for row, words in zip(answered, said, strict=True):
        assert (words in row["error"], row["answer"]) == (True, None) if words else row["error"] is None
    assert (answered[0]["answer"], answered[0]["prompt_tokens"], answered[6]["answer"]) == ("sums", 11, "sums")
    assert (tally.rows, tally.errors) == (len(said), len(said) - 2)
