"""Writes a noisy pool: clean adapters, trainings, and what was derived from both, under names that say nothing.

`truth.json` beside them says what each is, for the evaluation alone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pool_derived import KINDS, Lora
from pool_training import SCALING, train, trainings
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
