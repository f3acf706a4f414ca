"""Processes that may not outlive who has started them. Knows nothing of what they do."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def end_with_parent(parent: int, by: signal.Signals) -> None:
    """Have the system end this process, by a signal, with its parent, whatever it is busy with then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, by)
    if os.getppid() != parent:  # it was faster
        os._exit(1)
