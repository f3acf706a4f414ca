"""The logarithms of tokens' probabilities: computed on the device, and told in compact form.

Only rows that ask for them cost anything. Knows nothing of requests or text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorauter.engine.messages import Ranked
from lorauter.engine.plan import StepPlan
from lorauter.engine.sampling import to_device
from lorauter.engine.types import SamplingParams


@dataclass(frozen=True)
class StepRanks:
    """What a step tells of probabilities; to be read once the step is computed.

    Attributes:
        table: (n, 3 + 2 * k) int32 on the host: each token, its rank, its logarithm (the bits of a float32), and the
            likeliest's ids and logarithms; first those of single tokens, then those of prompts.
        sampled: place among the step's or choice's tokens of each single one, and how many likeliest it has.
        scored: how many tokens of each prompt piece, and how many likeliest.
    """

    table: Tensor
    sampled: Sequence[tuple[int, int]] = field(default_factory=list)
    scored: Sequence[tuple[int, int]] = field(default_factory=list)

    def of_tokens(self) -> dict[int, Ranked]:
        """By place among the step's tokens."""
        return {place: self._part(i, 1, most) for i, (place, most) in enumerate(self.sampled)}

    def of_prompts(self) -> list[Ranked]:
        """Of each piece of `StepPlan.scored`."""
        parts, start = [], len(self.sampled)
        for count, most in self.scored:
            parts.append(self._part(start, count, most))
            start += count
        return parts

    def _part(self, start: int, count: int, most: int) -> Ranked:
        rows = self.table[start : start + count]
        ids, ranks, own = rows[:, :1], rows[:, 1], rows[:, 2:3]
        top = (rows.shape[1] - 3) // 2
        ids = torch.cat((ids, rows[:, 3 : 3 + most]), dim=1)
        values = torch.cat((own, rows[:, 3 + top : 3 + top + most]), dim=1).view(torch.float32)
        return Ranked(
            most, array("i", ids.flatten().tolist()), array("f", values.flatten().tolist()), array("i", ranks)
        )


class Ranker:
    """Knows which rows ask, and computes what they ask for.

    Args:
        rows: how many rows there are.
    """

    def __init__(self, rows: int) -> None:
        self._sampling = [SamplingParams()] * rows
        self._asking: set[int] = set()

    @property
    def asked(self) -> bool:
        """Whether any row asks."""
        return bool(self._asking)

    def start(self, row: int, sampling: SamplingParams) -> None:
        """A row begins to be used."""
        self._sampling[row] = sampling
        if sampling.logprobs is None and sampling.prompt_logprobs is None:
            self._asking.discard(row)
        else:
            self._asking.add(row)

    def of_step(self, plan: StepPlan, logits: Tensor, chosen: Tensor) -> StepRanks | None:
        """What a step tells, its table still on the device; None if nobody asks.

        Args:
            logits: (m, vocabulary) of the pieces that sample, then of all targets.
            chosen: (n,) the tokens of the former.
        """
        if not self._asking:
            return None
        now = [(place, piece.row) for place, piece in enumerate(plan.sampled) if not piece.held]
        sampled = self._asked([row for _, row in now])
        scored = [(len(piece.targets), self._sampling[piece.row].prompt_logprobs or 0) for piece in plan.scored]
        if not sampled and not scored:
            return None
        places, targets = (
            to_device(torch.tensor(values, dtype=torch.long), logits.device)
            for values in (
                [now[place][0] for place, _ in sampled],
                [token for piece in plan.scored for token in piece.targets],
            )
        )
        first = len(chosen)
        own = torch.cat((chosen[places].long(), targets))
        rows = torch.cat((logits[places], logits[first : first + len(targets)]))
        return StepRanks(ranked(rows, own, max(most for _, most in [*sampled, *scored])), sampled, scored)

    def of_choice(self, rows: Sequence[int], logits: Tensor, chosen: Tensor) -> StepRanks | None:
        """The same of tokens (n,) that were chosen beside a step, by logits (n, vocabulary), for these rows."""
        sampled = self._asked(rows) if self._asking else []
        if not sampled:
            return None
        places = to_device(torch.tensor([place for place, _ in sampled], dtype=torch.long), logits.device)
        return StepRanks(ranked(logits[places], chosen[places].long(), max(most for _, most in sampled)), sampled)

    def _asked(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Which of these rows ask, by their place, and for how many likeliest."""
        return [(place, most) for place, row in enumerate(rows) if (most := self._sampling[row].logprobs) is not None]


def ranked(logits: Tensor, tokens: Tensor, most: int) -> Tensor:
    """The table of `StepRanks` for logits (n, vocabulary) and tokens (n,); one below 0 is as 0."""
    logarithms = logits.float().log_softmax(dim=-1)
    own = logarithms.gather(-1, tokens.clamp_min(0)[:, None])
    ranks = (logarithms > own).sum(dim=-1, keepdim=True) + 1
    values, ids = logarithms.topk(min(most, logits.shape[1]), dim=-1)
    parts = (tokens[:, None].int(), ranks.int(), own.view(torch.int32), ids.int(), values.view(torch.int32))
    return torch.cat(parts, dim=1)
