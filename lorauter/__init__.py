"""lorauter: routes every query to a weighted mixture of LoRA adapters, and answers it.

Importing the package loads nothing heavy; each public name is loaded on first use, so that the engine runs
on a machine without FAISS and sentence-transformers, and the routing without a language model. It sets how OpenMP's
threads wait, unless the environment says so already: that is read once, when PyTorch is loaded.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorauter.catalog import Catalog
    from lorauter.errors import LorauterError
    from lorauter.routing import Router, RoutingConfig, RoutingDecision, RoutingOptions

__version__ = "0.1.0"
__all__ = ["Catalog", "LorauterError", "Router", "RoutingConfig", "RoutingDecision", "RoutingOptions"]

# An engine's step is hundreds of short parallel pieces. Between them OpenMP puts threads to sleep at once where it
# counts more of them than CPUs, and it counts those of every thread that ever computed: waking them took a fifth of the
# time. So they look for work a moment, some microseconds by GNU's counting, and then sleep.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "active"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # milliseconds: LLVM's and Intel's OpenMP would never sleep

_HOMES = {"Catalog": "lorauter.catalog", "LorauterError": "lorauter.errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorauter' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "lorauter.routing")), name)
