"""The editor without a cluster: handles that are a few lines long, a store in memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_states import HashingStates

from deployments import catalog_editor
from deployments.access import Caller
from deployments.catalog_editor import CatalogEditor
from deployments.changes import Change
from deployments.config import AppConfig
from deployments.openai_answers import error_answer
from lorauter.adapters import AdapterManifest, AdapterRepository, ModelShape, open_store
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE
from lorauter.catalog import Catalog, build_catalog, catalog_versions, with_adapters, with_tasks
from lorauter.catalog.catalog import PROBE_TEXT
from lorauter.encoder import HashingEncoder
from lorauter.errors import (
    AdapterNotFound,
    AdapterRejected,
    CatalogError,
    CatalogVersionNotFound,
    Conflict,
    InvalidRequest,
    PermissionDenied,
    ReadOnlyStore,
    TaskNotFound,
)
from lorauter.keys import ApiKey
from lorauter.tasks import Task

ENCODER = HashingEncoder(64)
ANYBODY = Caller()
SHAPE = ModelShape(("org/tiny-base",), 1, {"q_proj": (8, 8), "v_proj": (8, 8)})


class Method:
    """A deployment's method behind a handle."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def remote(self, *args: Any) -> Coroutine[Any, Any, Any]:
        async def later() -> Any:
            await asyncio.sleep(0)
            return self._answer(*args)

        return later()


@pytest.fixture
def config(tmp_path: Path, make_task: Callable[..., Task]) -> AppConfig:
    """A catalog of two tasks and no adapter, published."""
    catalog, adapters = str(tmp_path / "catalog"), str(tmp_path / "adapters")
    build_catalog([make_task("sums"), make_task("poems")], ENCODER).save(catalog)
    return AppConfig(catalog=catalog, adapters=adapters)


