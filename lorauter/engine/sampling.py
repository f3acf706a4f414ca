"""From logits to tokens. Knows nothing of where the logits came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample(logits: Tensor, temperatures: Sequence[float], top_ps: Sequence[float], uniforms: Sequence[float]) -> Tensor:
    """Choose one token a row.

    A row with temperature 0 takes its likeliest token. Any other takes the token at which the cumulated
    probability, of the nucleus sorted from the likeliest down, passes the row's own uniform number: the choice
    depends on the row's logits and number alone, not on what else is in the batch.

    Args:
        logits: (n, vocabulary) float32, finite.
        temperatures: n of them, at least 0.
        top_ps: n of them, in (0, 1].
        uniforms: n of them, in [0, 1).

    Returns:
        (n,) int64 on the logits' device.
    """
    tokens = logits.argmax(dim=-1)
    rows = [i for i, temperature in enumerate(temperatures) if temperature > 0]
    if not rows:
        return tokens

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor([values[i] for i in rows], device=logits.device)[:, None]

    chosen = logits[rows]
    # The least numbers that a float64 holds are 0 as float32, hence both `clamp_min`.
    tiny = torch.finfo(torch.float32).tiny
    scaled = (chosen - chosen.amax(dim=-1, keepdim=True)) / column(temperatures).clamp_min(tiny)
    probabilities, ids = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulated = probabilities.cumsum(dim=-1)
    # The nucleus: the tokens before which less than top_p is spent; never less than one.
    nucleus = (cumulated - probabilities < column(top_ps).clamp_min(tiny)).sum(dim=-1, keepdim=True)
    mass = cumulated.gather(-1, nucleus - 1)
    place = torch.searchsorted(cumulated, column(uniforms) * mass, right=True).minimum(nucleus - 1)
    tokens[rows] = ids.gather(-1, place)[:, 0]
    return tokens
