"""Brief LoRA trainings, many at once: their parameters stacked, one forward pass over the frozen base for all of them.

The rows of a pass are shared out among the adapters, each of which changes its own by batched products; AdamW is by
hand, as every adapter has a rate of its own. Deterministic by seed on one kind of device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lorauter.catalog.dialogues import Dialogue, dialogue_of
from lorauter.engine.lora_stack import LoraStack
from lorauter.engine.model import Decoder
from lorauter.engine.slots import groups_of
from lorauter.engine.step import StepBatch
from lorauter.engine.text import TextCodec
from lorauter.engine.whole_step import AdaptedStep
from lorauter.tasks import Example

SCALING = 2.0
SHAPES = [(8, ("q_proj", "v_proj")), (16, ("q_proj", "k_proj", "v_proj", "o_proj"))]
Factors = dict[str, tuple[Tensor, Tensor]]
"""By target, A (layers, r, in) and B (layers, out, r)."""


@dataclass(frozen=True)
class Training:
    """One brief training: of how many examples of a task, how large, at which rate, in which order."""

    task: str
    examples: int
    rank: int
    targets: tuple[str, ...]
    rate: float
    seed: int

    @property
    def shape(self) -> tuple[int, tuple[str, ...]]:
        """What trainings have to have in common to be stacked."""
        return self.rank, self.targets


def trainings(tasks: Sequence[str], count: int, seed: int) -> list[Training]:
    """So many trainings, the tasks in turn."""
    found = []
    for i in range(count):
        draw = random.Random(f"{seed} training {i}")
        rank, targets = draw.choice(SHAPES)
        rate = 10 ** draw.uniform(-3.3, -2.5)
        examples = draw.choice([50, 100, 200, 500, 1000, 2000])
        found.append(Training(tasks[i % len(tasks)], examples, rank, targets, rate, draw.randrange(1 << 30)))
    return found


def train(
    decoder: Decoder,
    codec: TextCodec,
    examples: Mapping[str, Sequence[Example]],
    wanted: Sequence[Training],
    *,
    steps: int,
    rows: int,
    positions: int,
    longest: int = 448,
    say: Callable[[str], None] = print,
) -> list[Factors]:
    """Train them all.

    Args:
        decoder: a plain one.
        rows: of each adapter in a step.
        positions: of a pass at most.
        longest: dialogue that is trained on, in tokens.
    """
    dialogues: dict[str, list[Dialogue]] = {}
    lengths: dict[str, int] = {}
    for task in {one.task for one in wanted}:
        own = [dialogue_of(codec, example) for example in examples[task]]
        # The longest eighth would fill up all others' rows.
        lengths[task] = min(longest, sorted(len(d.tokens) for d in own)[-1 - len(own) // 8])
        dialogues[task] = [d for d in own if len(d.tokens) <= lengths[task]]
    found: dict[int, Factors] = {}
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i].shape, lengths[wanted[i].task], i))
    for _, alike in groupby(order, key=lambda i: wanted[i].shape):
        batch: list[int] = []
        for i in [*alike, None]:
            if batch and (i is None or (len(batch) + 1) * rows * lengths[wanted[i].task] > positions):
                members = [wanted[k] for k in batch]
                together = Together(decoder, codec, members, [dialogues[one.task] for one in members], rows, steps)
                losses = [together.step(n) for n in range(steps)]
                say(f"{len(batch)} of rank {members[0].rank}: losses {losses[0]:.3f} to {losses[-1]:.3f}")
                found |= dict(zip(batch, together.factors(), strict=True))
                batch = []
            if i is not None:
                batch.append(i)
    return [found[i] for i in range(len(wanted))]


class Together:
    """Trainings of one shape whose rows fit one pass."""

    def __init__(
        self,
        decoder: Decoder,
        codec: TextCodec,
        members: Sequence[Training],
        dialogues: Sequence[Sequence[Dialogue]],
        rows: int,
        steps: int,
    ) -> None:
        self._decoder = decoder
        self._members = members
        self._rows = rows
        self._steps = steps
        self._end = min(codec.eos_ids)
        self._order = []  # of each member, the dialogues that it meets
        for one, own in zip(members, dialogues, strict=True):
            draw = random.Random(one.seed)
            seen = draw.sample(list(own), min(one.examples, len(own)))
            epochs = -(-rows * steps // len(seen))
            self._order.append([d for _ in range(epochs) for d in draw.sample(seen, len(seen))])
        shape, count, rank = decoder.shape, len(members), members[0].rank
        draws = [torch.Generator().manual_seed(one.seed) for one in members]
        self._a: dict[str, Tensor] = {}
        self._b: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}  # where B may be other than 0
        for group in groups_of(shape):
            targets = [target for target in group.targets if target in members[0].targets]
            if targets:
                ranks, outputs = rank * len(targets), sum(group.widths)
                bound = 1 / math.sqrt(group.inputs)
                a = [2 * torch.rand(shape.layers, group.inputs, ranks, generator=draw) - 1 for draw in draws]
                self._a[group.first] = (bound * torch.stack(a, 1)).to(decoder.device).requires_grad_(True)
                b = torch.zeros(shape.layers, count, ranks, outputs, device=decoder.device)
                self._b[group.first] = b.requires_grad_(True)
                own, column = torch.zeros(ranks, outputs), 0
                for target, width in zip(group.targets, group.widths, strict=True):
                    if target in targets:
                        row = rank * targets.index(target)
                        own[row : row + rank, column : column + width] = 1
                    column += width
                self._own[group.first] = own.to(decoder.device)
        self._parameters = [*self._a.values(), *self._b.values()]
        rates = torch.tensor([one.rate for one in members], device=decoder.device)[:, None, None]
        self._rates = [rates] * len(self._a) + [SCALING * rates] * len(self._b)  # B has its scaling in it
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self._parameters]

    def step(self, n: int) -> float:
        """One step of all; the mean of their losses."""
        chosen = [d for order in self._order for d in order[n * self._rows : (n + 1) * self._rows]]
        length = -(-max(len(d.tokens) for d in chosen) // 32) * 32
        tokens = torch.zeros(len(chosen), length, dtype=torch.long)
        outputs: list[int] = []
        wanted: list[int] = []
        shares: list[float] = []
        for row, d in enumerate(chosen):
            tokens[row, : len(d.tokens)] = torch.tensor(d.tokens)
            outputs += range(row * length + d.prompt - 1, row * length + len(d.tokens))
            wanted += [*d.tokens[d.prompt :], self._end]
            shares += [1 / (self._rows * d.outputs)] * d.outputs
        decoder, device = self._decoder, self._decoder.device
        positions = torch.arange(length, device=device).repeat(len(chosen))
        batch = StepBatch(
            tokens.view(-1).to(device), positions, positions, 0, (), torch.tensor(outputs, device=device)
        )  # fmt: skip
        stack = LoraStack(*({first: of.to(decoder.dtype) for first, of in one.items()} for one in (self._a, self._b)))
        logits = decoder.run(AdaptedStep(decoder, stack, None, length), batch)
        losses = F.cross_entropy(logits.float(), torch.tensor(wanted, device=device), reduction="none")
        loss = losses @ torch.tensor(shares, device=device)
        loss.backward()
        with torch.no_grad():
            for first, of in self._b.items():
                of.grad *= self._own[first]
            self._adam(n + 1)
        return loss.item() / len(self._members)

    def _adam(self, n: int) -> None:
        """AdamW (arXiv 1711.05101) with a cosine decay after a tenth of the steps."""
        warm = max(1, self._steps // 10)
        share = n / warm if n < warm else 0.5 * (1 + math.cos(math.pi * (n - warm) / max(1, self._steps - warm)))
        for parameter, rates, (first, second) in zip(self._parameters, self._rates, self._moments, strict=True):
            gradient = parameter.grad
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            change = (first / (1 - 0.9**n)) / ((second / (1 - 0.999**n)).sqrt() + 1e-8)
            parameter -= share * rates * (change + 0.01 * parameter)
            parameter.grad = None

    def factors(self) -> list[Factors]:
        """The pairs of each, as PEFT has them, whose scaling is SCALING."""
        found: list[Factors] = [{} for _ in self._members]
        rank = self._members[0].rank
        for group in groups_of(self._decoder.shape):
            if group.first not in self._a:
                continue
            a, b = self._a[group.first].detach().cpu(), self._b[group.first].detach().cpu()
            row = column = 0
            for target, width in zip(group.targets, group.widths, strict=True):
                if target in self._members[0].targets:
                    for i, own in enumerate(found):
                        own_a = a[:, i, :, row : row + rank].transpose(1, 2)
                        own_b = b[:, i, row : row + rank, column : column + width].transpose(1, 2) / SCALING
                        own[target] = own_a.contiguous(), own_b.contiguous()
                    row += rank
                column += width
        return found