@pytest.fixture
def editor(config: AppConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("deployments.catalog_editor.join_serve_logs", lambda: None)  # this process is no replica
    embedder = SimpleNamespace(embed=Method(ENCODER.encode), name=Method(lambda: ENCODER.name))
    model = SimpleNamespace(shape=Method(lambda: (SHAPE, 4)))
    return CatalogEditor.func_or_class(config, embedder, model)


@pytest.fixture
def files(tmp_path: Path, make_adapter: Callable[..., Path]) -> Callable[..., Any]:
    """`files(name, **config)`: an adapter's files, as they are uploaded."""

    def make(name: str, **settings: Any) -> dict[str, Any]:
        folder = make_adapter(tmp_path / "made", name, **settings)
        return {file: np.fromfile(folder / file, np.uint8) for file in (CONFIG_FILE, WEIGHTS_FILE)}

    return make


def write(files: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        content.tofile(folder / name)
    return folder


def served(config: AppConfig) -> dict[str, list[str]]:
    return {entry.name: [a.name for a in entry.adapters] for entry in Catalog.load(config.catalog).tasks}


def test_a_task_and_an_adapter_of_its_name_are_linked_whichever_comes_first(
    editor: Any, config: AppConfig, files: Callable[..., Any], make_task: Callable[..., Task]
) -> None:
    async def scenario() -> None:
        first = await editor.put_adapter(ANYBODY, "films", files("films"))
        assert (first["id"], first["object"], first["tasks"], first["rank"]) == ("films", "adapter", [], 2)
        second = await editor.put_task(ANYBODY, make_task("films"))
        assert (second["id"], second["object"], second["adapters"]) == ("films", "task", ["films"])
        third = await editor.put_adapter(ANYBODY, "sums", files("sums"))
        assert third["tasks"] == ["sums"]
        assert third["catalog_version"] == Catalog.load(config.catalog).version

    asyncio.run(scenario())
    assert served(config) == {"films": ["films"], "poems": [], "sums": ["sums"]}


def test_what_is_changed_is_what_would_be_built_anew(
    editor: Any, config: AppConfig, files: Callable[..., Any], make_task: Callable[..., Task]
) -> None:
    async def scenario() -> None:
        await editor.put_task(ANYBODY, make_task("films"))
        await editor.put_adapter(ANYBODY, "sums", files("sums"))

    asyncio.run(scenario())
    tasks = [make_task(name) for name in ("films", "poems", "sums")]
    anew = build_catalog(tasks, ENCODER, repository=AdapterRepository(open_store(config.adapters)))
    assert Catalog.load(config.catalog).version == anew.version


def test_an_adapter_that_the_store_has_is_taken_in_by_its_name(
    editor: Any, config: AppConfig, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    pushed = AdapterRepository(open_store(config.adapters)).push(make_adapter(tmp_path / "pushed", "poems"))
    answer = asyncio.run(editor.put_adapter(ANYBODY, "poems", None))
    assert (answer["version"], answer["tasks"]) == (pushed.version, ["poems"])
    with pytest.raises(AdapterNotFound):
        asyncio.run(editor.put_adapter(ANYBODY, "nowhere", None))


def test_another_version_of_an_adapter_is_in_the_catalog(
    editor: Any, config: AppConfig, files: Callable[..., Any]
) -> None:
    old = asyncio.run(editor.put_adapter(ANYBODY, "sums", files("sums")))
    new = asyncio.run(editor.put_adapter(ANYBODY, "sums", files("sums", lora_alpha=9)))
    assert new["version"] != old["version"]
    assert Catalog.load(config.catalog).adapters == {"sums": new["version"]}


def test_what_is_removed_is_gone_from_the_catalog_and_the_store(
    editor: Any, config: AppConfig, files: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        await editor.put_adapter(ANYBODY, "sums", files("sums"))
        gone = await editor.remove_adapter(ANYBODY, "sums")
        assert (gone["id"], gone["object"], gone["deleted"]) == ("sums", "adapter", True)
        assert (await editor.remove_task(ANYBODY, "poems"))["deleted"] is True
        for again in (editor.remove_adapter(ANYBODY, "sums"), editor.remove_adapter(ANYBODY, "../sums")):
            with pytest.raises(AdapterNotFound):
                await again
        with pytest.raises(TaskNotFound):
            await editor.remove_task(ANYBODY, "poems")
        with pytest.raises(InvalidRequest, match="last"):
            await editor.remove_task(ANYBODY, "sums")

    asyncio.run(scenario())
    assert served(config) == {"sums": []}
    with pytest.raises(AdapterNotFound):
        AdapterRepository(open_store(config.adapters)).manifest("sums")


def test_an_adapter_that_the_store_lost_can_be_taken_out_of_the_catalog(
    editor: Any, config: AppConfig, files: Callable[..., Any]
) -> None:
    asyncio.run(editor.put_adapter(ANYBODY, "sums", files("sums")))
    AdapterRepository(open_store(config.adapters)).remove("sums")
    asyncio.run(editor.remove_adapter(ANYBODY, "sums"))
    assert Catalog.load(config.catalog).adapters == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 8}, "rank 8; the engine serves up to 4"),
        ({"base": "org/other"}, "org/other"),
        ({"layers": 2}, "layer 1"),
        ({"use_dora": True}, "use_dora"),
        ({"fill": float("nan")}, "NaN"),
    ],
)
def test_what_the_engine_would_refuse_is_not_taken(
    editor: Any, config: AppConfig, files: Callable[..., Any], settings: dict[str, Any], said: str
) -> None:
    before = Catalog.load(config.catalog).version
    with pytest.raises(AdapterRejected, match=said):
        asyncio.run(editor.put_adapter(ANYBODY, "bad", files("bad", **settings)))
    assert Catalog.load(config.catalog).version == before
    assert AdapterRepository(open_store(config.adapters)).names() == []


def test_no_change_is_lost_of_many_at_once(editor: Any, config: AppConfig, make_task: Callable[..., Task]) -> None:
    async def scenario() -> None:
        await asyncio.gather(
            *[editor.put_task(ANYBODY, make_task(f"t{i}")) for i in range(6)], editor.remove_task(ANYBODY, "poems")
        )

    asyncio.run(scenario())
    assert set(served(config)) == {"sums", *(f"t{i}" for i in range(6))}


