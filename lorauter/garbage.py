"""How a process that serves looks for garbage: seldom, and not among what it began with."""

from __future__ import annotations

import gc

_NEW = 10_000  # objects after which the new ones are looked at: a request makes hundreds, and hardly any are in cycles


def settle() -> None:
    """From now on what is here stays; to be called once a process is ready. Models and libraries are hundreds of
    thousands of objects, through which a collection would go while a request waits."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW, *gc.get_threshold()[1:])
