"""`hf://`: adapters of the Hugging Face hub, read from a stand-in that speaks its HTTP API."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hub_server import GOOD_TOKEN, HubServer, files_below
from huggingface_hub import hf_hub_download

from lorauter.adapters import AdapterDiskCache, AdapterRepository, MemoryStore, hub, open_store
from lorauter.adapters.hub import HubStore
from lorauter.catalog.pool import read_pool
from lorauter.errors import (
    AdapterNotFound,
    AdapterUnavailable,
    BucketNotFound,
    ConfigError,
    Conflict,
    ObjectNotFound,
    ReadOnlyStore,
    StoreError,
    StoreUnavailable,
)
from lorauter.names import AdapterKey

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
SST2, RTE = files_below(EXAMPLES / "sst2"), files_below(EXAMPLES / "rte")
CARD = {"README.md": b"# a card", ".gitattributes": b"*.safetensors filter=lfs"}


def folder_of(**adapters: dict[str, bytes]) -> dict[str, bytes]:
    return CARD | {f"{name}/{file}": content for name, files in adapters.items() for file, content in files.items()}


@pytest.fixture
def pool(hub_server: HubServer) -> str:
    """The commit of a repository with two adapters."""
    return hub_server.commit("team/pool", folder_of(sst2=SST2, rte=RTE))


def test_a_repository_of_adapters_is_a_store_of_them_and_the_commit_is_their_version(
    hub_server, pool, tmp_path
) -> None:
    repository = AdapterRepository(open_store("hf://team/pool"))
    assert repository.names() == ["rte", "sst2"]
    assert repository.newest() == {"rte": pool, "sst2": pool}
    manifest = repository.manifest("sst2")
    assert (manifest.version, manifest.size) == (pool, sum(map(len, SST2.values())))
    repository.download(manifest, tmp_path)
    assert files_below(tmp_path) == SST2
    assert repository.load(manifest).rank == 8


def test_a_repository_that_is_an_adapter_is_a_store_of_that_one(hub_server) -> None:
    commit = hub_server.commit("someone/sst2-lora", CARD | SST2)
    repository = AdapterRepository(open_store("hf://someone/sst2-lora"))
    assert repository.newest() == {"sst2-lora": commit}
    assert repository.load(repository.manifest("sst2-lora")).name == "sst2-lora"


def test_a_folder_of_a_repository_is_a_store_too(hub_server) -> None:
    files = {f"all/{name}": content for name, content in folder_of(sst2=SST2, rte=RTE).items()}
    commit = hub_server.commit("team/more", files | {"other/x/adapter_config.json": b"{}"})
    assert AdapterRepository(open_store("hf://team/more/all")).newest() == {"rte": commit, "sst2": commit}
    assert AdapterRepository(open_store("hf://team/more@main/all/rte")).newest() == {"rte": commit}


def test_a_moved_branch_is_seen_by_who_asks_for_the_newest_and_by_nobody_else(
    hub_server, pool, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(hub, "_FRESH_S", 0.0)
    repository = AdapterRepository(open_store("hf://team/pool@main"))
    served = repository.manifest("sst2")
    later = hub_server.commit("team/pool", folder_of(sst2=RTE, new=SST2))
    assert repository.manifest("sst2").version == later != pool == served.version
    assert repository.newest() == {"new": later, "sst2": later}
    for one in (repository, AdapterRepository(open_store("hf://team/pool@main"))):
        assert one.manifest("rte", pool).version == pool, "which the branch has no more"
        target = tmp_path / str(id(one))
        target.mkdir()
        one.fetch(AdapterKey("sst2", pool), lambda _, target=target: target)
        assert files_below(target) == SST2
    with pytest.raises(AdapterNotFound):
        repository.manifest("new", pool)
    with pytest.raises(AdapterNotFound):
        repository.manifest("sst2", "f" * 40)


def test_branches_tags_commits_and_pull_requests_can_be_named(hub_server, pool) -> None:
    wanted = hub_server.commit("team/pool", folder_of(odd=SST2), branch="refs/pr/3")
    for revision in ("refs/pr/3", "refs%2Fpr%2F3", wanted):
        store = HubStore(f"hf://team/pool@{revision}")
        assert AdapterRepository(store).newest() == {"odd": wanted}, revision
        assert HubStore(store.uri).commit() == wanted, "its URI says the same"
    before = len(hub_server.requests)
    store = HubStore(f"hf://team/pool@{pool}")
    for _ in range(3):
        AdapterRepository(store).newest()
    assert len(hub_server.requests) == before + 1, "a commit is asked for once"


def test_a_pool_is_listed_by_one_request_and_what_is_cached_needs_none(hub_server, tmp_path) -> None:
    commit = hub_server.commit("team/many", folder_of(**{f"a{i}": SST2 for i in range(50)}))
    repository = AdapterRepository(open_store("hf://team/many"))
    assert len([repository.manifest(name) for name in repository.names()]) == 50
    assert len(hub_server.requests) == 1
    cache = AdapterDiskCache(repository, tmp_path, budget_bytes=1 << 30)
    cache.submit(AdapterKey("a7", commit)).result()
    hub_server.stop()
    local = cache.submit(AdapterKey("a7", commit)).result()
    assert (local.path / "adapter_config.json").read_bytes() == SST2["adapter_config.json"]


def test_what_the_hubs_cache_has_is_not_fetched_and_what_it_has_not_is_not_put_there(
    hub_server, pool, tmp_path
) -> None:
    store = HubStore("hf://team/pool").at()
    store.download("sst2/adapter_model.safetensors", tmp_path / "one")
    store.download("sst2/adapter_model.safetensors", tmp_path / "two")
    large = [path for path in hub_server.downloads() if path.startswith("/cdn/")]
    assert len(large) == 2
    cached = store.cached("sst2/adapter_model.safetensors")
    hub_server.requests.clear()
    store.download("sst2/adapter_model.safetensors", tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == cached.read_bytes() == (tmp_path / "one").read_bytes()
    assert hub_server.requests == []
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "three"}, "nothing is left behind"


def test_files_are_read_opened_and_described(hub_server, pool) -> None:
    store = open_store("hf://team/pool")
    assert store.read("README.md") == b"# a card"
    with store.open("sst2/adapter_model.safetensors") as file:
        file.seek(3)
        assert file.read(5) == SST2["adapter_model.safetensors"][3:8]
    assert store.files("sst2") == {f"sst2/{name}": len(content) for name, content in SST2.items()}
    assert ".gitattributes" not in store.files()
    assert time.gmtime(store.modified("README.md"))[:3] == (2026, 1, 2)
    for ask in (store.read, store.fingerprint, store.open, store.modified):
        with pytest.raises(ObjectNotFound):
            ask("none")


def test_a_mirror_that_lists_names_alone_will_do(hub_server, pool, tmp_path) -> None:
    hub_server.names_only = True
    repository = AdapterRepository(open_store("hf://team/pool"))
    manifest = repository.manifest("sst2")
    repository.download(manifest, tmp_path)
    assert (files_below(tmp_path), manifest.size) == (SST2, sum(map(len, SST2.values())))


def test_a_dropped_connection_goes_on_where_it_broke(hub_server, pool, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub_server.cuts = 3
    repository = AdapterRepository(open_store("hf://team/pool"))
    repository.download(repository.manifest("sst2"), tmp_path)
    assert files_below(tmp_path) == SST2


def test_what_comes_damaged_is_not_taken(hub_server, pool, tmp_path) -> None:
    hub_server.damaged = True
    repository = AdapterRepository(open_store("hf://team/pool"))
    with pytest.raises(AdapterUnavailable, match="damaged"):
        repository.download(repository.manifest("sst2"), tmp_path)
    assert "adapter_model.safetensors" not in files_below(tmp_path)


def test_the_token_opens_a_private_repository_and_no_other_host_sees_it(hub_server, tmp_path, monkeypatch) -> None:
    hub_server.commit("team/secret", folder_of(sst2=SST2), gate="private")
    with pytest.raises(BucketNotFound, match="no repository 'team/secret', or it is private and HF_TOKEN"):
        open_store("hf://team/secret").children()
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(StoreError, match=r"refuses \(401\); is HF_TOKEN"):
        open_store("hf://team/secret").children()
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    repository = AdapterRepository(open_store("hf://team/secret"))
    repository.download(repository.manifest("sst2"), tmp_path)
    assert files_below(tmp_path) == SST2
    assert {token for _, path, token in hub_server.requests if path.startswith("/cdn/")} == {None}


@pytest.mark.parametrize("token", [None, GOOD_TOKEN])
def test_a_gated_repository_says_what_to_do(hub_server, tmp_path, monkeypatch, token) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub_server.commit("team/gated", folder_of(sst2=SST2), gate="gated")
    repository = AdapterRepository(open_store("hf://team/gated"))
    with pytest.raises(AdapterUnavailable, match=r"is gated: ask for access on its page .* HF_TOKEN"):
        repository.download(repository.manifest("sst2"), tmp_path)


def test_what_is_not_there_is_not_found(hub_server, pool) -> None:
    with pytest.raises(BucketNotFound, match="no repository 'team/none'"):
        open_store("hf://team/none").children()
    with pytest.raises(ObjectNotFound, match="no branch, tag or commit"):
        open_store("hf://team/pool@none").children()
    assert open_store("hf://team/pool/none").children() == []


def test_offline_the_hubs_cache_is_the_store(hub_server, pool, tmp_path, monkeypatch) -> None:
    store = HubStore("hf://team/pool")
    for file in SST2:
        hf_hub_download("team/pool", f"sst2/{file}")
    tags = {key: store.fingerprint(key) for key in store.files("sst2")}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_server.stop()
    for uri in ("hf://team/pool", f"hf://team/pool@{pool}"):
        repository = AdapterRepository(open_store(uri))
        assert repository.newest() == {"sst2": pool}
        assert {key: repository.store.fingerprint(key) for key in repository.store.files()} == tags
        repository.download(repository.manifest("sst2", pool), tmp_path)
        assert files_below(tmp_path) == SST2
    for missing in ("hf://team/pool@other", "hf://team/none"):
        with pytest.raises(StoreUnavailable, match=r"HF_HUB_OFFLINE is set, and .* run: hf download"):
            open_store(missing).children()


def test_a_commit_that_does_not_concern_an_adapter_gives_it_no_version(hub_server, pool, monkeypatch) -> None:
    monkeypatch.setattr(hub, "_FRESH_S", 0.0)
    repository = AdapterRepository(open_store("hf://team/pool"))
    before = read_pool(repository, print)
    pushed = repository.manifest("rte")
    later = hub_server.commit("team/pool", folder_of(sst2=RTE, rte=RTE, new=SST2))
    assert read_pool(repository, print, known=before).versions == {"new": later, "rte": pool, "sst2": later}
    assert read_pool(repository, print).versions == dict.fromkeys(("new", "rte", "sst2"), later)
    repository.check_current(pushed)
    hub_server.commit("team/pool", folder_of(rte=SST2))
    with pytest.raises(Conflict):
        repository.check_current(pushed)


@pytest.mark.parametrize("trouble", ["down", "offline", 429, 500, 503])
def test_a_hub_that_does_not_answer_is_unavailable_soon(hub_server, pool, tmp_path, monkeypatch, trouble) -> None:
    store = HubStore("hf://team/pool")
    seen = store.at()
    if trouble == "down":
        hub_server.stop()
    elif trouble == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        hub_server.status = trouble
    started = time.monotonic()
    for call in (
        HubStore("hf://team/pool").children,
        lambda: seen.download("sst2/adapter_model.safetensors", tmp_path / "file"),
    ):
        with pytest.raises(StoreUnavailable):
            call()
    assert time.monotonic() - started < 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    ["hf://", "hf://team", "hf://team/", "hf:///pool", "hf://team/pool@", "hf://team/pool@a@b", "hf://team/pool/../x"],
)
def test_a_uri_that_names_no_repository_is_refused(uri) -> None:
    with pytest.raises(ConfigError, match="use hf://owner/name@revision/path"):
        open_store(uri)


def test_a_name_that_no_repository_may_have_is_a_wrong_setting(hub_server) -> None:
    with pytest.raises(ConfigError, match="names no repository"):
        open_store("hf://team/po ol").children()


def test_nothing_is_published_there(hub_server, pool) -> None:
    store = open_store("hf://team/pool")
    for change in (
        lambda: store.write("a", b"x"),
        lambda: store.delete("README.md"),
        lambda: store.locked("CURRENT").__enter__(),
        lambda: AdapterRepository(store).push(EXAMPLES / "sst2"),
        lambda: AdapterRepository(store).remove("sst2"),
    ):
        with pytest.raises(ReadOnlyStore, match=r"only reads from the hub; publish to a folder, s3://"):
            change()


def test_a_pushed_layout_on_the_hub_keeps_its_own_versions(hub_server) -> None:
    memory = MemoryStore()
    first = AdapterRepository(memory).push(EXAMPLES / "sst2")
    hub_server.commit("team/pushed", memory.objects)
    repository = AdapterRepository(open_store("hf://team/pushed"))
    assert repository.newest() == {"sst2": first.version}
    assert repository.load(repository.manifest("sst2", first.version)).rank == 8
