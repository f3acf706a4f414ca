"""Which adapters of a store a catalog may name."""

import re

import pytest

from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import DirectoryStore
from lorauter.adapters.weights import WEIGHTS_FILE
from lorauter.catalog import build_catalog, with_adapters
from lorauter.catalog.pool import Pool, read_pool
from lorauter.encoder import HashingEncoder
from lorauter.errors import AdapterUnavailable

ENCODER = HashingEncoder(64)


@pytest.fixture
def plain(tmp_path, make_adapter) -> AdapterRepository:
    """A store of plain folders: one sound, one that has what PEFT ignores, and four that cannot be served."""
    root = tmp_path / "store"
    make_adapter(root, "sound")
    make_adapter(root, "odd", target_modules=["q_proj"])
    make_adapter(root, "dora", use_dora=True)
    make_adapter(root, "nan", fill=float("nan"))
    folder = make_adapter(root, "pickle")
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    (make_adapter(root, "pointer") / WEIGHTS_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    make_adapter(root, "not a name")
    (root / "notes").mkdir()
    (root / "notes" / "readme.txt").touch()
    return AdapterRepository(DirectoryStore(root))


def test_plain_folders_are_read_and_what_cannot_be_served_is_told_and_left_out(plain) -> None:
    told: list[str] = []
    pool = read_pool(plain, told.append)
    assert sorted(pool.versions) == ["odd", "sound"]
    assert pool.left_out == {"dora", "nan", "pickle", "pointer"}
    for line, said in zip(
        told,
        [
            "left out: adapter 'not a name': the name is not allowed",
            "left out: adapter 'dora': .*use_dora",
            "left out: adapter 'nan': .*NaN or infinity",
            "adapter 'odd': ignored, as in PEFT: tensors of modules that the configuration leaves out",
            "left out: adapter 'pickle': .*adapter_model.bin is a pickle",
            "left out: adapter 'pointer': .*Git LFS pointer",
        ],
        strict=True,
    ):
        assert re.match(said, line), line


def test_what_was_read_before_is_not_read_again(plain, monkeypatch) -> None:
    known = read_pool(plain, print).versions
    read: list[str] = []
    load = AdapterRepository.load
    monkeypatch.setattr(AdapterRepository, "load", lambda self, m: (read.append(m.name), load(self, m))[1])
    assert read_pool(plain, print, known=Pool(known)).versions == known
    assert sorted(read) == ["dora", "nan", "pointer"]


def test_a_store_that_fails_leaves_nobody_out(plain, monkeypatch) -> None:
    def fail(*_):
        raise AdapterUnavailable("the store is down", adapter="x")

    monkeypatch.setattr(AdapterRepository, "load", fail)
    with pytest.raises(AdapterUnavailable):
        read_pool(plain, print)


def test_a_refresh_leaves_out_what_broke_and_takes_back_what_was_mended(plain, make_adapter, make_task) -> None:
    tasks = [make_task("sound"), make_task("dora")]
    catalog = build_catalog(tasks, ENCODER, repository=plain, report=lambda _: None)
    root = plain.store.root
    make_adapter(root, "sound", use_dora=True)
    make_adapter(root, "dora")
    told: list[str] = []
    changed = with_adapters(catalog, plain, report=told.append)
    assert sorted(changed.adapters) == ["dora", "odd"]
    assert any(line.startswith("left out: adapter 'sound'") for line in told)
