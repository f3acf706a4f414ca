import hashlib
import json
from dataclasses import replace

import pytest

from lorauter.adapters.repository import MANIFEST_FILE, AdapterRepository, StoredFile, adapter_folders
from lorauter.adapters.store import DirectoryStore, MemoryStore
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE, LoraWeights
from lorauter.errors import AdapterNotFound, AdapterRejected, AdapterUnavailable, StoreUnavailable

PATH_LIKE = ["..", ".", "a/b", "../a", "/etc", "", ".hidden", "a b", "a\\b", "x" * 129]


def test_what_is_pushed_can_be_listed_described_and_downloaded(store, tmp_path, make_adapter) -> None:
    repository = AdapterRepository(store)
    assert repository.names() == []
    folders = {name: make_adapter(tmp_path / "mine", name, rank=3) for name in ("wic", "agnews")}
    manifests = {name: repository.push(folder) for name, folder in folders.items()}
    assert repository.names() == ["agnews", "wic"]
    for name, folder in folders.items():
        manifest = repository.manifest(name)
        assert manifest == manifests[name]
        assert (manifest.name, manifest.base_model, manifest.rank) == (name, "org/tiny-base", 3)
        assert manifest.size == sum(path.stat().st_size for path in folder.iterdir())
        (tmp_path / name).mkdir()
        repository.download(manifest, tmp_path / name)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes()
            assert manifest.files[file].sha256 == hashlib.sha256((folder / file).read_bytes()).hexdigest()


def test_the_same_content_has_the_same_version_everywhere(tmp_path, make_adapter) -> None:
    versions = {
        AdapterRepository(MemoryStore()).push(make_adapter(tmp_path / place, "sst2")).version
        for place in ("here", "there")
    }
    assert len(versions) == 1


@pytest.mark.parametrize("change", [{"rank": 3}, {"lora_alpha": 3}], ids=["weights", "configuration"])
def test_a_replaced_adapter_has_a_new_version_and_leaves_the_old_readable(pushed, tmp_path, make_adapter, change):
    old = pushed.manifest("sst2")
    new = pushed.push(make_adapter(tmp_path / "new", "sst2", **change))
    assert new.version != old.version
    assert pushed.manifest("sst2") == new
    for manifest in (old, new):
        pushed.download(manifest, tmp_path)


def test_an_unchanged_adapter_is_not_sent_again(memory, pushed, tmp_path, break_writes) -> None:
    before = pushed.manifest("sst2")
    break_writes(memory, 0)
    assert pushed.push(tmp_path / "pushed" / "sst2") == before


