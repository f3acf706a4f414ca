"""The engine's sizes. Validated values, no logic."""

from __future__ import annotations

from dataclasses import dataclass

from lorauter.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """The engine's sizes.

    Attributes:
        max_batch: sequences that run at once.
        max_model_len: positions a sequence may take, prompt and answer together; the model's own limit bounds it.
        max_queue: requests that may wait, beside those that run.
        prefill_tokens: prompt tokens processed in one step at most.
        max_rank: the largest adapter rank served.
        max_slowdown: a request is refused if it would take more than this many times as long as alone; None refuses
            by `max_queue` only.
        adapter_bytes: bytes of adapters resident on the device at most; None takes a quarter of what is free on a
            GPU once the model and the cache are there, and 1 GiB on a CPU.
    """

    max_batch: int = 16
    max_model_len: int = 2048
    max_queue: int = 256
    prefill_tokens: int = 512
    max_rank: int = 128
    adapter_bytes: int | None = None
    max_slowdown: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ConfigError(f"engine.{name} is {value}; it must be at least 1", setting=f"engine.{name}")
