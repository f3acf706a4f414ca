from pathlib import Path

import pytest

from deployments.batch.config import BatchConfig
from lorauter.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def test_the_shipped_example_is_read_and_says_nothing_unknown() -> None:
    config = BatchConfig.read(ROOT / "examples" / "batch.yaml")
    assert (config.shard_rows, config.max_errors, config.sampling.max_tokens) == (1024, 100, 64)
    assert config.answer_workers.workers == 1


def test_what_the_command_says_goes_before_the_file(tmp_path) -> None:
    path = tmp_path / "batch.yaml"
    path.write_text("catalog: here\nroute_only: true\n")
    config = BatchConfig.read(path, catalog="there", max_errors=0, adapters=None)
    assert (config.catalog, config.route_only, config.max_errors, config.adapters) == ("there", True, 0, "default")
    path.write_text("")
    assert BatchConfig.read(path) == BatchConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("catalogue: x", "catalogue"),
        ("shard_rows: 0", "shard_rows"),
        ("sampling: {temperature: 3}", "temperature"),
        ("prompts: plain\nsystem: Be brief.", "system"),
        ("- a", "mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, message) -> None:
    (tmp_path / "batch.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        BatchConfig.read(tmp_path / "batch.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        BatchConfig.read(tmp_path / "none.yaml")


def test_only_what_decides_the_output_must_stay_the_same() -> None:
    def decides(**settings):
        return BatchConfig.parse(settings).decides()

    for harmless in (
        {"answer_workers": {"workers": 4, "gpus": 1}},
        {"max_errors": 5},
        {"column_clash": "refuse"},
        {"engine": {"adapter_bytes": 1, "threads": 2}},
        {"cache": {"downloads": 2}},
    ):
        assert decides(**harmless) == decides()
    for other in (
        {"sampling": {"seed": 1}},
        {"shard_rows": 5},
        {"engine": {"max_model_len": 64}},
        {"route_only": True},
    ):
        assert decides(**other) != decides()
    assert decides(route_only=True, sampling={"seed": 1}) == decides(route_only=True)
