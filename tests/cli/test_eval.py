"""`lorauter eval ...` in this process, with the encoder that needs no model, and a tiny random base model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import Cli
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import build_catalog
from lorauter.encoder import HashingEncoder
from lorauter.tasks import Example, Task

WORDS = {"sums": "add two numbers", "poems": "rhyme a stanza", "rain": "forecast the clouds"}


@pytest.fixture
def cli(cli: Cli) -> Cli:
    """`cli(*arguments)`: run `lorauter eval` to its end."""
    return partial(cli, "eval")


@pytest.fixture
def tasks(tmp_path: Path, make_task: Callable[..., Task]) -> Path:
    """Three task files, each with words of its own and two queries."""
    (tmp_path / "tasks").mkdir()
    for name, words in WORDS.items():
        task = make_task(name, f"{words} one", f"{words} two", f"{words} three", domain=name)
        task = replace(task, test=tuple(Example(f"{words} {n}", f"{name} {n}") for n in ("now", "here")))
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(task.to_json()))
    return tmp_path / "tasks"


@pytest.fixture
def pool(tmp_path: Path, make_adapter: Callable[..., Path]) -> Path:
    """Adapters for sums and poems, none for rain."""
    for name in ("sums", "poems"):
        make_adapter(tmp_path / "pool", name, base="Tiny")
    return tmp_path / "pool"


@pytest.fixture
def catalog(tasks: Path, pool: Path, tmp_path: Path) -> Path:
    from lorauter.tasks import read_tasks

    repository = AdapterRepository(open_store(pool))
    build_catalog(read_tasks(tasks), HashingEncoder(), repository=repository).save(tmp_path / "catalog")
    return tmp_path / "catalog"


@pytest.fixture
def decisions(cli: Cli, tasks: Path, catalog: Path, tmp_path: Path) -> Path:
    """Of the base model, the oracle and the router."""
    path = tmp_path / "decisions.jsonl"
    methods = "base,oracle,default"
    assert cli("decide", "--tasks", tasks, "--catalog", catalog, "--methods", methods, "--out", path).code == 0
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random Llama with a byte tokenizer, as a folder."""
    torch.manual_seed(0)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 8) | {
        "vocab_size": 257,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "Tiny")
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    chat = "{% for m in messages %}{{ m.content }}>{% endfor %}"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", chat_template=chat
    ).save_pretrained(tmp_path / "Tiny")
    return tmp_path / "Tiny"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_decide_writes_rows_for_methods_regimes_and_queries(decisions: Path) -> None:
    rows = read(decisions)
    counts = {method: sum(row["method"] == method for row in rows) for method in ("base", "oracle", "default")}
    assert counts == {"base": 6, "oracle": 6, "default": 18}
    oracle = {row["task"]: row["adapters"] for row in rows if row["method"] == "oracle"}
    assert oracle == {"sums": {"sums": 1}, "poems": {"poems": 1}, "rain": {}}


def test_decide_takes_regimes_and_settings(cli: Cli, tasks: Path, catalog: Path, tmp_path: Path) -> None:
    settings, out = tmp_path / "routing.yaml", tmp_path / "new" / "decisions.jsonl"
    settings.write_text("top_k: 1\nfallback: false\n")
    given = ("decide", "--tasks", tasks, "--catalog", catalog, "--out", out, "--config", settings)
    ran = cli(*given, "--methods", "uniform", "--regimes", "OOD, in-domain")
    assert ran.code == 0, ran
    rows = read(out)
    assert {(row["method"], row["regime"]) for row in rows} == {
        (method, regime) for method in ("uniform", "configured") for regime in ("OOD", "in-domain")
    }
    assert {len(row["adapters"]) for row in rows if row["method"] == "configured"} <= {0, 1}
    settings.write_text("top_k: 0\n")
    assert "top_k" in cli(*given).err.splitlines()[-1]
    settings.write_text("{")
    assert "cannot be read" in cli(*given).err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--methods", "base,nonsense"), "method 'nonsense'"),
        (("--methods", "base", "--regimes", "sideways"), "regime 'sideways'"),
        (("--split", "validation"), "no task has validation examples"),
    ],
)
def test_decide_refuses_in_one_line_and_writes_nothing(
    cli: Cli, tasks: Path, catalog: Path, tmp_path: Path, arguments: tuple[str, ...], part: str
) -> None:
    out = tmp_path / "decisions.jsonl"
    ran = cli("decide", "--tasks", tasks, "--catalog", catalog, "--out", out, *arguments)
    last = ran.err.splitlines()[-1]
    assert ran.code == 1
    assert last.startswith("error: ")
    assert part in last
    assert not out.exists()


