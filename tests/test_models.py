"""Models and encoders that are named by a store's URI."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer, files_below

from deployments.app import build
from deployments.config import AppConfig
from lorauter.adapters import AdapterRepository, hub, open_store
from lorauter.adapters.weights import model_name
from lorauter.catalog import Catalog
from lorauter.defaults import describe_model, resolve_encoder, resolve_model
from lorauter.errors import ConfigError, StoreError, StoreUnavailable
from lorauter.models import pinned
from lorauter.uris import called

MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "1_Pooling/config.json": b"{}",
}
BESIDE = {
    "pytorch_model.bin": b"a pickle",
    "original/params.json": b"{}",
    "onnx/config.json": b"{}",
    "README.md": b"",
    "consolidated.safetensors": b"again",
    ".gitattributes": b"",
}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAUTER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "_FRESH_S", 0.0)


def test_a_model_of_the_hub_comes_once_through_the_hubs_cache(hub_server: HubServer) -> None:
    commit = hub_server.commit("org/Tiny-1B", MODEL | BESIDE)
    told: list[str] = []
    folder = Path(resolve_model("hf://org/Tiny-1B@main", told.append))
    assert (folder.name, files_below(folder), len(told)) == ("Tiny-1B", MODEL, 1)
    cached = hub.HubStore(f"hf://org/Tiny-1B@{commit}").cached("model.safetensors").resolve()
    assert (folder / "model.safetensors").samefile(cached), "it is on the disk once"
    hub_server.requests.clear()
    assert resolve_model("hf://org/Tiny-1B@main", told.append) == str(folder)
    assert resolve_encoder("hf://org/Tiny-1B") != str(folder), "another URI is another copy"
    assert len(told) == 1 and hub_server.downloads() == []


def test_a_moved_branch_is_another_copy_and_the_commit_that_a_service_is_told_is_not(hub_server: HubServer) -> None:
    first = hub_server.commit("org/tiny", MODEL)
    held = pinned("hf://org/tiny@main/")
    assert held == f"hf://org/tiny@{first}"
    before = resolve_model(held)
    hub_server.commit("org/tiny", MODEL | {"model.safetensors": b"new"})
    assert (Path(resolve_model("hf://org/tiny@main")) / "model.safetensors").read_bytes() == b"new"
    assert resolve_model(held) == before
    assert (Path(before) / "model.safetensors").read_bytes() == b"weights"
    assert pinned("org/tiny") == "org/tiny" and pinned("s3://bucket/tiny") == "s3://bucket/tiny"


def test_a_service_is_told_commits_and_not_branches(hub_server: HubServer, monkeypatch) -> None:
    commit = hub_server.commit("org/tiny", MODEL)
    monkeypatch.setattr("deployments.app._with_gpus", lambda options, device: (options, 0))
    app = build(AppConfig(base_model="hf://org/tiny", encoder="hf://org/tiny@main", adapters="hf://org/pool"))
    config, embedder = app._bound_deployment.init_args[:2]
    assert config.base_model == f"hf://org/tiny@{commit}"
    assert embedder._bound_deployment.init_args == (f"hf://org/tiny@{commit}", "default")


def test_what_describes_a_model_comes_without_its_weights(hub_server: HubServer) -> None:
    hub_server.commit("org/tiny", MODEL)
    assert "model.safetensors" not in files_below(Path(describe_model("hf://org/tiny")))
    assert not [path for path in hub_server.downloads() if path.startswith("/cdn/")]


def test_the_copy_serves_while_the_store_does_not_answer(hub_server: HubServer) -> None:
    hub_server.commit("org/tiny", MODEL)
    folder = resolve_model("hf://org/tiny")
    hub_server.stop()
    told: list[str] = []
    assert resolve_model("hf://org/tiny", told.append) == folder
    assert "does not answer; the copy of it that is here serves" in told[0]
    assert pinned("hf://org/tiny") == "hf://org/tiny"
    with pytest.raises(StoreUnavailable):
        resolve_model("hf://org/other")


def test_a_model_may_lie_in_any_store_and_below_a_path(hub_server: HubServer, bucket: str, tmp_path: Path) -> None:
    below = {f"models/tiny/{name}": content for name, content in MODEL.items()}
    for name, content in below.items():
        for uri in (bucket, f"file://{tmp_path}/store"):
            open_store(uri).write(name, content)
    hub_server.commit("org/all", below)
    for uri in (bucket, f"file://{tmp_path}/store", "hf://org/all"):
        folder = Path(resolve_model(f"{uri}/models/tiny/"))
        assert (folder.name, files_below(folder)) == ("tiny", MODEL), uri
    open_store(bucket).write("models/tiny/model.safetensors", b"new")
    assert (Path(resolve_model(f"{bucket}/models/tiny")) / "model.safetensors").read_bytes() == b"new"


def test_what_is_no_model_is_refused(hub_server: HubServer, bucket: str) -> None:
    hub_server.commit("org/pool", {"README.md": b"", "a/adapter_config.json": b"{}"})
    for resolve, needed in ((resolve_model, "config.json"), (resolve_encoder, "modules.json or config.json")):
        for uri in ("hf://org/pool", f"{bucket}/none"):
            with pytest.raises(ConfigError, match=f"'{uri}' holds no {needed}, so no model"):
                resolve(uri)
        with pytest.raises(ConfigError, match="no repository 'org/none'"):
            resolve("hf://org/none")
        with pytest.raises(ConfigError, match="no branch, tag or commit"):
            resolve("hf://org/pool@none")
        with pytest.raises(ConfigError, match="unknown scheme 'ftp'"):
            resolve("ftp://host/model")
    hub_server.commit("org/closed", MODEL, gate="gated")
    with pytest.raises(StoreError, match="gated"):
        resolve_model("hf://org/closed")


def test_a_model_that_comes_damaged_or_half_is_not_there(hub_server: HubServer) -> None:
    hub_server.commit("org/tiny", MODEL)
    hub_server.damaged = True
    with pytest.raises(StoreUnavailable, match="damaged"):
        resolve_model("hf://org/tiny")
    hub_server.damaged = False
    assert files_below(Path(resolve_model("hf://org/tiny"))) == MODEL


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/Tiny-1B", "Tiny-1B"),
        ("hf://org/Tiny-1B@main", "Tiny-1B"),
        ("hf://org/Tiny-1B@refs/pr/3", "Tiny-1B"),
        ("hf://org/all@0123/models/Tiny-1B/", "Tiny-1B"),
        ("s3://bucket/m@x/Tiny-1B", "Tiny-1B"),
        ("/models/Tiny-1B/", "Tiny-1B"),
    ],
)
def test_what_a_model_is_called(model: str, name: str) -> None:
    assert called(model) == name
    assert model_name(model) == name.lower()


def test_adapters_go_from_the_hub_to_another_store_and_a_catalog_to_a_folder(
    hub_server: HubServer, cli, tmp_path: Path
) -> None:
    examples = Path(__file__).parents[1] / "examples"
    files = {f"{name}/{file}": content for name in ("sst2", "rte")
             for file, content in files_below(examples / "adapters" / name).items()}  # fmt: skip
    commit = hub_server.commit(
        "team/pool", files | {"broken/adapter_config.json": b"{", "broken/adapter_model.safetensors": b""}
    )
    ran = cli("adapters", "push", "hf://team/pool@main", "--to", tmp_path / "store")
    assert (ran.code, ran.out.count("\n")) == (1, 2), ran.err
    assert "2 of 3 adapters are in" in ran.err
    assert AdapterRepository(open_store(tmp_path / "store")).names() == ["rte", "sst2"]
    listed = cli("adapters", "list", "hf://team/pool").out
    assert f"sst2\t{commit}\t-\t" in listed
    built = cli(
        "catalog", "build", "--tasks", examples / "tasks", "--adapters", "hf://team/pool", "--out", tmp_path / "c"
    )
    assert built.code == 0, built.err
    assert Catalog.load(tmp_path / "c").adapters == {"rte": commit, "sst2": commit}


@pytest.mark.parametrize(
    "command",
    [
        ("adapters", "push", "examples/adapters", "--to", "hf://team/pool"),
        ("adapters", "prune", "hf://team/pool", "--catalog", "none"),
        ("catalog", "build", "--tasks", "examples/tasks", "--adapters", "examples/adapters", "--out", "hf://team/c"),
        ("catalog", "use", "hf://team/c", "0123456789abcdef"),
        ("catalog", "prune", "hf://team/c"),
    ],
)
def test_commands_that_would_write_to_the_hub_refuse_at_once(hub_server: HubServer, cli, command) -> None:
    cli(*command).refused("only reads from the hub; publish to a folder, s3://, gs:// or az://")
    assert hub_server.requests == []
