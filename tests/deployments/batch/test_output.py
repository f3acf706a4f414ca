import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from deployments.batch.output import Output, check_same, read_manifest, write_manifest
from deployments.batch.rows import SourceRow, Work, decision_columns, result_schema
from deployments.batch.tally import Tally
from deployments.openai_answers import error_answer
from lorauter.adapters import open_store
from lorauter.errors import ConfigError, InvalidRequest
from lorauter.routing import AdapterWeight, RoutingDecision, TaskScore

DECISION = RoutingDecision("v", (TaskScore("sums", 0.9, 0.8),), (AdapterWeight("a", "1", 1.0),), 0.75)
GOOD = {
    **decision_columns(DECISION),
    "left_out": [],
    "answer": "4",
    "finish_reason": "stop",
    "prompt_tokens": 3,
    "completion_tokens": 1,
    "latency_s": 0.5,
}
BAD = {**dict.fromkeys(GOOD), **decision_columns(InvalidRequest("empty"))}


def work(shard=0):
    return Work(shard, [SourceRow(0, {"id": 1, "answer": "old"}), SourceRow(1, {"id": 2})], results=[GOOD, BAD])


def make(uri, kind):
    source = None if kind == "jsonl" else pa.schema([("id", pa.int64()), ("answer", pa.string())])
    return Output(str(uri), kind, source, result_schema(route_only=False), {"answer": "input_answer"})


def parts(path, kind):
    content = path.read_bytes()
    if kind == "jsonl":
        return [json.loads(line) for line in content.splitlines()]
    if kind == "parquet":
        return pq.read_table(io.BytesIO(content)).to_pylist()
    return [
        {name: json.loads(value) if name in ("tasks", "adapters") and value else value for name, value in row.items()}
        for row in csv.DictReader(io.StringIO(content.decode()))
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_part_holds_the_rows_with_what_was_added(tmp_path, kind) -> None:
    assert make(tmp_path, kind).write(work()).errors == 1
    good, bad = parts(tmp_path / f"part-00000.{kind}", kind)
    assert (str(good["id"]), good["answer"], good["input_answer"]) == ("1", "4", "old")
    assert good["tasks"] == [{"name": "sums", "score": 0.9, "probability": 0.8}]
    assert good["adapters"] == [{"name": "a", "version": "1", "weight": 1.0}]
    assert not good["error"]
    assert str(bad["id"]) == "2"
    assert bad["error"] == "InvalidRequest: empty"
    assert not bad["answer"]


@pytest.mark.parametrize("plain", [False, True])
def test_openais_format_has_responses_as_the_api_gives_them(tmp_path, plain) -> None:
    chat = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    rows = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": '{"model": "poet", "prompt": "hi"}'},
        {"prompt": "2 + 2", "answer": "4"},
        {"custom_id": "d", "method": "GET", "url": "/v1/chat/completions", "body": chat},
        {},
    ]
    error = InvalidRequest("needed POST", param="url")
    done = Work(3, [SourceRow(i, values) for i, values in enumerate(rows)], decisions=[DECISION] * 3 + [error] * 2)
    done.results = [GOOD, GOOD, GOOD, BAD, BAD]
    done.errors = {place: error_answer(error, "operator") for place in (3, 4)}
    output = Output(str(tmp_path), "openai", None, result_schema(route_only=False), plain=plain)
    assert output.write(done).errors == 2
    assert list(output.done(4)) == [3]
    lines = [json.loads(line) for line in (tmp_path / "part-00003.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "b", "row-2", "d", "row-4"]
    assert [line["response"]["status_code"] for line in lines] == [200, 200, 200, 400, 400]
    assert all(line["error"] is None for line in lines)
    assert len({line["id"] for line in lines}) == 5
    first, second, third, fourth, _ = (line["response"]["body"] for line in lines)
    answered = ChatCompletion.model_validate(first)
    assert (answered.model, answered.choices[0].message.content, answered.choices[0].finish_reason) == (
        "base",
        "4",
        "stop",
    )
    assert answered.usage.total_tokens == 4
    assert first["lorauter"]["adapters"] == [{"name": "a", "version": "1", "weight": 1.0}]
    assert Completion.model_validate(second).choices[0].text == "4"
    assert second["model"] == "poet"
    assert third["object"] == ("text_completion" if plain else "chat.completion")
    assert third["model"] == "lorauter"
    assert fourth["error"]["param"] == "url"


def test_a_shard_is_done_once_its_part_and_its_record_are_there(store_uri) -> None:
    output, store = make(store_uri, "jsonl"), open_store(store_uri)
    assert output.done(3) == {}
    for shard in (0, 2):
        output.write(work(shard))
    tally = Tally.of(work().results)
    assert output.done(3) == {0: tally, 2: tally}
    store.delete("_shards/part-00002.json")
    assert output.done(3) == {0: tally}
    output.write(work(2))
    store.delete("part-00000.jsonl")
    assert list(output.done(3)) == [2]


@pytest.fixture(params=["folder", "s3"])
def store_uri(request, tmp_path) -> str:
    """An empty place."""
    return str(tmp_path / "out") if request.param == "folder" else request.getfixturevalue("bucket") + "/out"


def test_a_manifest_is_read_back_and_what_is_none_is_refused(store_uri) -> None:
    assert read_manifest(store_uri) is None
    write_manifest(store_uri, {"format": 1, "x": 2})
    assert read_manifest(store_uri) == {"format": 1, "x": 2}
    write_manifest(store_uri, {"format": 99})
    with pytest.raises(ConfigError, match="99"):
        read_manifest(store_uri)
    open_store(store_uri).delete("_manifest.json")
    open_store(store_uri).write("precious.txt", b"x")
    with pytest.raises(ConfigError, match=r"precious\.txt"):
        read_manifest(store_uri)


def test_a_job_with_other_settings_is_refused_by_what_differs() -> None:
    before = {"settings": {"sampling": {"seed": 1}}, "catalog": {"version": "a"}}
    check_same("out", before, json.loads(json.dumps(before)))
    with pytest.raises(ConfigError, match=r"settings\.sampling\.seed was 1, and is 2 now") as caught:
        check_same("out", before, {**before, "settings": {"sampling": {"seed": 2}}})
    assert caught.value.setting == "settings.sampling.seed"


def test_tallies_add_up() -> None:
    one = Tally.of([GOOD, BAD])
    assert (one.rows, one.errors, one.completion_tokens, one.tasks, one.adapters) == (2, 1, 1, {"sums": 1}, {"a": 1})
    assert one.confidence[7] == 1
    assert one.kinds == {"InvalidRequest": 1}
    two = Tally.sum([one, one])
    assert (two.rows, two.tasks, two.confidence[7], two.kinds) == (4, {"sums": 2}, 2, {"InvalidRequest": 2})
    assert Tally(**json.loads(json.dumps(two.to_json()))) == two


def test_a_row_of_the_base_model_alone_and_full_confidence_have_their_places() -> None:
    tally = Tally.of([decision_columns(RoutingDecision("v", (), (), 1.0))])
    assert (tally.base, tally.confidence[9]) == (1, 1)
