"""Fitting a task's mixture by gradients: one weight for each source and layer, on the task's few examples.

The examples are parted into folds. For each fold weights are fitted to all others, from one mixture on, and looked at
with the fold itself: where that stops getting better the fits end. What a task gets is the mean of its folds' weights
there, and how much better the examples fare under weights that have not seen them than under the mixtures that the
router gives them. All weights of a group of tasks are fitted at once, each task until its own end; gradients go to
weights alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from statistics import fmean, stdev

import torch
from torch import Tensor

from lorauter.catalog.dialogues import Dialogue
from lorauter.compositions.config import ComposeConfig
from lorauter.compositions.losses import Rows, losses_of, passes
from lorauter.compositions.stack import AdapterStack
from lorauter.engine.model import Decoder

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """A task to be fitted.

    Attributes:
        dialogues: its examples, two at least.
        mixtures: what the router answers each of them with.
        start: where the fits begin.
        barred: sources that it may not use.
    """

    task: str
    dialogues: Sequence[Dialogue]
    mixtures: Sequence[Weights]
    start: Weights
    barred: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        weights: (layers, targets, sources), of the stack.
        folds: the weights of each fold's fit, which has not seen it.
        fold_of: of each example the fold that it is in.
        before: of each example the loss under the router's mixture.
        after: the same under the weights that have not seen it.
        step: at which the fits ended.
        history: the mean loss of examples that were left out, at every look.
    """

    task: str
    weights: Tensor
    folds: Tensor
    fold_of: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    step: int
    history: tuple[float, ...] = field(default=())

    @property
    def gain(self) -> float:
        """By how much the mean loss of examples that were left out is lower."""
        return fmean(self.before) - fmean(self.after)

    @property
    def error(self) -> float:
        """The gain's standard error."""
        return stdev(b - a for b, a in zip(self.before, self.after, strict=True)) / sqrt(len(self.before))

    def holds(self, margin: float) -> bool:
        """Whether the gain is more than so many of its standard errors."""
        return self.gain > margin * self.error


