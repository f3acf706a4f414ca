"""A forward pass in which every token picks its adapters anew in every layer and target.

The scores of Arrow and SpectR are both the length of a projection of the layer's input, so one product of the input
with all adapters' projections gives all scores; the top k, softmaxed, become the mask of the engine's own mixture.
Knows tensors and layers; knows nothing of prompts or generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lorauter.adapters.weights import LoraWeights
from lorauter.engine.lora import GroupMixture, mix
from lorauter.engine.model import Decoder, StepBatch
from lorauter.engine.slots import AdapterSlots
from lorauter.engine.stacks import StackGroup, make_groups
from lorauter.engine.torch_step import TorchStep


class TokenRouter(Protocol):
    """How adapters are scored for a token."""

    @property
    def top_k(self) -> int:
        """How many adapters a token gets at most, at least 1."""

    @property
    def temperature(self) -> float:
        """Of the softmax over the best scores, above 0."""

    def rows(self, a: Tensor, b: Tensor) -> Tensor:
        """The projection P, (p, in) float32, by which an adapter's score for the input x is the length of P x.

        Args:
            a: (r, in), the adapter's A in one layer and target.
            b: (out, r), its B with the scaling in it.
        """


@dataclass(frozen=True)
class GroupRouter:
    """Routes tokens in T targets with the same input, over n adapters.

    Candidates in a target are the adapters that change it in this layer and are allowed to the token; where there is
    none, the base model answers. So in a pool of mixed target modules the weights sum to 1 (or are all 0) in every
    target by itself.

    Attributes:
        router: top_k and temperature.
        rows: (layers, R, in) float32, the projections of all adapters in all these targets.
        segments: (R, T * n) float32, 1 where a projection's row belongs to a target and adapter.
        changed: (layers, T, n) bool, what each adapter changes.
        columns: (C,) int64, the target and adapter (in T * n) of each rank column.
        mixture: all rank columns; its mask is given with each call.
    """

    router: TokenRouter
    rows: Tensor
    segments: Tensor
    changed: Tensor
    columns: Tensor
    mixture: GroupMixture

    def weights(self, layer: int, x: Tensor, allowed: Tensor) -> Tensor:
        """Every token's weight of every adapter, (tokens, T, n) float32.

        Args:
            layer: which.
            x: (tokens, in), the targets' input.
            allowed: (tokens, n) bool.
        """
        # In float32, as Arrow's authors route: the model's dtype would change near ties.
        projected = x.float() @ self.rows[layer].T
        scores = (projected.square() @ self.segments).sqrt().view(len(x), *self.changed.shape[1:])
        scores.masked_fill_(~(allowed[:, None] & self.changed[layer]), -torch.inf)
        best, places = scores.topk(min(self.router.top_k, scores.shape[2]), dim=2)
        # Softmax of nothing but -inf is NaN: no candidate, no change.
        weights = torch.softmax(best / self.router.temperature, dim=2).nan_to_num()
        return torch.zeros_like(scores).scatter_(2, places, weights)

    def add(self, layer: int, x: Tensor, y: Tensor, allowed: Tensor) -> None:
        """Add `sum_k w_k s_k B_k A_k x` to `y`, (tokens, sum of out), each token by its own `weights`."""
        mask = self.weights(layer, x, allowed).flatten(1)[:, self.columns].to(x.dtype)
        replace(self.mixture, mask=mask).add(layer, x, y)


@dataclass(frozen=True, kw_only=True)
class RoutedBatch(StepBatch):
    """One forward pass whose tokens are routed.

    Attributes:
        allowed: (n tokens, n adapters) bool, which adapters each token may get.
    """

    allowed: Tensor


class RoutedStep(TorchStep):
    """`add_lora` by routing; the rest is the device's own step, which `routed` puts behind this class."""

    routers: ClassVar[Mapping[str, GroupRouter]]

    def begin_lora(self, layer: int, first: str, x: Tensor) -> None:
        """Nothing can be done beside the base product: the weights are not known yet."""

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """See `TorchStep.add_lora`."""
        assert isinstance(self._batch, RoutedBatch)
        if first in self.routers:
            self.routers[first].add(layer, x, y, self._batch.allowed)

    @classmethod
    def on(cls, base: type[TorchStep], routers: Mapping[str, GroupRouter]) -> type[TorchStep]:
        """This class over a device's step, with its routers."""
        return type(cls.__name__, (cls, base), {"routers": routers})


def group_routers(decoder: Decoder, adapters: Sequence[LoraWeights], router: TokenRouter) -> dict[str, GroupRouter]:
    """The routers over a pool, by the first of the targets with the same input; those that some adapter changes.

    Raises:
        AdapterRejected: an adapter does not fit the model.
    """
    shape, dtype, device = decoder.shape, decoder.dtype, decoder.device
    # These slots hold nothing: they check adapters, and lay them out as the stacks take them.
    slots = AdapterSlots(
        shape, budget_bytes=0, max_rank=max(weights.rank for weights in adapters), dtype=dtype, device=device
    )
    groups = make_groups(shape, dtype, device)
    packed = [slots.pack(weights).stacks for weights in adapters]
    for target, stack in ((target, stack) for group in groups for target, stack in group.stacks.items()):
        pairs = {slot: stacks[target] for slot, stacks in enumerate(packed, start=1) if target in stacks}
        stack.resize(sum(a.shape[1] for a, _ in pairs.values()))
        for slot, (a, b) in pairs.items():
            stack.write(slot, a, b)
    mixtures = mix(groups, torch.ones(1, len(adapters) + 1), 0, torch.arange(len(adapters) + 1)).groups
    firsts = {next(iter(group.stacks)): group for group in groups}
    return {first: _group_router(firsts[first], mixture, adapters, router) for first, mixture in mixtures.items()}


def _group_router(
    group: StackGroup, mixture: GroupMixture, adapters: Sequence[LoraWeights], router: TokenRouter
) -> GroupRouter:
    (layers, _, inputs), device, n = group.a.shape, group.a.device, len(adapters)
    changed = torch.zeros(layers, len(group.stacks), n, dtype=torch.bool)
    rows: list[Tensor] = []
    owners: list[int] = []
    for t, target in enumerate(group.stacks):
        for k, weights in enumerate(adapters):
            own = {layer: router.rows(*pair) for (layer, name), pair in weights.tensors.items() if name == target}
            if own:
                # Rows of 0 make up for lower ranks and for layers that the adapter lacks: they add no length.
                block = torch.zeros(layers, max(len(projection) for projection in own.values()), inputs)
                for layer, projection in own.items():
                    block[layer, : len(projection)] = projection
                changed[list(own), t, k] = True
                rows.append(block)
                owners += [t * n + k] * block.shape[1]
    columns = [t * n + stack.owner - 1 for t, stack in enumerate(group.stacks.values())]
    segments = torch.nn.functional.one_hot(torch.tensor(owners), len(group.stacks) * n).float()
    return GroupRouter(
        router,
        rows=torch.cat(rows, dim=1).to(device),
        segments=segments.to(device),
        changed=changed.to(device),
        columns=torch.cat(columns).to(device),
        mixture=mixture,
    )
