"""Runs the HTTP tests of other servers, from sources of theirs, against a running service on the example pool.

    .venv-clients/newest/bin/python benchmarks/other_servers.py --url URL --tokenizer FOLDER_OF_THE_BASE_MODEL \\
        [--vllm DIR] [--sglang DIR] [--llama-cpp DIR]

Of the files that concern what this server has, the tests that ask a server over HTTP are run; `other_servers_scope.py`
says which those are, and which of them are not concerned, and why. The sources are read only: copies run beside
stand-ins for what they import of their own server (`other_servers_shim.py`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as Xml
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from other_servers_scope import LLAMA_CPP, SGLANG, VLLM

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Outcome:
    """What came of a test: passed, failed, or skipped, as it is not concerned, and what was said."""

    kind: str
    name: str
    outcome: str
    said: str


def lay_vllm(source: Path, work: Path) -> list[Path]:
    """Copy vLLM's tests to where their imports find the stand-in; returns the files."""
    tests = work / "tests"
    for name in VLLM:
        target = tests / "entrypoints" / name
        for folder in [target.parent, *target.parent.parents]:
            if folder == work:
                break
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
            theirs = source / folder.relative_to(work) / "conftest.py"
            if folder != tests and theirs.exists():
                shutil.copy(theirs, folder)
        shutil.copy(source / "tests" / "entrypoints" / name, target)
    stand_in = "from other_servers_shim import RemoteOpenAIServer, get_tokenizer"
    (tests / "utils.py").write_text(f"{stand_in}\n\nROCM_EXTRA_ARGS = []\nROCM_ENV_OVERRIDES = {{}}\n")
    return [tests / "entrypoints" / name for name in VLLM]


def lay_sglang(source: Path, work: Path) -> list[Path]:
    """Make test cases of SGLang's kits, which are mixins."""
    made = []
    for name, kit in SGLANG.items():
        shutil.copy(source / "sglang" / "test" / "kits" / name, work / name)
        case = work / f"test_{name}"
        case.write_text(
            f"import unittest\n\nimport openai\nfrom {name[:-3]} import {kit.mixin}\n"
            f"from other_servers_shim import start_any\n\n\nclass Test({kit.mixin}, unittest.TestCase):\n"
            "    base_url, api_key, model = start_any(), 'none', 'default'\n"
            "    client = openai.Client(base_url=base_url + '/v1', api_key=api_key)\n"
        )
        made.append(case)
    return made


def lay_llama_cpp(source: Path, work: Path) -> list[Path]:
    """Copy llama.cpp's tests beside their helpers, whose server is the stand-in."""
    theirs = source / "tools" / "server" / "tests"
    shutil.copy(theirs / "utils.py", work / "their_utils.py")
    (work / "utils.py").write_text(
        "import their_utils\nfrom other_servers_shim import as_llama_server\n\n"
        "as_llama_server(their_utils)\nfrom their_utils import *\n"
    )
    for name in LLAMA_CPP:
        shutil.copy(theirs / "unit" / name, work / name)
    return [work / name for name in LLAMA_CPP]


def run(files: Sequence[Path], work: Path, kinds: Mapping[str, str], only: str | None) -> list[Outcome]:
    """Run them; the log stays in the folder."""
    report = work / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "other_servers_shim", "-p", "no:cacheprovider"]
    command += ["-o", "asyncio_mode=auto", "-o", "junit_family=xunit1", f"--junitxml={report}", "--rootdir", str(work)]
    command += [*(["-k", only] if only else []), *map(str, files)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (work, HERE)))}
    with (work / "log.txt").open("w") as log:
        subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    outcomes = []
    for case in Xml.parse(report).getroot().iter("testcase"):
        file = str(case.get("file"))
        kind = next((kind for name, kind in kinds.items() if file.endswith(name)), file)
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        said = "" if bad is None else " ".join((bad.get("message") or "").split())
        name = f"{Path(file).name}::{case.get('name')}"
        outcomes.append(Outcome(kind, name, outcome, said))
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", required=True, help="the folder of the service's base model")
    parser.add_argument("--vllm", type=Path, help="vLLM's source: its sdist, unpacked, or a checkout")
    parser.add_argument("--sglang", type=Path, help="SGLang's wheel, unpacked, or the folder python of a checkout")
    parser.add_argument("--llama-cpp", type=Path, help="a checkout of llama.cpp")
    parser.add_argument("--only", help="pytest's -k")
    parser.add_argument("--work", type=Path, help="where the copies and logs are left")
    given = parser.parse_args()
    os.environ |= {"LORAUTER_URL": given.url, "LORAUTER_TOKENIZER": given.tokenizer}
    top = given.work or Path(tempfile.mkdtemp())
    suites = [
        ("vllm", given.vllm, lay_vllm, VLLM),
        ("sglang", given.sglang, lay_sglang, {name: kit.kind for name, kit in SGLANG.items()}),
        ("llama.cpp", given.llama_cpp, lay_llama_cpp, LLAMA_CPP),
    ]
    for suite, source, lay, kinds in suites:
        if source is None:
            continue
        work = top / suite.replace(".", "_")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        outcomes = run(lay(source.resolve(), work), work, kinds, given.only)
        counts = Counter((one.kind, one.outcome) for one in outcomes)
        for kind in dict.fromkeys(one.kind for one in outcomes):
            told = (f"{counts[kind, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
            print(suite, kind, *told, sep="\t")
        for one in outcomes:
            if one.outcome != "passed":
                print(f"{one.outcome}: {one.name}\n    {one.said[:300]}")
        passed, failed = (sum(one.outcome == outcome for one in outcomes) for outcome in ("passed", "failed"))
        print(f"{suite}: {passed} of {passed + failed} concerned pass", flush=True)


if __name__ == "__main__":
    main()