class Fitter:
    """Fits tasks over one stack of adapters.

    Args:
        decoder: a plain one.
        end_ids: tokens that end an answer.
        tokens, outputs: positions and predicted tokens of a pass at most.
    """

    def __init__(
        self,
        decoder: Decoder,
        end_ids: Sequence[int],
        stack: AdapterStack,
        config: ComposeConfig,
        *,
        tokens: int,
        outputs: int,
    ) -> None:
        self.config = config
        self.stack = stack
        self._decoder = decoder
        self._ends = torch.tensor(sorted(end_ids), device=decoder.device)
        self._passes = partial(passes, tokens=tokens, outputs=outputs, device=decoder.device)
        layers = stack.shape.layers
        groups = min(config.layer_groups or layers, layers)
        # (layers, groups): which group a layer's weights are.
        owner = torch.arange(layers) * groups // layers
        self._layers = torch.nn.functional.one_hot(owner, groups).float().to(decoder.device)

    def fit(
        self, problems: Sequence[Problem], progress: Callable[[int, float], None] = lambda step, loss: None
    ) -> list[Fit]:
        """Fit tasks together.

        Args:
            progress: called at each look with the step and the mean loss of examples that were left out.
        """
        config, count = self.config, len(self.stack.sources)
        folds = [_folds(problem, config) for problem in problems]
        first = [0]  # of each task's members
        owner: list[int] = []  # of each member its task
        for k, of in enumerate(folds):
            first.append(first[-1] + max(of) + 1)
            owner += [k] * (max(of) + 1)
        start = torch.zeros(first[-1], count)
        allowed = torch.ones(first[-1], count)
        training: list[tuple[Dialogue, int, float]] = []
        left_out: list[tuple[Dialogue, int, float]] = []
        for k, (problem, of) in enumerate(zip(problems, folds, strict=True)):
            members = range(first[k], first[k + 1])
            start[members] = self._of_names([problem.start])
            allowed[members] = torch.tensor([float(s.name not in problem.barred) for s in self.stack.sources])
            for dialogue, fold in zip(problem.dialogues, of, strict=True):
                left_out.append((dialogue, first[k] + fold, 1.0))
                seen_by = (other for other in range(len(members)) if other != fold)
                training += [(dialogue, first[k] + other, 1 / (len(of) - of.count(other))) for other in seen_by]
        before = self._before(problems)
        device = self._decoder.device
        origin = (start * allowed).to(device)[:, None, None, :].expand(-1, *self._shape, -1)
        free = allowed.to(device)[:, None, None, :]
        weights = origin.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([weights], lr=config.learning_rate, betas=(0.9, 0.95))
        running = list(range(len(problems)))
        fits, looks = self._passes(training, first[-1]), self._passes(left_out, first[-1])
        best = [(float("inf"), 0)] * len(problems)
        kept: list[tuple[Tensor, list[float]]] = [(torch.empty(0), [])] * len(problems)
        history: list[list[float]] = [[] for _ in problems]
        for step in range(config.steps + 1):
            if step % config.check_every == 0 or step == config.steps:
                losses = iter(self._losses(weights.detach(), looks, len(left_out)))
                for k in running:
                    own = [next(losses) for _ in problems[k].dialogues]
                    history[k].append(fmean(own))
                    if history[k][-1] < best[k][0]:
                        best[k] = history[k][-1], step
                        kept[k] = self._whole(weights.detach()[first[k] : first[k + 1]]).cpu(), own
                progress(step, fmean(history[k][-1] for k in running))
                further = [k for k in running if step - best[k][1] < config.patience * config.check_every]
                if len(further) < len(running):
                    running = further
                    training, left_out = (
                        [row for row in rows if owner[row[1]] in further] for rows in (training, left_out)
                    )
                    fits, looks = self._passes(training, first[-1]), self._passes(left_out, first[-1])
            if step == config.steps or not running:
                break
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - 0.8 * (step + 1) / config.steps)
            optimizer.zero_grad()
            for rows in fits:
                [(_, values)] = losses_of(self._decoder, self._ends, self.stack, self._whole(weights), [rows])
                (values * rows.share).sum().backward()  # type: ignore[no-untyped-call]
            assert weights.grad is not None
            with torch.no_grad():
                groups, targets = self._shape
                weights.grad += 2 * config.pull * (weights - origin) / (groups * targets)
                weights.grad *= free
            optimizer.step()
            if config.non_negative:
                with torch.no_grad():
                    weights.clamp_(min=0)
        return [
            Fit(
                problem.task,
                kept[k][0].mean(0),
                kept[k][0],
                tuple(folds[k]),
                tuple(before[k]),
                tuple(kept[k][1]),
                best[k][1],
                tuple(history[k]),
            )
            for k, problem in enumerate(problems)
        ]

    @property
    def _shape(self) -> tuple[int, int]:
        """Groups of layers, and of targets, that have weights of their own."""
        return self._layers.shape[1], len(self.stack.targets) if self.config.per_target else 1

    def _whole(self, weights: Tensor) -> Tensor:
        """(members, groups, targets or 1, sources) as (members, layers, targets, sources)."""
        of_layers = torch.einsum("mgta,lg->mlta", weights, self._layers)
        return of_layers.expand(-1, -1, len(self.stack.targets), -1)

    def _of_names(self, mixtures: Sequence[Weights]) -> Tensor:
        return torch.tensor([[mixture.get(s.name, 0.0) for s in self.stack.sources] for mixture in mixtures])

    def _before(self, problems: Sequence[Problem]) -> list[list[float]]:
        """The loss of every example under the mixture that it has now."""
        rows = [dialogue for problem in problems for dialogue in problem.dialogues]
        mixtures = torch.cat([self._of_names(problem.mixtures) for problem in problems]).to(self._decoder.device)
        shape = (self.stack.shape.layers, len(self.stack.targets))
        weights = mixtures[:, None, None, :].expand(-1, *shape, -1)
        batches = self._passes([(dialogue, i, 1.0) for i, dialogue in enumerate(rows)], len(rows))
        losses = iter(self._losses_of(weights, batches, len(rows)))
        return [[next(losses) for _ in problem.dialogues] for problem in problems]

    def _losses(self, weights: Tensor, batches: Sequence[Rows], count: int) -> list[float]:
        return self._losses_of(self._whole(weights), batches, count)

    @torch.no_grad()
    def _losses_of(self, weights: Tensor, batches: Sequence[Rows], count: int) -> list[float]:
        found = [0.0] * count
        for rows, values in losses_of(self._decoder, self._ends, self.stack, weights, batches):
            for place, value in zip(rows.places, values.tolist(), strict=True):
                found[place] = value
        return found


def _folds(problem: Problem, config: ComposeConfig) -> list[int]:
    """Which fold each example is in."""
    count = len(problem.dialogues)
    of = [i % min(config.folds, count) for i in range(count)]
    random.Random(f"{config.seed} {problem.task}").shuffle(of)
    return of
