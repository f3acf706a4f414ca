"""LoraHub as a step of the evaluation: weights for each task, searched on its validation examples.

Needs torch, transformers, safetensors and nevergrad alone, so that it runs on a bare GPU machine; how weights are
searched is `lorauter.evaluation.baselines.lorahub`'s.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeGuard

from lorauter.adapters.weights import LoadAdapter
from lorauter.errors import AdapterRejected, ConfigError, InvalidRequest
from lorauter.evaluation.baselines.lorahub import lorahub_weights
from lorauter.evaluation.rows import drop_torn_line, is_weight, read_json_lines
from lorauter.tasks import Task

if TYPE_CHECKING:
    from lorauter.catalog.scoring import LikelihoodScorer
    from lorauter.engine.slots import PackedAdapter

Weights = dict[tuple[str, bool], dict[str, float]]
"""By task, and by whether the task's own adapters were among the candidates."""

_CANDIDATES = 20  # drawn at random, as LoraHub's authors do
_LOSS_OF_NONSENSE = 100.0  # of weights under which the model's output is not finite


def weigh(
    tasks: Sequence[Task],
    pool: Sequence[str],
    scorer: LikelihoodScorer,
    load: LoadAdapter,
    output: Path,
    *,
    own: Mapping[str, Sequence[str]],
    budget: int = 40,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Search two weightings a task, with its own adapters among the candidates and without, and append them to a file.

    What the file has already is not searched again.

    Args:
        pool: names of the adapters to draw candidates from.
        scorer: knows the tasks' validation examples.
        own: adapters that were made for each task; they are candidates where they may be.
        output: JSON lines `{"task", "own", "weights"}`.
        budget: weightings tried for each.

    Raises:
        AdapterError: an adapter cannot be loaded or served.
        InvalidRequest: `output` is no such file.
    """
    known: Weights = {}
    if output.exists():
        known = read_weights(output)
        drop_torn_line(output)
    wanted = [(task, with_own) for task in tasks for with_own in (True, False)]
    packed: dict[str, PackedAdapter] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        for done, (task, with_own) in enumerate(wanted):
            progress(done, len(wanted))
            if (task.name, with_own) in known:
                continue
            candidates = _candidates(pool, own[task.name], task.name, with_own=with_own)
            packed |= {name: scorer.pack(load(name)) for name in candidates if name not in packed}
            weights = _search(scorer, task, {name: packed[name] for name in candidates}, budget)
            file.write(json.dumps({"task": task.name, "own": with_own, "weights": weights}) + "\n")
            file.flush()
    progress(len(wanted), len(wanted))


def _candidates(pool: Sequence[str], own: Sequence[str], task: str, *, with_own: bool) -> list[str]:
    others = sorted(set(pool) - set(own))
    kept = sorted(own) if with_own else []
    drawn = random.Random(task).sample(others, min(len(others), _CANDIDATES))
    return sorted([*kept, *drawn[: max(0, _CANDIDATES - len(kept))]])


def _search(
    scorer: LikelihoodScorer, task: Task, candidates: Mapping[str, PackedAdapter], budget: int
) -> dict[str, float]:
    examples = [(task.name, i) for i in range(len(task.validation))]

    def loss(weightings: Sequence[Mapping[str, float]]) -> list[float]:
        return [one(weights) for weights in weightings]

    def one(weights: Mapping[str, float]) -> float:
        try:
            mixture = [(candidates[name], weight) for name, weight in weights.items()]
            return -fmean(scorer.score_mixture(mixture, examples))
        except AdapterRejected:
            return _LOSS_OF_NONSENSE

    return lorahub_weights(list(candidates), loss, budget=budget) if candidates else {}


def read_weights(path: Path) -> Weights:
    """Read what `weigh` wrote, but for a torn last line. Raises InvalidRequest, naming the line."""
    found: Weights = {}
    for source, row in read_json_lines(path, torn=True):
        task, own, weights = (row.get(key) for key in ("task", "own", "weights"))
        if not (isinstance(task, str) and isinstance(own, bool) and _are_weights(weights)):
            raise InvalidRequest(
                f'{source}: a row is {{"task", "own": true or false, "weights": {{adapter: number}}}}', param="lorahub"
            )
        found[task, own] = weights
    return found


def _are_weights(value: object) -> TypeGuard[dict[str, float]]:
    return isinstance(value, dict) and all(map(is_weight, value.values()))


def weights_for(weights: Weights, task: str, *, with_own: bool) -> dict[str, float]:
    """A task's weights. Raises ConfigError if they were not searched."""
    if (task, with_own) not in weights:
        raise ConfigError(
            f"there are no LoraHub weights for task {task!r}; 'lorauter eval lorahub' searches them", setting="lorahub"
        )
    return weights[task, with_own]
