"""The command line in this process, with the encoder that needs no model. tests/integration runs the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli, Ran

from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import Catalog, build_catalog, catalog_versions
from lorauter.encoder import HashingEncoder
from lorauter.keys import hash_key, parse_keys
from lorauter.routing import Router, RoutingConfig
from lorauter.tasks import Task


@pytest.fixture
def pool(tmp_path: Path, make_adapter: Callable[..., Path]) -> Path:
    """A folder of adapter folders: sums and poems."""
    for name in ("sums", "poems"):
        make_adapter(tmp_path / "pool", name)
    return tmp_path / "pool"


@pytest.fixture
def tasks(tmp_path: Path, make_task: Callable[..., Task]) -> Path:
    """A folder of task files: sums, poems and rain, each known by words of its own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, words in {"sums": "add numbers", "poems": "rhyme verses", "rain": "weather forecast"}.items():
        task = make_task(name, f"{words} one", f"{words} two")
        (folder / f"{name}.json").write_text(json.dumps(task.to_json()))
    return folder


@pytest.fixture
def catalog(cli: Cli, pool: Path, tasks: Path, tmp_path: Path) -> Path:
    """A catalog of the tasks with the adapters of the pool, told apart by words alone."""
    options = ("--tasks", tasks, "--adapters", pool, "--out", tmp_path / "catalog", "--states", "none")
    assert cli("catalog", "build", *options).code == 0
    return tmp_path / "catalog"


# adapters


