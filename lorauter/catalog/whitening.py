"""Whitened hidden states: which tasks ask for the same kind of answer as a query does.

A *state* is what a small instruct model holds at a prompt's last token, after some of its layers (`lorauter.states`).
For each layer, states are compared under the inverse of their covariance over the catalog's examples, drawn towards a
multiple of the identity: with mean m, scatter S of the examples and Q = (0.9 S + 0.1 tr(S) / d I)^-1, a query h and a
task with the mean state t have the cosine of h - m and t - m under Q; their similarity is the mean over the layers.

Whitening that has seen examples of a task knows their directions, and betrays a query of it even where the task itself
is taken out. So a task is taken out of the whitening too: n examples change Q by something of rank n (Woodbury), if the
identity's share stays what it was. Knows arrays; knows nothing of models, catalogs or routing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.float16]
"""(n, layers, d): of n texts."""

_SAME = 0.99
_SHRINKAGE = 0.1
_NOTHING = 1e-4  # of the square distance of an example from the mean, about; what is nearer has no direction


class StatesOf(NamedTuple):
    """Whose states they are: the name of the `model`, for messages, and its states (layers, d) of a text that is the
    same for all, the `probe`."""

    model: str
    probe: NDArray[np.float16]

    def same(self, other: StatesOf) -> bool:
        """Whether they are one model's, in whatever precision."""
        one, two = self.probe.astype(np.float32), other.probe.astype(np.float32)
        if one.shape != two.shape:
            return False
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
        return bool(((one * two).sum(axis=1) >= _SAME * lengths).all())  # not, where one is NaN


class Centred(NamedTuple):
    """Mean states of c tasks, as `Whitening.similarities` takes them: `rows` less the mean, and these under Q;
    (layers, c, d) float32 each."""

    rows: NDArray[np.float32]
    inside: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Whitening:
    """See the module.

    Attributes:
        mean: (layers, d) float32, of all examples that it was fitted to.
        inverse: (layers, d, d) float32, Q.
        count: examples, but those that were taken out.
        moved: (layers, d) float32, by what the mean is another without these.
        added: (layers, d, r) float32: without these the inverse is Q + `added added^T`.
    """

    mean: NDArray[np.float32]
    inverse: NDArray[np.float32]
    count: int
    moved: NDArray[np.float32]
    added: NDArray[np.float32]

    @classmethod
    def fit(cls, states: Sequence[States]) -> Whitening:
        """Fit to the examples of tasks, (n, layers, d) each."""
        layers, d = states[0].shape[1:]
        mean, inverse = np.zeros((layers, d), np.float32), np.zeros((layers, d, d), np.float32)
        for layer in range(layers):  # one at a time: there may be thousands of examples
            rows = np.concatenate([of[:, layer] for of in states]).astype(np.float64)
            mean[layer] = rows.mean(axis=0)
            rows -= mean[layer]
            scatter = rows.T @ rows
            share = max(float(np.trace(scatter)) / d, 1e-6)
            inverse[layer] = np.linalg.inv((1 - _SHRINKAGE) * scatter + _SHRINKAGE * share * np.eye(d))
        return cls._untouched(mean, inverse, sum(map(len, states)))

    @classmethod
    def _untouched(cls, mean: NDArray[np.float32], inverse: NDArray[np.float32], count: int) -> Whitening:
        return cls(mean, inverse, count, np.zeros_like(mean), np.zeros((*mean.shape, 0), np.float32))

    def without(self, states: States) -> Whitening:
        """As if these examples, (n, layers, d), some of those that it was fitted to, had not been there."""
        count, left = len(states), self.count - len(states)
        if not count or left < 1:  # the last ones cannot go: there would be nothing to compare with
            return self
        gone = states.transpose(1, 2, 0).astype(np.float64) - (self.mean + self.moved)[:, :, None]
        total = gone.sum(axis=2)
        # The others' scatter about their own mean is S - V V^T; as the mean moves, each column of V has some of all.
        columns = gone + total[:, :, None] * ((math.sqrt(1 + count / left) - 1) / count)
        if count > len(self.mean[0]):
            columns = np.linalg.qr(columns.transpose(0, 2, 1))[1].transpose(0, 2, 1)
        inside = self.inverse @ columns + self.added @ (self.added.transpose(0, 2, 1) @ columns)
        known, directions = np.linalg.eigh((1 - _SHRINKAGE) * (columns.transpose(0, 2, 1) @ inside))
        scale = np.sqrt((1 - _SHRINKAGE) / np.maximum(1 - known, 1e-6))
        added = ((inside @ directions) * scale[:, None]).astype(np.float32)
        return replace(
            self,
            count=left,
            moved=(self.moved - total / left).astype(np.float32),
            added=np.concatenate([self.added, added], axis=2),
        )

    def centred(self, means: NDArray[Any]) -> Centred:
        """The mean states of tasks, (c, layers, d); they are the same whatever is taken out."""
        rows = means.transpose(1, 0, 2).astype(np.float32) - self.mean[:, None]
        return Centred(rows, np.asarray(rows @ self.inverse, np.float32))

    def similarities(self, states: NDArray[Any], tasks: Centred, *, apart: bool = False) -> NDArray[np.float64]:
        """(n, c): of queries' states, (n, layers, d), to tasks; `apart`, each query's are the same to the last bit
        whatever the others are."""
        product = _row_by_row if apart else np.matmul
        (b, b_inside), a = tasks, states.transpose(1, 0, 2).astype(np.float32) - self.mean[:, None]
        a_inside = product(a, self.inverse)
        if self.added.shape[2]:  # something was taken out
            moved = self.moved[:, None]
            moved_inside = moved @ self.inverse
            a, a_inside, b, b_inside = a - moved, a_inside - moved_inside, b - moved, b_inside - moved_inside
        products, least = product(a_inside, b.transpose(0, 2, 1)), _NOTHING * len(self.mean[0]) / self.count
        a_square, b_square = (a * a_inside).sum(axis=2), (b * b_inside).sum(axis=2)
        if self.added.shape[2]:
            a_added, b_added = product(a, self.added), b @ self.added
            products += product(a_added, b_added.transpose(0, 2, 1))
            a_square, b_square = a_square + (a_added * a_added).sum(axis=2), b_square + (b_added * b_added).sum(axis=2)
        a_length, b_length = np.sqrt(np.maximum(a_square, least)), np.sqrt(np.maximum(b_square, least))
        return np.asarray((products / (a_length[:, :, None] * b_length[:, None])).mean(axis=0), np.float64)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` takes, of one that nothing was taken out of."""
        return {"mean": self.mean, "inverse": self.inverse, "count": np.asarray(self.count)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Whitening:
        """The inverse of `arrays`. Raises KeyError."""
        return cls._untouched(arrays["mean"], arrays["inverse"], int(arrays["count"]))


def _row_by_row(rows: NDArray[np.float32], by: NDArray[np.float32]) -> NDArray[np.float32]:
    """(layers, n, e): rows (layers, n, d) by (layers, d, e): the last bits of a product of many hang on how many they
    are."""
    return np.asarray((rows[:, :, None] @ by[:, None])[:, :, 0])


def mean_state(states: States) -> NDArray[np.float16]:
    """(layers, d): the mean of a task's examples'."""
    mean: NDArray[np.float64] = states.mean(axis=0, dtype=np.float64)
    return mean.astype(np.float16)
