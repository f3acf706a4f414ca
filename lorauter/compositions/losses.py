"""The loss of examples under mixtures of stacked adapters, through the project's own decoder, with gradients.

A row's mixture has a weight for each adapter, layer and target. Rows are filled up to one length, after their tokens,
where causal attention does not look. Knows nothing of how weights are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorauter.catalog.dialogues import Dialogue
from lorauter.compositions.gradients import GradientStep
from lorauter.compositions.stack import AdapterStack
from lorauter.engine.model import Decoder
from lorauter.engine.step import StepBatch

_LENGTH_STEP = 32  # lengths are multiples of it: the model keeps its rotary tables for each


@dataclass(frozen=True)
class Rows:
    """Rows of one pass, on the device.

    Attributes:
        members: (rows,) which member's weights each row takes.
        share: (rows,) float32, of each row's loss in what is summed up.
        length: positions of a row.
        tokens: (rows * length,).
        outputs: (m,) places of the tokens that predict a target's or its end.
        wanted: (m,) what they should predict; whatever where it is the end.
        ends: (m,) whether it is the end.
        means: (rows, m) float32, that make each row's mean of its outputs.
        places: which of the rows that were given they are.
    """

    members: Tensor
    share: Tensor
    length: int
    tokens: Tensor
    outputs: Tensor
    wanted: Tensor
    ends: Tensor
    means: Tensor
    places: tuple[int, ...]


Example = tuple[Dialogue, int, float]
"""A dialogue, the member whose weights it takes, and its share of the sum."""


def passes(rows: Sequence[Example], *, tokens: int, outputs: int, device: torch.device) -> list[Rows]:
    """Share out rows into passes of at most so many positions and outputs; a longer row goes alone."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0].tokens), i))
    found: list[Rows] = []
    batch: list[int] = []
    for i in order:
        length = _padded(len(rows[i][0].tokens))  # the longest so far
        full = sum(rows[j][0].outputs for j in (*batch, i)) > outputs or (len(batch) + 1) * length > tokens
        if batch and full:
            found.append(_rows(rows, batch, device))
            batch = []
        batch.append(i)
    return [*found, _rows(rows, batch, device)] if batch else found


def _rows(rows: Sequence[Example], batch: Sequence[int], device: torch.device) -> Rows:
    chosen = [rows[i] for i in batch]
    length = _padded(max(len(dialogue.tokens) for dialogue, _, _ in chosen))
    tokens = torch.zeros(len(chosen), length, dtype=torch.long)
    outputs: list[int] = []
    wanted: list[int] = []
    ends: list[bool] = []
    means = torch.zeros(len(chosen), sum(dialogue.outputs for dialogue, _, _ in chosen))
    for row, (dialogue, _, _) in enumerate(chosen):
        tokens[row, : len(dialogue.tokens)] = torch.tensor(dialogue.tokens)
        means[row, len(outputs) : len(outputs) + dialogue.outputs] = 1 / dialogue.outputs
        outputs += range(row * length + dialogue.prompt - 1, row * length + len(dialogue.tokens))
        wanted += [*dialogue.tokens[dialogue.prompt :], 0]
        ends += [False] * (dialogue.outputs - 1) + [True]
    return Rows(
        torch.tensor([member for _, member, _ in chosen], device=device),
        torch.tensor([share for _, _, share in chosen], device=device),
        length,
        tokens.view(-1).to(device),
        torch.tensor(outputs, device=device),
        torch.tensor(wanted, device=device),
        torch.tensor(ends, device=device),
        means.to(device),
        tuple(batch),
    )


def row_losses(
    decoder: Decoder, end_ids: Tensor, stack: AdapterStack, columns: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """The mean negative log-probability of each row's target and its end, and the share of its tokens that would be
    chosen if all before them had been: (rows,) float32 each, gradients to the first alone. What is no number in a row,
    as its weights make nonsense, is so in no other.

    Args:
        decoder: a plain one.
        end_ids: tokens that end an answer, whose probabilities are added up.
        columns: of every member, as `AdapterStack.columns` gives them: (members, layers, all columns).
    """
    weights = stack.by_group(columns[rows.members].to(decoder.dtype))
    positions = torch.arange(rows.length, device=decoder.device).repeat(len(rows.places))
    batch = StepBatch(rows.tokens, positions, positions, 0, (), rows.outputs)
    logits = decoder.run(GradientStep(decoder, stack, weights, rows.length), batch).float()
    whole = logits.logsumexp(-1)
    ending = logits[:, end_ids].logsumexp(-1)
    chosen = logits.gather(1, rows.wanted[:, None])[:, 0]
    losses = _means(rows, whole - torch.where(rows.ends, ending, chosen))
    likeliest = logits.detach().argmax(-1)
    right = torch.where(rows.ends, torch.isin(likeliest, end_ids), likeliest == rows.wanted)
    return losses, _means(rows, right.float())


def _means(rows: Rows, values: Tensor) -> Tensor:
    """Of each row the mean of its outputs' values."""
    return torch.where(rows.means > 0, rows.means * values, 0.0).sum(1)


def _padded(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP
