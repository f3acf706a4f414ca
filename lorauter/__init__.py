"""lorauter: routes every query to a weighted mixture of LoRA adapters, and answers it.

Importing the package loads nothing heavy; each public name is loaded on first use, so that the engine runs
on a machine without FAISS and sentence-transformers, and the routing without a language model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorauter.catalog import Catalog
    from lorauter.errors import LorauterError
    from lorauter.routing import Router, RoutingConfig, RoutingDecision, RoutingOptions

__version__ = "0.1.0"
__all__ = ["Catalog", "LorauterError", "Router", "RoutingConfig", "RoutingDecision", "RoutingOptions"]

_HOMES = {"Catalog": "lorauter.catalog", "LorauterError": "lorauter.errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorauter' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "lorauter.routing")), name)
