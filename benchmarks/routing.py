"""How well the router tells tasks apart, with the preset "paper" and the default. Generates nothing.

    python benchmarks/routing.py [--tasks DIR | --flan FILE] [--examples 20] [--states none] [--json FILE]

Builds a catalog of the tasks' first validation examples with the default encoder and the default model of states and
routes their test examples; the default tasks are the repository's examples. `lorauter eval routing` prints more:
growth, ambiguity, strangers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from lorauter.defaults import load_encoder, load_states
from lorauter.evaluation.routing import (
    RememberingCatalogs,
    evaluate_routing,
    first_examples,
    queries_of,
    read_query_set,
)
from lorauter.routing import RoutingConfig
from lorauter.tasks import read_tasks

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "tasks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tasks", type=Path, default=EXAMPLES)
    source.add_argument("--flan", type=Path, help="a file of tasks and queries, as flan48.json.gz")
    parser.add_argument("--examples", type=int, default=20, help="validation examples a task")
    parser.add_argument("--states", default="default", help="the model of states, or none")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    tasks = first_examples(read_query_set(args.flan) if args.flan else read_tasks(args.tasks), args.examples)
    states = None if args.states == "none" else load_states(args.states)
    catalogs = RememberingCatalogs(load_encoder("default"), states)
    figures = {}
    for preset in ("paper", "default"):
        figures[preset] = asdict(evaluate_routing(tasks, queries_of(tasks), catalogs, RoutingConfig(preset=preset)))
    width = max(map(len, figures["paper"]))
    for name in figures["paper"]:
        print(f"{name:{width}}  paper {figures['paper'][name]:9.4g}  default {figures['default'][name]:9.4g}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
