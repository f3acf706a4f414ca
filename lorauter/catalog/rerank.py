"""The reranker: which of the retrieved tasks a query belongs to, and whether to any.

Fitted to nothing but the catalog's validation examples. A task's logit is a weighted sum of three parts: a linear
discriminant with a shrunken covariance over the embeddings (Friedman 1989), the cosine to the task's words
(`lorauter.catalog.lexicon`), and the cosine to its centroid. The weights minimise the contrastive loss

    -log exp(logit of the own task) / sum over tasks of exp(logit)

of examples that were held out of the parts' own fit (InfoNCE, arXiv 1807.03748, with tasks as the classes), and so the
softmax of the logits is calibrated. Whether a query belongs to any task is a logistic regression on the same held-out
examples, each once as it is and once as if its task were not in the catalog. Knows nothing of adapters.

Tried on 40 tasks with 20 examples each, top-1 on 20 others: nearest centroid 0.910, the discriminant 0.939, the same by
cosine 0.944, logistic regression 0.935, a projection trained with SupCon (arXiv 2004.11362) 0.941, the words alone
0.974, discriminant, words and cosine together 0.986. The encoder itself, fine-tuned with InfoNCE on the same examples
(AdamW, 5e-5, batches of 20 pairs), by nearest centroid: 0.965 after 15 steps and 0.978 after 30, a minute and three on
one busy core, where a refit may take half a minute; and each catalog would have an encoder of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from lorauter.catalog.lexicon import Grams, Lexicon, grams_of
from lorauter.encoder import Embeddings, normalised

Floats = NDArray[np.float64]

_SHRINKAGE = 0.3
_SPREAD = 0.5  # mean square distance of examples to their task's mean, where there is nothing to tell it from
_FOLDS = 5
_MAX_HELD_OUT = 4000  # examples: enough for seven numbers, of however many tasks
_RIVALS = 64  # nearest tasks that a held-out example is told apart from
_MAX_GAP = 20.0  # between the first two logits; more says no more
# Where there are too few tasks or examples to hold any out: the values that 40 tasks of 20 examples gave.
_COEFFICIENTS = np.array([0.09, 55.0, 0.0])
_FAMILIAR = np.array([-5.0, 25.0, 4.0, 0.3])
_STRANGER = 0.01
_STRANGEST = 0.02  # share of the held-out examples, their task taken out, that are stranger than `stranger`


@dataclass(frozen=True)
class Ranking:
    """What the reranker says of one query.

    Attributes:
        logits: (c,) of the candidates, in their order.
        familiarity: the probability that the query belongs to one of them.
        words: (c,) cosines to the candidates' words: which of them asks for answers of the same kind.
    """

    logits: Floats
    familiarity: float
    words: Floats


@dataclass(frozen=True, eq=False)
class Reranker:
    """See the module.

    Attributes:
        discriminant: (T, d) float32, and `bias` (T,) float32.
        lexicon: the tasks' words.
        coefficients: (3,) of discriminant, words and cosine.
        familiar: (4,) of the logistic regression: constant, largest word cosine, largest cosine, gap between the
            first two logits.
        stranger: familiarity below which a query is stranger than nearly all whose task the catalog lacks.
    """

    discriminant: Embeddings
    bias: NDArray[np.float32]
    lexicon: Lexicon
    coefficients: Floats
    familiar: Floats
    stranger: float

    @classmethod
    def fit(cls, examples: Sequence[Embeddings], texts: Sequence[Sequence[str]]) -> Reranker:
        """Fit to T tasks.

        Args:
            examples: of each task, (n, d) float32 unit rows.
            texts: the same examples' inputs.
        """
        grams = [[grams_of(text) for text in task] for task in texts]
        parts = _held_out(examples, grams)
        coefficients, familiar, stranger = _COEFFICIENTS, _FAMILIAR, _STRANGER
        if len(parts) and parts.shape[1] > 1:
            coefficients = _fit_coefficients(parts)
            familiar, stranger = _fit_familiar(parts, coefficients)
        rows, bias = _discriminant(examples)
        return cls(rows, bias, Lexicon.fit_grams(grams), coefficients, familiar, stranger)

    def rank(self, embedding: Embeddings, text: str, tasks: NDArray[np.int64], cosines: NDArray[Any]) -> Ranking:
        """Judge candidates for a query.

        Args:
            embedding: (d,) of the query.
            text: the query.
            tasks: (c,) their numbers, at least one.
            cosines: (c,) to their centroids.
        """
        parts = np.stack(
            [
                self.discriminant[tasks] @ embedding + self.bias[tasks],
                self.lexicon.similarity(text, tasks),
                cosines,
            ],
            axis=-1,
        ).astype(np.float64)
        logits = parts @ self.coefficients
        chance = _sigmoid(_features(parts[None], logits[None]) @ self.familiar)
        return Ranking(logits, float(chance[0]), parts[:, 1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` takes."""
        lexicon = {f"lexicon_{name}": array for name, array in vars(self.lexicon).items()}
        own = {name: getattr(self, name) for name in ("discriminant", "bias", "coefficients", "familiar")}
        return {**own, **lexicon, "stranger": np.array(self.stranger)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Reranker:
        """The inverse of `arrays`. Raises KeyError."""
        lexicon = Lexicon(**{name: arrays[f"lexicon_{name}"] for name in ("idf", "starts", "buckets", "values")})
        return cls(
            arrays["discriminant"],
            arrays["bias"],
            lexicon,
            arrays["coefficients"],
            arrays["familiar"],
            float(arrays["stranger"]),
        )


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _discriminant(examples: Sequence[Embeddings]) -> tuple[Embeddings, NDArray[np.float32]]:
    means = np.stack([rows.mean(axis=0) for rows in examples]).astype(np.float64)
    spread = np.concatenate([rows - mean for rows, mean in zip(examples, means, strict=True)])
    dimension = means.shape[1]
    covariance = spread.T @ spread / max(1, len(spread) - len(means))
    known = len(spread) > len(means)  # else no task has two examples, and nothing is known of their spread
    variance = max(float(np.trace(covariance)) if known else _SPREAD, 1e-6 * dimension) / dimension
    shrunken = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * variance * np.eye(dimension)
    rows = np.linalg.solve(shrunken, means.T).T
    return rows.astype(np.float32), (-0.5 * (rows * means).sum(axis=1)).astype(np.float32)


def _held_out(examples: Sequence[Embeddings], grams: Sequence[Sequence[Grams]]) -> NDArray[np.float64]:
    """The parts of logits, (held out, rivals, 3), of examples under fits without them; the own task comes first."""
    parts: list[Floats] = []
    rivals = min(_RIVALS, len(examples))
    step = max(1, sum(map(len, grams)) // _MAX_HELD_OUT)
    for fold in range(_FOLDS):
        kept = [np.arange(len(rows)) % _FOLDS != fold if len(rows) > 1 else np.ones(1, bool) for rows in examples]
        out = [(task, int(i)) for task, mask in enumerate(kept) for i in np.flatnonzero(~mask)][::step]
        if not out:
            continue
        inside = [rows[mask] for rows, mask in zip(examples, kept, strict=True)]
        lexicon = Lexicon.fit_grams([list(compress(task, mask)) for task, mask in zip(grams, kept, strict=True)])
        rows, bias = _discriminant(inside)
        centroids = normalised(np.stack([r.mean(axis=0) for r in inside]))
        for task, i in out:
            cosines = centroids @ examples[task][i]
            cosines[task] += 4  # the first, whatever the others
            chosen = np.argsort(-cosines, kind="stable")[:rivals]
            cosines[task] -= 4
            scores = rows[chosen] @ examples[task][i] + bias[chosen]
            parts.append(
                np.stack([scores, lexicon.similarity_of_grams(grams[task][i], chosen), cosines[chosen]], axis=-1)
            )
    return np.array(parts, np.float64)


def _fit_coefficients(parts: Floats) -> Floats:
    scale = parts.std(axis=(0, 1)) + 1e-9
    scaled = parts / scale

    def loss(weights: Floats) -> tuple[float, Floats]:
        chances = softmax(scaled @ weights)
        gradient = ((chances[:, :, None] * scaled).sum(axis=1) - scaled[:, 0]).mean(axis=0)
        value = -np.log(chances[:, 0] + 1e-30).mean() + 1e-4 * (weights**2).sum()
        return float(value), gradient + 2e-4 * weights

    found = minimize(loss, np.ones(3), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 3)
    return np.asarray(found.x / scale)


def _features(parts: Floats, logits: Floats) -> Floats:
    """(n, 4) of n queries, for the logistic regression."""
    first = np.sort(logits, axis=1)[:, ::-1]
    gap = first[:, 0] - first[:, 1] if logits.shape[1] > 1 else np.zeros(len(logits))
    largest = parts.max(axis=1)
    return np.stack([np.ones(len(parts)), largest[:, 1], largest[:, 2], np.minimum(gap, _MAX_GAP)], axis=1)


def _fit_familiar(parts: Floats, coefficients: Floats) -> tuple[Floats, float]:
    """The logistic regression that tells held-out examples from the same with their task taken out."""
    logits = parts @ coefficients
    features = np.concatenate([_features(parts, logits), _features(parts[:, 1:], logits[:, 1:])])
    scale = features.std(axis=0) + 1e-9
    scale[0] = 1.0
    scaled, sign = features / scale, np.repeat([1.0, -1.0], len(parts))

    def loss(weights: Floats) -> tuple[float, Floats]:
        margin = sign * (scaled @ weights)
        gradient = -(scaled * (sign * _sigmoid(-margin))[:, None]).mean(axis=0)
        return float(np.logaddexp(0, -margin).mean() + 1e-4 * (weights**2).sum()), gradient + 2e-4 * weights

    found = minimize(loss, np.zeros(4), jac=True, method="L-BFGS-B")
    familiar = found.x / scale
    strangers = _sigmoid(features[len(parts) :] @ familiar)
    return familiar, float(np.quantile(strangers, _STRANGEST))
