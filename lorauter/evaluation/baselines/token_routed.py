"""Answers prompts with adapters that every token picks anew in every layer and target (Arrow, SpectR).

Greedy, on the engine's own decoder, cache and attention, on CPU or GPU; eager, without graphs. Knows token ids;
knows nothing of text, tasks or scores.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorauter.adapters.weights import LoraWeights
from lorauter.engine.kv_cache import KVCache
from lorauter.engine.model import Decoder, PrefillSpan
from lorauter.engine.stacks import to_device
from lorauter.errors import ContextLengthExceeded, InvalidRequest
from lorauter.evaluation.baselines.routed_step import RoutedBatch, RoutedStep, TokenRouter, group_routers

_PREFILL_TOKENS = 8192  # prompts begun in one step, which bounds its memory


@dataclass
class _Sequence:
    """A prompt and its answer so far."""

    prompt: int  # which
    tokens: list[int]
    start: int  # where the answer begins
    limit: int


class TokenRouted:
    """A pool of adapters, all on the device, from which every token is routed.

    Args:
        decoder: the base model. It is not changed: this works on a shallow copy, of the same weights, that has
            another step class.
        adapters: the pool, in the order of `generate`'s masks.
        router: `Arrow` or `SpectR`.
        eos_ids: tokens that end an answer.
        max_batch: prompts that run together.

    Raises:
        InvalidRequest: the pool is empty.
        AdapterRejected: an adapter does not fit the model.
    """

    def __init__(
        self,
        decoder: Decoder,
        adapters: Sequence[LoraWeights],
        router: TokenRouter,
        *,
        eos_ids: Collection[int] = (),
        max_batch: int = 32,
    ) -> None:
        if not adapters:
            raise InvalidRequest("there is no adapter to route to; give at least one", param="adapters")
        self.names = tuple(weights.name for weights in adapters)
        self._eos_ids = frozenset(eos_ids)
        self._max_batch = max_batch
        self._decoder = copy.copy(decoder)
        self._decoder._step = RoutedStep.on(decoder._step, group_routers(decoder, adapters, router))

    def generate(self, prompts: Sequence[Sequence[int]], allowed: Tensor, max_tokens: int) -> list[list[int]]:
        """Greedy answers, in the order of the prompts.

        Args:
            prompts: token ids.
            allowed: (prompts, adapters) bool, which adapters each prompt may use; none is the base model.
            max_tokens: a prompt's new tokens at most; the room left in the context bounds them too.

        Returns:
            New tokens of each prompt, with the one of `eos_ids` that ended it.

        Raises:
            InvalidRequest: a prompt is empty, `allowed` is not of that shape and type, max_tokens is below 1, or the
                model's output is not finite.
            ContextLengthExceeded: a prompt leaves no room for an answer.
        """
        wanted = (len(prompts), len(self.names))
        if tuple(allowed.shape) != wanted or allowed.dtype != torch.bool:
            raise InvalidRequest(
                f"allowed is {allowed.dtype} of shape {tuple(allowed.shape)}; it must be bool of {wanted}",
                param="allowed",
            )
        if not all(prompts) or max_tokens < 1:
            raise InvalidRequest("a prompt is empty or max_tokens below 1; at least 1 each is needed", param="prompts")
        context = self._decoder.max_positions
        longest = max(map(len, prompts), default=0)
        if longest >= context:
            raise ContextLengthExceeded(longest, context)
        sequences = [
            _Sequence(i, list(prompt), len(prompt), min(context, len(prompt) + max_tokens))
            for i, prompt in enumerate(prompts)
        ]
        if sequences:
            self._run(sequences, to_device(allowed.cpu(), self._decoder.device))
        return [sequence.tokens[sequence.start :] for sequence in sequences]

    def _run(self, sequences: Sequence[_Sequence], allowed: Tensor) -> None:
        """Continue all to their ends. The index in `rows` is the cache row; those that decode come first."""
        cache = self._new_cache(min(self._max_batch, len(sequences)), max(sequence.limit for sequence in sequences))
        waiting, rows = deque(sequences), list[_Sequence]()
        while waiting or rows:
            decoding, begun = len(rows), 0
            while waiting and len(rows) < self._max_batch and (not begun or begun + waiting[0].start < _PREFILL_TOKENS):
                begun += waiting[0].start
                rows.append(waiting.popleft())
            logits = self._decoder.forward(self._batch(rows, decoding, allowed), cache)
            if not logits.isfinite().all():
                raise InvalidRequest("the model's output is not finite under these adapters")
            for sequence, token in zip(rows, logits.argmax(dim=-1).tolist(), strict=True):
                sequence.tokens.append(token)
            for row in reversed(range(len(rows))):
                if rows[row].tokens[-1] in self._eos_ids or len(rows[row].tokens) >= rows[row].limit:
                    if row < len(rows) - 1:
                        cache.move(len(rows) - 1, row, len(rows[-1].tokens))
                        rows[row] = rows[-1]
                    rows.pop()

    def _batch(self, rows: Sequence[_Sequence], decoding: int, allowed: Tensor) -> RoutedBatch:
        """The last tokens of the rows that decode, and the prompts of the others."""
        tokens = [sequence.tokens[-1] for sequence in rows[:decoding]]
        positions = [len(sequence.tokens) - 1 for sequence in rows[:decoding]]
        prompts = [sequence.prompt for sequence in rows[:decoding]]
        outputs, spans = list(range(decoding)), []
        for row, sequence in enumerate(rows[decoding:], start=decoding):
            spans.append(PrefillSpan(row, 0, sequence.start))
            tokens += sequence.tokens
            positions += range(sequence.start)
            prompts += [sequence.prompt] * sequence.start
            outputs.append(len(tokens) - 1)

        def ids(values: list[int]) -> Tensor:
            return to_device(torch.tensor(values, dtype=torch.long), self._decoder.device)

        return RoutedBatch(ids(tokens), ids(positions), decoding, spans, ids(outputs), allowed=allowed[ids(prompts)])

    def _new_cache(self, rows: int, length: int) -> KVCache:
        decoder = self._decoder
        return KVCache(
            layers=decoder.shape.layers,
            rows=rows,
            kv_heads=decoder.kv_heads,
            length=length,
            head_dim=decoder.head_dim,
            dtype=decoder.dtype,
            device=decoder.device,
        )
