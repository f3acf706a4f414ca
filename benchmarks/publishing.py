"""Writers that change one catalog at the same time, and what of their changes is in it afterwards.

    python benchmarks/publishing.py --seconds 60

on a folder and on a real S3 server: processes that add, replace and remove tasks, push adapters and have the catalog
serve them, as fast as they can, while another deletes old versions. Every change that was reported done must be in the
last version. Prints one line a store; the exit status is 1 if anything is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from local_s3 import LocalS3
from safetensors.torch import save_file

from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import (
    Catalog,
    build_catalog,
    change_catalog,
    named_adapters,
    prune_versions,
    with_adapter,
    with_tasks,
    without_tasks,
)
from lorauter.encoder import HashingEncoder
from lorauter.tasks import Example, Task

ENCODER = HashingEncoder(32)


def make_task(name: str, number: int = 0) -> Task:
    return Task(name, "tests", "em", tuple(Example(f"{name} {word} {number}", "x") for word in ("one", "two")))


def write_adapter(folder: Path, alpha: int) -> None:
    folder.mkdir(exist_ok=True)
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"]
    save_file(dict(zip(names, (torch.ones(2, 8), torch.ones(8, 2)), strict=True)), folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/tiny", "r": 2, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"]}))


def write(root: str, name: str, seconds: float) -> None:
    """One writer. Prints each change when it is done: the task's number, or none, and the adapter's version."""
    store, repository = open_store(f"{root}/catalog"), AdapterRepository(open_store(f"{root}/adapters"))
    end, number, choice = time.monotonic() + seconds, 0, random.Random(name)
    mine: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch:
        while time.monotonic() < end:
            number += 1
            task = f"{name}-{choice.randrange(6)}"
            kind = choice.choice(["put", "put", "adapter"] if task not in mine else ["put", "remove", "adapter"])
            if kind == "put":
                put = make_task(task, number)
                change_catalog(store, lambda before: with_tasks(before, [put], ENCODER), tasks=[task])  # noqa: B023
                mine.add(task)
                print(json.dumps({"task": task, "is": number}), flush=True)
            elif kind == "remove":
                change_catalog(store, lambda before: without_tasks(before, [task]), tasks=[task])  # noqa: B023
                mine.remove(task)
                print(json.dumps({"task": task, "is": None}), flush=True)
            else:
                write_adapter(Path(scratch) / name, number)
                pushed = repository.push(Path(scratch) / name)
                change_catalog(store, lambda before: with_adapter(before, pushed), adapters=[name])  # noqa: B023
                print(json.dumps({"adapter": name, "is": pushed.version}), flush=True)


def prune(root: str, seconds: float) -> None:
    """Delete whatever is not current, as fast as that goes."""
    store, repository = open_store(f"{root}/catalog"), AdapterRepository(open_store(f"{root}/adapters"))
    end, pruned = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        pruned += len(prune_versions(store, keep=0, older_than_s=0))
        pruned += len(repository.prune(keep=named_adapters(store), older_than_s=2))
        time.sleep(0.2)
    print(json.dumps({"pruned": pruned}), flush=True)


def run(root: str, seconds: float, writers: int = 2) -> tuple[str, list[str]]:
    """Let writers write to an empty store; returns what happened in a line, and what is lost or went wrong."""
    build_catalog([make_task("first")], ENCODER).save(f"{root}/catalog")
    names = [f"w{number}" for number in range(writers)]
    command = [sys.executable, __file__, "--seconds", str(seconds), "--root", root]
    processes = {
        name: subprocess.Popen([*command, "--as", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in (*names, "prune")
    }
    problems, done, expected = [], Counter[str](), {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=seconds + 120)
        if process.returncode:
            problems.append(f"{name} failed: {err[-2000:]}")
        for line in map(json.loads, out.splitlines()):
            done[name] += line.get("pruned", 1)
            expected |= {(kind, line[kind]): line["is"] for kind in ("task", "adapter") if kind in line}
    catalog = Catalog.load(f"{root}/catalog")
    tasks = {entry.name: int(entry.task.validation[0].input.split()[-1]) for entry in catalog.tasks}
    found = {("task", name): number for name, number in tasks.items() if name != "first"}
    found |= {("adapter", name): version for name, version in catalog.adapters.items()}
    wanted = {what: is_ for what, is_ in expected.items() if is_ is not None}
    problems += [f"{what}: is {found.get(what)}, not {wanted.get(what)}" for what in {*found, *wanted}
                 if found.get(what) != wanted.get(what)]  # fmt: skip
    repository = AdapterRepository(open_store(f"{root}/adapters"))
    with tempfile.TemporaryDirectory() as target:
        for name in catalog.adapters:
            repository.download(repository.manifest(name, catalog.adapters[name]), Path(target))
    told = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    return f"{root}: {seconds:g} s, changes done: {told}; {len(problems)} lost or wrong", problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--as", dest="name", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.name == "prune":
        prune(args.root, args.seconds)
    elif args.name:
        write(args.root, args.name, args.seconds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            server = LocalS3(Path(folder) / "s3", "bucket")
            server.start()
            os.environ.update(server.env)
            try:
                results = [run(root, args.seconds, args.writers) for root in (f"{folder}/store", "s3://bucket/store")]
            finally:
                server.stop()
        for line, problems in results:
            print("\n  ".join([line, *problems]))
        sys.exit(any(problems for _, problems in results))


if __name__ == "__main__":
    main()
