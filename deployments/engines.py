"""Starts the engine that the settings of a service or of a batch job describe. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.config import EngineSettings
from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine import EngineConfig, MultiLoraEngine, load_engine


def start_engine(base_model: str, aliases: Sequence[str], settings: EngineSettings) -> MultiLoraEngine:
    """Load a base model by its setting's value, and start an engine on it. Raises ConfigError."""
    return load_engine(
        resolve_model(base_model),
        EngineConfig(
            max_batch=settings.max_batch,
            max_model_len=settings.max_model_len,
            max_queue=settings.max_queue,
            prefill_tokens=settings.prefill_tokens,
            max_rank=settings.max_rank,
            adapter_bytes=settings.adapter_bytes,
            max_slowdown=settings.max_slowdown,
        ),
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        aliases=(*aliases, *base_model_aliases(base_model)),
    )