@pytest.mark.parametrize("part", [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("damage", [None, b"short"])
def test_a_push_mends_what_is_missing_or_short(memory, pushed, tmp_path, part, damage) -> None:
    intact = dict(memory.objects)
    key = next(key for key in memory.objects if key.endswith(part))
    memory.objects.pop(key)
    if damage is not None:
        memory.objects[key] = damage
    pushed.push(tmp_path / "pushed" / "sst2")
    assert memory.objects == intact


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_push_that_fails_midway_leaves_the_old_version(
    memory, pushed, tmp_path, make_adapter, break_writes, allowed
) -> None:
    old = pushed.manifest("sst2")
    break_writes(memory, allowed)
    with pytest.raises(StoreUnavailable):
        pushed.push(make_adapter(tmp_path / "new", "sst2", rank=3))
    assert pushed.manifest("sst2") == old
    pushed.download(old, tmp_path)


@pytest.mark.parametrize("name", ["base", "lorauter", "BASE", "a b", ".hidden", "ä", "x" * 129])
def test_a_name_that_is_not_allowed_is_not_pushed(memory, tmp_path, make_adapter, name) -> None:
    with pytest.raises(AdapterRejected, match="name is not allowed"):
        AdapterRepository(memory).push(make_adapter(tmp_path, name))
    assert memory.objects == {}


def test_a_folder_that_has_no_name_is_not_pushed(memory, tmp_path, make_adapter) -> None:
    inside = make_adapter(tmp_path, "sst2") / "inside"
    inside.mkdir()
    with pytest.raises(AdapterRejected, match="name is not allowed"):
        AdapterRepository(memory).push(inside / "..")
    assert memory.objects == {}


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_what_could_not_be_served_is_not_pushed(memory, tmp_path, make_adapter, missing) -> None:
    folder = make_adapter(tmp_path, "sst2")
    (folder / missing).unlink()
    for broken in (folder, make_adapter(tmp_path, "dora", use_dora=True), tmp_path / "none"):
        with pytest.raises(AdapterRejected):
            AdapterRepository(memory).push(broken)
    assert memory.objects == {}


@pytest.mark.parametrize("name", [*PATH_LIKE, "none"])
def test_a_name_that_is_not_allowed_is_not_found_whatever_it_points_at(memory, pushed, name) -> None:
    if name != "none":
        memory.objects[f"{name}/{MANIFEST_FILE}"] = memory.objects[f"sst2/{MANIFEST_FILE}"].replace(
            b'"name": "sst2"', f'"name": {json.dumps(name)}'.encode()
        )
    with pytest.raises(AdapterNotFound) as caught:
        pushed.manifest(name)
    assert caught.value.adapter == name


def test_only_allowed_names_are_listed(tmp_path, make_adapter) -> None:
    for name in ("ok", "not ok", ".hidden", "ä"):
        make_adapter(tmp_path, name)
    assert AdapterRepository(DirectoryStore(tmp_path)).names() == ["ok"]


def test_a_plain_folder_is_an_adapter_too(tmp_path, make_adapter) -> None:
    folder = make_adapter(tmp_path / "root", "sst2")
    repository = AdapterRepository(DirectoryStore(tmp_path / "root"))
    assert repository.names() == ["sst2"]
    first = repository.manifest("sst2")
    assert first == repository.manifest("sst2")
    assert first.size == sum(path.stat().st_size for path in folder.iterdir())
    (tmp_path / "target").mkdir()
    repository.download(first, tmp_path / "target")
    assert (tmp_path / "target" / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()
    make_adapter(tmp_path / "root", "sst2", rank=3)
    assert repository.manifest("sst2").version != first.version
    with pytest.raises(AdapterUnavailable, match="is damaged"):
        repository.download(first, tmp_path / "target")


def test_a_plain_folder_without_a_configuration_is_no_adapter(tmp_path, make_adapter) -> None:
    (make_adapter(tmp_path, "sst2") / CONFIG_FILE).unlink()
    with pytest.raises(AdapterNotFound):
        AdapterRepository(DirectoryStore(tmp_path)).manifest("sst2")


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (None, f"{WEIGHTS_FILE} cannot be read: it is missing$"),
        ("adapter_model.bin", "it is missing, and adapter_model.bin is a pickle"),
        ("adapter_model-00001-of-00002.safetensors", "is of several files; PEFT reads one"),
    ],
)
def test_a_plain_folder_without_weights_is_refused_as_push_refuses_it(store, tmp_path, make_adapter, there, said):
    folder = make_adapter(tmp_path / "mine", "sst2")
    (folder / WEIGHTS_FILE).unlink()
    store.write(f"sst2/{CONFIG_FILE}", folder / CONFIG_FILE)
    if there is not None:
        (folder / there).write_bytes(b"x")
        store.write(f"sst2/{there}", b"x")
    with pytest.raises(AdapterRejected, match=said) as pulled:
        AdapterRepository(store).manifest("sst2")
    with pytest.raises(AdapterRejected) as pushed:
        AdapterRepository(store).push(folder)
    assert str(pulled.value) == str(pushed.value)


def test_what_has_no_effect_is_told_when_it_is_pushed(memory, tmp_path, make_adapter) -> None:
    told: list[str] = []
    folder = make_adapter(tmp_path, "sst2", target_modules=["q_proj"], notes="mine")
    AdapterRepository(memory).push(folder, report=told.append)
    assert len(told) == 2
    assert told[0] == f"adapter 'sst2': {CONFIG_FILE} has notes, which PEFT does not know and ignores"
    assert "leaves out (model.layers.0.self_attn.v_proj)" in told[1]


def test_a_plain_adapter_is_read_and_a_fault_of_the_local_disk_is_none_of_its(
    tmp_path, make_adapter, monkeypatch
) -> None:
    repository = AdapterRepository(DirectoryStore(tmp_path))
    make_adapter(tmp_path, "sst2", rank=3)
    assert repository.load(repository.manifest("sst2")).rank == 3
    faults = [AdapterRejected("too many open files", adapter="sst2")]

    def load(*args, **kwargs):
        if faults:
            raise faults.pop()
        return read(*args, **kwargs)

    read = LoraWeights.load
    monkeypatch.setattr(LoraWeights, "load", load)
    assert repository.load(repository.manifest("sst2")).rank == 3
    assert not faults


def test_folders_of_adapters_with_names_that_none_may_have_are_known(store, tmp_path, make_adapter) -> None:
    folder = make_adapter(tmp_path / "mine", "sst2")
    for name in ("my adapter", "base", "sst2"):
        store.write(f"{name}/{CONFIG_FILE}", folder / CONFIG_FILE)
    store.write("my notes/readme.txt", b"")
    assert AdapterRepository(store).misnamed() == ["base", "my adapter"]


def _without(*path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def _with(value, *path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _without("name"),
        _without("version"),
        _without("files"),
        _without("files", WEIGHTS_FILE),
        _without("files", CONFIG_FILE, "key"),
        _without("files", CONFIG_FILE, "size"),
        _without("files", CONFIG_FILE, "sha256"),
        _with("other", "name"),
        _with("../../etc", "version"),
        _with("", "version"),
        _with(7, "version"),
        _with([], "files"),
        _with("x", "files", CONFIG_FILE),
        _with("many", "files", CONFIG_FILE, "size"),
        _with(float("inf"), "files", CONFIG_FILE, "size"),
    ],
)
def test_a_malformed_manifest_is_rejected(memory, pushed, change) -> None:
    data = json.loads(memory.objects[f"sst2/{MANIFEST_FILE}"])
    change(data)
    memory.objects[f"sst2/{MANIFEST_FILE}"] = json.dumps(data).encode()
    with pytest.raises(AdapterRejected, match=rf"{MANIFEST_FILE} is malformed") as caught:
        pushed.manifest("sst2")
    assert caught.value.adapter == "sst2"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b'"text"'])
