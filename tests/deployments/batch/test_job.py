"""What a job checks and notes before it needs Ray; tests/integration runs whole ones."""

import json
from contextlib import nullcontext

import pytest

from deployments.batch import job
from deployments.batch.config import BatchConfig
from deployments.batch.job import run_job
from deployments.batch.tally import Tally
from lorauter.catalog import prune_versions, with_tasks
from lorauter.encoder import HashingEncoder
from lorauter.errors import BatchError, ConfigError


@pytest.fixture
def run(router, tmp_path):
    """`run(input, output, **settings)`: a job on the tiny catalog; names are below the test's folder."""
    router.catalog.save(tmp_path / "catalog")

    def run(input="in", output="out", **settings):
        config = BatchConfig.parse({"catalog": str(tmp_path / "catalog"), "route_only": True, **settings})
        return run_job(str(tmp_path / input), str(tmp_path / output), config)

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows.jsonl").write_text("\n")
    return run


def test_a_job_without_rows_is_complete(run, tmp_path) -> None:
    assert run().tally.rows == 0
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert (manifest["state"], manifest["counts"]["rows"], manifest["counts"]["total"]) == ("complete", 0, 0)
    assert run().total == 0


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"input": "none.jsonl"}, "does not exist"),
        ({"input": "nothing"}, "no known format"),
        ({"output": "in/out"}, "lies in the input"),
        ({"output": "in"}, "lies in the input"),
        ({"output": "out.jsonl"}, "named like a file"),
        ({"output": "catalog"}, "not a batch job's"),
    ],
)
def test_places_that_would_do_harm_are_refused(run, places, message) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**places)


def test_a_job_is_resumed_as_it_was_begun_or_not_at_all(run, router, tmp_path) -> None:
    run()
    run(max_errors=3, route_workers={"workers": 7})
    for settings, name in (({"shard_rows": 5}, "shard_rows"), ({"format": "csv"}, "output_format")):
        with pytest.raises(ConfigError, match=name):
            run(**settings)
    (tmp_path / "in" / "rows.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match=r"input\.files"):
        run()


def test_a_catalog_that_is_not_there_is_refused(run, tmp_path) -> None:
    with pytest.raises(ConfigError, match="no catalog"):
        run(catalog=str(tmp_path / "in"))


def test_columns_of_the_added_names_are_refused_where_the_job_says_so(run, tmp_path) -> None:
    (tmp_path / "in" / "rows.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y", "error": "from upstream"}\n')
    with pytest.raises(ConfigError, match=r"error.*column_clash: keep.*input_error"):
        run(column_clash="refuse")


def test_openais_format_needs_answers(run) -> None:
    with pytest.raises(ConfigError, match="route_only"):
        run(format="openai")


@pytest.fixture
def cut_off(monkeypatch):
    """A job that gets as far as Ray, and no further; the versions that it would have used."""
    used = []

    def killed(self, version):
        used.append(version)
        raise KeyboardInterrupt

    monkeypatch.setattr(job._Job, "run", killed)
    monkeypatch.setattr(job, "_ray", lambda *arguments: nullcontext())
    return used


def test_a_job_goes_on_with_its_versions_whatever_is_published_meanwhile(
    run, router, cut_off, tmp_path, make_task
) -> None:
    (tmp_path / "in" / "rows.jsonl").write_text('{"prompt": "add numbers"}\n')
    with pytest.raises(KeyboardInterrupt):
        run()
    pinned = json.loads((tmp_path / "out" / "_manifest.json").read_text())["catalog"]
    assert pinned == {
        "uri": str(tmp_path / "catalog"),
        "version": router.catalog.version,
        "adapters": dict(router.catalog.adapters),
    }
    other = with_tasks(router.catalog, [make_task("weather")], HashingEncoder()).save(tmp_path / "catalog")
    with pytest.raises(KeyboardInterrupt):
        run()
    assert cut_off == [router.catalog.version] * 2
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["catalog"] == pinned
    with pytest.raises(KeyboardInterrupt):
        run(output="begun later")
    assert cut_off[2] == other


def test_a_job_whose_catalog_was_deleted_meanwhile_says_so(run, router, cut_off, tmp_path, make_task) -> None:
    (tmp_path / "in" / "rows.jsonl").write_text('{"prompt": "add numbers"}\n')
    with pytest.raises(KeyboardInterrupt):
        run()
    with_tasks(router.catalog, [make_task("weather")], HashingEncoder()).save(tmp_path / "catalog")
    assert prune_versions(tmp_path / "catalog", keep=0, older_than_s=-1) == [router.catalog.version]
    with pytest.raises(ConfigError, match=f"version {router.catalog.version}.*not there any more.*another output"):
        run()
    router.catalog.save(tmp_path / "catalog")
    with pytest.raises(KeyboardInterrupt):
        run()


def test_a_job_that_is_complete_needs_its_catalog_no_more(run, router, tmp_path, make_task) -> None:
    run()
    with_tasks(router.catalog, [make_task("weather")], HashingEncoder()).save(tmp_path / "catalog")
    prune_versions(tmp_path / "catalog", keep=0, older_than_s=-1)
    assert run().total == 0


def test_a_job_that_errors_have_stopped_does_not_end_well_when_it_is_started_again(run, cut_off, tmp_path) -> None:
    (tmp_path / "in" / "rows.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(KeyboardInterrupt):
        run()
    (tmp_path / "out" / "_shards").mkdir()
    (tmp_path / "out" / "part-00000.jsonl").write_text("{}\n")
    (tmp_path / "out" / "_shards" / "part-00000.json").write_text(json.dumps(Tally(rows=1, errors=1).to_json()))
    with pytest.raises(BatchError, match="1 rows failed, and max_errors is 0"):
        run(max_errors=0)
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["state"] == "stopped"
    assert run(max_errors=1).errors == 1


def test_a_job_that_began_while_another_read_its_input_keeps_the_output(run, tmp_path, monkeypatch) -> None:
    plan = job.make_plan

    def meanwhile(*arguments):
        monkeypatch.setattr(job, "make_plan", plan)
        run(shard_rows=7)
        return plan(*arguments)

    monkeypatch.setattr(job, "make_plan", meanwhile)
    with pytest.raises(ConfigError, match="another job has begun"):
        run()
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["settings"]["shard_rows"] == 7


def test_a_file_that_is_a_link_is_what_its_own_name_says(run, tmp_path) -> None:
    (tmp_path / "blob").write_text("\n")  # as caches of data sets have them
    (tmp_path / "rows.jsonl").symlink_to("blob")
    assert run(input="rows.jsonl").total == 0


@pytest.mark.parametrize("change", [{"plan": None}, {"plan": {}}, {"catalog": None}, {"catalog": {"version": "x"}}])
def test_a_damaged_manifest_is_refused(run, tmp_path, change) -> None:
    run()
    file = tmp_path / "out" / "_manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match="choose another output"):
        run()
