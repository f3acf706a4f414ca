"""The multi-LoRA engine. Needs torch, transformers and safetensors, and nothing heavier.

Each public name is loaded on first use: who only speaks of requests and answers needs none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorauter.engine.config import EngineConfig
    from lorauter.engine.load import load_engine
    from lorauter.engine.local import MultiLoraEngine
    from lorauter.engine.types import Chunk, Completion, GenerationRequest, SamplingParams

__all__ = [
    "Chunk",
    "Completion",
    "EngineConfig",
    "GenerationRequest",
    "MultiLoraEngine",
    "SamplingParams",
    "load_engine",
]

_HOMES = {"EngineConfig": "config", "MultiLoraEngine": "local", "load_engine": "load"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorauter.engine' has no attribute {name!r}")
    return getattr(import_module(f"lorauter.engine.{_HOMES.get(name, 'types')}"), name)