def test_push_a_pool_and_list_it(cli: Cli, pool: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    pushed = cli("adapters", "push", pool, "--to", store)
    assert pushed.code == 0
    assert f"2 of 2 adapters are in {store}" in pushed.err.replace("\n", "")
    repository = AdapterRepository(open_store(store))
    versions = {name: repository.manifest(name).version for name in ("poems", "sums")}
    assert [line.split("\t")[:2] for line in pushed.out.splitlines()] == [list(item) for item in versions.items()]
    listed = cli("adapters", "list", store)
    size = repository.manifest("sums").size
    assert listed.out.splitlines()[1] == f"sums\t{versions['sums']}\t2\t{size}\torg/tiny-base"
    assert listed.err.startswith("2 adapters in ")
    again = cli("adapters", "push", pool, "--to", store)
    assert (again.code, again.out) == (0, pushed.out)


def test_push_a_single_adapter(cli: Cli, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pool / "sums")
    assert cli("adapters", "push", ".", "--to", tmp_path / "store").code == 0
    assert AdapterRepository(open_store(tmp_path / "store")).names() == ["sums"]


def test_what_an_adapter_has_and_nobody_uses_is_told(
    cli: Cli, pool: Path, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    make_adapter(pool, "odd", target_modules=["q_proj"])
    pushed = cli("adapters", "push", pool, "--to", tmp_path / "store")
    assert pushed.code == 0
    assert "adapter 'odd': ignored, as in PEFT: tensors of modules that the configuration leaves out" in pushed.err


def test_a_broken_adapter_does_not_hold_up_the_others(
    cli: Cli, pool: Path, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    make_adapter(pool, "broken", fill=float("nan"))
    make_adapter(pool, "base")
    pushed = cli("adapters", "push", pool, "--to", tmp_path / "store")
    assert pushed.code == 1
    refused = [line for line in pushed.err.splitlines() if line.startswith("refused: ")]
    assert len(refused) == 2
    assert "'base'" in refused[0]
    assert "'broken'" in refused[1]
    assert "NaN" in refused[1]
    assert "2 of 4 adapters" in pushed.err
    assert AdapterRepository(open_store(tmp_path / "store")).names() == ["poems", "sums"]


def test_a_list_names_what_cannot_be_read(cli: Cli, pool: Path, tmp_path: Path) -> None:
    cli("adapters", "push", pool, "--to", tmp_path / "store")
    (tmp_path / "store" / "poems" / "adapter.json").write_text("{}")
    listed = cli("adapters", "list", tmp_path / "store")
    assert listed.code == 0
    poems, sums = listed.out.splitlines()
    assert poems.startswith("poems\t")
    assert "malformed" in poems
    assert sums.startswith("sums\t")


def test_replaced_versions_are_pruned(cli: Cli, pool: Path, tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    store = tmp_path / "store"
    cli("adapters", "push", pool, "--to", store)
    old = AdapterRepository(open_store(store)).manifest("sums").version
    make_adapter(pool, "sums", lora_alpha=9)
    cli("adapters", "push", pool, "--to", store)
    young = cli("adapters", "prune", store, "--catalog", "none")
    assert (young.code, young.out) == (0, "")
    assert cli("adapters", "prune", store, "--older-than", "0").code != 0, "nobody said which catalogs name them"
    cli("adapters", "prune", store, "--catalog", tmp_path / "nowhere").refused("there is none")
    pruned = cli("adapters", "prune", store, "--catalog", "none", "--older-than", "0")
    assert (pruned.code, pruned.out) == (0, f"sums\t{old}\n")
    assert pruned.err.splitlines()[-1].startswith("1 versions deleted from ")
    assert cli("adapters", "prune", store, "--catalog", "none", "--older-than", "-1").code != 0


def test_what_is_pushed_is_served_in_one_step_and_one_version(
    cli: Cli, pool: Path, tmp_path: Path, make_adapter: Callable[..., Path], make_task: Callable[..., Task]
) -> None:
    store, catalog = tmp_path / "store", tmp_path / "catalog"
    cli("adapters", "push", pool, "--to", store, "--catalog", catalog).refused("there is no catalog at")
    assert not store.exists()
    build_catalog([make_task("sums")], HashingEncoder()).save(catalog)
    told = cli("adapters", "push", pool, "--to", store, "--catalog", catalog)
    assert (told.code, len(catalog_versions(catalog))) == (0, 2)
    first, repository = Catalog.load(catalog), AdapterRepository(open_store(store))
    assert first.version in told.err
    assert first.adapters == {
        name: AdapterRepository(open_store(store)).manifest(name).version for name in ("sums", "poems")
    }
    make_adapter(pool, "sums", lora_alpha=9)
    assert "a catalog serves them once" in cli("adapters", "push", pool, "--to", store).err
    assert Catalog.load(catalog).version == first.version
    assert cli("adapters", "push", pool / "sums", "--to", store, "--catalog", catalog).code == 0
    second = Catalog.load(catalog)
    assert second.adapters["sums"] == repository.manifest("sums").version
    assert second.adapters["sums"] != first.adapters["sums"]
    assert second.adapters["poems"] == first.adapters["poems"]


@pytest.mark.parametrize("where", ["", "nowhere", "file"])
def test_nothing_to_push(cli: Cli, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    cli("adapters", "push", tmp_path / where, "--to", tmp_path / "store").refused("holds no adapter")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("uri", "cause"), [("ftp://host/path", "unknown scheme"), ("s3://", "bucket"), ("{file}/below", "{file}")]
)
def test_a_store_that_cannot_be(cli: Cli, pool: Path, tmp_path: Path, uri: str, cause: str) -> None:
    (tmp_path / "file").write_text("")
    uri, cause = uri.format(file=tmp_path / "file"), cause.format(file=tmp_path / "file")
    cli("adapters", "push", pool, "--to", uri).refused(cause)


# catalog


def test_build_with_and_without_adapters(cli: Cli, pool: Path, tasks: Path, tmp_path: Path) -> None:
    for options, adapters, served in (((), 0, 0), (("--adapters", pool), 2, 2)):
        built = cli("catalog", "build", "--tasks", tasks, *options, "--out", tmp_path / "out")
        assert built.code == 0
        catalog = Catalog.load(tmp_path / "out")
        assert built.out == f"{catalog.version}\t3 tasks, {adapters} adapters, {served} tasks with an adapter\n"
        assert [task.name for task in catalog.tasks] == ["poems", "rain", "sums"]
    assert [[a.name for a in task.adapters] for task in catalog.tasks] == [["poems"], [], ["sums"]]


def test_build_with_a_mapping(cli: Cli, pool: Path, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "mapping.json").write_text('{"rain": ["sums", "poems"], "poems": [], "sums": "sums"}')
    options = ("--adapters", pool, "--mapping", tmp_path / "mapping.json", "--out", tmp_path / "out")
    assert cli("catalog", "build", "--tasks", tasks, *options).code == 0
    served = {task.name: [a.name for a in task.adapters] for task in Catalog.load(tmp_path / "out").tasks}
    assert served == {"poems": [], "rain": ["sums", "poems"], "sums": ["sums"]}


@pytest.mark.parametrize(
    ("mapping", "cause"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("\ud800", "cannot be read"),
        ("[]", "must be a JSON object"),
        ('{"rain": 5}', "must be a JSON object"),
        ('{"rain": [5]}', "must be a JSON object"),
        ('{"snow": ["sums"]}', "'snow'"),
        ('{"rain": ["nowhere"]}', "'nowhere'"),
    ],
)
def test_a_bad_mapping(cli: Cli, pool: Path, tasks: Path, tmp_path: Path, mapping: str | None, cause: str) -> None:
    path = tmp_path / "mapping.json"
    if mapping is not None:
        path.write_bytes(mapping.encode(errors="surrogatepass"))
    options = ("--adapters", pool, "--mapping", path, "--out", tmp_path / "out")
    cli("catalog", "build", "--tasks", tasks, *options).refused(cause)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("nowhere", None, "is not a directory"),
        ("empty", None, "no .json"),
        ("bad", b"{", "bad.json"),
        ("bad", b'{"name": "bad"}', "missing"),
        ("bad.json", b'{"name": "a/b", "domain": "", "metric": "em", "validation": []}', "'a/b'"),
    ],
)
def test_bad_tasks(cli: Cli, tmp_path: Path, name: str, content: bytes | None, cause: str) -> None:
    folder = tmp_path / name
    if name != "nowhere":
        folder.mkdir()
    if content:
        (folder / "bad.json").write_bytes(content)
    cli("catalog", "build", "--tasks", folder, "--out", tmp_path / "out").refused(cause)
    assert not (tmp_path / "out").exists()


# route


@pytest.fixture
def route(cli: Cli, catalog: Path, tmp_path: Path) -> Cli:
    """`route(lines, *options)`: route a file of these lines (text or JSON values) to out.jsonl."""

    def run(lines: list[Any], *options: object) -> Ran:
        encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(encoded))
        files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
        return cli("route", "--catalog", catalog, *files, *options)

    return run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_kept_and_decided(route: Cli, tmp_path: Path) -> None:
    given: list[Any] = [
        {"input": "add numbers please", "id": 7, "target": "Grüße"},
        b"",
        b"   \r",
        {"input": "rhyme verses", "tags": {"a": [None]}, "top_k": 1},
    ]
    ran = route(given)
    assert (ran.code, ran.out) == (0, "")
    assert "routed 2 rows" in ran.err
    first, second = rows(tmp_path / "out.jsonl")
    assert list(first) == ["input", "id", "target", "tasks", "adapters", "confidence"]
    assert {key: first[key] for key in ("input", "id", "target")} == given[0]
    assert {key: second[key] for key in ("input", "tags", "top_k")} == given[3]
    assert first["tasks"][0]["name"] == "sums"
    assert [list(task) for task in first["tasks"]] == [["name", "score", "probability"]] * 3
    assert [(a["name"], a["weight"]) for a in first["adapters"]] == [("sums", 1.0)]
    assert 0.5 < first["confidence"] <= first["tasks"][0]["probability"] <= 1
    assert [(a["name"], a["weight"]) for a in second["adapters"]] == [("poems", 1.0)]


def test_a_rows_options_are_its_own(route: Cli, tmp_path: Path) -> None:
    text = "add numbers to rhyme verses"
    options: list[dict[str, Any]] = [
        {},
        {"exclude_adapters": ["sums"]},
        {"exclude_tasks": ["sums"]},
        {"allow_adapters": ["sums", "unheard-of"]},
        {"allow_adapters": []},
        {"exclude_tasks": ["sums", "poems", "rain"]},
        {"temperature": 0.001},
        {"top_k": None, "temperature": None, "exclude_tasks": None, "exclude_adapters": None, "allow_adapters": None},
    ]
    assert route([{"input": text, **own} for own in options], "--temperature", 10).code == 0
    decided = rows(tmp_path / "out.jsonl")
    names = [{adapter["name"] for adapter in row["adapters"]} for row in decided]
    both = {"sums", "poems"}
    assert names == [both, {"poems"}, {"poems"}, {"sums"}, set(), set(), both, both]
    assert [len(row["tasks"]) for row in decided] == [3, 3, 2, 3, 3, 0, 3, 3]
    for row in decided:
        assert not row["adapters"] or sum(a["weight"] for a in row["adapters"]) == pytest.approx(1, abs=1e-9)
    assert abs(decided[0]["adapters"][0]["weight"] - 0.5) < 0.05
    assert decided[7]["adapters"] == decided[0]["adapters"]


def test_a_row_is_decided_as_the_library_decides_it(route: Cli, tmp_path: Path, catalog: Path) -> None:
    text = "add numbers to rhyme verses"
    for options, config in (
        ((), RoutingConfig()),
        (("--top-k", 1), RoutingConfig(top_k=1)),
        (("--temperature", 3, "--num-tasks", 2), RoutingConfig(temperature=3, num_tasks=2)),
    ):
        assert route([{"input": text}], *options).code == 0
        [row] = rows(tmp_path / "out.jsonl")
        [decision] = Router.load(catalog, config=config).route([text])
        assert [row[key] for key in ("tasks", "adapters")] == [decision.to_json()[k] for k in ("tasks", "adapters")]
        assert "constrained" not in row
    assert route([{"input": text, "constrain": True}]).code == 0
    assert rows(tmp_path / "out.jsonl")[0]["constrained"] is None  # its task knows no answers
    for asked in ([{"input": text}], [{"input": text, "examples": 2}]):
        assert route(asked, *([] if "examples" in asked[0] else ["--examples", 2])).code == 0
        assert rows(tmp_path / "out.jsonl")[0]["shown"]["why"] in ("unsure", "unchecked")


def test_what_words_do_not_tell_is_looked_at_once_more(
    cli: Cli, route: Cli, tmp_path: Path, catalog: Path, tasks: Path
) -> None:
    strange = [{"input": "zyzzyva qoph"}]
    assert route(strange).code == 0
    [plain] = rows(tmp_path / "out.jsonl")
    assert "by_states" not in plain
    assert cli("catalog", "build", "--tasks", tasks, "--out", catalog).code == 0
    assert route(strange).code == 0
    assert rows(tmp_path / "out.jsonl")[0]["by_states"] is True
    assert route(strange, "--states", "none").code == 0
    [again] = rows(tmp_path / "out.jsonl")
    assert "by_states" not in again
    assert again["confidence"] == plain["confidence"]


def test_many_rows_come_out_in_order(route: Cli, tmp_path: Path) -> None:
    assert route([{"input": f"add number {i}", "id": i} for i in range(600)], "--num-tasks", 1, "--top-k", 1).code == 0
    decided = rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in decided] == list(range(600))
    assert {len(row["tasks"]) for row in decided} == {1}
    assert {len(row["adapters"]) for row in decided} == {1}


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b"{", "line 302: "),
        (b"[" * 100_000, "line 302: "),
        (b'{"input": "\xff"}', "line 302: "),
        ([], "line 302: a row is a JSON object"),
        ({"text": "a"}, 'line 302: a row is a JSON object with a non-empty string "input"'),
        ({"input": 5}, "line 302: "),
        ({"input": " "}, "line 302: "),
        ({"input": "a \ud800"}, "line 302: "),
        ({"input": "a", "id": "\ud800"}, "line 302: "),
        ({"input": "a", "top_k": 0}, "line 302: top_k: "),
        ({"input": "a", "top_k": "3"}, "line 302: top_k: "),
        ({"input": "a", "temperature": float("inf")}, "line 302: temperature: "),
        ({"input": "a", "exclude_tasks": "sums"}, "line 302: exclude_tasks: "),
        ({"input": "a", "allow_adapters": [5]}, "line 302: allow_adapters.0: "),
    ],
)
def test_a_bad_line_is_named_and_leaves_the_output_alone(route: Cli, tmp_path: Path, line: Any, cause: str) -> None:
    (tmp_path / "out.jsonl").write_text("as before")
    route([{"input": "fine"}, b"", *[{"input": "fine"}] * 299, line]).refused(cause)
    assert (tmp_path / "out.jsonl").read_text() == "as before"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--top-k", 0), "top_k"),
        (("--temperature", "nan"), "temperature"),
        (("--temperature", 0), "temperature"),
        (("--num-tasks", 0), "num_tasks"),
        (("--catalog", "{tmp}/nowhere"), "lorauter catalog build"),
        (("--catalog", "ftp://x"), "unknown scheme"),
        (("--input", "{tmp}/nowhere.jsonl"), "nowhere.jsonl"),
        (("--input", "{tmp}"), "cannot route"),
        (("--output", "{tmp}/nowhere/out.jsonl"), "nowhere"),
        (("--output", "{tmp}/in.jsonl/out.jsonl"), "cannot route"),
        (("--output", "{tmp}"), "cannot route"),
    ],
)
def test_wrong_options_to_route(route: Cli, tmp_path: Path, options: tuple[Any, Any], cause: str) -> None:
    name, value = options
    route([{"input": "a"}], name, str(value).format(tmp=tmp_path)).refused(cause)


