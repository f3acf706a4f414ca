"""Answers prompts with adapters that every token picks anew in every layer and target (Arrow, SpectR).

Greedy, on the engine's own decoder, cache and attention, on CPU or GPU; eager, without graphs. Knows token ids;
knows nothing of text, tasks or scores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorauter.adapters.weights import LoraWeights
from lorauter.engine.blocks import blocks_of
from lorauter.engine.model import Decoder
from lorauter.engine.runner import step_class
from lorauter.engine.sampling import to_device
from lorauter.engine.step import Span
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
        decoder: the base model.
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
        self._decoder = decoder
        self._step = RoutedStep.on(step_class(decoder), group_routers(decoder, adapters, router))

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
        """Continue all to their ends. Each has a row of the cache, whose blocks are the row's for good."""
        rows = min(self._max_batch, len(sequences))
        length = max(sequence.limit for sequence in sequences)
        memory = self._decoder.memory(blocks=rows * blocks_of(length), rows=rows, length=length)
        memory.table[:rows] = torch.arange(1, rows * blocks_of(length) + 1, device=memory.table.device).view(rows, -1)
        waiting, free = deque(sequences), list(range(rows))
        running: list[tuple[_Sequence, int]] = []
        while waiting or running:
            decoding, begun = len(running), 0
            while waiting and free and (not begun or begun + waiting[0].start < _PREFILL_TOKENS):
                begun += waiting[0].start
                running.append((waiting.popleft(), free.pop()))
            batch = self._batch(running, decoding, allowed)
            logits = self._decoder.forward(self._step(memory, batch), batch).float()
            if not logits.isfinite().all():
                raise InvalidRequest("the model's output is not finite under these adapters")
            for (sequence, _), token in zip(running, logits.argmax(dim=-1).tolist(), strict=True):
                sequence.tokens.append(token)
            ended = [self._has_ended(sequence) for sequence, _ in running]
            free += [row for (_, row), over in zip(running, ended, strict=True) if over]
            running = [one for one, over in zip(running, ended, strict=True) if not over]

    def _has_ended(self, sequence: _Sequence) -> bool:
        return sequence.tokens[-1] in self._eos_ids or len(sequence.tokens) >= sequence.limit

    def _batch(self, running: Sequence[tuple[_Sequence, int]], decoding: int, allowed: Tensor) -> RoutedBatch:
        """The last tokens of those that decode, and the prompts of the others."""
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        prompts: list[int] = []
        outputs: list[int] = []
        for i, (sequence, row) in enumerate(running):
            first = len(sequence.tokens) - 1 if i < decoding else 0
            tokens += sequence.tokens[first:]
            positions += range(first, len(sequence.tokens))
            rows += [row] * (len(sequence.tokens) - first)
            prompts += [sequence.prompt] * (len(sequence.tokens) - first)
            outputs.append(len(tokens) - 1)
        spans = [Span(row, 0, sequence.start) for sequence, row in running[decoding:]]

        def ids(values: list[int]) -> Tensor:
            return to_device(torch.tensor(values, dtype=torch.int32), self._decoder.device)

        return RoutedBatch(
            ids(tokens), ids(rows), ids(positions), decoding, spans, ids(outputs), allowed=allowed[ids(prompts)]
        )
