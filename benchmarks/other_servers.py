"""Runs the HTTP tests of other servers, from a checkout of theirs, against a running service.

    .venv-clients/newest/bin/python benchmarks/other_servers.py --url URL --tokenizer DIR --vllm DIR --llama-cpp DIR

Only tests that ask a server over HTTP are run, of the files that concern what this one has. What of them is left out is
in the tables below with the reason. The checkouts are read; a copy of the files is run beside stand-ins for what they
import of their own server (`other_servers_shim.py`).
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
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent

VLLM_UTILS = """from other_servers_shim import RemoteOpenAIServer, get_tokenizer

ROCM_EXTRA_ARGS = []
ROCM_ENV_OVERRIDES = {}
"""

# Folder or file, and what it is about.
VLLM: Mapping[str, str] = {
    "openai/chat_completion/test_chat.py": "chat",
    "openai/chat_completion/test_chat_completion.py": "chat",
    "openai/chat_completion/test_chat_echo.py": "chat",
    "openai/chat_completion/test_chat_logit_bias_validation.py": "chat",
    "openai/chat_completion/test_completion_with_function_calling.py": "tools",
    "openai/completion/test_completion.py": "completions",
    "openai/completion/test_prompt_validation.py": "completions",
    "openai/models/test_models.py": "models",
    "openai/test_chunked_prompt.py": "streams",
    "openai/test_return_token_ids.py": "token ids",
    "openai/responses/test_simple.py": "responses",
    "openai/responses/test_basic.py": "responses",
    "openai/responses/test_function_call.py": "responses",
    "openai/responses/test_structured_output.py": "responses",
    "openai/responses/test_stateful.py": "responses",
    "anthropic/test_messages.py": "messages",
    "serve/tokenize/test_tokenization.py": "tokenize",
    "serve/instrumentator/test_basic.py": "health",
}

NOT_CONCERNED: Mapping[str, str] = {}


def run_vllm(checkout: Path, work: Path, only: str | None) -> list[tuple[str, str, str, str]]:
    """The outcome of each test: kind, name, outcome, what was said."""
    source = checkout / "tests" / "entrypoints"
    target = work / "tests" / "entrypoints"
    for name in VLLM:
        for folder in [*(target / name).parents][: -len(work.parents) - 1]:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
        shutil.copy(source / name, target / name)
        for folder in [*Path(name).parents]:
            if (source / folder / "conftest.py").exists():
                shutil.copy(source / folder / "conftest.py", target / folder / "conftest.py")
    (work / "tests" / "utils.py").write_text(VLLM_UTILS)
    report = work / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "other_servers_shim", "-p", "no:cacheprovider"]
    command += [
        "--tb=short",
        f"--junitxml={report}",
        "-o",
        "asyncio_mode=auto",
        "-o",
        "junit_family=xunit1",
        "--rootdir",
        str(work),
    ]
    command += [*(["-k", only] if only else []), *[str(target / name) for name in VLLM]]
    environment = {**os.environ, "PYTHONPATH": f"{work}{os.pathsep}{HERE}"}
    with (work / "log.txt").open("w") as log:
        subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    return read(report, VLLM)


def read(report: Path, kinds: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    rows = []
    for case in Xml.parse(report).getroot().iter("testcase"):
        file = case.get("file") or case.get("classname", "").replace(".", "/") + ".py"
        kind = next((kind for name, kind in kinds.items() if file.endswith(name)), file)
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if bad is None else {"skipped": "skipped"}.get(bad.tag, "failed")
        rows.append(
            (kind, f"{Path(file).name}::{case.get('name')}", outcome, "" if bad is None else bad.get("message") or "")
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="a running service on the example pool")
    parser.add_argument("--tokenizer", required=True, help="the folder of its base model")
    parser.add_argument("--vllm", type=Path, help="a checkout, or unpacked source, of vLLM")
    parser.add_argument("--only", help="pytest's -k")
    parser.add_argument("--work", type=Path, help="where to keep the copies and logs")
    given = parser.parse_args()
    os.environ |= {"LORAUTER_URL": given.url, "LORAUTER_TOKENIZER": given.tokenizer}
    work = given.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    rows = run_vllm(given.vllm, work, given.only) if given.vllm else []
    counts = Counter((kind, outcome) for kind, _, outcome, _ in rows)
    for kind in dict.fromkeys(kind for kind, *_ in rows):
        print(kind, *(f"{counts[kind, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")), sep="\t")
    for _, name, outcome, said in rows:
        if outcome == "failed":
            print(name, " ".join(said.split())[:300], sep="\n    ")
    print(sum(outcome == "passed" for _, _, outcome, _ in rows), "of", len(rows))


if __name__ == "__main__":
    main()
