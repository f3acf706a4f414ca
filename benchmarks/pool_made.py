"""Writes a noisy pool: clean adapters, trainings, and what was derived from both, under names that say nothing.

`truth.json` beside them says what each is, for the evaluation alone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from pool_derived import KINDS, Lora
from pool_training import SCALING, Training, train, trainings
from safetensors.torch import save_file

from lorauter.adapters.peft_config import CONFIG_FILE, TARGETS
from lorauter.adapters.tensors import PREFIX, module_of
from lorauter.adapters.weights import WEIGHTS_FILE, LoraWeights
from lorauter.tasks import Example


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


class Recipe:
    """What each adapter of the pool is and how it is made; the same in every process.

    Args:
        clean, trained: folders of the sources.
        names: of the clean ones.
        jobs: the trainings.
    """

    def __init__(self, clean: Path, trained: Path, names: Sequence[str], jobs: Sequence[Training], seed: int) -> None:
        self.folders = {name: clean / name for name in names}
        self.what: dict[str, dict] = {name: {"kind": "clean", "of": [name], "tasks": [name]} for name in names}
        for i, job in enumerate(jobs):
            name = f"trained-{i}"
            self.folders[name] = trained / name
            self.what[name] = {"kind": "trained", "of": [], "tasks": [job.task], "training": vars(job)}
        self.sources = sorted(self.folders)
        self.seed = seed
        self._read: dict[str, Lora] = {}

    def source(self, name: str) -> Lora:
        if name not in self._read:
            self._read[name] = read_lora(self.folders[name])
        return self._read[name]

    def adapter(self, i: int) -> tuple[Lora, dict]:
        """The i-th: the sources, and then what is derived of them."""
        if i < len(self.sources):
            return self.source(self.sources[i]), {**self.what[self.sources[i]], "source": self.sources[i]}
        draw = random.Random(f"{self.seed} derived {i - len(self.sources)}")
        kind = list(KINDS)[(i - len(self.sources)) % len(KINDS)]
        one, other = draw.sample(self.sources, 2)
        generator = torch.Generator().manual_seed(draw.randrange(1 << 31))
        lora = KINDS[kind].make(self.source(one), self.source(other), generator)
        of = [one, other] if kind.startswith("merged") else [] if kind == "random" else [one]
        return lora, {"kind": kind, "of": of, "tasks": sorted({t for source in of for t in self.what[source]["tasks"]})}

    def write(self, numbers: Sequence[int], folder: Path, base: str) -> dict[str, dict]:
        """Write some, and say what they are."""
        torch.set_num_threads(1)
        found = {}
        for i in numbers:
            lora, what = self.adapter(i)
            name = hashlib.sha256(f"{self.seed} {i}".encode()).hexdigest()[:12]
            write_lora(lora, folder / name, base)
            found[name] = what
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
    say: Callable[[str], None],
) -> dict[str, dict]:
    """Write the pool into `out/adapters`, and what each of it is into `out/truth.json`."""
    known = out / "truth.json"
    if known.exists():
        return json.loads(known.read_text())
    names = sorted(path.name for path in clean.iterdir() if (path / WEIGHTS_FILE).exists() and path.name in tasks)
    base = json.loads((clean / names[0] / CONFIG_FILE).read_text())["base_model_name_or_path"]
    jobs = trainings(sorted(tasks), wanted, seed)
    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in range(workers):
            pool.submit(os.getpid)  # they start while adapters are trained
        say(f"{len(names)} clean adapters; training {wanted}")
        decoder, codec = decoder_of()
        trained = train(decoder, codec, tasks, jobs, steps=steps, rows=rows, positions=positions, say=say)
        for i, factors in enumerate(trained):
            write_lora(Lora(factors, SCALING, kept_in=torch.float32), out / "trained" / f"trained-{i}", base)
        say("deriving")
        recipe = Recipe(clean, out / "trained", names, jobs, seed)
        numbers = range(max(count, len(recipe.sources)))
        write = partial(recipe.write, folder=out / "adapters", base=base)
        parts = pool.map(write, [numbers[start :: 4 * workers] for start in range(4 * workers)])
        truth = {name: what for part in parts for name, what in part.items()}
    known.write_text(json.dumps(dict(sorted(truth.items()))))
    return truth
