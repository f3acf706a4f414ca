"""The formulas of docs/sizing.md, and the tables in it.

    python benchmarks/sizing.py     # prints the tables as they stand in docs/sizing.md

Sizes are bytes of bf16 unless said otherwise. tests/infra/test_sizing.py holds the formulas against what the engine
itself allocates, and the page against what this prints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ITEM = 2  # bytes of a bf16 number
BLOCK = 16  # positions of a cache block
GRAPHS = 3 << 29  # bytes that are left to a GPU's graphs and libraries
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    """A base model's shape."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """in and out of each target."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


EIGHT_B = Model("8B", 32, 4096, 14336, 32, 8, 128, 128256, tied=False)
SMOL = Model("135M", 30, 576, 1536, 9, 3, 64, 49152, tied=True)


def weight_bytes(model: Model, *, item: int = ITEM) -> int:
    """The base model: tables, linear layers, norms (Llama's; biases and norms of q and k would add next to nothing)."""
    tables = (1 if model.tied else 2) * model.vocabulary * model.hidden
    layer = sum(a * b for a, b in model.linears.values()) + 2 * model.hidden
    return (tables + model.layers * layer + model.hidden) * item


def adapter_bytes(model: Model, rank: int, targets: Sequence[str] = ATTENTION, *, item: int = ITEM) -> int:
    """One adapter, on the device as in host memory: rank columns of A and of B, for every target and layer."""
    return rank * model.layers * sum(sum(model.linears[target]) for target in targets) * item


def kv_bytes(model: Model, positions: int, *, item: int = ITEM) -> int:
    """The cache of keys and values, in blocks, and one block for padding."""
    blocks = math.ceil(positions / BLOCK) + 1
    return 2 * model.layers * blocks * BLOCK * model.kv_heads * model.head_dim * item


def default_adapter_budget(gpu_bytes: int, model: Model) -> int:
    """What `adapter_bytes: null` takes of a GPU: a quarter of what the model leaves of it."""
    return (gpu_bytes - weight_bytes(model)) // 4


def default_positions(gpu_bytes: int, model: Model, step_bytes: int) -> int:
    """What `cache_bytes: null` has room for: nearly all that model, adapters, graphs and twice a step leave."""
    left = gpu_bytes - weight_bytes(model) - default_adapter_budget(gpu_bytes, model) - GRAPHS - 2 * step_bytes
    return int(left * 0.95) // (kv_bytes(model, BLOCK) - kv_bytes(model, 0)) * BLOCK


def slots(budget: int, one_adapter: int) -> int:
    """Adapters of one size that are resident at once; each begins at a multiple of 64 numbers."""
    return budget // (math.ceil(one_adapter / ITEM / 64) * 64 * ITEM)


def zipf_share(top: int, adapters: int, exponent: float = 1.0) -> float:
    """The share of requests for the `top` most wanted of all adapters, whose popularity falls as 1 / rank^exponent."""
    weights = [float(rank) ** -exponent for rank in range(1, adapters + 1)]
    return sum(weights[:top]) / sum(weights)


def replicas(requests_per_s: float, new_tokens: float, tokens_per_s: float, *, busy: float = 0.7) -> int:
    """Replicas of LoraModel, each `busy` of the time; above that queues grow faster than the load."""
    return max(1, math.ceil(requests_per_s * new_tokens / (tokens_per_s * busy)))


def concurrency(requests_per_s: float, new_tokens: float, tokens_per_s: float, batch: int) -> float:
    """Requests under way in one replica (Little's law): arrivals times the seconds that one takes in a full batch."""
    return requests_per_s * new_tokens * batch / tokens_per_s


def tables() -> dict[str, str]:
    """The page's tables, by name."""
    mib, gb = 2**20, 1e9
    adapters = ["| model | rank | targets | one adapter | 64 | 1,000 |", "| --- | --- | --- | --- | --- | --- |"]
    for model in (EIGHT_B, SMOL):
        for rank, targets, called in ((8, ATTENTION, "q, k, v, o"), (16, ATTENTION, "q, k, v, o"), (16, ALL, "all")):
            one = adapter_bytes(model, rank, targets)
            sizes = f"{one / mib:,.1f} MiB | {64 * one / gb:,.2f} GB | {1000 * one / gb:,.1f} GB"
            adapters.append(f"| {model.name} | {rank} | {called} | {sizes} |")
    room = [
        "| model, GPU | weights | adapters | slots | positions in the cache |",
        "| --- | --- | --- | --- | --- |",
    ]
    for model, card, size, step in (
        (EIGHT_B, "141 GB", 141e9, 10**9),
        (EIGHT_B, "80 GB", 80e9, 10**9),
        (EIGHT_B, "24 GB", 24e9, 10**9),
        (SMOL, "24 GB", 24e9, 3 * 10**8),
    ):
        budget = default_adapter_budget(int(size), model)
        cells = f"{weight_bytes(model) / gb:.2f} GB | {budget / gb:.2f} GB"
        fit, positions = slots(budget, adapter_bytes(model, 16)), default_positions(int(size), model, step)
        room.append(f"| {model.name}, {card} | {cells} | {fit:,} | {positions:,} |")
    shares = ["| resident | of 100 | of 500 | of 1,000 | of 5,000 |", "| --- | --- | --- | --- | --- |"]
    for top in (16, 64, 256):
        cells = " | ".join(f"{zipf_share(min(top, n), n):.0%}" for n in (100, 500, 1000, 5000))
        shares.append(f"| {top} | {cells} |")
    # docs/figures.md, the engine with a batch that stands still, and on CPU: tokens per second of whole requests.
    load = ["| replica | tokens/s | 5 requests/s | 50 requests/s | 200 requests/s |", "| --- | --- | --- | --- | --- |"]
    for called, speed, new in (
        ("8B, H100, batch 32", 3861, 128),
        ("8B, H100, batch 128", 9451, 128),
        ("135M, H100, batch 128", 54702, 128),
        ("135M, 2 CPU cores, batch 32", 326, 64),
    ):
        cells = " | ".join(f"{replicas(rate, new, speed):,}" for rate in (5, 50, 200))
        load.append(f"| {called}, {new} new tokens | {speed:,} | {cells} |")
    return {
        name: "\n".join(rows)
        for name, rows in {"adapters": adapters, "room": room, "shares": shares, "load": load}.items()
    }


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
