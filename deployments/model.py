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
from deployments.logs import join_serve_logs
from deployments.metrics import RayRecorder
from deployments.samplers import Sampling, model_sampler
from deployments.tracing import span
from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine import Chunk, EngineConfig, GenerationRequest, load_engine
from lorauter.errors import InvalidRequest


@serve.deployment(ray_actor_options={"num_cpus": 1}, health_check_period_s=5, graceful_shutdown_timeout_s=60)
class LoraModel:
    """One replica: an engine, and its tiers of adapters.

    Args:
        config: the app's configuration.
    """

    def __init__(self, config: AppConfig) -> None:
        join_serve_logs()
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
            ),
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.threads,
            aliases=(*config.base_model_aliases, *base_model_aliases(config.base_model)),
        )
        self._adapters = HostAdapters(
            NodeCache(CacheSpec(config.adapters, config.cache)),
            self._engine.pack,
            budget_bytes=settings.host_bytes,
            revalidate_s=config.cache.revalidate_s,
        )
        self._sampling = Sampling(model_sampler(self._engine, self._adapters, RayRecorder()))

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        """Answer a call; closing the stream cancels it.

        Raises (before anything is yielded, unless the engine fails later):
            InvalidRequest, AdapterNotFound, AdapterRejected, AdapterUnavailable, Overloaded.
        """
        prompt = await asyncio.to_thread(self._encode, call.prompt)  # a long text takes its time
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        names = [name for name, _ in call.adapters]
        weights = await self._adapters.get(names)
        request = GenerationRequest(
            prompt,
            tuple((w, share) for w, (_, share) in zip(weights, call.adapters, strict=True)),
            call.sampling,
        )
        stream = self._engine.stream(request)
        tokens = 0
        with span("generate", current=False) as traced:
            try:
                admitted = False
                async for chunk in stream:
                    if not admitted:
                        admitted = True
                        yield Admitted(len(prompt))
                    tokens += len(chunk.token_ids)
                    yield chunk
            finally:
                if traced is not None:
                    traced.set_attributes(
                        {"prompt_tokens": len(prompt), "completion_tokens": tokens, "adapters": len(names)}
                    )
                await stream.aclose()

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        codec = self._engine.codec
        return codec.chat(prompt.messages) if prompt.text is None else codec.plain(prompt.text)

    async def stats(self) -> dict[str, Any]:
        """What runs and waits, and hits, misses and load times of the replica's tiers of adapters."""
        running, waiting = self._engine.load
        return {
            "running": running,
            "waiting": waiting,
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
