"""Starts the engine that the settings of a service or of a batch job describe, and makes adapters ready for it.

Knows nothing of Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lorauter.adapters import LoraWeights
from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine import EngineConfig, MultiLoraEngine, load_engine
from lorauter.engine.slots import PackedAdapter

logger = logging.getLogger("lorauter.model")


def start_engine(base_model: str, aliases: Sequence[str], config: EngineConfig) -> MultiLoraEngine:
    """Load a base model by its setting's value, and start an engine on it. Raises ConfigError."""
    return load_engine(resolve_model(base_model), config, aliases=(*aliases, *base_model_aliases(base_model)))


class Packing:
    """Makes adapters ready for an engine, and says once of each in the log what of it has no effect or is not there."""

    def __init__(self, engine: MultiLoraEngine) -> None:
        self._engine = engine
        self._told: set[tuple[str, str]] = set()

    def __call__(self, weights: LoraWeights) -> PackedAdapter:
        """The adapter, packed. Raises AdapterRejected."""
        if weights.key not in self._told:
            self._told.add(weights.key)
            missing = weights.check_fits(self._engine.slots.shape, max_rank=self._engine.config.max_rank)
            for warning in (*weights.warnings, *missing):
                logger.warning("adapter %r: %s", weights.name, warning)
        return self._engine.pack(weights)
