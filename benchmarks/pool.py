"""A noisy pool of many adapters, made from a clean one, and what matching and routing make of it.

    python benchmarks/pool.py --tasks DIR --adapters DIR --out DIR [--count 1560] [--trainings 64] [--only make,speed]

make: brief trainings on the tasks' train sets (many at once), and adapters that were derived from these and the clean
ones, under names that say nothing; `truth.json` beside them says what each is, for the evaluation alone. Deterministic
by seed on one kind of device; nothing is downloaded. speed: how many evaluations by likelihood a second.

What is in the folder is not made again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from pool_derived import KINDS, Lora
from pool_training import SCALING, train, trainings
from safetensors.torch import save_file

from lorauter.adapters.peft_config import CONFIG_FILE, TARGETS
from lorauter.adapters.tensors import PREFIX, module_of
from lorauter.adapters.weights import WEIGHTS_FILE, LoraWeights
from lorauter.catalog.scores import Evaluation, Failed
from lorauter.catalog.scoring import LikelihoodScorer
from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine.load import load_decoder
from lorauter.tasks import Example, Task, read_tasks

started = time.perf_counter()


def say(what: str) -> None:
    print(f"[{time.perf_counter() - started:6.1f} s] {what}", flush=True)


def read_lora(folder: Path) -> Lora:
    """A clean adapter, whose pairs have one rank and scaling."""
    weights = LoraWeights.load(folder, name=folder.name, version="1")
    factors = {}
    for target in weights.ranks:
        pairs = [weights.tensors[layer, target] for layer in sorted(k for k, t in weights.tensors if t == target)]
        factors[target] = torch.stack([a.float() for a, _ in pairs]), torch.stack([b.float() for _, b in pairs])
    return Lora(factors, 1.0)  # the scaling is in B


def write_lora(lora: Lora, folder: Path, base: str) -> None:
    """As PEFT saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for target, (a, b) in lora.factors.items():
        for layer in range(a.shape[0]) if lora.layers is None else lora.layers:
            path = f"{PREFIX}{module_of(layer, target)}"
            tensors[f"{path}.lora_A.weight"] = a[layer].to(lora.kept_in).contiguous()
            tensors[f"{path}.lora_B.weight"] = b[layer].to(lora.kept_in).contiguous()
    save_file(tensors, folder / WEIGHTS_FILE)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base or base,
        "r": lora.rank,
        "lora_alpha": lora.scaling * lora.rank,
        "target_modules": [target for target in TARGETS if target in lora.factors],
        "layers_to_transform": None if lora.layers is None else list(lora.layers),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def train_sets(folder: Path, only: Sequence[str]) -> dict[str, list[Example]]:
    """The tasks' train examples, which no catalog reads."""
    found = {}
    for name in only:
        data = json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes()))
        found[name] = [Example(one["input"], one["target"]) for one in data["train"]]
    return found


def make(
    tasks: Mapping[str, Sequence[Example]],
    clean: Path,
    out: Path,
    *,
    decoder_of: Callable[[], tuple],
    count: int,
    wanted: int,
    steps: int,
    rows: int,
    positions: int,
    seed: int,
) -> dict[str, dict]:
    """Write the pool, and what each of it is."""
    known = out / "truth.json"
    if known.exists():
        return json.loads(known.read_text())
    names = sorted(path.name for path in clean.iterdir() if (path / WEIGHTS_FILE).exists() and path.name in tasks)
    base = json.loads((clean / names[0] / CONFIG_FILE).read_text())["base_model_name_or_path"]
    real: dict[str, tuple[Lora, dict]] = {
        name: (read_lora(clean / name), {"kind": "clean", "of": [name], "tasks": [name]}) for name in names
    }
    say(f"{len(real)} clean adapters; training {wanted}")
    jobs = trainings(sorted(tasks), wanted, seed)
    decoder, codec = decoder_of()
    trained = train(decoder, codec, tasks, jobs, steps=steps, rows=rows, positions=positions, say=say)
    for i, (job, factors) in enumerate(zip(jobs, trained, strict=True)):
        real[f"trained-{i}"] = Lora(factors, SCALING), {"kind": "trained", "of": [], "tasks": [job.task], **vars(job)}
    del decoder
    say("deriving")
    sources = sorted(real)

    def derived(i: int) -> tuple[Lora, dict]:
        draw = random.Random(f"{seed} derived {i}")
        kind = list(KINDS)[i % len(KINDS)]
        one, other = draw.sample(sources, 2)
        torch_draw = torch.Generator().manual_seed(draw.randrange(1 << 31))
        lora = KINDS[kind].make(real[one][0], real[other][0], torch_draw)
        of = [one, other] if kind.startswith("merged") else [] if kind == "random" else [one]
        made_of = sorted({task for source in of for task in real[source][1]["tasks"]})
        return lora, {"kind": kind, "of": of, "tasks": made_of}

    def write(i: int) -> tuple[str, dict]:
        lora, what = real[sources[i]] if i < len(sources) else derived(i - len(sources))
        name = hashlib.sha256(f"{seed} {i}".encode()).hexdigest()[:12]
        write_lora(lora, out / "adapters" / name, base)
        return name, {**what, "source": sources[i] if i < len(sources) else None}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as workers:
        truth = dict(workers.map(write, range(max(count, len(sources)))))
    torch.set_num_threads(threads)
    known.write_text(json.dumps(dict(sorted(truth.items()))))
    return truth


def speed(scorer: LikelihoodScorer, tasks: Sequence[Task], names: Sequence[str], adapters: int) -> None:
    """Evaluations a second, where every adapter meets an example of every task, and all of one task's."""
    chosen = names[:adapters]
    for label, wanted in (
        ("one example of every task", [(task.name, 0) for task in tasks]),
        ("all of two tasks", [(task.name, i) for task in tasks[:2] for i in range(len(task.validation))]),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1560)
    parser.add_argument("--trainings", type=int, default=64)
    parser.add_argument("--steps", type=int, default=80, help="of each training")
    parser.add_argument("--rows", type=int, default=8, help="of a training in a step")
    parser.add_argument("--positions", type=int, default=60_000, help="of a training pass at most")
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="make,speed")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    tasks = [replace(task, validation=task.validation[: args.examples]) for task in read_tasks(args.tasks)]
    tasks = [task for task in tasks if (args.adapters / task.name).is_dir()]
    model, aliases = resolve_model("default", say), base_model_aliases("default")
    truth = make(
        train_sets(args.tasks, [task.name for task in tasks]),
        args.adapters,
        args.out,
        decoder_of=lambda: load_decoder(model, aliases=aliases, plain=True),
        count=args.count,
        wanted=args.trainings,
        steps=args.steps,
        rows=args.rows,
        positions=args.positions,
        seed=args.seed,
    )
    kinds = Counter(what["kind"] for what in truth.values())
    say(f"{len(truth)} adapters: {', '.join(f'{kind} {number}' for kind, number in sorted(kinds.items()))}")
    if "speed" in args.only:
        decoder, codec = load_decoder(model, aliases=aliases)

        def load(name: str) -> LoraWeights:
            return LoraWeights.load(args.out / "adapters" / name, name=name, version="1")

        speed(LikelihoodScorer(decoder, codec, load, tasks), tasks, sorted(truth), 100)
    say("done")


if __name__ == "__main__":
    main()
