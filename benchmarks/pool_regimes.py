"""Decisions on test queries, on a clean pool or a noisy one: a process of its own for benchmarks/pool.py.

    python benchmarks/pool_regimes.py --tasks DIR --scores FILE --rows FILE --name NAME [--truth FILE] [--queries N]

Builds a catalog of the tasks and of the adapters that have scores, and writes the rows that the answering step reads,
by the method NAME in all regimes. With --truth a task's own adapters are those that the file says are made of its data;
without, the one of its name, and the rows of the oracle are written too.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from lorauter.adapters.repository import AdapterManifest
from lorauter.catalog import build_catalog, with_scores
from lorauter.catalog.change import with_adapter
from lorauter.catalog.scores import ScoreTable
from lorauter.defaults import load_encoder, load_states
from lorauter.evaluation.methods import decide
from lorauter.evaluation.routing import RememberingEncoder
from lorauter.routing import RoutingConfig
from lorauter.states import RememberingStates
from lorauter.tasks import read_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True, help="by the tasks' metrics, of all adapters")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--only", required=True, help="these tasks")
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--queries", type=int)
    args = parser.parse_args()

    only = args.only.split(",")
    asked = [
        replace(task, validation=task.validation[: args.examples], test=task.test[: args.queries])
        for task in read_tasks(args.tasks)
        if task.name in only
    ]
    encoder, states = RememberingEncoder(load_encoder("default")), RememberingStates(load_states("default"))
    bare = build_catalog([replace(task, test=()) for task in asked], encoder, states=states)
    table = ScoreTable(args.scores)
    kept = {task.name: len(task.validation) for task in asked}
    scores = {
        task: {adapter: {i: score for i, score in of.items() if i < kept[task]} for adapter, of in found.items()}
        for task, found in table.by_task().items()
        if task in kept
    }
    adapters = sorted({adapter for of in scores.values() for adapter in of})
    catalog = with_adapter(bare, *(AdapterManifest(name, "1", {}) for name in adapters))
    catalog = with_scores(catalog, scores)
    own, methods = None, {args.name: RoutingConfig()}
    if args.truth:
        truth = json.loads(args.truth.read_text())
        own = {name: [adapter for adapter, what in truth.items() if name in what["tasks"]] for name in only}
    else:
        methods = {"oracle": None, **methods}
    rows = decide(asked, catalog, encoder, methods, states=states, own=own)
    lines = [json.dumps({**row, "id": f"{args.name}/{row['id']}"}) + "\n" for row in rows]
    args.rows.write_text("".join(lines))
    print(f"{args.name}: {len(lines)} rows, {len(adapters)} adapters", flush=True)


if __name__ == "__main__":
    main()
