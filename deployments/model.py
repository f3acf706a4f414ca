"""LoraModel: the replicas that hold the base model and answer under mixtures of adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from ray import serve

from deployments.adapter_cache import CacheSpec, NodeCache
from deployments.calls import Admitted, GenerateCall, Prompt
from deployments.config import AppConfig
from deployments.host_adapters import HostAdapters
from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine import Chunk, EngineConfig, GenerationRequest, load_engine
from lorauter.engine.load import warm_up
from lorauter.errors import AdapterUnavailable, InvalidRequest


@serve.deployment(ray_actor_options={"num_cpus": 1}, health_check_period_s=5, graceful_shutdown_timeout_s=60)
class LoraModel:
    """One replica: an engine, and its tiers of adapters.

    Args:
        config: the app's configuration.
    """

    def __init__(self, config: AppConfig) -> None:
        settings = config.engine
        self._engine = load_engine(
            resolve_model(config.base_model),
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
            aliases=(*config.base_model_aliases, *base_model_aliases(config.base_model)),
        )
        warm_up(self._engine)
        self._adapter_wait_s = settings.adapter_wait_s
        self._adapters = HostAdapters(
            NodeCache(CacheSpec(config.adapters, config.cache)),
            self._engine.pack,
            budget_bytes=settings.host_bytes,
            revalidate_s=config.cache.revalidate_s,
        )

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        """Answer a call; closing the stream cancels it.

        Raises (before anything is yielded, unless the engine fails later):
            InvalidRequest, AdapterNotFound, AdapterRejected, AdapterUnavailable, Overloaded.
        """
        prompt = await asyncio.to_thread(self._encode, call.prompt)  # a long text takes its time
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        names = [name for name, _ in call.adapters]
        try:
            async with asyncio.timeout(self._adapter_wait_s):
                weights = await self._adapters.get(names)
        except TimeoutError as error:
            problem = f"not here within {self._adapter_wait_s:g} s; try again later"
            raise AdapterUnavailable(problem, adapter=names[0]) from error
        request = GenerationRequest(
            prompt,
            tuple((w, share) for w, (_, share) in zip(weights, call.adapters, strict=True)),
            call.sampling,
            call.generated,
        )
        stream = self._engine.stream(request)
        try:
            admitted = False
            async for chunk in stream:
                if not admitted:
                    admitted = True
                    yield Admitted(len(prompt), tuple(w.key[1] for w in weights))
                yield chunk
        finally:
            await stream.aclose()

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        codec = self._engine.codec
        return codec.chat(prompt.messages) if prompt.text is None else codec.plain(prompt.text)

    async def stats(self) -> dict[str, Any]:
        """What runs and waits, what a request takes beside how many, and hits, misses and load times of the tiers."""
        running, waiting = self._engine.load
        return {
            "running": running,
            "waiting": waiting,
            "seconds": [round(self._engine.pace.seconds(n), 3) for n in range(1, self._engine.config.max_batch + 1)],
            "resident": self._engine.slots.resident,
            "resident_bytes": self._engine.slots.used_bytes,
            "device": asdict(self._engine.slots.counters),
            "host": asdict(self._adapters.counters),
        }

    def check_health(self) -> None:
        """Serve's health check."""
        self._engine.check_health()

    def __del__(self) -> None:
        if engine := getattr(self, "_engine", None):
            engine.close()
