"""What the repository holds: examples that fit each other, modules that stay small, nothing of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from lorauter.adapters import LoraWeights, adapter_folders
from lorauter.defaults import BASE_MODEL
from lorauter.tasks import read_tasks

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    path for folder in ("lorauter", "lorauter_cli", "deployments") for path in (ROOT / folder).rglob("*.py")
)
# Spelled so that this file does not find itself.
FOREIGN = {
    "a machine's path": r"(?<![\w.])/(?:ro{2}t|w[o]rk|home/(?!ray/)\w+|Users/\w+)/",
    "a package registry": r"pypi\.[o]rg|pythonhosted\.[o]rg",
    "a key": r"AKIA[0-9A-Z]{16}|-{5}BEGIN [A-Z ]*PRIVATE|\b(?:hf|ghp|gho|sk)[_-][A-Za-z0-9_-]{20,}|xox[bp]-\d",
}


def tracked() -> list[Path]:
    """What is or would be committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_example_pool_and_tasks_match_each_other() -> None:
    tasks = read_tasks(ROOT / "examples" / "tasks")
    adapters = list(adapter_folders(ROOT / "examples" / "adapters"))
    assert [task.name for task in tasks] == [folder.name for folder in adapters]
    assert len(tasks) == 12
    for task in tasks:
        assert (len(task.validation), len(task.test)) == (20, 10), task.name
        assert not {e.input for e in task.validation} & {e.input for e in task.test}, task.name
    for folder in adapters:
        assert LoraWeights.load(folder, name=folder.name, version="v").base_model == BASE_MODEL


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
def test_a_module_is_small_and_says_what_it_is(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 500
    assert ast.get_docstring(ast.parse(source))


def test_the_median_module_is_short() -> None:
    lengths = sorted(path.read_text().count("\n") for path in MODULES)
    assert lengths[len(lengths) // 2] < 150


def test_the_library_names_neither_ray_nor_what_stands_above_it() -> None:
    found = {}
    for path in (ROOT / "lorauter").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("ray", "deployments", "lorauter_cli") for name in names):
                found[path.name] = names
    assert found == {}


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert (ROOT / "README.md").read_text().count("\n") < 150


PAGES = sorted(path for path in ROOT.rglob("*.md") if ".venv" not in str(path.relative_to(ROOT)))


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_a_pages_links_lead_somewhere(page: Path) -> None:
    def anchors(path: Path) -> set[str]:
        titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        if "://" not in link:
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("what", FOREIGN)
def test_no_file_holds(what: str) -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in re.finditer(FOREIGN[what], text)]
    assert found == []


def test_weights_and_two_pictures_are_the_only_binary_data_and_stay_small() -> None:
    binary = []
    for path in tracked():
        try:
            path.read_text()
        except UnicodeDecodeError:
            binary.append(path)
    pictures = [path for path in binary if path.suffix == ".png"]
    assert {path.name for path in pictures} == {"page-ask.png", "page-compare.png"}
    assert all(path.parent == ROOT / "docs" and path.stat().st_size < 150_000 for path in pictures)
    binary = [path for path in binary if path not in pictures]
    assert {path.suffix for path in binary} <= {".safetensors"}
    assert sum(path.stat().st_size for path in binary) < 17_000_000
    assert all(path.is_relative_to(ROOT / "examples") for path in binary)
