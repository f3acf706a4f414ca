"""Router: the ingress. It routes a query and passes the answer on.

Holds no model and no catalog; it calls the other deployments' replicas (`deployments.replicas`). The HTTP side is
`deployments.api`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.context import _set_request_context
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments import observe
from deployments.access import Access, Caller
from deployments.adapter_cache import CacheSpec
from deployments.admin import admin_endpoints
from deployments.api import build_api
from deployments.calls import Admitted, CatalogDescription, GenerateCall, Residency
from deployments.changes import Change
from deployments.config import AppConfig
from deployments.dispatch import Dispatch
from deployments.limits import SharedLimits
from deployments.listener import Listener
from deployments.logs import join_serve_logs
from deployments.metrics import RayRecorder
from deployments.node_metrics import read_metrics
from deployments.replicas import Replicas
from deployments.retries import answered, generated
from deployments.routing_metrics import RoutingMetrics
from deployments.scope import Permitted
from deployments.startup import tells_why
from deployments.tokenizing import Tokenizing
from deployments.tracing import span
from deployments.vllm_metrics import Loras, as_vllm
from deployments.warmup import demand_for
from lorauter.catalog.catalog import PROBE_TEXT
from lorauter.defaults import BASE_MODEL, DEFAULT
from lorauter.encoder import Embeddings
from lorauter.engine import Chunk
from lorauter.engine.types import Prompt
from lorauter.errors import AdapterError, Overloaded, ServiceUnavailable
from lorauter.garbage import settle
from lorauter.names import AdapterKey
from lorauter.routing import RoutingDecision, RoutingOptions, check_text
from lorauter.routing.compose import cause_of
from lorauter.tasks import Task
from lorauter.uris import called

_RETRY_AFTER_S = 1.0
_LORAS_S = 2.0  # for which what is on the devices is no old news: gateways ask many times a second
_DEMAND = 4096  # adapters of which each node tells how much they were wanted
_TOGETHER = 64  # texts to be embedded that go together
_READY_S = 1800.0  # an encoder may have to be downloaded first


@serve.deployment(
    max_ongoing_requests=1000,
    max_queued_requests=1000,  # in each proxy, which answers what is more by itself:
    backpressure_config={"status_code": 429, "retry_after_s": _RETRY_AFTER_S},
    ray_actor_options={"num_cpus": 0.3},
    health_check_period_s=5,
    graceful_shutdown_timeout_s=600,  # streams in flight end by themselves, as in LoraModel
)
@serve.ingress()
@tells_why
class Router:
    """The ingress.

    Args:
        config: the app's configuration.
        embedder: handle of QueryEmbedder.
        retriever: handle of TaskRetriever.
        model: handle of LoraModel.
        editor: handle of CatalogEditor, unless what is served cannot be changed.
    """

    def __init__(
        self,
        config: AppConfig,
        embedder: DeploymentHandle[Any],
        retriever: DeploymentHandle[Any],
        model: DeploymentHandle[Any],
        editor: DeploymentHandle[Any] | None,
    ) -> None:
        join_serve_logs()
        self._config = config
        self._access = Access(config.access, SharedLimits() if config.access.closed else None)
        self._recorder = RayRecorder()
        self._metrics = RoutingMetrics(self._recorder)
        self._embedder = Replicas(embedder)
        self._retriever = Replicas(retriever)
        self._model = Replicas(model)
        self._cache = CacheSpec(config.adapters, config.cache)
        self._dispatch = Dispatch(self._model, self._cache, batch=config.engine.rows)
        self._tokenizing = Tokenizing(lambda: self._asked(self._model, "tokenizer"))
        self._model.listen(lambda replicas: replicas and self._tokenizing.begin())
        self._encoder: str | None = None
        self._apps = dict.fromkeys((model.deployment_id.app_name, serve.get_replica_context().app_name))
        self._editor = _EditorClient(editor) if editor is not None else None
        self._routing = 0  # texts
        self._loras_seen: Loras | None = None
        self._listener: Listener | None = None

    def __serve_build_asgi_app__(self) -> Any:
        config = self._config
        admin = admin_endpoints(self._editor, config.api)
        api = build_api(
            self,
            config.api,
            self._access,
            admin,
            max_model_len=config.engine.max_model_len,
            base_model=config.base_model,
        )
        observed = observe.Observed(api, self._recorder, _take_id)
        if config.api.listen is not None:
            self._listener = Listener(observed, config.api.listen)
        return observed

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Serve's hook, once the replica is ready: from then on it listens, if it is to."""
        settle()
        if self._listener is not None:
            self._listener.start()
        return {}

    def check_health(self) -> None:
        """Serve's health check."""
        if self._listener is not None:
            self._listener.check()

    async def __del__(self) -> None:
        """Serve's hook, which waits for it."""
        if listener := getattr(self, "_listener", None):
            await listener.end()

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        """Decide for n texts. Raises InvalidRequest, Overloaded, ServiceUnavailable."""
        for i, text in enumerate(texts):
            check_text(text, param=f"input[{i}]")
        self._routing += len(texts)
        try:
            with self._metrics.step("route"), span("route"):
                started = time.perf_counter()
                decisions: list[RoutingDecision] = await self._asked(
                    self._retriever, "decide", list(texts), [options] * len(texts)
                )
                seconds = time.perf_counter() - started
        finally:
            self._routing -= len(texts)
        self._metrics.decided(decisions)
        return [
            replace(decision, seconds={"embed": seconds - decision.seconds.get("retrieve", 0.0), **decision.seconds})
            for decision in decisions
        ]

    async def versions(self, names: Sequence[str]) -> dict[str, str]:
        """The versions of adapters that are served, those of the catalog in use; without those that it lacks."""
        versions: dict[str, str] = await self._asked(self._retriever, "versions", list(names))
        return versions

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """(n, d) float32 unit rows for n texts. Raises Overloaded, ServiceUnavailable."""
        parts = [
            await self._asked(self._embedder, "embed", list(texts[start : start + _TOGETHER]))
            for start in range(0, len(texts), _TOGETHER)  # one after the other: what is urgent comes in between
        ]
        return np.concatenate(parts)

    async def encoder(self) -> str:
        """What embeds is called. Raises ServiceUnavailable."""
        if self._encoder is None:
            self._encoder = await self._asked(self._embedder, "name")
        return self._encoder

    async def tokenize(self, prompt: Prompt) -> Sequence[int]:
        """A prompt's tokens. Raises InvalidRequest, Overloaded, ServiceUnavailable."""
        return await self._tokenizing.encode(prompt)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens. Raises InvalidRequest, Overloaded, ServiceUnavailable."""
        return await self._tokenizing.decode(token_ids, skip_special_tokens=skip_special_tokens)

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        """Answer a call, on another replica if one dies; closing the stream cancels it. Raises what replicas raise."""
        record = observe.current()
        asked, words = await self._tokenizing.asked(call)
        stream = generated(self._dispatch, asked, timeout_s=self._config.api.first_token_s)
        try:
            async for item in stream:
                if isinstance(item, Admitted):
                    record.asked, record.sampling = record.asked + len(call.choices), call.sampling
                    record.prompt_tokens += item.prompt_tokens
                    record.cached_tokens += item.cached_tokens
                    self._metrics.left_out(adapter.cause for adapter in item.left_out)
                else:
                    record.token_arrived(len(item.token_ids), item.finish_reason, item.kept_s)
                yield words.of(item)
        except AdapterError as error:
            if call.routed:
                self._metrics.left_out([cause_of(error)] * len(call.adapters))
            raise
        finally:
            await stream.aclose()

    def check_load(self) -> None:
        """Raise Overloaded if no replica has room: to route a request would only slow the others down."""
        self._dispatch.check(self._routing)

    async def describe(self) -> CatalogDescription:
        """The catalog."""
        catalog: CatalogDescription = await self._asked(self._retriever, "describe")
        return catalog

    async def examples(self, names: Sequence[str], most: int, permitted: Permitted) -> dict[str, list[dict[str, str]]]:
        """The first validation examples of tasks, of those that a caller may be told."""
        args = list(names), most, permitted
        examples: dict[str, list[dict[str, str]]] = await self._asked(self._retriever, "examples", *args)
        return examples

    async def layout(self, permitted: Permitted, named: Sequence[str]) -> dict[str, Any]:
        """The tasks in two dimensions, of those that a caller may see."""
        shown: dict[str, Any] = await self._asked(self._retriever, "layout", permitted, list(named))
        return shown

    async def history(self, limit: int, after: str | None) -> dict[str, Any]:
        """The catalog's versions in the store. Raises InvalidRequest, CatalogError, StoreError."""
        page: dict[str, Any] = await self._asked(self._retriever, "history", limit, after)
        return page

    async def residency(self, keys: Sequence[AdapterKey]) -> list[Residency]:
        """Of versions of adapters, on how many replicas each is in a tier, and how much it was wanted lately."""
        demand = await demand_for(self._cache, _DEMAND)
        whereabouts = self._dispatch.placement.whereabouts
        return [Residency(whereabouts(str(key)), demand.get(key, 0.0)) for key in keys]

    async def deployments(self) -> list[dict[str, Any]]:
        """The service's deployments: the state of each, and how many replicas are in which."""
        applications = (await asyncio.to_thread(serve.status)).applications
        return [
            {"id": name, "object": "deployment", "status": part.status.value, "replicas": dict(part.replica_states)}
            for app in self._apps
            if app in applications
            for name, part in applications[app].deployments.items()
        ]

    async def metrics(self) -> str:
        """This node's metrics, or all nodes'; under vLLM's names too, of the service, unless they are left out."""
        of_all = self._config.api.metrics_of == "cluster"
        text = await read_metrics(all_nodes=of_all)
        if not self._config.api.vllm_metrics:
            return text
        whole = text if of_all else await read_metrics(all_nodes=True)  # who asks knows of one endpoint, this one
        base = BASE_MODEL if self._config.base_model == DEFAULT else self._config.base_model
        return text + await asyncio.to_thread(as_vllm, whole, called(base), await self._loras())

    async def _loras(self) -> Loras:
        """The adapters wanted lately that are on a device of some replica, as they were a moment ago at most."""
        if self._loras_seen is not None and time.time() - self._loras_seen.seen < _LORAS_S:
            return self._loras_seen
        wanted = await demand_for(self._cache, _DEMAND)
        there = [key.name for key in wanted if "device" in self._dispatch.placement.whereabouts(str(key))]
        running = sorted(set(there))
        self._loras_seen = Loras(running, max(self._config.engine.rows, len(running)), time.time())
        return self._loras_seen

    async def _asked(self, replicas: Replicas, method: str, *args: Any) -> Any:
        return await self._asked_within(self._config.api.first_token_s, replicas, method, *args)

    async def _asked_within(self, timeout_s: float, replicas: Replicas, method: str, *args: Any) -> Any:
        return await answered(lambda: replicas.call(method, *args), timeout_s=timeout_s)

    async def check_ready(self) -> None:
        """Raise unless the encoder in use is the catalog's own."""
        await self._tokenizing.prepare()
        [probe] = await self._asked_within(_READY_S, self._embedder, "embed", [PROBE_TEXT])
        encoder = await self._asked_within(_READY_S, self._embedder, "name")
        await self._asked_within(_READY_S, self._retriever, "check_probe", probe, encoder)