def test_a_change_that_began_ends_though_its_client_left(
    editor: Any, config: AppConfig, make_task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = threading.Event()

    def slowly(*args: Any, **given: Any) -> Catalog:
        began.set()
        time.sleep(0.05)
        return with_tasks(*args, **given)

    monkeypatch.setattr(catalog_editor, "with_tasks", slowly)

    async def scenario() -> None:
        first = asyncio.create_task(editor.put_task(ANYBODY, make_task("left")))
        await asyncio.to_thread(began.wait, 10)
        first.cancel()
        await editor.put_task(ANYBODY, make_task("stayed"))

    asyncio.run(scenario())
    assert {"left", "stayed"} < set(served(config))


def test_who_publishes_by_other_means_meanwhile_loses_nothing(
    editor: Any, config: AppConfig, make_task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [make_task("theirs")]

    def while_another_publishes(catalog: Catalog, *args: Any, **given: Any) -> Catalog:
        if others:
            with_tasks(catalog, [others.pop()], ENCODER).save(config.catalog)
        return with_tasks(catalog, *args, **given)

    monkeypatch.setattr(catalog_editor, "with_tasks", while_another_publishes)
    asyncio.run(editor.put_task(ANYBODY, make_task("ours")))
    assert set(served(config)) == {"sums", "poems", "theirs", "ours"}

    def forever(catalog: Catalog, *args: Any, **given: Any) -> Catalog:
        with_tasks(catalog, [make_task(f"theirs{len(catalog.tasks)}")], ENCODER).save(config.catalog)
        return with_tasks(catalog, *args, **given)

    monkeypatch.setattr(catalog_editor, "with_tasks", forever)
    with pytest.raises(Conflict, match="somebody else published"):
        asyncio.run(editor.put_task(ANYBODY, make_task("late")))


def test_what_changes_nothing_makes_no_version(editor: Any, config: AppConfig, make_task: Callable[..., Task]) -> None:
    before = catalog_versions(config.catalog)
    asyncio.run(editor.put_task(ANYBODY, make_task("sums")))
    assert catalog_versions(config.catalog) == before


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"fill": float("nan")}])
def test_a_broken_adapter_of_the_store_is_refused_in_the_words_of_push(
    editor: Any,
    config: AppConfig,
    files: Callable[..., Any],
    make_adapter: Callable[..., Path],
    settings: dict[str, Any],
) -> None:
    folder = make_adapter(Path(config.adapters), "sums", **settings)
    with pytest.raises(AdapterRejected) as pushed:
        AdapterRepository(open_store(config.adapters)).push(folder)
    for upload in (None, files("sums", **settings)):
        with pytest.raises(AdapterRejected) as caught:
            asyncio.run(editor.put_adapter(ANYBODY, "sums", upload))
        assert str(caught.value) == str(pushed.value)
    assert served(config) == {"poems": [], "sums": []}


def test_what_of_an_adapter_has_no_effect_is_told(
    editor: Any, config: AppConfig, files: Callable[..., Any], make_adapter: Callable[..., Path]
) -> None:
    odd = {"target_modules": ["q_proj", "k_proj"], "notes": "mine"}
    make_adapter(Path(config.adapters), "poems", **odd)
    for name, upload in (("sums", files("sums", **odd)), ("poems", None)):
        answer = asyncio.run(editor.put_adapter(ANYBODY, name, upload))
        assert [warning.partition(" ")[0] for warning in answer["warnings"]] == ["adapter_config.json", "ignored,"]
    assert "warnings" not in asyncio.run(editor.put_adapter(ANYBODY, "films", files("films")))


def changes(*of: Change) -> tuple[Change, ...]:
    return of


