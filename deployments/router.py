"""Router: the ingress. It routes a query, has the adapters prefetched, and passes the answer on.

Holds no model and no catalog; it talks to the other deployments through their handles. The HTTP side is
`deployments.api`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments import observe
from deployments.access import Access
from deployments.adapter_cache import CacheSpec, running_caches
from deployments.api import build_api
from deployments.calls import Admitted, CatalogDescription, GenerateCall, Retrieval
from deployments.config import AppConfig
from deployments.limits import SharedLimits
from deployments.logs import join_serve_logs
from deployments.metrics import RayRecorder
from deployments.routing_metrics import RoutingMetrics
from deployments.tracing import span
from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog.catalog import PROBE_TEXT
from lorauter.engine import Chunk
from lorauter.errors import Overloaded, ServiceUnavailable, StoreError
from lorauter.routing import RoutingDecision, RoutingOptions, check_text, compose

_REFRESH_S = 5.0
_RETRY_AFTER_S = 1.0


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.3}, health_check_period_s=5)
@serve.ingress()
class Router:
    """The ingress.

    Args:
        config: the app's configuration.
        embedder: handle of QueryEmbedder.
        retriever: handle of TaskRetriever.
        model: handle of LoraModel.
    """

    def __init__(
        self,
        config: AppConfig,
        embedder: DeploymentHandle[Any],
        retriever: DeploymentHandle[Any],
        model: DeploymentHandle[Any],
    ) -> None:
        join_serve_logs()
        self._config = config
        self._access = Access(config.access, SharedLimits() if config.access.closed else None)
        self._recorder = RayRecorder()
        self._metrics = RoutingMetrics(self._recorder)
        self._embedder = embedder
        self._retriever = retriever
        self._model = model.options(stream=True)
        self._repository = AdapterRepository(open_store(config.adapters))
        self._cache_spec = CacheSpec(config.adapters, config.cache)
        self._caches: list[Any] = []
        self._refreshed = -_REFRESH_S

    def __serve_build_asgi_app__(self) -> Any:
        return observe.Observed(build_api(self, self._config.api, self._access), self._recorder)

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        """Decide for n texts. Raises InvalidRequest, Overloaded, ServiceUnavailable."""
        for i, text in enumerate(texts):
            check_text(text, param=f"input[{i}]")
        with span("route"):
            try:
                with self._metrics.step("embed"), span("embed"):
                    embeddings = await self._embedder.embed.remote(list(texts))
                with self._metrics.step("retrieve"), span("retrieve"):
                    retrieval: Retrieval = await self._retriever.retrieve.remote(
                        embeddings, list(texts), [options] * len(texts)
                    )
            except Exception as error:
                raise _translated(error) from error
            with self._metrics.step("compose"), span("compose"):
                decisions = [
                    compose(found, options, self._config.routing, catalog_version=retrieval.catalog_version)
                    for found in retrieval.found
                ]
        self._metrics.decided(decisions)
        return decisions

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        """Answer a call on some replica; closing the stream cancels it. Raises what the replica raises."""
        if call.adapters:
            self._prefetch([name for name, _ in call.adapters])
        record = observe.current()
        stream: Any = self._model.generate.remote(call)
        try:
            async for item in stream:
                if isinstance(item, Admitted):
                    record.prompt_tokens = item.prompt_tokens
                else:
                    record.token_arrived(len(item.token_ids))
                yield item
        except (GeneratorExit, asyncio.CancelledError):
            stream.cancel()
            raise
        except Exception as error:
            raise _translated(error) from error

    async def describe(self) -> CatalogDescription:
        """The catalog; its `adapters` with those that only the store has."""
        try:
            catalog: CatalogDescription = await self._retriever.describe.remote()
        except Exception as error:
            raise _translated(error) from error
        try:
            stored = await asyncio.to_thread(self._repository.names)
        except StoreError:  # the catalog's adapters may still be cached on the nodes
            stored = []
        return CatalogDescription(catalog.version, catalog.tasks, sorted({*catalog.adapters, *stored}))

    async def check_ready(self) -> None:
        """Raise unless the encoder in use is the catalog's own."""
        await self._find_caches()
        embeddings = await self._embedder.embed.remote([PROBE_TEXT])
        await self._retriever.check_probe.remote(embeddings[0], await self._embedder.name.remote())

    def _prefetch(self, names: list[str]) -> None:
        """Tell the nodes' caches which adapters will be wanted; nobody waits for it."""
        if time.monotonic() - self._refreshed > _REFRESH_S:
            self._refreshed = time.monotonic()
            self._refresh = asyncio.create_task(self._find_caches())
        for cache in self._caches:
            cache.prefetch.remote(names)

    async def _find_caches(self) -> None:
        try:
            self._caches = await asyncio.to_thread(running_caches, self._cache_spec)
        except RayError:  # prefetching is a courtesy; the replicas fetch for themselves
            self._caches = []


def _translated(error: Exception) -> Exception:
    """Ray's wrapping taken off, and its own errors put in terms of ours."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, BackPressureError):
        return Overloaded("every replica's queue is full; try again later", retry_after_s=_RETRY_AFTER_S)
    if isinstance(error, TaskCancelledError):
        return ServiceUnavailable("the request was cancelled on its replica")
    if isinstance(error, (RayError, DeploymentUnavailableError)):
        return ServiceUnavailable(f"a deployment is down: {type(error).__name__}")
    return error
