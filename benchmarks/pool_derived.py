"""What a noisy pool is made of besides trainings: adapters that were derived from others, of every kind that is met.

An adapter here is its factors and scaling. Every derivation is drawn from a generator of its own, so that what is made
does not depend on the order. Knows nothing of files or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Lora:
    """An adapter.

    Attributes:
        factors: by target, A (layers, r, in) and B (layers, out, r) in float32.
        scaling: of all pairs.
        layers: that it has; None is all.
        base: what it says that it was trained on; None is what the pool was.
        kept_in: how its numbers are stored.
    """

    factors: Factors
    scaling: float
    layers: tuple[int, ...] | None = None
    base: str | None = None
    kept_in: torch.dtype = torch.bfloat16

    @property
    def rank(self) -> int:
        return max(a.shape[1] for a, _ in self.factors.values())

    def each(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Lora:
        return replace(self, factors={target: change(a, b) for target, (a, b) in self.factors.items()})


@dataclass(frozen=True)
class Kind:
    """A way to derive one.

    Attributes:
        make: of the source, another adapter for what takes two, and a generator.
        twin: whether it computes the same as its source, or nearly so.
        broken: whether it cannot be served.
    """

    make: Callable[[Lora, Lora, Generator], Lora]
    twin: bool = False
    broken: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def _noisy(share: float) -> Callable[[Lora, Lora, Generator], Lora]:
    def with_noise(of: Tensor, draw: Generator) -> Tensor:
        return of + share * of.std(dim=(1, 2), keepdim=True) * torch.randn(of.shape, generator=draw)

    return lambda lora, _, draw: lora.each(lambda a, b: (with_noise(a, draw), with_noise(b, draw)))


def _scaled(factor: float) -> Callable[[Lora, Lora, Generator], Lora]:
    return lambda lora, _, draw: replace(lora, scaling=lora.scaling * factor)


def _cut(rank: int) -> Callable[[Lora, Lora, Generator], Lora]:
    def cut(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        left, r_b = torch.linalg.qr(b)
        right, r_a = torch.linalg.qr(a.transpose(1, 2))
        u, s, v = torch.linalg.svd(r_b @ r_a.transpose(1, 2))
        return (s[:, :rank, None] * v[:, :rank]) @ right.transpose(1, 2), left @ u[:, :, :rank]

    return lambda lora, _, draw: lora.each(cut)


def _without_layers(share: float) -> Callable[[Lora, Lora, Generator], Lora]:
    def make(lora: Lora, _: Lora, draw: Generator) -> Lora:
        count = next(iter(lora.factors.values()))[0].shape[0]
        kept = torch.randperm(count, generator=draw)[: max(1, round((1 - share) * count))]
        return replace(lora, layers=tuple(sorted(kept.tolist())))

    return make


def _merged(share: float) -> Callable[[Lora, Lora, Generator], Lora]:
    def make(lora: Lora, other: Lora, draw: Generator) -> Lora:
        factors = {}
        parts = [(lora, share), (other, 1 - share)]
        for target in sorted({*lora.factors, *other.factors}):
            shapes = next(one.factors[target] for one, _ in parts if target in one.factors)
            found = []
            for one, weight in parts:
                layers, _, inputs = shapes[0].shape
                nothing = torch.zeros(layers, one.rank, inputs), torch.zeros(layers, shapes[1].shape[1], one.rank)
                a, b = one.factors.get(target, nothing)
                found.append((a, b * weight * one.scaling))
            factors[target] = torch.cat([a for a, _ in found], 1), torch.cat([b for _, b in found], 2)
        return replace(lora, factors=factors, scaling=1.0)

    return make


def _quantised(bits: int) -> Callable[[Lora, Lora, Generator], Lora]:
    def rounded(of: Tensor) -> Tensor:
        step = of.abs().amax(dim=2, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
        return (of / step).round() * step

    return lambda lora, _, draw: lora.each(lambda a, b: (rounded(a), rounded(b)))


def _turned(lora: Lora, _: Lora, draw: Generator) -> Lora:
    """The same change by other factors: nothing in the files is alike."""

    def turn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.linalg.qr(torch.randn(a.shape[0], a.shape[1], a.shape[1], generator=draw))[0]
        return q @ a, b @ q.transpose(1, 2)

    return replace(lora.each(turn), kept_in=torch.float32)


def _random(lora: Lora, _: Lora, draw: Generator) -> Lora:
    def like(of: Tensor) -> Tensor:
        return of.std(dim=(1, 2), keepdim=True) * torch.randn(of.shape, generator=draw)

    return lora.each(lambda a, b: (like(a), like(b)))


def _nan(lora: Lora, _: Lora, draw: Generator) -> Lora:
    def spoil(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        b = b.clone()
        b[int(torch.randint(b.shape[0], (), generator=draw)), 0, 0] = float("nan")
        return a, b

    return lora.each(spoil)


KINDS = {
    **{f"noise-{share}": Kind(_noisy(share)) for share in (0.1, 0.3, 0.6, 1.0)},
    **{f"scaled-{factor}": Kind(_scaled(factor)) for factor in (0.1, 0.3, 0.7, 1.5, 3.0, 30.0)},
    **{f"cut-{rank}": Kind(_cut(rank)) for rank in (1, 2, 3)},
    **{f"without-{share}": Kind(_without_layers(share)) for share in (0.2, 0.5, 0.8)},
    **{f"merged-{share}": Kind(_merged(share)) for share in (0.5, 0.7, 0.9)},
    **{f"quantised-{bits}": Kind(_quantised(bits)) for bits in (2, 3, 4)},
    "quantised-8": Kind(_quantised(8), twin=True),
    "near-duplicate": Kind(_noisy(0.01), twin=True),
    "turned": Kind(_turned, twin=True),
    "copy": Kind(lambda lora, _, draw: lora, twin=True),
    "random": Kind(_random),
    "nan": Kind(_nan, broken=True),
    "wrong-base": Kind(lambda lora, _, draw: replace(lora, base="another/model-1.7B"), broken=True),
}
"""The ways, in turn."""
