"""Batch jobs against the engine alone, and their memory.

    python benchmarks/batch.py throughput --tasks DIR    # 2,000 rows of the tasks' tests, the example pool
    python benchmarks/batch.py memory --tasks DIR        # 100,000 route-only rows, made of the tests' first words

`throughput` runs a job of one answering worker, then the engine in this process on the same rows with the same
mixtures, and prints the ratio. The job's clock, as the engine's, starts once the model is loaded, and stops with the
last part written; routing, Ray and all files are in it. `memory` sums the resident memory of the command and of all its
descendants, shared pages counted once (PSS) and as often as they are shared (RSS).
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
from pathlib import Path
from typing import Any

import psutil

from deployments.batch.config import BatchConfig
from deployments.batch.job import run_job
from lorauter.adapters import LoraWeights
from lorauter.defaults import base_model_aliases, resolve_adapters, resolve_model
from lorauter.engine import EngineConfig, GenerationRequest, SamplingParams, load_engine
from lorauter.tasks import read_tasks

WORKER_NICENESS = 15  # Ray's own setting for its workers; the engine alone gets no better place
MAX_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["throughput", "memory"])
    parser.add_argument("--tasks", type=Path, required=True, help="a folder of task files with test examples")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--workers", type=int, default=2, help="of the routing pool, in the memory part")
    args = parser.parse_args()
    texts = [example.input for task in read_tasks(args.tasks) for example in task.test]
    random.Random(0).shuffle(texts)
    with tempfile.TemporaryDirectory(prefix="batch-") as folder:
        if args.part == "throughput":
            throughput(texts, args.rows or 2000, Path(folder))
        else:
            memory(texts, args.rows or 100_000, args.workers, Path(folder))


def write_rows(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(texts)))


def throughput(texts: list[str], count: int, folder: Path) -> None:
    texts = [texts[i % len(texts)] for i in range(count)]
    write_rows(folder / "in.jsonl", texts)
    config = BatchConfig.parse({"sampling": {"max_tokens": MAX_TOKENS}, "engine": {"max_batch": 16}})
    began = time.perf_counter()
    status = run_job(str(folder / "in.jsonl"), str(folder / "out"), config)
    wall = time.perf_counter() - began
    rows = [json.loads(line) for part in sorted((folder / "out").glob("part-*")) for line in part.open()]
    good = [row for row in rows if row["error"] is None]
    workers = status.workers.values()
    print(f"{len(rows)} rows, {len(rows) - len(good)} errors; load average {os.getloadavg()[0]:.1f}", flush=True)
    seconds, answers = alone(good, config)
    job, own = status.seconds, seconds
    tokens = sum(row["prompt_tokens"] + row["completion_tokens"] for row in good)
    same = sum(row["answer"] == answer for row, answer in zip(good, answers, strict=True))
    for name, value in (("job", job), ("job, with all that starts and stops", wall), ("engine alone", own)):
        print(f"{name:40} {value:8.1f} s {len(good) / value:8.2f} rows/s {tokens / value:10.1f} tokens/s")
    print(f"job / engine alone                       {own / job:8.3f}    (target 0.85)")
    adapters = len(status.tally.adapters)
    slots = sum(facts["slot_loads"] for facts in workers)
    print(f"adapter loads {status.adapter_loads} and into slots {slots}: {adapters} adapters, {len(workers)} workers")
    print(f"the same answers in another order: {same} of {len(good)}; load average {os.getloadavg()[0]:.1f}")


def alone(rows: list[dict[str, Any]], config: BatchConfig) -> tuple[float, list[str]]:
    """Seconds and answers of the engine in this process, on rows as a job has routed them."""
    os.nice(WORKER_NICENESS - os.nice(0))
    settings = config.engine
    engine = load_engine(
        resolve_model(config.base_model),
        EngineConfig(max_batch=settings.max_batch, max_model_len=settings.max_model_len),
        aliases=base_model_aliases(config.base_model),
    )
    pool = Path(resolve_adapters(config.adapters))
    packed = {
        name: engine.pack(LoraWeights.load(pool / name, name=name, version="1"))
        for name in sorted({adapter["name"] for row in rows for adapter in row["adapters"]})
    }
    requests = [
        GenerationRequest(
            engine.codec.chat([{"role": "user", "content": row["prompt"]}]),
            tuple((packed[adapter["name"]], adapter["weight"]) for adapter in row["adapters"]),
            SamplingParams(max_tokens=MAX_TOKENS),
        )
        for row in rows
    ]
    began = time.perf_counter()
    completions = engine.generate(requests)
    seconds = time.perf_counter() - began
    engine.close()
    return seconds, [completion.text for completion in completions]


def memory(texts: list[str], count: int, workers: int, folder: Path) -> None:
    starts = [" ".join(text.split()[:4]) for text in texts]
    write_rows(folder / "in.jsonl", [f"{starts[i % len(starts)]} {i}" for i in range(count)])
    (folder / "batch.yaml").write_text(f"route_workers: {{workers: {workers}}}\n")
    command = [str(Path(sys.executable).parent / "lorauter"), "batch", "--route-only"]
    command += ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out")]
    command += ["--config", str(folder / "batch.yaml")]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    rss = pss = processes = 0
    try:
        while process.poll() is None:
            shared, proportional, number = used(process.pid)
            rss, pss, processes = max(rss, shared), max(pss, proportional), max(processes, number)
            time.sleep(0.5)
    finally:
        process.terminate()
    if process.returncode:
        sys.exit(f"the job failed with {process.returncode}")
    written = sum(1 for part in (folder / "out").glob("part-*") for _ in part.open())
    seconds = time.perf_counter() - began
    print(f"{written} of {count} rows in {seconds:.0f} s, at most {processes} processes at once")
    print(f"peak of the whole tree: RSS {rss / 1e9:.2f} GB, PSS {pss / 1e9:.2f} GB    (target 3 GB)")


def used(pid: int) -> tuple[int, int, int]:
    """RSS and PSS in bytes, summed over a process and its descendants, and how many they are."""
    rss = pss = 0
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in family:
        try:
            full = process.memory_full_info()
        except psutil.Error:  # it has ended
            continue
        rss, pss = rss + full.rss, pss + full.pss
    return rss, pss, len(family)


if __name__ == "__main__":
    main()
