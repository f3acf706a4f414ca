"""The reranker: which of the retrieved tasks a query belongs to, and whether to any.

Fitted to nothing but the catalog's validation examples, to a sample of its tasks where they are many
(`lorauter.catalog.sample`), whose held-out examples are told from all of the catalog's tasks. A task's logit is a
weighted sum of three parts: a linear discriminant with a shrunken covariance over the embeddings (Friedman 1989), the
cosine to the task's words (`lorauter.catalog.lexicon`), and the cosine to its centroid. The weights minimise the
contrastive loss

    -log exp(logit of the own task) / sum over tasks of exp(logit)

of examples that were held out of the parts' own fit (InfoNCE, arXiv 1807.03748, with tasks as the classes), and so the
softmax of the logits is calibrated. Whether a query belongs to any task is a logistic regression on the same held-out
examples, each once as it is and once as if its task were not in the catalog. Where the catalog has states, all of this
is fitted once more, with the similarity of states (`lorauter.catalog.whitening`) as a fourth part: for queries whose
state is known too. Knows nothing of adapters.

Tried on 40 tasks with 20 examples each, top-1 on 20 others: nearest centroid 0.910, the discriminant 0.939, the same by
cosine 0.944, logistic regression 0.935, a projection trained with SupCon (arXiv 2004.11362) 0.941, the words alone
0.974, discriminant, words and cosine together 0.986, with states 0.999. The encoder itself, fine-tuned with InfoNCE on
the same examples (AdamW, 5e-5, batches of 20 pairs), by nearest centroid: 0.965 after 15 steps and 0.978 after 30, a
minute and three on one busy core, where a refit may take half a minute; and each catalog would have an encoder of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lorauter.catalog.lexicon import Grams, Texts, Words, WordTable, idf_of, similarities
from lorauter.catalog.sample import Sample
from lorauter.catalog.whitening import Centred, States, Whitening, mean_state
from lorauter.encoder import Embeddings

Floats = NDArray[np.float64]

_SHRINKAGE = 0.3
_SPREAD = 0.5  # mean square distance of examples to their task's mean, where there is nothing to tell it from
_FOLDS = 5
_MAX_HELD_OUT = 1000  # examples: enough for seven numbers, of however many tasks
_RIVALS = 64  # nearest tasks that a held-out example is told apart from
_MAX_GAP = 20.0  # between the first two logits; more says no more
_STRANGEST = 0.02  # share of the held-out examples, their task taken out, that are stranger than `stranger`


class Known(NamedTuple):
    """What a reranker makes of c tasks by themselves: their centroids, and these under its precision (2 c, d), what
    `norms_of` says of them (c,), their words, and their states, if there are any."""

    directions: Embeddings
    norms: Embeddings
    words: WordTable
    states: Centred | None


class Candidates(NamedTuple):
    """Tasks that a query may be one of: unit `centroids` (c, d), the `lengths` (c,) of the means that they are the
    directions of, their `words`, and the means of their `states`, if there are any; `known` is what
    `Reranker.knowing` knows of them."""

    centroids: Embeddings
    lengths: NDArray[np.float32]
    words: Sequence[Words]
    states: NDArray[np.float16] | None = None
    known: Known | None = None

    @classmethod
    def of(
        cls,
        examples: Sequence[Embeddings],
        grams: Sequence[Sequence[Grams]],
        idf: NDArray[np.float32],
        states: Sequence[States] = (),
    ) -> Candidates:
        """Tasks with these examples: of each (n, d) unit rows, n texts taken apart, and n states if there are any;
        `idf` is as for `Words`."""
        means = np.stack([rows.mean(axis=0) for rows in examples])
        lengths = np.linalg.norm(means, axis=1)
        centroids = means / np.maximum(lengths, 1e-12)[:, None]
        words = [Words.of(task, idf) for task in grams]
        mean_states = np.stack([mean_state(of) for of in states]) if states else None
        return cls(centroids.astype(np.float32), lengths.astype(np.float32), words, mean_states)


class Fit(NamedTuple):
    """What is fitted to held-out examples: `coefficients` of the parts, those of the logistic regression (`familiar`),
    and the familiarity of a `stranger`."""

    coefficients: Floats
    familiar: Floats
    stranger: float


# Where there are too few tasks or examples to hold any out: the values that 40 tasks of 20 examples gave.
_UNFITTED = Fit(np.array([0.09, 55.0, 0.0]), np.array([-5.0, 25.0, 4.0, 0.3]), 0.01)
_UNFITTED_BY_STATES = Fit(np.array([0.05, 0.0, 6.0, 32.0]), np.array([-7.0, 10.0, -4.5, 0.4, 18.5]), 0.01)


class Tasks(Protocol):
    """All of a catalog's tasks."""

    def places(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Where tasks are."""

    def nearest(self, queries: Embeddings, depth: int) -> NDArray[np.int64]:
        """The places of the tasks nearest to n queries: (n, depth at most), -1 where there are no more."""

    def candidates(self, places: NDArray[np.int64]) -> Candidates:
        """The tasks at these places."""


@dataclass(frozen=True)
class Ranking:
    """What the reranker says of n queries; of each the same to the last bit, whatever the others are.

    Attributes:
        logits: (n, c) of the candidates, in their order; minus infinity of those that a query may not be of.
        familiarity: (n,) the probability that the query belongs to one of those that it may be of.
        stranger: (n,) whether it is stranger than nearly every query of a task that the catalog lacks.
        words: (n, c) cosines to the candidates' words.
        cosines: (n, c) to their centroids.
        states: (n, c) similarities to their states, if the queries' are known.
    """

    logits: Floats
    familiarity: Floats
    stranger: NDArray[np.bool_]
    words: Floats
    cosines: Floats
    states: Floats | None = None


@dataclass(frozen=True, eq=False)
class ByStates:
    """What is fitted for queries whose states are known.

    Attributes:
        whitening: of all tasks' states.
        coefficients: (4,) of discriminant, words, cosine and states.
        familiar: (5,), as a reranker's, with the largest similarity of states.
        stranger: as a reranker's.
    """

    whitening: Whitening
    coefficients: Floats
    familiar: Floats
    stranger: float

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` takes."""
        fitted = {name: np.asarray(value) for name, value in vars(self).items() if name != "whitening"}
        return {f"by_states.{name}": value for name, value in {**fitted, **self.whitening.arrays()}.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ByStates | None:
        """The inverse of `arrays`; None where there are none of these. Raises KeyError."""
        own = {name.removeprefix("by_states."): of for name, of in arrays.items() if name.startswith("by_states.")}
        if not own:
            return None
        return cls(Whitening.from_arrays(own), own["coefficients"], own["familiar"], float(own["stranger"]))


@dataclass(frozen=True, eq=False)
class Reranker:
    """See the module. What it knows of a task it is told with the candidates.

    Attributes:
        precision: (d, d) float32, the inverse of the covariance that the tasks share.
        idf: (buckets,) float32, of words.
        coefficients: (3,) of discriminant, words and cosine.
        familiar: (4,) of the logistic regression: constant, largest word cosine, largest cosine, gap between the
            first two logits.
        stranger: familiarity below which a query is stranger than nearly all whose task the catalog lacks.
        by_states: the same for queries whose states are known, if the catalog has states.
    """

    precision: Embeddings
    idf: NDArray[np.float32]
    coefficients: Floats
    familiar: Floats
    stranger: float
    by_states: ByStates | None = None

    @classmethod
    def fit(cls, sample: Sample, tasks: Tasks) -> Reranker:
        """Fit to a sample of tasks, among all of them.

        On one thread, for its last bits hang on how many there are: the same tasks are the same catalog anywhere.
        """
        # Half a second that who only ranks, or tells of what was ranked, need not spend; and before the limit, which is
        # one of what is there.
        import scipy.optimize  # noqa: F401

        with threadpool_limits(1, user_api="blas"):
            return cls._fit(sample, tasks)

    @classmethod
    def _fit(cls, sample: Sample, tasks: Tasks) -> Reranker:
        parts, without = _held_out(sample, tasks)
        known = len(parts) > 0 and parts.shape[1] > 1
        fitted = _fit(parts[:, :, :3], without[:, :, :3]) if known else _UNFITTED
        by_states = None
        if sample.states:
            by_states = ByStates(
                Whitening.fit(sample.states), *(_fit(parts, without) if known else _UNFITTED_BY_STATES)
            )
        idf = idf_of(ids for task in sample.grams for ids in task)
        return cls(_precision(sample.examples), idf, *fitted, by_states)

    def rank(
        self,
        embeddings: Embeddings,
        texts: Sequence[str],
        candidates: Candidates,
        norms: Embeddings | None = None,
        states: NDArray[Any] | None = None,
        whitening: Whitening | None = None,
        among: NDArray[np.bool_] | None = None,
    ) -> Ranking:
        """Judge candidates for n queries: their (n, d) embeddings and their texts.

        Args:
            norms: (c,) what `norms_of` says of the candidates, if that is known.
            states: (n, layers, width) of the queries, if they are known and the candidates have states.
            whitening: of their states, without tasks that the queries must not know of.
            among: (n, c) which of the candidates each query may be of, at least one; None are all.
        """
        known = candidates.known
        if norms is None:
            norms = known.norms if known else norms_of(candidates.centroids, candidates.lengths, self.precision)
        parts = _parts(embeddings, Texts.taken_apart(texts), candidates, norms, self.precision, self.idf)
        similar = None
        fitted: Reranker | ByStates = self
        if states is not None and self.by_states is not None and candidates.states is not None:
            fitted, whitening = self.by_states, whitening or self.by_states.whitening
            tasks = known.states if known and known.states else whitening.centred(candidates.states)
            similar = whitening.similarities(states, tasks, apart=True)
            parts = np.concatenate([parts, similar[:, :, None]], axis=2)
        logits, cosines, words = parts @ fitted.coefficients, parts[:, :, 2], parts[:, :, 1]
        if among is not None:
            logits = np.where(among, logits, -np.inf)
            parts = np.where(among[:, :, None], parts, -np.inf)
        chances = _sigmoid((_features(parts, logits) * fitted.familiar).sum(axis=1))
        return Ranking(logits, chances, chances < fitted.stranger, words, cosines, similar)

    def knowing(self, candidates: Candidates) -> Candidates:
        """The same candidates, for many queries."""
        states = None
        if self.by_states is not None and candidates.states is not None:
            states = self.by_states.whitening.centred(candidates.states)
        norms = norms_of(candidates.centroids, candidates.lengths, self.precision)
        directions = np.concatenate([candidates.centroids, candidates.centroids @ self.precision])
        return candidates._replace(known=Known(directions, norms, WordTable(candidates.words, self.idf), states))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` takes."""
        own = {name: np.asarray(value) for name, value in vars(self).items() if name != "by_states"}
        return own if self.by_states is None else {**own, **self.by_states.arrays()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Reranker:
        """The inverse of `arrays`. Raises KeyError."""
        own = {name: arrays[name] for name in ("precision", "idf", "coefficients", "familiar")}
        return cls(**own, stranger=float(arrays["stranger"]), by_states=ByStates.from_arrays(arrays))


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def norms_of(centroids: Embeddings, lengths: NDArray[np.float32], precision: Embeddings) -> Embeddings:
    """(n,): m P m of tasks with the means m under the precision P."""
    return np.asarray(((centroids @ precision) * centroids).sum(axis=1) * lengths * lengths)


def _parts(
    embeddings: Embeddings,
    texts: Texts,
    candidates: Candidates,
    norms: Embeddings,
    precision: Embeddings,
    idf: NDArray[np.float32],
) -> Floats:
    """(n, c, 3): of n queries and each candidate discriminant, words and cosine.

    The discriminant of a task with mean m under the precision P is q P m - m P m / 2. Products are made query by query:
    the last bits of a product of many hang on how many they are.
    """
    known, columns = candidates.known, embeddings[:, :, None]
    if known:
        both, words = (known.directions @ columns)[:, :, 0], known.words.similarities(texts)
        cosines, inside = both[:, : len(norms)], both[:, len(norms) :]
    else:
        cosines, inside = ((candidates.centroids @ of)[:, :, 0] for of in (columns, precision @ columns))
        apart = [texts.grams[texts.of == n] for n in range(texts.n)]
        words = np.stack([similarities(grams, candidates.words, idf) for grams in apart])
    parts = np.empty((len(embeddings), len(norms), 3))
    parts[:, :, 0] = candidates.lengths * inside - 0.5 * norms
    parts[:, :, 1] = words
    parts[:, :, 2] = cosines
    return parts


def _precision(examples: Sequence[Embeddings]) -> Embeddings:
    dimension, count = examples[0].shape[1], sum(map(len, examples))
    spread = np.concatenate([rows - rows.mean(axis=0, dtype=np.float64) for rows in examples])
    covariance = spread.T @ spread / max(1, count - len(examples))
    known = count > len(examples)  # else no task has two examples, and nothing is known of their spread
    variance = max(float(np.trace(covariance)) if known else _SPREAD, 1e-6 * dimension) / dimension
    shrunken = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * variance * np.eye(dimension)
    return np.linalg.inv(shrunken).astype(np.float32)


def _held_out(sample: Sample, tasks: Tasks) -> tuple[Floats, Floats]:
    """The parts of logits, (held out, rivals, 3 or 4), of examples under fits without them, where the own task comes
    first; and those, (held out, rivals - 1, 3 or 4), under fits that have not seen the own task either.

    Of these fits, the whitening of states alone knows what it has seen so well that it has to be another one.
    """
    step = math.ceil(sum(map(len, sample.examples)) / _MAX_HELD_OUT)
    folds = [
        [np.arange(len(rows)) % _FOLDS != f if len(rows) > 1 else np.ones(1, bool) for rows in sample.examples]
        for f in range(_FOLDS)
    ]
    out = [[(t, int(i)) for t, mask in enumerate(kept) for i in np.flatnonzero(~mask)][::step] for kept in folds]
    if not any(out):
        return np.zeros((0, 0, 4)), np.zeros((0, 0, 4))
    own = tasks.places(sample.names)
    rivals = tasks.nearest(np.stack([sample.examples[t][i] for fold in out for t, i in fold]), _RIVALS)
    sampled = {int(place): i for i, place in enumerate(own)}
    parts: list[Floats] = []
    without: list[Floats] = []  # of the own task
    row = iter(rivals)
    for kept, fold in zip(folds, out, strict=True):
        if not fold:
            continue
        examples = [rows[mask] for rows, mask in zip(sample.examples, kept, strict=True)]
        grams = [list(compress(task, mask)) for task, mask in zip(sample.grams, kept, strict=True)]
        states = [rows[mask] for rows, mask in zip(sample.states, kept, strict=True)] if sample.states else []
        precision, idf = _precision(examples), idf_of(ids for task in grams for ids in task)
        inside: dict[int, Candidates] = {}
        told: list[tuple[int, int, Candidates]] = []
        at: list[list[int]] = []  # where the candidates of each are
        means: dict[int, NDArray[np.float16]] = {}  # of the states of all of them
        for task, i in fold:
            found = next(row)
            others = found[(found != own[task]) & (found >= 0)]
            places = np.concatenate([own[task : task + 1], others])[: rivals.shape[1]]
            if len(places) < rivals.shape[1]:  # a search that did not find as many
                continue
            candidates = tasks.candidates(places)
            words = list(candidates.words)
            for n, t in enumerate(map(sampled.get, places.tolist())):
                if t is not None:  # as it is without the examples that are held out
                    if t not in inside:
                        inside[t] = Candidates.of([examples[t]], [grams[t]], idf, states[t : t + 1])
                    candidates.centroids[n], candidates.lengths[n] = inside[t].centroids[0], inside[t].lengths[0]
                    words[n] = inside[t].words[0]
            if candidates.states is not None:
                means |= dict(zip(places.tolist(), candidates.states, strict=True))
            at.append(places.tolist())
            told.append((task, i, candidates._replace(words=words)))
        if told:  # at once, as small products of matrices take longer
            centroids = np.concatenate([candidates.centroids for _, _, candidates in told])
            lengths = np.concatenate([candidates.lengths for _, _, candidates in told])
            norms = norms_of(centroids, lengths, precision).reshape(len(told), -1)
            of_fold = np.array(
                [
                    _parts(
                        sample.examples[task][i][None],
                        Texts.one(sample.grams[task][i]),
                        candidates,
                        norm,
                        precision,
                        idf,
                    )[0]
                    for (task, i, candidates), norm in zip(told, norms, strict=True)
                ]
            )
            rest = of_fold[:, 1:]
            if means:
                means |= {int(own[t]): of.states[0] for t, of in inside.items() if of.states is not None}
                asked = [(task, sample.states[task][i]) for task, i, _ in told]
                similar, apart = _similar(states, asked, means, at)
                of_fold = np.concatenate([of_fold, similar[:, :, None]], axis=2)
                rest = np.concatenate([rest, apart[:, 1:, None]], axis=2)
            parts.append(of_fold)
            without.append(rest)
    if not parts:
        return np.zeros((0, 0, 4)), np.zeros((0, 0, 4))
    return np.concatenate(parts), np.concatenate(without)


def _similar(
    kept: Sequence[States],
    asked: Sequence[tuple[int, NDArray[np.float16]]],
    means: Mapping[int, NDArray[np.float16]],
    at: Sequence[Sequence[int]],
) -> tuple[Floats, Floats]:
    """Similarities of states by a whitening that was fitted to other examples, and by one without the own task's too:
    (n, rivals) each.

    Args:
        kept: of each task the states that it is fitted to.
        asked: n states that it is not, and whose each is.
        means: of rivals, by their places.
        at: the rivals of each of the n.
    """
    whitening, states = Whitening.fit(kept), np.stack([state for _, state in asked])
    order = {place: n for n, place in enumerate(means)}
    tasks = whitening.centred(np.stack(list(means.values())))
    similar = whitening.similarities(states, tasks)
    apart, owners = np.empty_like(similar), np.array([task for task, _ in asked])
    for task in np.unique(owners):
        mine = owners == task
        apart[mine] = whitening.without(kept[task]).similarities(states[mine], tasks)
    rows, columns = np.arange(len(asked))[:, None], np.array([[order[place] for place in places] for places in at])
    return similar[rows, columns], apart[rows, columns]


def _fit(parts: Floats, without: Floats) -> Fit:
    """Fit to parts as `_held_out` gives them."""
    coefficients = _fit_coefficients(parts)
    return Fit(coefficients, *_fit_familiar(parts, without, coefficients))


def _least(loss: Callable[[Floats], tuple[float, Floats]], start: Floats, **options: Any) -> Any:
    """The least of a loss that tells its gradient too, as SciPy tells it."""
    from scipy.optimize import minimize

    return minimize(loss, start, jac=True, method="L-BFGS-B", **options)


def _fit_coefficients(parts: Floats) -> Floats:
    scale = parts.std(axis=(0, 1)) + 1e-9
    scaled = parts / scale

    def loss(weights: Floats) -> tuple[float, Floats]:
        chances = softmax(scaled @ weights)
        gradient = ((chances[:, :, None] * scaled).sum(axis=1) - scaled[:, 0]).mean(axis=0)
        value = -np.log(chances[:, 0] + 1e-30).mean() + 1e-4 * (weights**2).sum()
        return float(value), gradient + 2e-4 * weights

    found = _least(loss, np.ones(len(scale)), bounds=[(0, None)] * len(scale))
    return np.asarray(found.x / scale)


def _features(parts: Floats, logits: Floats) -> Floats:
    """(n, 4) of n queries, for the logistic regression; (n, 5) where there are states. What a query may not be of is
    minus infinity."""
    features, largest = np.zeros((len(parts), parts.shape[2] + 1)), parts.max(axis=1)
    features[:, 0] = 1.0
    features[:, 1:3] = largest[:, 1:3]
    features[:, 4:] = largest[:, 3:]
    if logits.shape[1] > 1:
        order = np.sort(logits, axis=1)
        first, second = order[:, -1], order[:, -2]
        np.minimum(first - second, _MAX_GAP, out=features[:, 3], where=second > -np.inf)
    return features


def _fit_familiar(parts: Floats, without: Floats, coefficients: Floats) -> tuple[Floats, float]:
    """The logistic regression that tells held-out examples from the same with their task taken out."""
    features = np.concatenate([_features(of, of @ coefficients) for of in (parts, without)])
    scale = features.std(axis=0) + 1e-9
    scale[0] = 1.0
    scaled, sign = features / scale, np.repeat([1.0, -1.0], len(parts))

    def loss(weights: Floats) -> tuple[float, Floats]:
        margin = sign * (scaled @ weights)
        gradient = -(scaled * (sign * _sigmoid(-margin))[:, None]).mean(axis=0)
        return float(np.logaddexp(0, -margin).mean() + 1e-4 * (weights**2).sum()), gradient + 2e-4 * weights

    found = _least(loss, np.zeros(len(scale)))
    familiar = found.x / scale
    strangers = _sigmoid(features[len(parts) :] @ familiar)
    return familiar, float(np.quantile(strangers, _STRANGEST))
