"""A forward pass in which every token picks its adapters anew in every layer and target.

The scores of Arrow and SpectR are both the length of a projection of the layer's input, so one product of the input
with all adapters' projections gives all scores; the top k, softmaxed, become the mask of the engine's own mixture.
Knows tensors and layers; knows nothing of prompts or generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lorauter.adapters.weights import LoraWeights
from lorauter.engine.model import Decoder
from lorauter.engine.slots import Group, groups_of
from lorauter.engine.step import Step, StepBatch, StepClass


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
class Columns:
    """The rank columns of a pool in T targets with the same input, those of a target one adapter after another.

    Attributes:
        a: (layers, C, in).
        bs: of each target, (layers, its columns, out), with the scaling in it.
        owners: (C,) int64, the target and adapter (in T * n) of each column.
    """

    a: Tensor
    bs: Sequence[Tensor]
    owners: Tensor

    def add(self, layer: int, x: Tensor, y: Tensor, mask: Tensor) -> None:
        """Add `((x A^T) * mask) B` to `y`, (tokens, sum of out); mask is (tokens, C)."""
        mixed = (x @ self.a[layer].T) * mask
        begin = offset = 0
        for b in self.bs:
            end, width = begin + b.shape[1], b.shape[2]
            y[:, offset : offset + width].addmm_(mixed[:, begin:end], b[layer])
            begin, offset = end, offset + width


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
        columns: all rank columns.
    """

    router: TokenRouter
    rows: Tensor
    segments: Tensor
    changed: Tensor
    columns: Columns

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
        mask = self.weights(layer, x, allowed).flatten(1)[:, self.columns.owners].to(x.dtype)
        self.columns.add(layer, x, y, mask)


@dataclass(frozen=True, kw_only=True)
class RoutedBatch(StepBatch):
    """One forward pass whose tokens are routed.

    Attributes:
        allowed: (n tokens, n adapters) bool, which adapters each token may get.
    """

    allowed: Tensor


class RoutedStep:
    """`add_lora` by routing; the rest is the device's own step, which `on` puts behind this class."""

    routers: ClassVar[Mapping[str, GroupRouter]]
    _batch: StepBatch

    def begin_lora(self, layer: int, first: str, x: Tensor) -> None:
        """Nothing can be done beside the base product: the weights are not known yet."""

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """See `Step.add_lora`."""
        assert isinstance(self._batch, RoutedBatch)
        if first in self.routers:
            self.routers[first].add(layer, x, y, self._batch.allowed)

    @classmethod
    def on(cls, base: StepClass, routers: Mapping[str, GroupRouter]) -> StepClass:
        """This class over a device's step, with its routers."""
        assert isinstance(base, type)
        routed: type[Step] = type(cls.__name__, (cls, base), {"routers": routers})
        return routed


def group_routers(decoder: Decoder, adapters: Sequence[LoraWeights], router: TokenRouter) -> dict[str, GroupRouter]:
    """The routers over a pool, by the first of the targets with the same input; those that some adapter changes.

    Raises:
        AdapterRejected: an adapter does not fit the model.
    """
    for weights in adapters:
        weights.check_fits(decoder.shape, max_rank=weights.rank)
    changed = {target for weights in adapters for _, target in weights.tensors}
    return {
        group.first: _group_router(group, decoder, adapters, router)
        for group in groups_of(decoder.shape)
        if changed & {*group.targets}
    }


def _group_router(group: Group, decoder: Decoder, adapters: Sequence[LoraWeights], router: TokenRouter) -> GroupRouter:
    layers, device, n = decoder.shape.layers, decoder.device, len(adapters)
    changed = torch.zeros(layers, len(group.targets), n, dtype=torch.bool)
    rows: list[Tensor] = []
    owners: list[int] = []
    a: list[Tensor] = []
    bs: list[Tensor] = []
    columns: list[int] = []
    for t, target in enumerate(group.targets):
        b: list[Tensor] = [torch.zeros(layers, 0, group.widths[t])]
        for k, weights in enumerate(adapters):
            own = {layer: pair for (layer, name), pair in weights.tensors.items() if name == target}
            if not own:
                continue
            changed[list(own), t, k] = True
            # Rows of 0 make up for lower ranks and for layers that the adapter lacks: they add no length.
            projections = {layer: router.rows(*pair) for layer, pair in own.items()}
            rows.append(_padded(projections, layers))
            owners += [t * n + k] * rows[-1].shape[1]
            a.append(_padded({layer: pair[0] for layer, pair in own.items()}, layers))
            b.append(_padded({layer: pair[1].T for layer, pair in own.items()}, layers))
            columns += [t * n + k] * a[-1].shape[1]
        bs.append(torch.cat(b, dim=1).to(device, decoder.dtype))
    segments = torch.nn.functional.one_hot(torch.tensor(owners), len(group.targets) * n).float()
    return GroupRouter(
        router,
        rows=torch.cat(rows, dim=1).to(device),
        segments=segments.to(device),
        changed=changed.to(device),
        columns=Columns(torch.cat(a, dim=1).to(device, decoder.dtype), bs, torch.tensor(columns, device=device)),
    )


def _padded(matrices: Mapping[int, Tensor], layers: int) -> Tensor:
    """(rows, width) of some layers as (layers, most rows, width) float32, filled up with 0."""
    block = torch.zeros(layers, max(map(len, matrices.values())), next(iter(matrices.values())).shape[1])
    for layer, matrix in matrices.items():
        block[layer, : len(matrix)] = matrix
    return block
