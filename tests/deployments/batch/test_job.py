"""What a job checks and notes before it needs Ray; tests/integration runs whole ones."""

import json

import pytest

from deployments.batch.config import BatchConfig
from deployments.batch.job import run_job
from lorauter.errors import ConfigError


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
