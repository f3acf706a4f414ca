"""The singular value decomposition of an adapter's change B A, through its small core. Knows nothing of routing."""

from __future__ import annotations

import torch
from torch import Tensor


def right_factor(a: Tensor, b: Tensor) -> Tensor:
    """`S V^T` of `B A = U S V^T`, exactly, without forming B A.

    With the QR decompositions `A^T = Q_a R_a` and `B = Q_b R_b`, `B A = Q_b (R_b R_a^T) Q_a^T`: the r x r core has
    the same singular values, and its right singular vectors times `Q_a^T` are those of B A.

    Args:
        a: (r, in).
        b: (out, r), the scaling in it.

    Returns:
        (min(r, in, out), in) float32, the largest singular value first.
    """
    q_a, r_a = torch.linalg.qr(a.float().T)
    _, r_b = torch.linalg.qr(b.float(), mode="r")
    _, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    factor: Tensor = s[:, None] * (vt @ q_a.T)
    return factor
