"""The table of answers: the default with compositions, with these and examples, and beside it rows decided before.

Answers of compositions come first, then rows given, then what takes asking the examples.

    python benchmarks/table.py [ROWS.jsonl ...] --tasks DIR --adapters URI --out DIR [--examples 20] [--shown 3]
        [--split test|validation] [--regimes in-domain,semi-OOD] [--only a,b] [--queries N]

Everything is made of the first validation examples of each task: a catalog with states and all scores (scores.jsonl in
the folder, or made), each regime's compositions, which tasks examples help. Rows given are those of other methods
(benchmarks/states.py --decide, or `lorauter eval decide`, makes some). What is in the folder is not made again.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from answers import read_rows, tell

from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import build_catalog
from lorauter.catalog.provenance import model_digest
from lorauter.catalog.scores import Evaluation, ScoreTable, score_all
from lorauter.catalog.scoring import EngineScorer
from lorauter.compositions.config import ComposeConfig
from lorauter.defaults import base_model_aliases, load_encoder, load_states, resolve_model
from lorauter.engine import EngineConfig, MultiLoraEngine, load_engine
from lorauter.evaluation.answering import adapters_in, answer
from lorauter.evaluation.composing import COMPOSED_REGIMES, compose_regimes, composed_or, read_composed
from lorauter.evaluation.helped import Helped, read_helped
from lorauter.evaluation.left_out import ask_regimes
from lorauter.evaluation.methods import COMPOSED, COMPOSED_EXAMPLES, decide
from lorauter.evaluation.report import ORACLE
from lorauter.evaluation.routing import RememberingEncoder
from lorauter.evaluation.rows import DecisionRow
from lorauter.states import RememberingStates
from lorauter.tasks import read_tasks

started = time.perf_counter()


def say(what: str) -> None:
    print(f"[{time.perf_counter() - started:6.1f} s] {what}", flush=True)


def engine() -> MultiLoraEngine:
    cache = 8 << 30 if torch.cuda.is_available() else None  # what 128 short rows need, and more
    config = EngineConfig(max_batch=128, max_queue=8192, cache_bytes=cache)
    return load_engine(resolve_model("default", say), config, aliases=base_model_aliases("default"))


def release() -> None:
    """Give back what nothing holds any more: an engine takes what is free of the device, and so do fits."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="*")
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--adapters", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--shown", type=int, default=3, help="examples that go before a query, at most")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--regimes", default=",".join(COMPOSED_REGIMES[::-1]), help="of the compositions and examples")
    parser.add_argument("--only", help="these tasks alone")
    parser.add_argument("--queries", type=int, help="of a task at most")
    parser.add_argument("--steps", type=int, help="of the fits, in place of the default")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    only = args.only.split(",") if args.only else None
    every = [task for task in read_tasks(args.tasks) if only is None or task.name in only]
    tasks = [replace(task, validation=task.validation[: args.examples], test=()) for task in every]
    most = None if args.queries is None else args.examples + args.queries
    every = [replace(task, validation=task.validation[:most], test=task.test[: args.queries]) for task in every]
    repository = AdapterRepository(open_store(args.adapters))
    pool, load = repository.names(), adapters_in(repository)
    own = {task.name: [task.name] if task.name in pool else [] for task in tasks}
    rows: list[dict[str, Any]] = [row for path in args.rows for row in read_rows(path)]
    oracle = [row for row in rows if row["method"] == ORACLE]
    answers, report = args.out / "answers.jsonl", dict[str, object]()

    def answered(new: list[dict[str, Any]], running: MultiLoraEngine, what: str) -> None:
        asked = [DecisionRow.from_json(row, source=what) for row in new]
        reads = composed_or(read_composed(args.out), load) if (args.out / "composed.json").exists() else load
        answer(asked, running, reads, answers, progress=lambda d, t: say(f"{what}: {d} of {t} answered"))
        tell(oracle, new, answers, report)
        (args.out / "report.json").write_text(json.dumps(report))

    table = ScoreTable(args.out / "scores.jsonl")
    wanted = [Evaluation(name, task.name, i) for name in pool for task in tasks for i in range(len(task.validation))]
    missing = [one for one in wanted if not table.has(one)]

    def begin() -> None:  # whose engine is gone from the device when it ends
        with closing(engine()) as running:
            say(f"{len(missing)} of {len(wanted)} scores are to be made")
            score_all(missing, EngineScorer(running, load, tasks), table, lambda n: say(f"{n} left"), chunk_size=4096)

    if missing:
        begin()
        release()
    say("embedding, and reading states")
    encoder, states = RememberingEncoder(load_encoder("default")), RememberingStates(load_states("default"))
    kept = {one.name: len(one.validation) for one in tasks}
    scores = {
        task: {name: {i: score for i, score in of.items() if i < kept[task]} for name, of in found.items()}
        for task, found in table.by_task().items()
        if task in kept
    }
    catalog = build_catalog(tasks, encoder, states=states, repository=repository, scores=scores)
    if not (args.out / "composed.json").exists():
        say("composing")
        config = ComposeConfig() if args.steps is None else replace(ComposeConfig(), steps=args.steps)
        compose_regimes(
            catalog,
            list(catalog.names),
            load,
            args.out,
            own=own,
            model="default",
            config=config,
            progress=lambda d, t, what: say(f"{d}/{t} {what[:100]}") if d % (t // 20 or 1) == 0 else None,
            report=say,
        )
        release()
    composed = read_composed(args.out)
    for regime in COMPOSED_REGIMES:
        say(f"{regime}: {sum(one.regime == regime for one in composed)} of {len(tasks)} compositions hold")

    def decided(method: str, regime: str, helped: Helped | None = None) -> list[dict[str, Any]]:
        say(f"deciding for {method}, {regime}")
        found = decide(
            every, catalog, encoder, {method: None}, states=states, split=args.split, regimes=[regime], own=own,
            composed=composed, helped=helped,
        )  # fmt: skip
        return [{**row, "split": args.split, "id": f"{args.split}/{row['id']}"} for row in found]

    regimes = args.regimes.split(",")
    with closing(engine()) as running:
        oracle = oracle or decided(ORACLE, COMPOSED_REGIMES[0])
        answered(oracle, running, ORACLE)
        for regime in regimes:
            answered(decided(COMPOSED, regime), running, f"{COMPOSED}, {regime}")
        if rows:
            answered(rows, running, "rows given")
        ask_regimes(
            catalog,
            args.shown,
            running,
            composed_or(composed, load),
            args.out / "helped",
            own=own,
            model=model_digest("default"),
            composed=composed,
            progress=lambda d, t: say(f"left-out examples: {d} of {t} asked"),
        )
        helped = read_helped(args.out / "helped")
        for regime, of in helped.items():
            by = [(one.own or one.others).by for one in of.values()]
            say(
                f"{regime}: examples help {len(by) - by.count(None)} of {len(by)} tasks, {by.count('base')} by the base"
            )
        for regime in regimes:
            new = decided(COMPOSED_EXAMPLES, regime, helped)
            say(f"{sum('examples' in row for row in new)} of {len(new)} rows have examples")
            answered(new, running, f"{COMPOSED_EXAMPLES}, {regime}")
    say("done")


if __name__ == "__main__":
    main()
