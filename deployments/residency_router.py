"""ResidencyRouter: Serve's request router for LoraModel, with `deployments.placement` as its policy.

It runs wherever a handle of LoraModel is (the ingress replicas). Serve tells it the replicas with their reports
and counts their queues; it tells Serve whom to ask, in which order, and the chosen replica's node which adapters
will be wanted there.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.serve._private.common import RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.adapter_cache import NAMESPACE, CacheSpec
from deployments.calls import GenerateCall
from deployments.placement import Placement, share
from lorauter.names import AdapterKey

REPORT_PERIOD_S = 1.0
_REPORT_TIMEOUT_S = 10.0
_LOOK_AGAIN_S = 5.0


def residency_routing(spec: CacheSpec, *, batch: int) -> RequestRouterConfig:
    """The `request_router_config` of LoraModel.

    Args:
        spec: the node caches that are told of adapters that will be wanted.
        batch: requests that a replica runs at once.
    """
    return RequestRouterConfig.model_validate(
        {
            "request_router_class": f"{__name__}.{ResidencyRouter.__name__}",
            "request_router_kwargs": {"batch": batch, "caches": spec.prefix},
            "request_routing_stats_period_s": REPORT_PERIOD_S,
            "request_routing_stats_timeout_s": _REPORT_TIMEOUT_S,
        }
    )


class ResidencyRouter(RequestRouter):
    """Chooses the replica whose adapters and queue suit a `GenerateCall` best; for any other call, the less busy."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Serve's hook: `request_router_kwargs`."""
        self._placement = Placement(batch=kwargs["batch"])
        self._placement.look = lambda: self._queues(self._replicas_list)
        share(self._placement, str(self._deployment_id))
        self._cache_prefix: str = kwargs["caches"]
        self._caches: dict[str, tuple[Any, float]] = {}  # by node, and when they were looked for
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._own: dict[str, int] = {}  # requests from here in progress there: Serve's count lapses after a while

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve's hook: one replica a rank."""
        call = pending_request.args[0] if pending_request is not None and pending_request.args else None
        adapters, avoid = (call.adapters, call.avoid) if isinstance(call, GenerateCall) else ((), ())
        again = False
        if pending_request is not None:
            again = pending_request.routing_context.should_backoff
            pending_request.routing_context.should_backoff = True  # once all ranks are full, wait before asking again
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queues = self._queues(candidate_replicas)
        wanted = [(str(adapter.key), adapter.weight) for adapter in adapters]
        ranked = [replicas[name] for name in self._placement.rank(wanted, queues, time.monotonic(), avoid=avoid)]
        if adapters and ranked and not again:
            self._announce(ranked[0].node_id, [adapter.key for adapter in adapters])
        return [[replica] for replica in ranked]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's hook: the replicas there are now, and their reports."""
        reports = {replica.replica_id.unique_id: replica.routing_stats or {} for replica in replicas}
        for replica in self._replicas_list:
            if (name := replica.replica_id.unique_id) not in reports and self._placement.calls_of(name):
                self._watches[name] = asyncio.create_task(self._watch(name, replica))
        news = self._placement.update(reports, time.monotonic())
        self._own = {name: count for name, count in self._own.items() if name in reports}
        super().update_replicas(replicas)
        for replica in replicas:  # what others send there is known by its reports, else by its answers alone
            name = replica.replica_id.unique_id
            if name in news and (queue := reports[name].get("queue")) is not None:
                self.on_new_queue_len_info(replica.replica_id, queue)

    async def _watch(self, name: str, replica: RunningReplica) -> None:
        """See that the calls of a replica that takes no more end with it, if they do not end before: of a machine that
        is lost nobody else may hear."""
        try:
            while self._placement.calls_of(name):
                try:
                    await replica.get_queue_len(deadline_s=_REPORT_TIMEOUT_S)
                except ActorDiedError:
                    self._placement.died(name)
                    return
                except RayError:  # it may answer again
                    pass
                await asyncio.sleep(_LOOK_AGAIN_S)
        finally:
            self._watches.pop(name, None)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Serve's hook: a request leaves for a replica."""
        super().on_send_request(replica_id)
        self._own[replica_id.unique_id] = self._own.get(replica_id.unique_id, 0) + 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve's hook: a request has ended, however it did."""
        super().on_request_completed(replica_id, internal_request_id)
        if self._own.get(replica_id.unique_id):
            self._own[replica_id.unique_id] -= 1

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve's hook: a replica has taken a request."""
        call = pending_request.args[0] if pending_request.args else None
        if isinstance(call, GenerateCall) and call.number:
            self._placement.took(call.number, replica_id.unique_id)

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        """Serve's own: whom a chosen replica is for. Serve looks by the id of the ingress's request, which its calls
        share: of several at once (choices of one answer) all but one would never be sent."""
        waiting = self._pending_requests_to_fulfill
        return next((one for one in waiting if one.metadata is request_metadata and not one.future.done()), None)

    def _queues(self, replicas: list[RunningReplica]) -> dict[str, int]:
        """Requests in progress: what Serve has heard of, and what was sent from here."""
        told, own = self.replica_queue_len_cache, self._own
        ids = [replica.replica_id for replica in replicas]
        return {key.unique_id: max(told.get(key) or 0, own.get(key.unique_id, 0)) for key in ids}

    def _announce(self, node: str, keys: list[AdapterKey]) -> None:
        """Have the replica's node fetch what it lacks while the request is on its way; a courtesy."""
        cache, looked = self._caches.get(node, (None, -_LOOK_AGAIN_S))
        if time.monotonic() - looked > _LOOK_AGAIN_S:  # a node's cache may have been started anew
            self._caches[node] = cache, time.monotonic()
            self._looking[node] = asyncio.create_task(self._look(node))
        if cache is not None:
            cache.prefetch.remote(keys)

    async def _look(self, node: str) -> None:
        try:
            cache = await asyncio.to_thread(ray.get_actor, self._cache_prefix + node, namespace=NAMESPACE)
        except (ValueError, RayError):  # none there, or Ray cannot say; the replica fetches for itself
            cache = None
        self._caches[node] = cache, time.monotonic()