def _take_id(request_id: str) -> None:
    """Have Serve log a request, here and in all deployments below, by this id."""
    _set_request_context(request_id=request_id)


class _EditorClient:
    """The editor behind its handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def put_task(self, caller: Caller, task: Task) -> dict[str, Any]:
        return await _result(self._handle.put_task.remote(caller, task))

    async def remove_task(self, caller: Caller, name: str) -> dict[str, Any]:
        return await _result(self._handle.remove_task.remote(caller, name))

    async def put_adapter(self, caller: Caller, name: str, files: Mapping[str, Any] | None) -> dict[str, Any]:
        return await _result(self._handle.put_adapter.remote(caller, name, files))

    async def remove_adapter(self, caller: Caller, name: str) -> dict[str, Any]:
        return await _result(self._handle.remove_adapter.remote(caller, name))

    async def change(self, caller: Caller, changes: Sequence[Change]) -> dict[str, Any]:
        return await _result(self._handle.change.remote(caller, changes))

    async def use_version(self, version: str) -> dict[str, Any]:
        return await _result(self._handle.use_version.remote(version))

    async def compose(self, caller: Caller, task: str) -> dict[str, Any]:
        return await _result(self._handle.compose.remote(caller, task))

    async def compositions(self, caller: Caller) -> dict[str, Any]:
        return await _result(self._handle.compositions.remote(caller))

    async def composition(self, caller: Caller, id: str) -> dict[str, Any]:
        return await _result(self._handle.composition.remote(caller, id))

    async def cancel_composition(self, caller: Caller, id: str) -> dict[str, Any]:
        return await _result(self._handle.cancel_composition.remote(caller, id))


async def _result(response: Any) -> dict[str, Any]:
    try:
        result: dict[str, Any] = await response
        return result
    except Exception as error:
        raise _translated(error) from error


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