def test_many_changes_are_one_version_and_what_goes_is_gone_from_the_store(
    editor: Any, config: AppConfig, files: Callable[..., Any], make_task: Callable[..., Task]
) -> None:
    asyncio.run(editor.put_adapter(ANYBODY, "sums", files("sums")))
    asyncio.run(editor.put_adapter(ANYBODY, "old", files("old")))
    AdapterRepository(open_store(config.adapters)).remove("old")  # of which the catalog does not know
    store = AdapterRepository(open_store(config.adapters))
    for name in ("films", "spare"):
        store.push(write(files(name), Path(config.adapters).parent / "more" / name))
    before = catalog_versions(config.catalog)
    wanted = changes(
        Change("task", "films", task=make_task("films")),
        Change("task", "poems", remove=True),
        Change("adapter", "films"),
        Change("adapter", "sums", remove=True),
        Change("adapter", "old", remove=True),
        Change("adapter", "spare", remove=True),  # which is in the store alone
    )
    answer = asyncio.run(editor.change(ANYBODY, wanted))
    assert len(catalog_versions(config.catalog)) == len(before) + 1
    assert answer["catalog_version"] == Catalog.load(config.catalog).version
    assert [(row["id"], row.get("deleted", False)) for row in answer["data"]] == [
        (change.name, change.remove) for change in wanted
    ]
    assert answer["data"][0]["adapters"] == answer["data"][2]["tasks"] == ["films"]
    assert served(config) == {"films": ["films"], "sums": []}
    assert store.names() == ["films"]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (Change("task", "nil", remove=True), TaskNotFound),
        (Change("adapter", "nil"), AdapterNotFound),
        (Change("adapter", "nil", remove=True), AdapterNotFound),
        (Change("task", "poems", remove=True), InvalidRequest),
    ],
)
def test_of_many_changes_one_that_cannot_be_makes_none(
    editor: Any,
    config: AppConfig,
    files: Callable[..., Any],
    make_task: Callable[..., Task],
    wrong: Change,
    error: type[Exception],
) -> None:
    asyncio.run(editor.put_adapter(ANYBODY, "sums", files("sums")))
    before = Catalog.load(config.catalog).version
    with pytest.raises(error):
        asyncio.run(
            editor.change(
                ANYBODY, changes(Change("adapter", "sums", remove=True), Change("task", "sums", remove=True), wrong)
            )
        )
    assert Catalog.load(config.catalog).version == before
    assert AdapterRepository(open_store(config.adapters)).names() == ["sums"]


def test_a_task_that_anothers_adapter_serves_by_now_is_not_a_limited_keys_to_change(
    editor: Any, config: AppConfig, files: Callable[..., Any], make_task: Callable[..., Task]
) -> None:
    limited = Caller(ApiKey(name="team", sha256="0" * 64, roles=("admin",), adapters=("sums",)))
    asyncio.run(editor.put_adapter(limited, "sums", files("sums")))
    asyncio.run(editor.put_task(limited, make_task("sums")))
    for wanted in (Change("task", "poems", remove=True), Change("task", "poems", task=make_task("poems"))):
        before = Catalog.load(config.catalog)
        with pytest.raises(PermissionDenied, match="'poems' is neither"):
            asyncio.run(editor.change(limited, changes(Change("adapter", "sums"), wanted)))
        assert Catalog.load(config.catalog).version == before.version
    with pytest.raises(PermissionDenied, match="'unknown' is neither"):
        asyncio.run(editor.remove_task(limited, "unknown"))
    asyncio.run(editor.remove_task(limited, "sums"))


def test_the_last_task_may_go_where_another_comes(
    editor: Any, config: AppConfig, make_task: Callable[..., Task]
) -> None:
    gone = [Change("task", name, remove=True) for name in ("sums", "poems")]
    asyncio.run(editor.change(ANYBODY, changes(*gone, Change("task", "films", task=make_task("films")))))
    assert served(config) == {"films": []}