def test_lorahub_is_a_method_where_its_weights_are_given(
    cli: Cli, tasks: Path, catalog: Path, pool: Path, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nevergrad")
    weights, out = tmp_path / "new" / "lorahub.jsonl", tmp_path / "decisions.jsonl"
    search = ("lorahub", "--tasks", tasks, "--adapters", pool, "--out", weights, "--model", model)
    search += ("--examples", "2", "--budget", "3")
    decide = ("decide", "--tasks", tasks, "--catalog", catalog, "--out", out)
    ran = cli(*search)
    assert ran.code == 0, ran
    assert "6 of 6 searches are done" in ran.err
    found = {(row["task"], row["own"]): row["weights"] for row in read(weights)}
    assert {key: set(of) for key, of in found.items() if key[0] != "poems"} == {
        ("sums", True): {"sums", "poems"},
        ("sums", False): {"poems"},
        ("rain", True): {"sums", "poems"},
        ("rain", False): {"sums", "poems"},
    }
    before = weights.read_bytes()
    assert cli(*search).code == 0
    assert weights.read_bytes() == before
    assert cli(*decide, "--lorahub", weights, "--methods", "base").code == 0
    rows = read(out)
    assert {row["method"] for row in rows} == {"base", "lorahub"}
    for row in rows:
        if row["method"] == "lorahub":
            assert row["adapters"] == found[row["task"], row["regime"] == "in-domain"]
    assert cli(*decide).code == 0
    assert "lorahub" not in {row["method"] for row in read(out)}
    ran = cli(*decide, "--methods", "base,lorahub")
    assert (ran.code, "search them with 'lorauter eval lorahub'" in ran.err) == (1, True)
    weights.write_bytes(before.splitlines(keepends=True)[0])
    ran = cli(*decide, "--lorahub", weights)
    assert (ran.code, "no LoraHub weights for task" in ran.err) == (1, True)
    assert cli("lorahub", "--tasks", tasks, "--adapters", tmp_path / "tasks", "--out", weights).code == 1


def test_plots_draw_a_catalog(cli: Cli, tasks: Path, catalog: Path, pool: Path, tmp_path: Path) -> None:
    from lorauter.tasks import read_tasks

    out = tmp_path / "new" / "plots"
    ran = cli("plots", "--catalog", catalog, "--out", out)
    assert ran.code == 0, ran
    assert "the catalog has no scores" in ran.err
    assert [path.name for path in out.iterdir()] == ["tasks.png"]
    scores = {"sums": {"sums": {0: 0.5}, "poems": {0: 0.25, 1: 0.5}}}
    given = {"repository": AdapterRepository(open_store(pool)), "scores": scores}
    build_catalog(read_tasks(tasks), HashingEncoder(), **given).save(catalog)
    ran = cli("plots", "--catalog", catalog, "--out", out)
    assert (ran.code, "scores.png and tasks.png drawn" in ran.err) == (0, True)
    assert all((out / name).stat().st_size > 0 for name in ("scores.png", "tasks.png"))
    build_catalog(read_tasks(tasks)[:1], HashingEncoder()).save(catalog)
    assert "nothing drawn" in cli("plots", "--catalog", catalog, "--out", tmp_path / "other").err
    (tmp_path / "file").write_text("")
    ran = cli("plots", "--catalog", catalog, "--out", tmp_path / "file")
    assert (ran.code, "cannot be written" in ran.err) == (1, True)


def test_report_scores_answers(cli: Cli, decisions: Path, tmp_path: Path) -> None:
    answers, out = tmp_path / "answers.jsonl", tmp_path / "report"
    lines = [
        {"id": row["id"], "answer": row["target"] if row["method"] == "oracle" else "?", "completion_tokens": 1}
        for row in read(decisions)
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = cli("report", "--decisions", decisions, "--answers", answers, "--out", out)
    assert ran.code == 0, ran
    assert "| oracle | 1.000 [1.000, 1.000], 100.0 % |" in ran.out
    assert "| base | 0.000 [0.000, 0.000], 0.0 % |" in ran.out
    assert (out / "report.md").read_text() == ran.out
    assert len(json.loads((out / "report.json").read_text())["results"]) == 5
    assert (out / "score_by_share.png").stat().st_size > 0
    answers.write_text("")
    ran = cli("report", "--decisions", decisions, "--answers", answers, "--out", out)
    assert (ran.code, "30 of 30 rows have no answer" in ran.err) == (1, True)


def test_answers_go_through_all_steps_and_are_not_made_twice(
    cli: Cli, tasks: Path, catalog: Path, pool: Path, model: Path, tmp_path: Path
) -> None:
    out, threads = tmp_path / "out", torch.get_num_threads()
    given = ("answers", "--tasks", tasks, "--catalog", catalog, "--adapters", pool, "--out", out, "--model", model)
    given += ("--device", "cpu", "--max-batch", "2", "--methods", "base,oracle,default")
    try:
        ran = cli(*given)
        assert ran.code == 0, ran
        assert "| oracle |" in ran.out
        assert {path.name for path in out.iterdir()} == {
            *("decisions.jsonl", "answers.jsonl", "report.json", "report.md", "score_by_share.png")
        }
        first = read(out / "answers.jsonl")
        assert {row["id"] for row in first} == {row["id"] for row in read(out / "decisions.jsonl")}
        again = cli(*given)
        assert (again.code, again.out, read(out / "answers.jsonl")) == (0, ran.out, first)
        separate = tmp_path / "answers.jsonl"
        step = ("--adapters", pool, "--model", model, "--device", "cpu")
        ran = cli("answer", "--decisions", out / "decisions.jsonl", "--out", separate, *step)
        assert ran.code == 0, ran
        assert "30 of 30 rows are answered" in ran.err
        assert {row["id"] for row in read(separate)} == {row["id"] for row in first}
    finally:
        torch.set_num_threads(threads)


def test_routing_prints_tables_and_writes_figures(cli: Cli, tasks: Path, tmp_path: Path) -> None:
    known = [json.loads(path.read_text()) for path in sorted(tasks.iterdir())]
    queries = [{"task": task["name"], "input": task["test"][0]["input"]} for task in known]
    other = tmp_path / "set.json"
    other.write_text(json.dumps({"tasks": [{**task, "test": None} for task in known], "queries": queries}))
    ran = cli("routing", "--tasks", tasks, "--examples", "2", "--flan", other, "--json", tmp_path / "figures.json")
    assert ran.code == 0, ran
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {name: set(of) for name, of in figures.items()} == {key: {"paper", "default"} for key in ("tasks", "flan")}
    assert figures["tasks"]["default"]["routing"]["top_1"] == 1
    assert figures["flan"]["paper"]["routing"]["queries"] == 3
    assert "tasks, known queries:" in ran.out
    assert "flan, the whole domain taken out:" in ran.out
    known_queries = ran.out.split("\n\n")[1].splitlines()
    assert known_queries[0].startswith("| preset | tasks | queries | top_1 | ")
    assert known_queries[3].startswith("| default | 3 | 6 | 1.000 | ")
    assert "top-1 by number" not in ran.out  # the smallest subset has ten tasks


def test_answering_loads_neither_index_nor_encoder() -> None:
    code = (
        "import sys, lorauter_cli.eval, lorauter.evaluation.answering;"
        "print(*{'faiss', 'sentence_transformers', 'ray', 'matplotlib', 'peft'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.split() == []
