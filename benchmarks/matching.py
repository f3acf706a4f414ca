"""What matching adapters to tasks by successive halving costs, and how good what it chooses is, by simulation.

    python benchmarks/matching.py --scores FILE.jsonl [--seeds 6] [--settings '{"keep": 0.4}'] [--nameless]

The file is a full table, as `lorauter catalog build --match --scores` keeps it: every adapter on every validation
example of every task. Matching is run against it, with the adapter of a task's name as a candidate of it, unless
--nameless says otherwise. Prints the share of the table that it asked for, and the ratio of the mean validation
scores of the adapters that it chose for the tasks to those of the best in the whole table: with the default seed, and
the mean over the seeds. The adapter of the best mean over all examples is chosen; a catalog, which knows the tasks'
embeddings too, shrinks means and prefers the task's own adapter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from lorauter.catalog.match import MatchConfig, Matching
from lorauter.catalog.scores import ScoreTable


def simulate(full: ScoreTable, settings: Mapping[str, Any], *, names_hint: bool) -> tuple[float, float]:
    """The share of the exhaustive evaluations that matching asks for, and how good its choice is beside the best."""
    tasks = sorted({task for _, task in full.scores})
    adapters = sorted({adapter for adapter, _ in full.scores})
    counts = {task: max(map(len, (full.scores[a, task] for a in adapters))) for task in tasks}
    candidates = {task: [task] for task in tasks if task in adapters} if names_hint else {}
    matching = Matching(counts, adapters, MatchConfig(candidates=candidates, **settings))
    while evaluations := matching.next_round():
        matching.record({e: full.scores[e.adapter, e.task][e.example] for e in evaluations})
    chosen = fmean(matches[0].score for matches in matching.result().values())
    best = fmean(max(full.mean(adapter, task) for adapter in adapters) for task in tasks)
    return matching.spent / matching.exhaustive, chosen / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--settings", type=json.loads, default={}, help="of MatchConfig, as a JSON object")
    parser.add_argument("--nameless", action="store_true", help="names hint at nothing")
    args = parser.parse_args()

    full = ScoreTable(args.scores)
    runs = [simulate(full, args.settings | {"seed": seed}, names_hint=not args.nameless) for seed in range(args.seeds)]
    print(f"{'seeds':12} {'evaluations':>12} {'chosen / best':>14}")
    print(f"{'0, default':12} {runs[0][0]:12.1%} {runs[0][1]:14.3f}")
    print(f"{f'mean of {args.seeds}':12} {fmean(r[0] for r in runs):12.1%} {fmean(r[1] for r in runs):14.3f}")


if __name__ == "__main__":
    main()
