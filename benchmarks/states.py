"""What hidden states change: known tasks told apart, unknown ones noticed, and how well unseen tasks are answered.

    python benchmarks/states.py --tasks DIR --adapters URI --out DIR [--examples 20] [--queries N]
        [--only a,b] [--test] [--regimes OOD] [--variants] [--decide] [--latency N]

Every adapter is scored on the first validation examples of every task, which make a catalog with states and one
without. The other validation examples are asked, to choose settings by; with --test the test queries too, by the
default alone. With --regimes only answers are made, of these regimes; with --decide no answers, but rows.jsonl, which
benchmarks/answers.py answers elsewhere. --latency times so many texts instead, one at a time. What is in the folder is
not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import lorauter.routing.retrieve as retrieve
from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import build_catalog
from lorauter.catalog.scores import Evaluation, ScoreTable, score_all
from lorauter.catalog.scoring import EngineScorer
from lorauter.defaults import base_model_aliases, load_encoder, load_states, resolve_model
from lorauter.engine import EngineConfig, load_engine
from lorauter.evaluation.answering import adapters_in, answer
from lorauter.evaluation.methods import decide
from lorauter.evaluation.regimes import REGIMES
from lorauter.evaluation.report import evaluate
from lorauter.evaluation.routing import RememberingCatalogs, RememberingEncoder, evaluate_routing, queries_of
from lorauter.evaluation.rows import DecisionRow, ScoredRow, read_answers
from lorauter.routing import Router, RoutingConfig
from lorauter.states import RememberingStates
from lorauter.tasks import read_tasks

SETTINGS = {"states": {}, "every-state": {"sure": 1.0}, "without": {"sure": 0.0}}
VARIANTS = {  # on validation examples alone: cosines to a logit, and the settings of the mixture
    "logit-20": (20.0, {"sure": 1.0}),
    "logit-80": (80.0, {"sure": 1.0}),
    "softening-2": (40.0, {"sure": 1.0, "softening": 2.0}),
    "softening-8": (40.0, {"sure": 1.0, "softening": 8.0}),
    "top-8": (40.0, {"sure": 1.0, "top_k": 8}),
}
started = time.perf_counter()


def say(what: str) -> None:
    print(f"[{time.perf_counter() - started:6.1f} s] {what}", flush=True)


def latencies(texts: list[str], tasks: list, encoder, states) -> None:
    """Milliseconds to embed a text, to read it, and to route it with and without its state, one at a time."""
    catalog = build_catalog(tasks, encoder, states=states)
    routers = {
        name: Router(catalog, encoder, RoutingConfig(**settings), states=states) for name, settings in SETTINGS.items()
    }
    work = {
        "embed": lambda text: encoder.encode([text]),
        "read": lambda text: states.states([text]),
        **{f"route, {name}": lambda text, router=router: router.route([text]) for name, router in routers.items()},
    }
    for name, do in work.items():
        took = []
        for text in texts:
            start = time.perf_counter()
            do(text)
            took.append(1000 * (time.perf_counter() - start))
        took.sort()
        say(f"{name:20} {median(took):7.1f} ms, p95 {took[int(0.95 * len(took))]:7.1f}, mean {fmean(took):7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--adapters", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--queries", type=int, help="of a task and a split at most")
    parser.add_argument("--only", help="these tasks alone")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--regimes", help="these alone, and no routing figures, which take longer than all answers")
    parser.add_argument("--decide", action="store_true", help="write what is to be answered, and end")
    parser.add_argument("--variants", action="store_true", help="try other settings on the validation examples")
    parser.add_argument("--latency", type=int)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    only = args.only.split(",") if args.only else None
    every = [task for task in read_tasks(args.tasks) if only is None or task.name in only]
    tasks = [replace(task, validation=task.validation[: args.examples], test=()) for task in every]
    if args.latency:
        texts = [
            task.validation[i].input for i in range(args.examples, 99) for task in every if i < len(task.validation)
        ]
        latencies(texts[: args.latency], tasks, load_encoder("default"), load_states("default"))
        return
    every = [
        replace(
            task,
            validation=task.validation[: args.examples + args.queries] if args.queries else task.validation,
            test=task.test[: args.queries],
        )
        for task in every
    ]
    repository = AdapterRepository(open_store(args.adapters))
    pool, load = repository.names(), adapters_in(repository)

    def engine():
        config = EngineConfig(max_batch=args.batch, max_queue=8192)
        return load_engine(resolve_model("default", say), config, aliases=base_model_aliases("default"))

    table = ScoreTable(args.out / "scores.jsonl")
    wanted = [Evaluation(name, task.name, i) for name in pool for task in tasks for i in range(len(task.validation))]
    missing = [one for one in wanted if not table.has(one)]
    if missing:
        say(f"{len(missing)} of {len(wanted)} scores are to be made")
        with closing(engine()) as running:
            scorer = EngineScorer(running, load, tasks)
            score_all(missing, scorer, table, lambda left: say(f"{left} scores are left"), chunk_size=4096)
    say("embedding, and reading states")
    encoder, states = RememberingEncoder(load_encoder("default")), RememberingStates(load_states("default"))
    begun = time.perf_counter()
    texts = [example.input for task in every for example in (*task.validation, *(task.test if args.test else ()))]
    states.states(texts)
    say(f"{len(texts)} states, {1000 * (time.perf_counter() - begun) / len(texts):.1f} ms each")
    splits = {"validation": [replace(task, test=task.validation[args.examples :]) for task in every]}
    if args.test:
        splits["test"] = every
    wanted_regimes = list(REGIMES) if args.regimes is None else args.regimes.split(",")
    known = RememberingCatalogs(encoder, states)
    for split, asked in splits.items() if args.regimes is None else ():
        queries = queries_of(asked)
        for name, settings in SETTINGS.items():
            found = evaluate_routing(tasks, queries, known, RoutingConfig(**settings))
            say(f"{split}, {name}: {json.dumps({key: round(value, 4) for key, value in vars(found).items()})}")

    catalog = build_catalog(tasks, encoder, states=states, repository=repository, scores=table.by_task())
    rows = []
    for split in splits:
        methods = {"oracle": None, **{name: RoutingConfig(**settings) for name, settings in SETTINGS.items()}}
        regimes = [*dict.fromkeys((REGIMES[0], *wanted_regimes))]  # the oracle is asked in the first
        made = [
            row
            for row in decide(every, catalog, encoder, methods, states=states, split=split, regimes=regimes)
            if row["method"] == "oracle" or row["regime"] in wanted_regimes
        ]
        if args.variants and split == "validation":
            own, logit = retrieve._KINDRED_STATES_LOGIT, 0.0
            for name, (logit, settings) in VARIANTS.items():
                retrieve._KINDRED_STATES_LOGIT = logit
                configs = {name: RoutingConfig(**settings)}
                made += decide(every, catalog, encoder, configs, states=states, split=split, regimes=["OOD"])
            retrieve._KINDRED_STATES_LOGIT = own
        rows += [{**row, "split": split, "id": f"{split}/{row['id']}"} for row in made]
        say(f"{len(rows)} rows to answer")
    if args.decide:
        (args.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    with closing(engine()) as running:
        asked_rows = [DecisionRow.from_json(row, source="row") for row in rows]
        answer(asked_rows, running, load, args.out / "answers.jsonl", progress=lambda d, t: say(f"{d} of {t} answered"))
    answers = read_answers(args.out / "answers.jsonl")
    report = {}
    for split in splits:
        scored = [ScoredRow.from_json(row, source="row") for row in rows if row["split"] == split]
        print(f"\n{split}: share of the oracle's score")
        for result in evaluate(scored, answers, rouge_for_bleu=True):
            share = f"{100 * result.of_oracle:6.1f} %" if result.of_oracle is not None else "-"
            low, high = result.interval
            print(f"{result.method:20} {result.regime:10} {result.score:.4f} ({low:.3f} to {high:.3f}) {share}")
            report[f"{split}/{result.method}/{result.regime}"] = [result.score, result.of_oracle, low, high]
    (args.out / "report.json").write_text(json.dumps(report))
    say("done")


if __name__ == "__main__":
    main()
