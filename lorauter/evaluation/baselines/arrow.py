"""Arrow: a token goes to the adapters whose strongest input direction it has most of.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs" (arXiv 2405.11157). Knows how an
adapter scores an input; `lorauter.evaluation.baselines.token_routed` runs it.

PEFT's own Arrow (`create_arrow_model`) is not used, as it refuses a pool of mixed ranks or target modules, and knows
no sets of adapters that a prompt may not use. Its prototypes are 15 steps of power iteration from a random start,
those here the exact singular vectors; where the iteration has converged, and the pool is uniform, both give the same
answers, which the tests hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from lorauter.evaluation.baselines.spectrum import right_factor


@dataclass(frozen=True)
class Arrow:
    """The score of an adapter for an input x of a linear layer is `|v . x|`, v the top right singular vector of B A.

    Attributes:
        top_k: adapters a token and layer; the paper takes 4, PEFT 3.
        temperature: of the softmax over the top_k scores.
    """

    top_k: int = 3
    temperature: float = 1.0

    def rows(self, a: Tensor, b: Tensor) -> Tensor:
        """(1, in) float32: the prototype v, of length 1, or 0 where B A is 0. See `TokenRouter.rows`."""
        return F.normalize(right_factor(a, b)[:1], dim=1)
