"""Fitting a task's mixture by gradients: weights of sources in each layer, on the task's few examples.

The examples are parted into folds. For each fold weights are fitted to all others, from the mixture on that fits these
best, and looked at with the fold itself: where that stops getting better the fits end. What a task gets is the mean of
its folds' weights there, and how much better the examples fare under weights that have not seen them than under the
mixtures that the router gives them. All weights of a group of tasks are fitted at once, each task until its own end;
gradients go to weights alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, isnan, nan, sqrt
from statistics import fmean, stdev

import torch
from torch import Tensor

from lorauter.catalog.dialogues import Dialogue
from lorauter.compositions.config import ComposeConfig
from lorauter.compositions.losses import Rows, passes, row_losses
from lorauter.compositions.stack import AdapterStack
from lorauter.engine.model import Decoder

Weights = Mapping[str, float]
_ALL = 1 - 1e-4  # of the tokens, whose shares are summed up
_AT_ONCE = 256  # examples with a mixture each
Outcome = tuple[float, float]
"""The loss of an example, and the share of its target's tokens that is right."""


@dataclass(frozen=True)
class Problem:
    """A task to be fitted.

    Attributes:
        dialogues: its examples, two at least.
        mixtures: what the router answers each of them with.
        starts: where the fits may begin: each where the examples that it sees have the least loss.
        barred: sources that it may not use.
        exact: whether an answer is right as a whole or not at all; else so much of it is as tokens are.
    """

    task: str
    dialogues: Sequence[Dialogue]
    mixtures: Sequence[Weights]
    starts: Sequence[Weights]
    barred: frozenset[str] = frozenset()
    exact: bool = True

    def right(self, outcomes: Iterable[Outcome]) -> float:
        """How many of the examples come out right, as a share."""
        return fmean(float(share > _ALL) if self.exact else share for _, share in outcomes)


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        weights: (layers, all columns of the stack).
        folds: the weights of each fold's fit, which has not seen it.
        fold_of: of each example the fold that it is in.
        before: of each example the loss under the router's mixture.
        after: the same under the weights that have not seen it.
        right_before, right_after: the share of the examples that come out right.
        step: at which the fits ended.
        history: the mean loss of examples that were left out, at every look.
    """

    task: str
    weights: Tensor
    folds: Tensor
    fold_of: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    right_before: float
    right_after: float
    step: int
    history: tuple[float, ...] = field(default=())

    @property
    def gain(self) -> float:
        """By how much the mean loss of examples that were left out is lower."""
        return fmean(self.before) - fmean(self.after)

    @property
    def error(self) -> float:
        """The gain's standard error; no number where a loss is none."""
        gains = [b - a for b, a in zip(self.before, self.after, strict=True)]
        return stdev(gains) / sqrt(len(gains)) if all(map(isfinite, gains)) else nan


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
            progress: called at each step with its number and the mean loss of examples that were left out, as it was
                at the last look. What it raises ends the fits.
        """
        config = self.config
        folds = [_folds(problem, config) for problem in problems]
        first = [0]  # of each task's members
        owner: list[int] = []  # of each member its task
        for k, of in enumerate(folds):
            first.append(first[-1] + max(of) + 1)
            owner += [k] * (max(of) + 1)
        training: list[tuple[Dialogue, int, float]] = []
        left_out: list[tuple[Dialogue, int, float]] = []
        for k, (problem, of) in enumerate(zip(problems, folds, strict=True)):
            for dialogue, fold in zip(problem.dialogues, of, strict=True):
                left_out.append((dialogue, first[k] + fold, 1.0))
                seen_by = (other for other in range(max(of) + 1) if other != fold)
                training += [(dialogue, first[k] + other, 1 / (len(of) - of.count(other))) for other in seen_by]
        before = self._under([problem.mixtures for problem in problems], problems)
        allowed = torch.tensor([[float(s.name not in problems[k].barred) for s in self.stack.sources] for k in owner])
        free = self._parameters(allowed)
        origin = self._parameters(torch.cat(self._starts(problems, folds))) * free
        weights = origin.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([weights], lr=config.learning_rate, betas=(0.9, 0.95))
        of_a_source = origin[0].numel() / len(self.stack.sources)
        running = list(range(len(problems)))
        fits, looks = self._passes(training), self._passes(left_out)
        best = [(0.0, 0)] * len(problems)
        kept: list[tuple[Tensor, list[Outcome]]] = [(torch.empty(0), [])] * len(problems)
        history: list[list[float]] = [[] for _ in problems]
        for step in range(config.steps + 1):
            if step % config.check_every == 0 or step == config.steps:
                outcomes = iter(self._outcomes(self._columns(weights.detach()), looks, len(left_out)))
                for k in running:
                    own = [next(outcomes) for _ in problems[k].dialogues]
                    history[k].append(fmean(loss for loss, _ in own))
                    if not step or history[k][-1] < best[k][0]:  # the first may be no number
                        best[k] = history[k][-1], step
                        kept[k] = self._columns(weights.detach()[first[k] : first[k + 1]].clone()).cpu(), own
                loss = fmean(history[k][-1] for k in running)
                further = [k for k in running if step - best[k][1] < config.patience * config.check_every]
                if len(further) < len(running):
                    running = further
                    training, left_out = (
                        [row for row in rows if owner[row[1]] in further] for rows in (training, left_out)
                    )
                    fits, looks = self._passes(training), self._passes(left_out)
            progress(step, loss)
            if step == config.steps or not running:
                break
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - 0.8 * (step + 1) / config.steps)
            optimizer.zero_grad()
            for rows in fits:
                losses, _ = row_losses(self._decoder, self._ends, self.stack, self._columns(weights), rows)
                (losses * rows.share).sum().backward()  # type: ignore[no-untyped-call]
            assert weights.grad is not None
            with torch.no_grad():
                weights.grad += 2 * config.pull * (weights - origin) / of_a_source
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
                tuple(loss for loss, _ in before[k]),
                tuple(loss for loss, _ in kept[k][1]),
                problem.right(before[k]),
                problem.right(kept[k][1]),
                best[k][1],
                tuple(history[k]),
            )
            for k, problem in enumerate(problems)
        ]

    def _parameters(self, mixtures: Tensor) -> Tensor:
        """What is fitted, of mixtures (members, sources): columns, or (members, groups, targets or 1, sources)."""
        mixtures = mixtures.to(self._decoder.device)
        if self.config.each == "column":
            return self._wide(mixtures)
        targets = len(self.stack.targets) if self.config.each == "target" else 1
        return mixtures[:, None, None, :].expand(-1, self._layers.shape[1], targets, -1)

    def _columns(self, weights: Tensor) -> Tensor:
        """Parameters as weights of columns."""
        if self.config.each == "column":
            return weights
        of_layers = torch.einsum("mgta,lg->mlta", weights, self._layers)
        return self.stack.columns(of_layers.expand(-1, -1, len(self.stack.targets), -1))

    def _wide(self, mixtures: Tensor) -> Tensor:
        """Mixtures (members, sources), each the same in all layers, as weights of columns."""
        layers, targets = self.stack.shape.layers, len(self.stack.targets)
        return self.stack.columns(mixtures.to(self._decoder.device)[:, None, None, :].expand(-1, layers, targets, -1))

    def _of_names(self, mixtures: Sequence[Weights]) -> Tensor:
        return torch.tensor([[mixture.get(s.name, 0.0) for s in self.stack.sources] for mixture in mixtures])

    def _starts(self, problems: Sequence[Problem], folds: Sequence[Sequence[int]]) -> list[Tensor]:
        """Of each task (members, sources): each member's start is the best for the examples that it is fitted to."""
        found = []
        most = max(len(problem.starts) for problem in problems)
        losses = [
            self._under([[p.starts[min(i, len(p.starts) - 1)]] * len(p.dialogues) for p in problems], problems)
            for i in range(most if most > 1 else 0)
        ]
        for k, (problem, of) in enumerate(zip(problems, folds, strict=True)):
            chosen = []
            for fold in range(max(of) + 1):
                seen = [i for i, other in enumerate(of) if other != fold]
                means = [fmean(under[k][i][0] for i in seen) for under in losses[: len(problem.starts)]]
                # One that makes nonsense has a loss that is no number.
                best = min(range(len(means)), key=lambda i: (isnan(means[i]), means[i])) if means else 0
                chosen.append(problem.starts[best])
            found.append(self._of_names(chosen))
        return found

    def _under(self, mixtures: Sequence[Sequence[Weights]], problems: Sequence[Problem]) -> list[list[Outcome]]:
        """What comes of every example of every task under a mixture of its own."""
        dialogues = [dialogue for problem in problems for dialogue in problem.dialogues]
        all_mixtures = [mixture for of in mixtures for mixture in of]
        found: list[Outcome] = []
        for start in range(0, len(dialogues), _AT_ONCE):
            rows = [(dialogue, i, 1.0) for i, dialogue in enumerate(dialogues[start : start + _AT_ONCE])]
            columns = self._wide(self._of_names(all_mixtures[start : start + _AT_ONCE]))
            found += self._outcomes(columns, self._passes(rows), len(rows))
        each = iter(found)
        return [[next(each) for _ in problem.dialogues] for problem in problems]

    @torch.no_grad()
    def _outcomes(self, columns: Tensor, batches: Sequence[Rows], count: int) -> list[Outcome]:
        """Of so many rows each one's loss, and the share of its tokens that is right."""
        found = [(0.0, 0.0)] * count
        for rows in batches:
            of = row_losses(self._decoder, self._ends, self.stack, columns, rows)
            for place, *outcome in zip(rows.places, *(values.tolist() for values in of), strict=True):
                found[place] = outcome[0], outcome[1]
        return found


def _folds(problem: Problem, config: ComposeConfig) -> list[int]:
    """Which fold each example is in."""
    count = len(problem.dialogues)
    of = [i % min(config.folds, count) for i in range(count)]
    random.Random(f"{config.seed} {problem.task}").shuffle(of)
    return of
