"""The wheel of this tree, installed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from wheels import Wheel, install


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Wheel:
    return install(root, tmp_path_factory.mktemp("wheel"))
