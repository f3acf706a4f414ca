"""Keys and values of the running sequences, one row a sequence.

Rows 0..n-1 are in use; the engine keeps them dense by moving the last row into a hole, so that a batch is a
slice and attention copies nothing. Knows nothing of requests.
"""

from __future__ import annotations

import torch


class KVCache:
    """Room for `rows` sequences of `length` positions.

    Attributes:
        keys, values: (layers, rows, kv_heads, length, head_dim). Memory is touched only as it is written.
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, rows, kv_heads, length, head_dim)
        # zeros, not empty: masked positions are multiplied by 0, and 0 times a stray NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Positions in a row."""
        return self.keys.shape[3]

    def clear(self, row: int, length: int) -> None:
        """Zero the first `length` positions of a row: NaN or infinity in them would reach the row's next sequence."""
        for tensor in (self.keys, self.values):
            tensor[:, row, :, :length] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` to row `target`."""
        for tensor in (self.keys, self.values):
            tensor[:, target, :, :length] = tensor[:, source, :, :length]
