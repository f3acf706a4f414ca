"""Starts the engine that the settings of a service or of a batch job describe, and makes adapters ready for it.

Knows nothing of Ray.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from lorauter.adapters import LocalAdapter
from lorauter.defaults import DEFAULT, base_model_aliases, resolve_model
from lorauter.engine import EngineConfig
from lorauter.engine.engine import Engine
from lorauter.engine.messages import Adapter
from lorauter.engine.process import load_in_process

logger = logging.getLogger("lorauter.model")


def start_engine(base_model: str, aliases: Sequence[str], config: EngineConfig) -> Engine:
    """Load a base model by its setting's value in a process of its own, and start an engine on it.

    From then on this process ends where that one does: whoever waits for it is to hear that at once, and asks another.

    Raises:
        ConfigError: the settings are wrong.
    """
    aliases = (*aliases, *base_model_aliases(base_model))
    if base_model == DEFAULT and config.tool_format == "auto":  # its template knows no tools
        config = replace(config, tool_format="hermes")
    return load_in_process(resolve_model(base_model), config, aliases=aliases, ended=_end)


def _end(how: str) -> None:
    logger.critical("%s, and its replica ends with it", how)
    logging.shutdown()
    os._exit(1)


class Reading:
    """Makes adapters ready for an engine, and says once of each in the log what of it has no effect or is not there."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._told: set[tuple[str, str]] = set()

    def __call__(self, local: LocalAdapter) -> Adapter:
        """The adapter. Raises AdapterRejected."""
        key = local.key
        adapter, warnings = self._engine.read(local.path, name=key.name, version=key.version)
        if key not in self._told:
            self._told.add(key)
            for warning in warnings:
                logger.warning("adapter %r: %s", key.name, warning)
        return adapter
