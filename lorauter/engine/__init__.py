"""The multi-LoRA engine. Needs torch, transformers and safetensors, and nothing heavier."""

from lorauter.engine.config import EngineConfig
from lorauter.engine.engine import MultiLoraEngine
from lorauter.engine.feed import Outcome, feed
from lorauter.engine.load import load_engine
from lorauter.engine.types import Chunk, Completion, EchoEngine, Engine, GenerationRequest, SamplingParams

__all__ = [
    "Chunk",
    "Completion",
    "EchoEngine",
    "Engine",
    "EngineConfig",
    "GenerationRequest",
    "MultiLoraEngine",
    "Outcome",
    "SamplingParams",
    "feed",
    "load_engine",
]
