"""A repository with an adapter in it; a failed assertion of a helper says what it compared."""

import pytest

from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import MemoryStore

pytest.register_assert_rewrite("peft_folders")


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def pushed(memory, tmp_path, make_adapter):
    """A repository over `memory` with one adapter, sst2, in it."""
    repository = AdapterRepository(memory)
    repository.push(make_adapter(tmp_path / "pushed", "sst2"))
    return repository