def test_another_encoder_than_the_catalogs_is_refused(route: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorauter.defaults.load_encoder", lambda name: HashingEncoder(32))
    route([{"input": "a"}]).refused("hashing-256")


def test_a_file_may_be_routed_onto_itself(cli: Cli, catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "add numbers"}\n' * 300)
    assert cli("route", "--catalog", catalog, "--input", path, "--output", path).code == 0
    assert len(rows(path)) == 300


def test_what_is_no_file_stays_and_so_does_a_link(cli: Cli, catalog: Path, tmp_path: Path) -> None:
    """As root a file would have taken the place of /dev/null."""
    (tmp_path / "in.jsonl").write_text('{"input": "add numbers"}\n')
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    given = ("route", "--catalog", catalog, "--input", tmp_path / "in.jsonl", "--output")
    cli(*given, tmp_path / "pipe").refused("no file that could be replaced")
    assert (tmp_path / "pipe").is_fifo()
    for _ in range(2):
        assert cli(*given, tmp_path / "link.jsonl").code == 0
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len(rows(tmp_path / "real.jsonl")) == 1


# keys, serve, and the whole


def test_a_new_key_is_shown_beside_its_row(cli: Cli) -> None:
    ran = cli("keys", "new", "--name", "a", "--adapter", "a-*", "--tokens-per-minute", 9, "--role", "admin")
    [row] = parse_keys(ran.out, "stdout")
    assert (row.name, row.adapters, row.tokens_per_minute, row.requests_per_minute) == ("a", ("a-*",), 9, None)
    assert row.roles == {"admin"}
    key = ran.err.split()[-1]
    assert hash_key(key) == row.sha256
    assert key not in ran.out
    both = ran.out + cli("keys", "new", "--name", "b").out
    assert [row.name for row in parse_keys(both, "two")] == ["a", "b"]
    cli("keys", "new", "--name", "a b").refused("name: ")
    cli("keys", "new", "--name", "a", "--role", "root").refused("roles: ")
    cli("keys", "new", "--name", "a", "--requests-per-minute", 0).refused("requests_per_minute: ")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "cannot be read"),
        ("a: [", "cannot be read"),
        ("applications: []", "0 applications"),
        (
            "applications: [{import_path: 'deployments.app:build', args: {engine: {max_batches: 1}}}]",
            "engine.max_batches",
        ),
        ("http_option: {}", "unknown keys: http_option"),
    ],
)
def test_serve_refuses_a_bad_configuration(cli: Cli, tmp_path: Path, content: str | None, cause: str) -> None:
    if content is not None:
        (tmp_path / "serve_config.yaml").write_text(content)
    cli("serve", "--config", tmp_path / "serve_config.yaml").refused(cause)


@pytest.mark.parametrize(
    "arguments",
    [(), ("adapters",), ("catalog",), ("fly",), ("adapters", "push"), ("route",), ("serve", "--port", 0), ("chat",)],
)
def test_wrong_usage_is_explained(cli: Cli, arguments: tuple[object, ...]) -> None:
    ran = cli(*arguments)
    assert ran.code == 2
    assert "Usage: " in ran.out + ran.err


def test_the_console_script_ends_with_one_line_of_error() -> None:
    script = Path(sys.executable).parent / "lorauter"
    ran = subprocess.run([script, "chat", "hi", "--url", "ftp://host"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "error: url 'ftp://host' must begin with http:// or https://\n"


def test_the_command_line_imports_neither_ray_nor_anything_heavy() -> None:
    heavy = {"ray", "deployments", "torch", "transformers", "faiss", "sentence_transformers", "boto3", "numpy"}
    program = f"import sys, lorauter_cli.main, lorauter.defaults; print(sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stderr
