"""`lorauter adapters compose`, `catalog build --compose` and `eval compose`, with real fits on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_line import Cli
from tiny_model import write_model

from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import Catalog
from lorauter.encoder import HashingEncoder
from lorauter.tasks import Example, Task

WORDS = {"sums": "add numbers", "poems": "rhyme verses", "rain": "weather forecast"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An encoder that needs no model, one thread, and a home of its own."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("lorauter.defaults.load_encoder", lambda *_, **__: HashingEncoder())
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    monkeypatch.setenv("LORAUTER_HOME", str(tmp_path / "home"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pool(tmp_path: Path, make_adapter: Callable[..., Path]) -> Path:
    """Adapters of sums and poems, and none for rain."""
    for name in ("sums", "poems", "spare"):
        make_adapter(tmp_path / "pool", name)
    return tmp_path / "pool"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    for name, words in WORDS.items():
        examples = tuple(Example(f"{words} {i}", "yes" if name == "rain" else f"{i}") for i in range(6))
        task = Task(name, name, "em", examples[:5], examples[5:])
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(task.to_json()))
    return tmp_path / "tasks"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny-base")


def test_compose_pushes_what_beats_the_router(cli: Cli, tasks: Path, pool: Path, model: Path, tmp_path: Path) -> None:
    given = ("adapters", "compose", "--tasks", tasks, "--adapters", pool, "--model", model, "--to", tmp_path / "made")
    ran = cli(*given, "--task", "rain")
    assert ran.code == 0, ran
    assert "rain: log-likelihood of left-out examples" in ran.err
    assert "1 of 1 compositions beat the router's mixtures" in ran.err
    repository = AdapterRepository(open_store(tmp_path / "made"))
    assert repository.names() == ["rain.composed"]
    provenance = repository.manifest("rain.composed").provenance
    assert provenance is not None
    assert provenance["task"] == "rain"
    assert {row["name"] for row in provenance["sources"]} == {"sums", "poems", "spare"}
    assert provenance["score_after"] > provenance["score_before"]
    again = cli(*given, "--task", "rain")  # which fits nothing
    assert (again.code, again.out) == (0, ran.out)


def test_a_catalog_is_built_with_compositions_for_tasks_without_adapters(
    cli: Cli, tasks: Path, pool: Path, model: Path, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    given = ("catalog", "build", "--tasks", tasks, "--adapters", pool, "--out", tmp_path / "out", "--model", model)
    ran = cli(*given, "--compose")
    assert ran.code == 0, ran
    catalog = Catalog.load(tmp_path / "out")
    assert {entry.name: [a.name for a in entry.adapters] for entry in catalog.tasks} == {
        "poems": ["poems"],
        "rain": ["rain.composed"],
        "sums": ["sums"],
    }
    assert AdapterRepository(open_store(pool)).names() == ["poems", "rain.composed", "spare", "sums"]
    again = cli(*given, "--compose")
    assert "nothing is composed" in again.err
    assert Catalog.load(tmp_path / "out").version == catalog.version

    make_adapter(pool, "spare", rank=3)  # another version
    changed = cli("catalog", "change", tmp_path / "out", "--refresh-adapters", pool)
    assert changed.code == 0, changed
    assert "adapter 'rain.composed' is stale: spare changed since it was composed" in changed.err
    ran = cli(*given, "--compose")
    assert "1 of 1 compositions" in ran.err
    assert Catalog.load(tmp_path / "out").stale == {}


def test_a_pool_that_serves_no_task_is_composed_from(
    cli: Cli, tasks: Path, model: Path, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    for name in ("one", "two"):
        make_adapter(tmp_path / "others", name)
    given = ("--tasks", tasks, "--adapters", tmp_path / "others", "--out", tmp_path / "out", "--model", model)
    ran = cli("catalog", "build", *given, "--compose")
    assert ran.code == 0, ran
    assert "of 3 compositions beat the router's mixtures" in ran.err


def test_compositions_are_evaluated_beside_the_default(
    cli: Cli, tasks: Path, pool: Path, model: Path, tmp_path: Path
) -> None:
    catalog, composed, out = tmp_path / "catalog", tmp_path / "composed", tmp_path / "out"
    assert cli("catalog", "build", "--tasks", tasks, "--adapters", pool, "--out", catalog).code == 0
    cli(
        "eval", "answers", "--tasks", tasks, "--catalog", catalog, "--adapters", pool, "--out", out,
        "--methods", "default+composed",
    ).refused("give their folder with --composed")  # fmt: skip
    ran = cli("eval", "compose", "--catalog", catalog, "--adapters", pool, "--out", composed, "--model", model)
    assert ran.code == 0, ran
    assert "of 6 compositions beat" in ran.err
    ran = cli(
        "eval", "answers", "--tasks", tasks, "--catalog", catalog, "--adapters", pool, "--out", out, "--model", model,
        "--device", "cpu", "--max-batch", "2", "--methods", "default,oracle", "--composed", composed,
    )  # fmt: skip
    assert ran.code == 0, ran
    assert "| default+composed |" in ran.out
    rows = [json.loads(line) for line in (out / "decisions.jsonl").read_text().splitlines()]
    used = {name for row in rows if row["method"] == "default+composed" for name in row["adapters"]}
    assert any(name.startswith("rain.composed.") for name in used)

    help = tmp_path / "help"
    made = ("--catalog", catalog, "--adapters", pool, "--model", model, "--composed", composed)
    ran = cli("eval", "examples", *made, "--out", help, "--count", 1, "--device", "cpu")
    assert ran.code == 0, ran
    assert "in-domain: examples help" in ran.err and "semi-OOD: examples help" in ran.err
    given = ("eval", "answers", "--tasks", tasks, "--out", tmp_path / "shown", *made, "--device", "cpu")
    ran = cli(*given, "--methods", "oracle", "--examples", help)
    assert ran.code == 0, ran
    assert "| default+composed+examples |" in ran.out
    cli(*given, "--methods", "default+composed+examples").refused("'lorauter eval examples' finds out")
    cli(*given, "--methods", "default+examples", "--examples", help).refused("needs --examples alone")
    cli(*given, "--examples", tmp_path).refused("does not say which tasks examples help")


def test_what_cannot_be_composed_is_told(cli: Cli, tasks: Path, pool: Path, model: Path, tmp_path: Path) -> None:
    given = ("adapters", "compose", "--tasks", tasks, "--adapters", pool, "--model", model)
    cli(*given, "--to", tmp_path / "made", "--task", "nonsense").refused("no task called nonsense")
    cli(*given, "--to", "default").refused("cannot be changed")
    cli("catalog", "build", "--tasks", tasks, "--out", tmp_path / "out", "--compose").refused("--adapters")
