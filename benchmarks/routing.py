"""Routed accuracy: how often a test query's nearest task is its own.

    python benchmarks/routing.py [--tasks DIR] [--examples 20]

Builds a catalog of the tasks' validation examples with the default encoder, routes their test examples, and
prints top-1 accuracy for each task and over all. The default tasks are the repository's examples.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from lorauter.catalog import build_catalog
from lorauter.defaults import load_encoder
from lorauter.routing import Router
from lorauter.tasks import read_tasks

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "tasks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, default=EXAMPLES)
    parser.add_argument("--examples", type=int, default=20, help="validation examples a task")
    args = parser.parse_args()

    tasks = [replace(task, validation=task.validation[: args.examples]) for task in read_tasks(args.tasks)]
    encoder = load_encoder("default")
    router = Router(build_catalog(tasks, encoder), encoder)
    right = total = 0
    started = time.perf_counter()
    for task in tasks:
        decisions = router.route([example.input for example in task.test])
        hits = sum(decision.tasks[0].name == task.name for decision in decisions)
        print(f"{task.name:24} {hits:4} of {len(decisions)}")
        right, total = right + hits, total + len(decisions)
    seconds = time.perf_counter() - started
    print(f"top-1 accuracy {right / total:.3f} ({right} of {total}), {1000 * seconds / total:.1f} ms a query")


if __name__ == "__main__":
    main()
