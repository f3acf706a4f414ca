"""Answers files of decisions on a machine that has a GPU and little else, and says after each how they score.

    python benchmarks/answers.py ROWS.jsonl ... --adapters URI --out DIR [--composed DIR] [--batch 128]

The files are as `lorauter eval decide` or benchmarks/states.py --decide write them, or so in .xz. Scores are shares of
the oracle's, whose rows are in the first of the files; rows of several splits say which they are of (`split`).
What is in the folder is not answered again.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine import EngineConfig, load_engine
from lorauter.evaluation.answering import adapters_in, answer
from lorauter.evaluation.composing import composed_or, read_composed
from lorauter.evaluation.report import ORACLE, evaluate
from lorauter.evaluation.rows import DecisionRow, ScoredRow, read_answers

Row = dict[str, Any]
started = time.perf_counter()


def say(what: str) -> None:
    print(f"[{time.perf_counter() - started:6.1f} s] {what}", flush=True)


def read_rows(path: Path) -> list[Row]:
    raw = path.read_bytes()
    return [json.loads(line) for line in (lzma.decompress(raw) if path.suffix == ".xz" else raw).splitlines()]


def tell(oracle: list[Row], rows: list[Row], answers: Path, report: dict[str, object]) -> None:
    """Print how rows score, and add it to a report."""
    told = read_answers(answers)
    for split in dict.fromkeys(row.get("split") for row in rows):
        print(f"\n{split or 'all'}: share of the oracle's score")
        scored = {row["id"]: row for row in (*oracle, *rows) if row.get("split") == split}
        kinds = {(row["method"], row["regime"]) for row in rows if row.get("split") == split}
        rows_of = [ScoredRow.from_json(row, source="row") for row in scored.values()]
        for one in evaluate(rows_of, told, rouge_for_bleu=True):
            if (one.method, one.regime) in kinds:
                low, high = one.interval
                share = f"{100 * one.of_oracle:6.1f} %" if one.of_oracle is not None else "-"
                print(f"{one.method:32} {one.regime:10} {one.score:.4f} ({low:.3f} to {high:.3f}) {share}", flush=True)
                report[f"{split or 'all'}/{one.method}/{one.regime}"] = vars(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--adapters", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--composed", type=Path, help="compositions, a folder as 'lorauter eval compose' makes it")
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    load = adapters_in(args.adapters)
    if args.composed is not None:
        load = composed_or(read_composed(args.composed), load)
    oracle: list[Row] = []
    report: dict[str, object] = {}
    config = EngineConfig(max_batch=args.batch, max_queue=8192)
    with closing(load_engine(resolve_model("default", say), config, aliases=base_model_aliases("default"))) as engine:
        for path in args.rows:
            rows = read_rows(path)
            oracle += [row for row in rows if row["method"] == ORACLE]
            asked, to = [DecisionRow.from_json(row, source=path.name) for row in rows], args.out / "answers.jsonl"
            answer(asked, engine, load, to, progress=lambda d, t, path=path: say(f"{path.name}: {d} of {t} answered"))
            tell(oracle, rows, to, report)
            (args.out / "report.json").write_text(json.dumps(report))
    say("done")


if __name__ == "__main__":
    main()
