"""A small service in which nothing is wrong, for the tests of what looks for that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import build_catalog
from lorauter.encoder import HashingEncoder
from lorauter.tasks import Task


def _folder(path: Path, **files: Any) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path.joinpath(f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.fixture
def folder() -> Callable[..., str]:
    """`folder(path, **files)`: a folder of JSON files; returns its name."""
    return _folder


@pytest.fixture
def sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_task: Callable[..., Task], make_adapter: Callable[..., Path]
) -> dict[str, Any]:
    """The settings of a service of two tasks and their adapters, all of it below `tmp_path`."""
    monkeypatch.setenv("LORAUTER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("deployments.preflight.load_encoder", lambda encoder, device: HashingEncoder(32))
    names = ("poems", "sums")
    for name in names:
        make_adapter(tmp_path / "pool", name, base="org/tiny-base")
        AdapterRepository(open_store(tmp_path / "adapters")).push(tmp_path / "pool" / name)
    repository = AdapterRepository(open_store(tmp_path / "adapters"))
    build_catalog([make_task(n) for n in names], HashingEncoder(), repository=repository).save(tmp_path / "catalog")
    return {
        "base_model": _folder(tmp_path / "tiny-base", config={"model_type": "llama"}),
        "encoder": _folder(tmp_path / "hashing-256", modules=[]),
        "adapters": str(tmp_path / "adapters"),
        "catalog": str(tmp_path / "catalog"),
        "cache": {"directory": str(tmp_path / "cache")},
    }