def test_a_manifest_that_is_no_json_object_is_rejected(memory, pushed, content) -> None:
    memory.objects[f"sst2/{MANIFEST_FILE}"] = content
    with pytest.raises(AdapterRejected, match=MANIFEST_FILE):
        pushed.manifest("sst2")


@pytest.mark.parametrize("key", ["../secret", f"wic/{CONFIG_FILE}", f"sst2/../wic/{CONFIG_FILE}", "sst2/else.json"])
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path, make_adapter, key) -> None:
    root = tmp_path / "root"
    repository = AdapterRepository(DirectoryStore(root))
    repository.push(make_adapter(tmp_path, "sst2"))
    make_adapter(root, "wic")
    (tmp_path / "secret").write_bytes(b"secret")
    path = root / "sst2" / MANIFEST_FILE
    before, data = repository.manifest("sst2"), json.loads(path.read_bytes())
    data["files"][CONFIG_FILE] = {"key": key, "size": 6, "sha256": None}
    path.write_text(json.dumps(data))
    with pytest.raises(AdapterRejected, match=rf"malformed: .*{CONFIG_FILE} is not in the adapter's own folder"):
        repository.manifest("sst2")
    assert repository.newest() == {"wic": repository.manifest("wic").version}
    if key == "../secret":  # nor does the store reach out of itself
        (tmp_path / "target").mkdir()
        files = {**before.files, CONFIG_FILE: StoredFile(key, 6, None)}
        with pytest.raises(AdapterUnavailable):
            repository.download(replace(before, files=files), tmp_path / "target")
        assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: bytes([content[0] ^ 1]) + content[1:], "is damaged: got .* SHA-256"),
        (lambda content: content[:-1], "is damaged"),
        (lambda content: b"", "is damaged: got 0 bytes"),
        (lambda content: content + b"x", "is damaged"),
        (lambda content: None, "cannot be downloaded"),
    ],
    ids=["a bit flipped", "truncated", "empty", "longer", "missing"],
)
def test_a_damaged_object_is_noticed(memory, pushed, tmp_path, file, damage, said) -> None:
    manifest = pushed.manifest("sst2")
    key = manifest.files[file].key
    content = damage(memory.objects.pop(key))
    if content is not None:
        memory.objects[key] = content
    with pytest.raises(AdapterUnavailable, match=rf"'sst2': {file} .*{said}"):
        pushed.download(manifest, tmp_path)


def test_a_store_that_is_down_makes_adapters_unavailable(memory, pushed, tmp_path) -> None:
    manifest = pushed.manifest("sst2")
    memory.down = True
    with pytest.raises(AdapterUnavailable):
        pushed.manifest("sst2")
    with pytest.raises(AdapterUnavailable):
        pushed.download(manifest, tmp_path)
    for ask in (pushed.names, lambda: pushed.push(tmp_path / "pushed" / "sst2")):
        with pytest.raises(StoreUnavailable):
            ask()


def test_adapter_folders_are_found_by_their_configuration(tmp_path, make_adapter) -> None:
    folders = [make_adapter(tmp_path, name) for name in ("b", "a")]
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").touch()
    assert list(adapter_folders(tmp_path)) == sorted(folders)
    assert list(adapter_folders(folders[0])) == [folders[0]]
    assert list(adapter_folders(tmp_path / "none")) == []


def test_a_forced_push_mends_damage_that_leaves_the_size(memory, pushed, tmp_path, make_adapter) -> None:
    folder = make_adapter(tmp_path / "pushed", "sst2")
    key = pushed.manifest("sst2").files[WEIGHTS_FILE].key
    whole = memory.objects[key]
    memory.objects[key] = whole[:-1] + bytes([whole[-1] ^ 1])
    pushed.push(folder)
    assert memory.objects[key] != whole
    pushed.push(folder, force=True)
    assert memory.objects[key] == whole


@pytest.mark.parametrize("name", ["base", "lorauter", "Base"])
def test_a_plain_folder_with_a_reserved_name_is_no_adapter(tmp_path, make_adapter, name) -> None:
    make_adapter(tmp_path, name)
    repository = AdapterRepository(DirectoryStore(tmp_path))
    assert repository.names() == []
    with pytest.raises(AdapterNotFound):
        repository.manifest(name)
