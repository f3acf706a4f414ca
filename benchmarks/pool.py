"""A noisy pool of many adapters, made from a clean one, and what matching and routing make of it.

    python benchmarks/pool.py --tasks DIR --adapters DIR --out DIR [--count 1560] [--trainings 60]
        [--only make,match,regimes,exhaustive] [--seconds N]

make: brief trainings on the tasks' train sets (many at once), and adapters that were derived from these and the clean
ones, under names that say nothing. Deterministic by seed on one kind of device; nothing is downloaded.
match: what `lorauter catalog build --match` does with a pool of this size; how many evaluations, and how long.
regimes: test queries answered on the clean pool and on the noisy one, by the same router. A task's own adapters, which
semi-OOD and OOD take away, are the clean one, those that were trained on it, and all that were derived of these. By how
much the noisy pool is worse is said of each regime as soon as it is answered.
exhaustive: every adapter on every example of some tasks, by likelihood, and what the choice is worth beside the best.
speed: evaluations a second. answer: the end of regimes alone, where its rows are there.

What is in the folder is not made again, and figures.json there has what was found out so far. --seconds ends what would
take longer; regimes come before exhaustive.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from pool_derived import KINDS
from pool_made import make, train_sets

from lorauter.adapters.weights import LoraWeights
from lorauter.catalog.match import MatchConfig, match_adapters
from lorauter.catalog.scores import Evaluation, Failed, ScoreTable
from lorauter.catalog.scoring import EngineScorer, LikelihoodScorer
from lorauter.catalog.screen import SCREEN, Screening, screen
from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine import EngineConfig, load_engine
from lorauter.engine.load import load_decoder
from lorauter.evaluation.answering import answer
from lorauter.evaluation.report import evaluate
from lorauter.evaluation.rows import DecisionRow, ScoredRow, read_answers
from lorauter.tasks import Task, read_tasks

CHUNK = 16384
_CLEAN, _NOISY = "clean pool", "noisy pool"
_REGIMES = ("semi-OOD", "OOD", "in-domain")  # the oracle's rows are among the last's
started = time.perf_counter()


def say(what: str) -> None:
    print(f"[{time.perf_counter() - started:6.1f} s] {what}", flush=True)


def free() -> None:
    """Give the device's memory back, which another process or an engine takes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Bench:
    """The pool and the model, and what is found out with them, in `figures.json` too.

    Args:
        out: the folder.
        seconds: after which nothing long is begun.
    """

    def __init__(self, tasks: Sequence[Task], clean: Path, out: Path, seconds: float) -> None:
        self.tasks = [replace(task, test=()) for task in tasks]
        self.clean = clean
        self.truth: Mapping[str, dict] = {}
        self.out = out
        self.seconds = seconds
        self.exhaustive = 0
        self.figures: dict[str, object] = {}
        self._loaded: dict[str, LoraWeights] = {}

    def know(self, truth: Mapping[str, dict]) -> None:
        """What each adapter of the pool is, as `make` gives it."""
        self.truth = truth
        self.own = {task.name: {n for n, what in truth.items() if task.name in what["tasks"]} for task in self.tasks}
        self.exhaustive = len(truth) * sum(len(task.validation) for task in self.tasks)
        kinds = Counter(what["kind"] for what in truth.values())
        say(f"{len(truth)} adapters: {', '.join(f'{kind} {number}' for kind, number in sorted(kinds.items()))}")

    def load(self, name: str) -> LoraWeights:
        """Read once, and kept."""
        if name not in self._loaded:
            folder = self.out / "adapters" / name if name in self.truth else self.clean / name
            self._loaded[name] = LoraWeights.load(folder, name=name, version="1")
        return self._loaded[name]

    def tell(self, name: str, value: object) -> None:
        self.figures[name] = value
        say(f"{name}: {value}")
        (self.out / "figures.json").write_text(json.dumps(self.figures, indent=1))

    def decoder(self):
        return load_decoder(resolve_model("default"), aliases=base_model_aliases("default"))

    def scorer(self) -> LikelihoodScorer:
        decoder, codec = self.decoder()
        room = 4 << 30 if decoder.device.type == "cuda" else 1 << 30
        return LikelihoodScorer(decoder, codec, self.load, self.tasks, adapter_bytes=room)

    def engine(self):
        cache = (
            8 << 30 if torch.cuda.is_available() else None
        )  # what 128 short rows need: deciding takes its part beside
        config = EngineConfig(max_batch=128, max_queue=8192, cache_bytes=cache)
        return load_engine(resolve_model("default"), config, aliases=base_model_aliases("default"))

    def match(self, scorer: LikelihoodScorer) -> Screening:
        """Screen, try in earnest, and then both again for each task without its own adapters."""
        begun = time.perf_counter()
        versions = dict.fromkeys(self.truth, "1")
        screened = screen(self.tasks, versions, scorer, self._table("screen"), progress=self._told, chunk_size=CHUNK)
        matching = screened.matching
        self.tell("screening, seconds", round(time.perf_counter() - begun, 1))
        for number, one in enumerate(matching.rounds, start=1):
            say(f"round {number}: {one.pairs} pairs, up to {one.examples} examples, {one.evaluations} evaluations")
        spent = sum(one.evaluations for one in matching.rounds)  # the table has others' too when this is run again
        self.tell("screening, evaluations", spent)
        self.tell("screening, share of the exhaustive", round(spent / self.exhaustive, 4))
        self.tell("adapters that were refused", len(matching.failures))
        broken = {n for n, w in self.truth.items() if w["kind"] in KINDS and KINDS[w["kind"]].broken}
        self.tell("of which were made broken", f"{len(broken & matching.failures.keys())} of {len(broken)}")
        self.tell("twins that were not tried", len(screened.twins))
        twins = {n for n, w in self.truth.items() if w["kind"] in KINDS and KINDS[w["kind"]].twin}
        self.tell("of which were made twins", f"{len(twins & screened.twins.keys())} of {len(twins)}")
        self.tell("descents", len(set(screened.kin.values())))
        for task in self.tasks:
            kinds = Counter(
                ("own " if task.name in self.truth[n]["tasks"] else "") + self.truth[n]["kind"]
                for n in screened.shortlists[task.name]
            )
            say(f"  {task.name}: {', '.join(f'{kind} {number}' for kind, number in kinds.items())}")
        return screened

    def foreign(self, scorer: LikelihoodScorer, screened: Screening) -> dict[str, list[str]]:
        """The shortlists of a pool that lacks a task's own adapters; for the evaluation, and not in the share."""
        begun, tried = time.perf_counter(), screened.matching.adapters
        matching = match_adapters(
            self.tasks,
            dict.fromkeys(tried, "1"),
            scorer,
            SCREEN,
            screened.matching.table,
            self._told,
            among={task: {*tried}.difference(own) for task, own in self.own.items()},
            kin=screened.kin,
            chunk_size=CHUNK,
        )
        say(f"the same without each task's own adapters in {time.perf_counter() - begun:.1f} s")
        return {task: [match.name for match in found] for task, found in matching.result().items()}

    def metric(self, *shortlists: Mapping[str, Sequence[str]]) -> ScoreTable:
        """Scores by the tasks' metrics of all that are on shortlists."""
        table = self._table("scores")
        with closing(self.engine()) as engine:
            scorer = EngineScorer(engine, self.load, self.tasks)
            for label, among in zip(("", " without own adapters"), shortlists, strict=False):
                begun, before = time.perf_counter(), sum(map(len, table.scores.values()))
                config = MatchConfig(min_candidates=max(map(len, among.values())))
                match_adapters(
                    self.tasks, dict.fromkeys(self.truth, "1"), scorer, config, table, self._told, among=among,
                    chunk_size=4096,
                )  # fmt: skip
                spent = sum(map(len, table.scores.values())) - before
                self.tell(f"trying{label}, evaluations", spent)
                self.tell(f"trying{label}, seconds", round(time.perf_counter() - begun, 1))
        return table

    def deciding(self, name: str, scores: Path, *options: object) -> subprocess.Popen[bytes]:
        """Begin to decide, beside whatever else goes on."""
        script = Path(__file__).with_name("pool_regimes.py")
        only = ",".join(task.name for task in self.tasks)
        arguments = ["--scores", scores, "--rows", self._rows(name), "--name", name, "--only", only, *options]
        return subprocess.Popen([sys.executable, str(script), *map(str, arguments)])

    def regimes(self, deciding: Mapping[str, subprocess.Popen[bytes] | None]) -> None:
        """Answer what is decided, regime by regime, and tell by how many points of the oracle's score the pools differ.

        Args:
            deciding: who decides on the clean pool, and on the noisy one; None where that is done.
        """
        file, rows = self.out / "answers.jsonl", list[dict]()
        with closing(self.engine()) as engine:
            for name, process in deciding.items():
                if process is not None and process.wait():
                    raise SystemExit(f"deciding on the {name} has failed")
                decided = [json.loads(line) for line in self._rows(name).read_text().splitlines()]
                for regime in _REGIMES:
                    new = [row for row in decided if row["regime"] == regime]
                    asked = [DecisionRow.from_json(row, source="row") for row in new]
                    what = f"{name}, {regime}"
                    answer(asked, engine, self.load, file, chunk_size=1024, progress=partial(self._answered, what))
                    rows += new
                    if name == _NOISY:
                        self._tell_regime(regime, rows, file)

    def _tell_regime(self, regime: str, rows: Sequence[dict], answers: Path) -> None:
        found = {
            result.method: result
            for result in evaluate(
                [ScoredRow.from_json(row, source="row") for row in rows if row["regime"] in (regime, _REGIMES[-1])],
                read_answers(answers),
                rouge_for_bleu=True,
            )
            if result.regime == regime
        }
        clean, noisy = found[_CLEAN].of_oracle, found[_NOISY].of_oracle
        if clean is not None and noisy is not None:
            self.tell(f"{regime}: noisy pool minus clean pool, points of the oracle", round(100 * (noisy - clean), 1))
        for method, result in found.items():
            share = "-" if result.of_oracle is None else f"{100 * result.of_oracle:.1f} % of the oracle"
            low, high = result.interval
            self.tell(f"{method}, {regime}", f"{result.score:.4f} ({low:.3f} to {high:.3f}) {share}")

    def _answered(self, what: str, done: int, total: int) -> None:
        say(f"{what}: {done} of {total} answered")

    def _rows(self, name: str) -> Path:
        return self.out / f"rows-{name.replace(' ', '-')}.jsonl"

    def try_all(self, scorer: LikelihoodScorer, screened: Screening, sample: int, seed: int) -> None:
        """Of some tasks every adapter on every example; and what was chosen beside what is best."""
        table = self._table("exhaustive")
        names = [name for name in self.truth if name not in screened.matching.failures]
        known = screened.matching.table
        drawn = random.Random(seed).sample(self.tasks, min(sample, len(self.tasks)))
        tokens = {task.name: sum(len(e.input) for e in task.validation) for task in drawn}
        chosen, best = [], []
        begun = time.perf_counter()
        for task in sorted(drawn, key=lambda task: tokens[task.name]):
            if time.perf_counter() - started > self.seconds:
                say(f"the time is up; left out: {task.name}")
                continue
            examples = range(len(task.validation))
            table.add(
                {
                    one: known.scores[name, task.name][i]
                    for name in names
                    for i in known.scores.get((name, task.name), {})
                    if not table.has(one := Evaluation(name, task.name, i))
                }
            )
            left = [one for name in names for i in examples if not table.has(one := Evaluation(name, task.name, i))]
            for start in range(0, len(left), CHUNK):
                table.add(scorer.score(left[start : start + CHUNK]))
            means = {name: table.mean(name, task.name, examples) for name in names if name not in table.failures}
            first = screened.shortlists[task.name][0]
            best.append(math.exp(max(means.values())))
            chosen.append(math.exp(means[first]))
            rank = 1 + sum(mean > means[first] for mean in means.values())
            say(
                f"  {task.name}: chosen {chosen[-1]:.4f} ({self.truth[first]['kind']}), best {best[-1]:.4f} "
                f"({self.truth[max(means, key=means.get)]['kind']}), rank {rank} of {len(means)}"
            )
            self.tell("exhaustive, tasks", len(best))
            self.tell("exhaustive, chosen of best", round(fmean(chosen) / fmean(best), 4))
        self.tell("exhaustive, seconds", round(time.perf_counter() - begun, 1))

    def speed(self, scorer: LikelihoodScorer, adapters: int) -> None:
        """Evaluations a second, where every adapter meets an example of every task, and all of two tasks."""
        chosen = sorted(self.truth)[:adapters]
        for label, wanted in (
            ("one example of every task", [(task.name, 0) for task in self.tasks]),
            ("all of two tasks", [(task.name, i) for task in self.tasks[:2] for i in range(len(task.validation))]),
        ):
            evaluations = [Evaluation(name, *example) for name in chosen for example in wanted]
            for turn in ("first", "again"):
                begun = time.perf_counter()
                found = scorer.score(evaluations)
                took = time.perf_counter() - begun
                failed = {e.adapter for e, outcome in found.items() if isinstance(outcome, Failed)}
                say(
                    f"{label}, {turn}: {len(chosen)} adapters, {len(found)} evaluations in {took:.2f} s, "
                    f"{len(found) / took:.0f} a second; {len(failed)} adapters failed"
                )

    def _table(self, name: str) -> ScoreTable:
        return ScoreTable(self.out / f"{name}.jsonl")

    def _told(self, done: int, left: int) -> None:
        say(f"{done} evaluations are made, {left} are left of this round")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1560)
    parser.add_argument("--trainings", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40, help="of each training")
    parser.add_argument("--rows", type=int, default=8, help="of a training in a step")
    parser.add_argument("--positions", type=int, default=80_000, help="of a training pass at most")
    parser.add_argument("--examples", type=int, default=20, help="validation examples a task")
    parser.add_argument("--queries", type=int, help="test queries of a task at most")
    parser.add_argument("--clean-scores", type=Path, help="of the clean pool, as `catalog build --scores` keeps them")
    parser.add_argument("--sample", type=int, default=8, help="tasks that are done exhaustively")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="make,match,regimes,exhaustive")
    parser.add_argument("--seconds", type=float, default=math.inf)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stages = args.only.split(",")

    tasks = [replace(task, validation=task.validation[: args.examples]) for task in read_tasks(args.tasks)]
    tasks = [task for task in tasks if (args.adapters / task.name).is_dir()]
    model, aliases = resolve_model("default", say), base_model_aliases("default")
    bench = Bench(tasks, args.adapters, args.out, args.seconds)
    deciding: dict[str, subprocess.Popen[bytes] | None] = {_CLEAN: None, _NOISY: None}
    if "regimes" in stages:
        common = ["--tasks", args.tasks, "--examples", args.examples]
        common += [] if args.queries is None else ["--queries", args.queries]
        deciding[_CLEAN] = bench.deciding(_CLEAN, args.clean_scores, *common)
    bench.know(
        make(
            train_sets(args.tasks, [task.name for task in tasks]),
            args.adapters,
            args.out,
            decoder_of=partial(load_decoder, model, aliases=aliases, plain=True),
            count=args.count,
            wanted=args.trainings,
            steps=args.steps,
            rows=args.rows,
            positions=args.positions,
            seed=args.seed,
            say=say,
        )
    )
    free()
    if stages == ["make"]:
        return
    if (process := deciding[_CLEAN]) is not None and process.poll():
        raise SystemExit(f"deciding on the {_CLEAN} has failed")  # before the long part
    if "answer" in stages:
        bench.regimes(deciding)
        return
    scorer = bench.scorer()
    if "speed" in stages:
        bench.speed(scorer, 100)
    if not {"match", "regimes", "exhaustive"} & {*stages}:
        return
    screened = bench.match(scorer)
    if "regimes" in stages:
        bench.metric(screened.shortlists, bench.foreign(scorer, screened))
        free()
        noisy = [*common, "--truth", args.out / "truth.json"]
        deciding[_NOISY] = bench.deciding(_NOISY, args.out / "scores.jsonl", *noisy)
        bench.regimes(deciding)
        free()
    if "exhaustive" in stages:
        bench.try_all(scorer, screened, args.sample, args.seed)
    say("done")


if __name__ == "__main__":
    main()
