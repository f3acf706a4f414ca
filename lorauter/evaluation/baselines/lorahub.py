"""LoraHub: one vector of adapter weights a task, found without gradients on the task's few examples.

Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" (arXiv 2307.13269). Knows
names and losses; knows nothing of models.

How the weights compose is up to who computes the loss. LoraHub itself weights A and B apart, `(sum_i w_i B_i)
(sum_i w_i A_i)`, which needs adapters of one rank and the same targets and adds cross terms; here the engine computes
the loss, and the answers, under the exact `sum_i w_i s_i B_i A_i` in output space, so that any pool will do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

from lorauter.errors import InvalidRequest
from lorauter.evaluation.metrics import missing_package

_BOUND = 1.5
_L1 = 0.05  # of the mean absolute weight, as in the authors' code

Loss = Callable[[Sequence[Mapping[str, float]]], Sequence[float]]
"""The loss of each of several weightings `{adapter: weight}`: mean cross entropy of the examples' targets, say."""


def lorahub_weights(
    candidates: Sequence[str], loss: Loss, *, budget: int = 40, seed: int = 0, workers: int = 1
) -> dict[str, float]:
    """Search the weights that minimise `loss + 0.05 * mean |w|`, with nevergrad.

    The authors leave the algorithm to nevergrad's NGOpt, which for one worker and their 20 candidates and 40 steps
    takes COBYLA. Here it is named: for fewer candidates or more workers NGOpt takes one that fails under NumPy 2.4.

    Args:
        candidates: adapters to weight; the paper draws 20 of its pool at random.
        loss: see `Loss`; must give the same for the same weights if the result is to be repeatable.
        budget: weightings tried at most, at least 1.
        seed: of the search; COBYLA draws nothing, so that it shows with several workers alone.
        workers: weightings tried in one call of `loss`. The authors' search has 1; with more, which saves calls but
            learns less from each, it is CMA-ES.

    Returns:
        `{adapter: weight}`, every weight in [-1.5, 1.5]; the search begins at 0, or around it.

    Raises:
        ConfigError: nevergrad is not installed.
        InvalidRequest: no candidates or one twice, budget or workers below 1, or the loss gives another number of
            values or one that is not finite.
    """
    try:
        import nevergrad as ng  # of the extra `evaluation`
    except ImportError as error:
        raise missing_package(error) from error

    if not candidates or len(set(candidates)) != len(candidates):
        raise InvalidRequest(f"candidates are {list(candidates)}; names without repeats needed", param="candidates")
    if min(budget, workers) < 1:
        raise InvalidRequest(f"budget is {budget} and workers {workers}; at least 1 each is needed", param="budget")
    zeros = [0.0] * len(candidates)
    space = ng.p.Array(init=zeros, lower=[-_BOUND] * len(candidates), upper=[_BOUND] * len(candidates))
    space.random_state.seed(seed)
    algorithm = ng.optimizers.registry["Cobyla" if workers == 1 else "CMA"]
    search = algorithm(parametrization=space, budget=budget, num_workers=workers)
    while left := budget - search.num_tell:
        with warnings.catch_warnings():
            # nevergrad gives scipy's COBYLA settings that scipy corrects, and says so.
            warnings.filterwarnings("ignore", message="COBYLA: Invalid", category=UserWarning)
            asked = [search.ask() for _ in range(min(workers, left))]
        losses = loss([_named(candidates, candidate.value) for candidate in asked])
        if len(losses) != len(asked) or not all(map(math.isfinite, losses)):
            raise InvalidRequest(f"the loss of {len(asked)} weightings is {list(losses)}", param="loss")
        for candidate, value in zip(asked, losses, strict=True):
            search.tell(candidate, float(value) + _L1 * sum(abs(w) for w in candidate.value) / len(candidates))
    return _named(candidates, search.provide_recommendation().value)


def _named(candidates: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    return {name: float(weight) for name, weight in zip(candidates, weights, strict=True)}
