"""Compositions of a pool, by settings: how their answers score on validation examples and on test queries.

    python benchmarks/compositions.py --tasks DIR --adapters URI --out DIR [--examples 20] [--only a,b]
        [--jobs semi-OOD/default,in-domain/default,...] [--splits test,validation] [--methods base,oracle,default,...]

The first validation examples of each task are what everything is made of: every adapter's score on every task, the
catalog, the compositions with the task's own adapter (in-domain) and without it (semi-OOD), by each setting. The other
validation examples are asked, to choose a setting by, or the test queries. What is in the folder is not made again.
Each setting is answered in three ways: with what holds among the router's adapters, with what holds in place of the
router's mixture, and with every composition alone, whether it holds or not.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lorauter.adapters import AdapterRepository, LoraWeights, open_store
from lorauter.catalog import build_catalog
from lorauter.catalog.provenance import model_digest
from lorauter.catalog.scores import Evaluation, ScoreTable, score_all
from lorauter.catalog.scoring import EngineScorer
from lorauter.compositions.config import ComposeConfig
from lorauter.compositions.make import Composer, Made, Wanted
from lorauter.compositions.starts import example_mixtures, starts_of
from lorauter.defaults import base_model_aliases, load_encoder, load_states, resolve_model
from lorauter.encoder import RememberingEncoder
from lorauter.engine import EngineConfig, load_engine
from lorauter.engine.load import load_decoder
from lorauter.evaluation.answering import adapters_in, answer
from lorauter.evaluation.composing import ComposedFor
from lorauter.evaluation.methods import COMPOSED, decide
from lorauter.evaluation.report import evaluate
from lorauter.evaluation.rows import DecisionRow, ScoredRow, read_answers
from lorauter.routing import RoutingConfig
from lorauter.states import RememberingStates
from lorauter.tasks import read_tasks

BASE = ComposeConfig()
VARIANTS = {
    "default": BASE,
    "layers": replace(BASE, each="adapter"),
    "columns": replace(BASE, each="column"),
    "ten-groups": replace(BASE, each="adapter", layer_groups=10),
    "adapters": replace(BASE, each="adapter", layer_groups=1),
    "negative": replace(BASE, non_negative=False),
    "pull": replace(BASE, pull=0.3),
}
started = time.perf_counter()


def say(what: str) -> None:
    print(f"[{time.perf_counter() - started:6.1f} s] {what}", flush=True)


def told_of(one: Made) -> dict[str, object]:
    """What a composition says of itself, and of each source its mean weight."""
    weights = {source.name: round(float(torch.tensor(source.weights).mean()), 3) for source in one.provenance.sources}
    return {**one.provenance.to_json(), "sources": weights, "holds": one.holds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--adapters", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--only", help="compose for these tasks alone")
    parser.add_argument(
        "--jobs", default="semi-OOD/default,in-domain/default", help="regimes and settings, in this order"
    )
    parser.add_argument("--steps", type=int, help="in place of the default")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1e9, help="after which nothing more is fitted")
    parser.add_argument("--fit", action="store_true", help="answer nothing")
    parser.add_argument("--splits", default="validation", help="test, validation or both, in this order")
    parser.add_argument("--states", action="store_true", help="the router reads hidden states, as it does by default")
    parser.add_argument("--methods", default="base,oracle,default", help="that are answered beside the compositions")
    parser.add_argument("--scored", type=int, help="examples of each task that adapters are scored on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    every = read_tasks(args.tasks)
    tasks = [replace(task, validation=task.validation[: args.examples], test=()) for task in every]
    repository = AdapterRepository(open_store(args.adapters))
    pool = repository.names()
    load = adapters_in(repository)
    chosen = args.only.split(",") if args.only else [task.name for task in tasks if task.name in pool]

    def engine():
        model = resolve_model("default", say)
        config = EngineConfig(max_batch=args.batch, max_queue=8192)
        return load_engine(model, config, aliases=base_model_aliases("default"))

    def score(missing: list[Evaluation]) -> None:  # whose engine is gone from the device when it ends
        with closing(engine()) as running:
            scorer = EngineScorer(running, load, tasks)
            score_all(missing, scorer, table, lambda left: say(f"{left} scores are left"), chunk_size=4096)

    table = ScoreTable(args.out / "scores.jsonl")
    wanted = [
        Evaluation(adapter, task.name, i)
        for adapter in pool
        for task in tasks
        for i in range(len(task.validation))[: args.scored]
    ]
    missing = [one for one in wanted if not table.has(one)]
    if missing:
        say(f"{len(missing)} of {len(wanted)} scores are to be made")
        score(missing)
    say("building the catalog")
    encoder = RememberingEncoder(load_encoder("default"))
    states = RememberingStates(load_states("default")) if args.states else None
    catalog = build_catalog(tasks, encoder, states=states, repository=repository, scores=table.by_task())
    say("built")

    decoder, codec = load_decoder(resolve_model("default"), aliases=base_model_aliases("default"), plain=True)
    sources = [load(name) for name in pool]
    base = model_digest("default")
    made: dict[tuple[str, str], list[Made]] = {}
    for job in args.jobs.split(","):
        regime, variant = job.split("/")
        config = VARIANTS[variant]
        config = config if args.steps is None else replace(config, steps=args.steps)
        begun = time.perf_counter()
        if begun - started > args.seconds:
            say(f"{regime} {variant}: left out, as the time is up")
            continue
        barred = {name: frozenset({name} if regime == "semi-OOD" else ()) for name in chosen}
        mixtures = example_mixtures(catalog, RoutingConfig(), barred)
        starts = starts_of(catalog, RoutingConfig(), barred, mixtures)
        composer = Composer(decoder, codec, sources, args.out / "made", base_model=base, config=config)
        todo = [
            Wanted(f"{name}.{regime}.{variant}", task, mixtures[name], starts[name], barred[name], not barred[name])
            for task in tasks
            if (name := task.name) in chosen
        ]

        def told(done: int, total: int, what: str, label: str = f"{regime} {variant}") -> None:
            say(f"{label}: {done}/{total} {what[:110]}")
            if time.perf_counter() - started > args.seconds:
                raise TimeoutError

        try:
            composer.make(todo, told)
        except TimeoutError:
            todo = [one for one in todo if composer.has(one)]
            say(f"{regime} {variant}: the time is up; {len(todo)} of {len(chosen)} tasks are there")
        made[regime, variant] = composer.make(todo)
        took = time.perf_counter() - begun
        fits = {f"{r}/{v}": [told_of(one) for one in of] for (r, v), of in made.items()}
        (args.out / "fits.json").write_text(json.dumps(fits))
        held = sum(one.holds for one in made[regime, variant])
        say(f"{regime} {variant}: {len(todo)} tasks in {took:.1f} s; {held} hold")
        for one in made[regime, variant]:
            p = one.provenance
            say(
                f"  {p.task:22} {p.score_before:7.3f} -> {p.score_after:7.3f} gain {p.gain:6.3f} +- {p.error:5.3f} "
                f"right {p.right_before:.3f} -> {p.right_after:.3f} "
                f"step {p.step:2} rank {p.rank} energy {p.energy:.4f} {'holds' if one.holds else '-'}"
            )
    del decoder, sources
    if torch.cuda.is_available():
        say(f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the device")
        torch.cuda.empty_cache()
    if args.fit:
        return

    done = {one.provenance.task for of in made.values() for one in of}
    asked = [task for task in every if task.name in done]
    folders = {one.name: one.folder for of in made.values() for one in of}

    def load_any(name: str) -> LoraWeights:
        return LoraWeights.load(folders[name], name=name, version="0" * 16) if name in folders else load(name)

    with closing(engine()) as running:
        for split in args.splits.split(","):
            rows = list(decided(asked, catalog, encoder, states, args.methods.split(","), made, split))
            answers_of(rows, running, load_any, args.out, split)
    say("done")


def decided(asked, catalog, encoder, states, methods, made, split):
    """Rows of the methods, and of every setting in its three ways."""
    regimes = list(dict.fromkeys(regime for regime, _ in made))
    shared = {"states": states, "split": split}
    plain = list(decide(asked, catalog, encoder, dict.fromkeys(methods), regimes=regimes, **shared))
    if "in-domain" not in regimes:  # where these two are
        plain += decide(asked, catalog, encoder, dict.fromkeys(["base", "oracle"]), regimes=["in-domain"], **shared)
    yield from plain
    for (regime, variant), of in made.items():
        held = [
            ComposedFor(
                one.name, regime, one.provenance.task, {s.name: s.version for s in one.provenance.sources}, one.folder
            )
            for one in of
            if one.holds
        ]
        of_task = {one.provenance.task: one for one in of}
        for row in decide(asked, catalog, encoder, {COMPOSED: None}, regimes=[regime], composed=held, **shared):
            yield {**row, "method": f"{variant} beside", "id": f"{variant}/{row['id']}"}
        for row in plain:
            if row["method"] == "default" and row["regime"] == regime and row["task"] in of_task:
                one = of_task[row["task"]]
                alone = {one.name: 1.0}
                for way, mixture in (("kept", alone if one.holds else row["adapters"]), ("alone", alone)):
                    name = f"{variant} {way}"
                    yield {**row, "adapters": mixture, "method": name, "id": f"{name}/{row['id']}"}


def answers_of(rows, running, load, out, split):
    """Answer rows, and say how they score."""
    (out / f"decisions-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    say(f"{split}: {len(rows)} rows to answer")
    path = out / f"answers-{split}.jsonl"
    asked = [DecisionRow.from_json(row, source="row") for row in rows]
    answer(asked, running, load, path, progress=lambda done, total: say(f"{done} of {total} answered"))
    answers = read_answers(path)
    report = {}
    say(f"{split}: share of the oracle's score")
    for result in evaluate([ScoredRow.from_json(row, source="row") for row in rows], answers, rouge_for_bleu=True):
        share = f"{100 * result.of_oracle:6.1f} %" if result.of_oracle is not None else "-"
        low, high = result.interval
        print(f"{result.method:28} {result.regime:10} {result.score:.4f} ({low:.3f} to {high:.3f}) {share}", flush=True)
        report[f"{result.method}/{result.regime}"] = asdict(result)
    (out / f"report-{split}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
