"""How the page is served: its files are found, kept and guarded. tests/integration has it in a browser."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import tomllib

import httpx
import pytest
from fake_service import FakeService, send

from deployments.web import FOLDER, files

FIRST = ("index.html", "style.css", "icon.svg", "app.js", "api.js", "dom.js")
FEW = 200_000  # bytes that the first load may take


def get(path: str, **headers: str) -> httpx.Response:
    response: httpx.Response = send(FakeService(), "GET", path, headers=headers)
    return response


def test_the_document_is_asked_for_anew_and_its_files_are_kept_for_good() -> None:
    index = get("/")
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    assert index.headers["cache-control"] == "no-cache"
    assert get("/", **{"if-none-match": index.headers["etag"]}).status_code == 304
    named = re.findall(r'(?:src|href)="(page/[^"]+)"', index.text)
    assert {path.rpartition("/")[2] for path in named} >= {"app.js", "style.css", "icon.svg"}
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    for path in named:
        file = get(f"/{path}")
        assert file.status_code == 200
        assert file.headers["content-type"].startswith(kinds[path.rpartition(".")[2]])
        assert "immutable" in file.headers["cache-control"]
        assert get(f"/{path}", **{"if-none-match": f"W/{file.headers['etag']}"}).status_code == 304
    assert get("/page/another/app.js").headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["index.html", "nothing.js", "..%2Fweb.py", "%2e%2e%2fweb.py", ".."])
def test_nothing_else_is_served(path: str) -> None:
    assert get(f"/page/x/{path}").status_code == 404


def test_no_browser_loads_or_runs_anything_that_is_not_the_pages() -> None:
    policy = get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    _, content = files()
    for name, text in content.items():
        others = re.findall(rb"(?:https?:)?//[\w.]+\.\w+", text)
        assert set(others) <= {b"http://www.w3.org"}, name  # a namespace, which nobody asks for
        assert not re.search(rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", get("/").text)


def test_the_page_is_small() -> None:
    _, content = files()
    assert sum(map(len, content.values())) < FEW
    assert sum(len(gzip.compress(content[name])) for name in FIRST) < FEW / 4


def test_the_page_is_part_of_the_package() -> None:
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["lorauter._shipped"]
    installed = {path for pattern in patterns for path in FOLDER.parents[1].glob(pattern)}
    assert set(FOLDER.iterdir()) <= installed


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.js")), ids=lambda path: path.name)
def test_every_module_parses(path: str) -> None:
    checked = subprocess.run(["node", "--check", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_modules_import_what_there_is() -> None:
    exported = {
        path.name: set(re.findall(r"^export (?:async )?(?:function\*?|const|class) (\w+)", path.read_text(), re.M))
        for path in FOLDER.glob("*.js")
    }
    for path in FOLDER.glob("*.js"):
        text = path.read_text()
        for names, source in re.findall(r'^import \{ (.+?) \} from "\./(.+?)";', text, re.M):
            for name in names.split(", "):
                assert name in exported[source], (path.name, name, source)
                assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{path.name} imports {name} for nothing"
