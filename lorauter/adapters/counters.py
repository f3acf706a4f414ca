"""What a tier of adapters in memory counts. Every tier counts the same, so that they can be compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TierCounters:
    """What a tier has done. An adapter that is wanted and there is a hit; times in seconds."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