def test_an_adapter_that_somebody_else_replaces_meanwhile_is_theirs(
    editor: Any, config: AppConfig, files: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(editor.put_adapter(ANYBODY, "sums", files("sums")))
    store, theirs = AdapterRepository(open_store(config.adapters)), []
    real = editor._repository.push

    def push(folder: Path) -> AdapterManifest:
        mine = real(folder)
        theirs.append(store.push(write(files("sums", lora_alpha=7), tmp_path / "theirs" / "sums")))
        return mine

    monkeypatch.setattr(editor._repository, "push", push)
    with pytest.raises(Conflict, match="somebody else pushed"):
        asyncio.run(editor.put_adapter(ANYBODY, "sums", files("sums", lora_alpha=5)))
    assert store.manifest("sums") == theirs[0]


def test_an_adapter_that_a_refresh_takes_in_again_while_it_is_removed_does_not_stay(
    editor: Any, config: AppConfig, files: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(editor.put_adapter(ANYBODY, "sums", files("sums")))
    real = editor._repository.remove

    def remove(name: str) -> None:
        with_adapters(Catalog.load(config.catalog), editor._repository).save(config.catalog)
        real(name)

    monkeypatch.setattr(editor._repository, "remove", remove)
    asyncio.run(editor.remove_adapter(ANYBODY, "sums"))
    assert Catalog.load(config.catalog).adapters == {}


def test_two_changes_at_once_of_the_command_line_and_the_editor_are_both_there(
    editor: Any, config: AppConfig, make_task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `lorauter catalog change` published between the editor's check of CURRENT and its write."""
    real, others = Catalog.upload, [make_task("of-the-command-line")]

    def upload(catalog: Catalog, store: Any, **but: Any) -> None:
        real(catalog, store, **but)
        if others:
            with_tasks(Catalog.load(store), [others.pop()], ENCODER).save(store)

    monkeypatch.setattr(Catalog, "upload", upload)
    asyncio.run(editor.put_task(ANYBODY, make_task("of-the-admin-api")))
    assert set(served(config)) == {"sums", "poems", "of-the-admin-api", "of-the-command-line"}


def test_another_version_becomes_current_as_it_is(
    editor: Any, config: AppConfig, files: Callable[..., Any], make_task: Callable[..., Task]
) -> None:
    async def scenario() -> None:
        await editor.put_task(ANYBODY, make_task("films"))
        with_films = (await editor.put_adapter(ANYBODY, "films", files("films")))["catalog_version"]
        without = (await editor.remove_adapter(ANYBODY, "films"))["catalog_version"]
        back = await editor.use_version(with_films)
        assert (back["catalog_version"], back["missing_adapters"]) == (with_films, ["films"])
        assert Catalog.load(config.catalog).version == with_films
        assert (await editor.use_version(without))["missing_adapters"] == []
        with pytest.raises(CatalogVersionNotFound, match=r"no version '0{16}'; see GET") as missing:
            await editor.use_version("0" * 16)
        assert error_answer(missing.value, "operator")[0] == 404
        assert Catalog.load(config.catalog).version == without

    asyncio.run(scenario())


def test_adapters_of_the_hub_are_taken_in_and_out_of_the_catalog_and_stay_there(
    config: AppConfig, files: Callable[..., Any], hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def committed(*names: str) -> str:
        made = {f"{name}/{file}": raw.tobytes() for name in names for file, raw in files(name).items()}
        commit: str = hub_server.commit("team/pool", made)
        return commit

    first = committed("sums")
    monkeypatch.setattr("deployments.catalog_editor.join_serve_logs", lambda: None)
    monkeypatch.setattr("lorauter.adapters.hub._FRESH_S", 0.0)
    model = SimpleNamespace(shape=Method(lambda: (SHAPE, 4)))
    editor = CatalogEditor.func_or_class(config.model_copy(update={"adapters": "hf://team/pool"}), None, model)

    async def scenario() -> None:
        taken = await editor.put_adapter(ANYBODY, "sums", None)
        assert taken["tasks"] == ["sums"]
        assert Catalog.load(config.catalog).adapters == {"sums": first}
        with pytest.raises(ReadOnlyStore, match="only reads from the hub"):
            await editor.put_adapter(ANYBODY, "mine", files("mine"))
        second = committed("sums", "poems")
        await editor.put_adapter(ANYBODY, "poems", None)
        assert Catalog.load(config.catalog).adapters == {"sums": first, "poems": second}, "sums was not asked for"
        await editor.remove_adapter(ANYBODY, "sums")
        assert Catalog.load(config.catalog).adapters == {"poems": second}
        with pytest.raises(ReadOnlyStore):  # which is not served, and cannot be deleted
            await editor.remove_adapter(ANYBODY, "sums")

    asyncio.run(scenario())


@pytest.mark.parametrize("reads", [True, False])
def test_a_task_that_comes_to_a_catalog_with_states_has_its_own(
    editor: Any, config: AppConfig, make_task: Callable[..., Task], reads: bool
) -> None:
    tasks, model = [make_task("sums"), make_task("poems")], HashingStates()
    build_catalog(tasks, ENCODER, states=HashingStates()).save(config.catalog)
    editor._embedder.states = Method(model.states)
    if not reads:
        editor._state_model = None
        with pytest.raises(CatalogError, match="name that model"):
            asyncio.run(editor.put_task(ANYBODY, make_task("films")))
        return
    asyncio.run(editor.put_task(ANYBODY, make_task("films")))
    anew = build_catalog([*tasks, make_task("films")], ENCODER, states=HashingStates())
    assert Catalog.load(config.catalog).version == anew.version
    assert set(model.read) == {PROBE_TEXT, *(example.input for example in make_task("films").validation)}


def test_nothing_is_read_for_a_catalog_without_states(editor: Any, make_task: Callable[..., Task]) -> None:
    editor._embedder.states = Method(lambda _: pytest.fail("was read"))
    asyncio.run(editor.put_task(ANYBODY, make_task("films")))
