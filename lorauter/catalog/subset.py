"""Some of a catalog's tasks, searched as if the others were not there, in time for those alone."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray


class TaskSubset:
    """A subset, made once for many searches.

    Args:
        mask: (tasks,) bool: which of them, in the catalog's order.
    """

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self.size = int(mask.sum())
        bits = np.packbits(mask, bitorder="little")
        self.search = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))  # type: ignore[call-arg,arg-type]
