"""What tests of real services share: the example pool in a real S3 server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorauter.adapters import AdapterRepository, adapter_folders, open_store
from lorauter.catalog import Catalog, with_adapter, with_shown
from lorauter.catalog.shown import Help, ShownExamples
from lorauter.defaults import resolve_catalog
from lorauter.tasks import read_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def published(s3_server: Any) -> str:
    """The URI below which the store holds the example `adapters` and their `catalog`, of which mrpc's examples help."""
    uri: str = s3_server.bucket("lorauter-test")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        repository, catalog = AdapterRepository(open_store(f"{uri}/adapters")), Catalog.load(resolve_catalog("default"))
        for folder in adapter_folders(ROOT / "examples" / "adapters"):
            catalog = with_adapter(catalog, repository.push(folder))  # a pushed one's version is not a folder's
        [mrpc] = [entry for entry in catalog.entries if entry.name == "mrpc"]
        helped = Help("mixture", 0.5, 0.1)
        catalog = with_shown(catalog, {"mrpc": ShownExamples(2, helped, helped, (80,) * mrpc.examples)})
        catalog.save(f"{uri}/catalog")
    return uri


@pytest.fixture(scope="session")
def examples() -> Any:
    """`examples(task)`: its test examples."""
    return lambda task: read_task(ROOT / "examples" / "tasks" / f"{task}.json").test


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
