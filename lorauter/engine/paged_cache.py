"""Keys and values of all sequences, in blocks. Knows nothing of who has which block."""

from __future__ import annotations

import torch

from lorauter.engine.blocks import BLOCK


class PagedCache:
    """Room for `blocks` blocks beside block 0, which is for padding.

    Args:
        shared: all layers have the same room, in place of each its own: for what no later step reads.

    Attributes:
        keys, values: (layers, blocks + 1, kv_heads, BLOCK, head_dim). On a CPU memory is touched only as it is written.
    """

    def __init__(
        self,
        *,
        layers: int,
        blocks: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        shared: bool = False,
    ) -> None:
        shape = (1 if shared else layers, blocks + 1, kv_heads, BLOCK, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device).expand(layers, *shape[1:])
        self.values = torch.zeros(shape, dtype=dtype, device=device).expand(layers, *shape[1:])

    @property
    def blocks(self) -> int:
        """How many blocks there are beside block 0."""
        return self.keys.shape[1] - 1

    @staticmethod
    def block_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block's keys and values in all layers."""
        return 2 * layers * kv_heads * BLOCK * head_dim * dtype.itemsize
