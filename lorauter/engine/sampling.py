"""From logits to tokens, on the device, each row by its own parameters and random numbers.

Knows nothing of where the logits came from. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorauter.engine.plan import NOT_FINITE, RowStart
from lorauter.engine.types import SamplingParams

_MASK = (1 << 64) - 1
_FORBIDDEN = 1e6  # taken from a logit: more than any that a model makes, and the order among equals stays
_ANY, _NONE = -1, -2  # in place of a token: one that any other is equal to, and none


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for one token of an answer: that of `seed` at `index`, whatever came before.

    SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), of which float32 holds 24
    bits.
    """
    start = _mixed(seed & _MASK) ^ (_mixed((seed >> 64) & _MASK) if seed >> 64 > 0 else 0)
    return (_mixed((start + (index + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 40) / (1 << 24)


def _mixed(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Sampler:
    """Chooses the tokens of rows that do not simply take the model's likeliest.

    Args:
        rows: how many rows there are.
        vocabulary: how many tokens.
        device: of the logits.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._device = device
        self._starts: list[RowStart | None] = [None] * rows
        self._special: set[int] = set()  # rows that do not take the likeliest
        self._forbidden: dict[int, _Forbidden] = {}
        # Made when a row first needs them: (rows, vocabulary).
        self._counts: Tensor | None = None  # how often an answer has each token
        self._seen: Tensor | None = None  # whether prompt or answer has it
        self._bias: Tensor | None = None

    def start(self, start: RowStart) -> None:
        """A row begins to be used."""
        sampling = start.sampling
        self._starts[start.row] = start
        (self._special.discard if sampling.greedy else self._special.add)(start.row)
        self._forbidden.pop(start.row, None)
        if sampling.forbids:
            self._forbidden[start.row] = _Forbidden(start, self._vocabulary, self._device)
        if sampling.penalises:
            if self._counts is None or self._seen is None or self._bias is None:
                shape = len(self._starts), self._vocabulary
                self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
                self._bias = torch.zeros(shape, device=self._device)
            answer = self._ids(start.tokens[start.prompt :])
            self._counts[start.row] = 0
            self._counts[start.row].scatter_add_(0, answer, torch.ones_like(answer, dtype=torch.int32))
            self._seen[start.row] = False
            self._seen[start.row, self._ids(start.tokens)] = True
            self._bias[start.row] = 0
            if sampling.logit_bias:
                tokens, biases = zip(*sampling.logit_bias, strict=True)
                self._bias[start.row, self._ids(tokens)] = to_device(torch.tensor(biases).float(), self._device)

    def sampled(self, rows: Sequence[int]) -> list[int]:
        """Which of these rows, by their place, do not take the likeliest token."""
        return [place for place, row in enumerate(rows) if row in self._special] if self._special else []

    def choose(
        self, logits: Tensor, rows: Sequence[int], positions: Sequence[int], masks: Tensor | None = None
    ) -> Tensor:
        """A token for each of these rows, or NOT_FINITE.

        Args:
            logits: (n, vocabulary).
            rows: n rows.
            positions: n of them, where in their sequences the tokens will be.
            masks: (n, words) int32, the only tokens that may come, as `lorauter.engine.grammars` has them.

        Returns:
            (n,) int32.
        """
        starts = [start for row in rows if (start := self._starts[row]) is not None]
        logits = logits.to(torch.float32, copy=True)
        least, most = logits.aminmax(dim=-1)
        finite = least.isfinite() & most.isfinite()
        changed = [place for place, start in enumerate(starts) if start.sampling.penalises]
        own = self._ids([rows[place] for place in changed])
        if changed:
            where = self._ids(changed)
            logits[where] = self._change(logits[where], own, [starts[place].sampling for place in changed])
        if masks is not None:
            logits.masked_fill_(_forbidden(masks)[:, : self._vocabulary], -torch.inf)
        forbidden = [(place, self._forbidden[row]) for place, row in enumerate(rows) if row in self._forbidden]
        for place, tokens_of in forbidden:
            tokens_of.forbid(logits[place], positions[place] - starts[place].prompt)
        numbers = [uniform(s.seed, position - s.prompt) for s, position in zip(starts, positions, strict=True)]
        tokens = sample(logits, [start.sampling for start in starts], numbers)
        if changed and self._counts is not None and self._seen is not None:
            chosen = tokens[self._ids(changed)]
            self._counts[own, chosen] += 1
            self._seen[own, chosen] = True
        for place, tokens_of in forbidden:
            tokens_of.came(tokens[place])
        return tokens.where(finite, NOT_FINITE).int()

    def _change(self, logits: Tensor, rows: Tensor, sampling: Sequence[SamplingParams]) -> Tensor:
        """The logits of rows under their penalties and biases."""
        assert self._counts is not None
        assert self._seen is not None
        assert self._bias is not None
        repetition, frequency, presence = (
            to_device(torch.tensor(values).float()[:, None], self._device)
            for values in zip(
                *((s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in sampling), strict=True
            )
        )
        penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(self._seen[rows], penalised, logits)
        counts = self._counts[rows]
        return logits - frequency * counts - presence * (counts > 0) + self._bias[rows]

    def _ids(self, values: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.long), self._device)


def _forbidden(masks: Tensor) -> Tensor:
    """Where the bits of (n, words) int32 are 0, as (n, 32 * words) bool, the least of each word first."""
    one = torch.ones((), dtype=torch.int32, device=masks.device)
    bits = one << torch.arange(32, dtype=torch.int32, device=masks.device)
    return ((masks[:, :, None] & bits) == 0).flatten(1)


class _Forbidden:
    """The tokens that may not come next in a row's answer.

    Args:
        start: the row's, with `bad_words` as tokens.
        vocabulary: how many tokens there are.
        device: of the logits.
    """

    def __init__(self, start: RowStart, vocabulary: int, device: torch.device) -> None:
        def ids(values: Sequence[object]) -> Tensor:
            return to_device(torch.tensor(values, dtype=torch.long), device)

        sampling = start.sampling
        self._vocabulary = vocabulary
        self._least = sampling.min_tokens
        self._ends = ids(list(start.ends))
        self._others: Tensor | None = None  # than those that are allowed
        if sampling.allowed_token_ids:
            self._others = torch.ones(vocabulary, dtype=torch.bool, device=device)
            self._others[ids(sampling.allowed_token_ids)] = False
        words = [word for word in sampling.bad_words if isinstance(word, tuple)]
        self._lasts: Tensor | None = None  # (words,) the last token of each
        if words:
            most = max(map(len, words)) - 1
            self._lasts = ids([word[-1] for word in words])
            # (words, most): what has to be before it, as far as it is as long; and what is there.
            self._before = ids([[_ANY] * (most + 1 - len(word)) + list(word[:-1]) for word in words])
            answer = list(start.tokens[start.prompt :])
            self._there = ids(([_NONE] * most + answer)[len(answer) :])

    def forbid(self, logits: Tensor, index: int) -> None:
        """Forbid them in the logits (vocabulary,) of the answer's token at this index.

        Where all that something else has left is forbidden, these compete among themselves.
        """
        if self._others is not None:
            logits.masked_fill_(self._others, -torch.inf)
        if index < self._least:
            logits[self._ends] -= _FORBIDDEN
        if self._lasts is not None:
            complete = ((self._before == self._there) | (self._before == _ANY)).all(dim=-1)
            banned = torch.zeros(self._vocabulary + 1, device=logits.device)
            banned[self._lasts.where(complete, self._vocabulary)] = _FORBIDDEN
            logits -= banned[:-1]

    def came(self, token: Tensor) -> None:
        """The answer's next token, () int64."""
        if self._lasts is not None:
            self._there = torch.cat((self._there, token[None]))[1:]


def sample(logits: Tensor, sampling: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Choose one token a row.

    A row with temperature 0 takes its likeliest token. Any other takes the token at which the cumulated probability
    of those that may be chosen passes the row's own uniform number: in the order of the vocabulary, or from the
    likeliest down where `top_p` or `top_k` need that. The choice depends on the row's logits, parameters and number
    alone, not on what else is in the batch.

    Args:
        logits: (n, vocabulary) float32, finite, or -inf for tokens that may not come, which some of each row are not.
        sampling: n of them.
        uniforms: n of them, in [0, 1).

    Returns:
        (n,) int64 on the logits' device.
    """
    tokens = logits.argmax(dim=-1)
    random = [place for place, s in enumerate(sampling) if s.temperature > 0]
    ranked = [place for place in random if sampling[place].top_p < 1 or sampling[place].top_k]
    for places, choose in ((ranked, _choose_ranked), (sorted({*random} - {*ranked}), _choose)):
        if places:
            where = to_device(torch.tensor(places), logits.device)
            chosen = [sampling[place] for place in places]
            # The least numbers that a float64 holds are 0 as float32, hence `clamp_min`.
            temperatures = _column([s.temperature for s in chosen], logits).clamp_min(torch.finfo(torch.float32).tiny)
            some = logits[where]
            chances = ((some - some.amax(dim=-1, keepdim=True)) / temperatures).softmax(dim=-1)
            least = _column([s.min_p for s in chosen], logits) * chances.amax(dim=-1, keepdim=True)
            chances = chances.where(chances >= least, 0)
            tokens[where] = choose(chances, chosen, _column([uniforms[place] for place in places], logits))
    return tokens


def _choose(chances: Tensor, sampling: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    cumulated = chances.cumsum(dim=-1)
    place = torch.searchsorted(cumulated, uniforms * cumulated[:, -1:], right=True)[:, 0]
    return place.where(place < chances.shape[1], chances.argmax(dim=-1))


def _choose_ranked(chances: Tensor, sampling: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    chances, ids = chances.sort(dim=-1, descending=True, stable=True)
    total = chances.sum(dim=-1, keepdim=True)
    cumulated = chances.cumsum(dim=-1)
    # The nucleus: the tokens before which less than top_p is spent; never less than one.
    top_p = _column([s.top_p for s in sampling], chances).clamp_min(torch.finfo(torch.float32).tiny)
    top_k = _column([min(s.top_k, chances.shape[1]) or chances.shape[1] for s in sampling], chances)
    nucleus = (cumulated - chances < top_p * total).sum(dim=-1, keepdim=True)
    nucleus = nucleus.minimum(top_k.long()).minimum((chances > 0).sum(dim=-1, keepdim=True)).clamp_min(1)
    mass = cumulated.gather(-1, nucleus - 1)
    place = torch.searchsorted(cumulated, uniforms * mass, right=True).minimum(nucleus - 1)
    return ids.gather(-1, place)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return to_device(torch.tensor(values).float()[:, None], like.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
