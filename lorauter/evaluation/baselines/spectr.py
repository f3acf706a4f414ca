"""SpectR: a token goes to the adapters whose change to it would be largest.

Fleshman and Van Durme, "SpectR: Dynamically Composing LM Experts with Spectral Routing" (arXiv 2504.03454). Knows how
an adapter scores an input; `lorauter.evaluation.baselines.token_routed` runs it.

Where Arrow scores by the first singular direction alone, SpectR takes the whole spectrum: with `s B A = U S V^T` it
stores an adapter as `U` and `S V^T`, and the score of an input is the length of `S V^T x`. As the columns of U are
orthonormal, that is the length of the adapter's own change, `|s B A x|`. Top-k and softmax are as in Arrow.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorauter.evaluation.baselines.spectrum import right_factor


@dataclass(frozen=True)
class SpectR:
    """The score of an adapter for an input x of a linear layer is `|S V^T x|`.

    Attributes:
        top_k: adapters a token and layer.
        temperature: of the softmax over the top_k scores.
    """

    top_k: int = 3
    temperature: float = 1.0

    def rows(self, a: Tensor, b: Tensor) -> Tensor:
        """(min(r, in, out), in) float32: `S V^T`. See `TokenRouter.rows`."""
        return right_factor(a, b)
