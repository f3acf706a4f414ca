"""Which replica of LoraModel a call goes to, and whether it goes on to another: `deployments.placement`, asked by who
sends them.

A replica's node is told which adapters are wanted there, for its cache and for replicas to come. A call goes on if the
replica has no room for it, and if it waits there while another replica has a row to spare: queues are as fair as one,
however many replicas there are and whenever one joins them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from deployments.adapter_cache import NAMESPACE, CacheSpec
from deployments.calls import GenerateCall
from deployments.placement import Placement
from deployments.replicas import Replica, Replicas
from deployments.rpc import RpcCall
from lorauter.errors import Overloaded
from lorauter.names import AdapterKey

_LOOK_AGAIN_S = 5.0
_TOGETHER_S = 0.1  # in which what is wanted on a node is one message to it
_SPARED = 1 / 16  # of `retry_after_s`, for which a replica that has refused a call is not asked again
_HALF = 0.5  # of the time for a first token: then a call is with a replica that does not get to it


class Dispatch:
    """Sends calls to LoraModel's replicas.

    Args:
        replicas: LoraModel's.
        spec: the node caches that are told of adapters that will be wanted.
        batch: requests that a replica runs at once.
    """

    def __init__(self, replicas: Replicas, spec: CacheSpec, *, batch: int) -> None:
        self._replicas = replicas
        self._cache_prefix = spec.prefix
        self.placement = Placement(batch=batch)
        self.placement.look = self._queues
        self._others: dict[str, int] = {}  # calls of other senders, by what each replica reported last
        self._nodes: dict[str, str] = {}
        self._caches: dict[str, tuple[Any, float]] = {}  # by node, and when they were looked for
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._wanted: dict[str, list[AdapterKey]] = {}  # by node
        self._refusal: Overloaded | None = None  # the last one
        replicas.listen(self._update)

    async def send(self, call: GenerateCall) -> RpcCall:
        """Have a replica answer a call, the one that suits it best, once there is one."""
        await self._replicas.arrived()
        wanted = [(str(adapter.key), adapter.weight) for adapter in call.adapters]
        best, *_ = self.placement.rank(wanted, self._queues(), time.monotonic(), avoid=call.avoid)
        if call.adapters:
            self._announce(self._nodes[best], [adapter.key for adapter in call.adapters])
        self.placement.took(call.number, best)
        return self._replicas.call_of(best, "generate", call)

    def ended(self, call: GenerateCall) -> None:
        """A call is with no replica any more."""
        self.placement.left(call.number)

    def check(self, coming: int = 0) -> None:
        """Raise Overloaded if no replica has room: to route a request would only slow down those that are there.

        Args:
            coming: requests that are being routed.
        """
        if self.placement.full(time.monotonic(), coming):
            refusal = self._refusal or Overloaded("every replica has as many requests as it takes", retry_after_s=1.0)
            raise Overloaded(str(refusal), retry_after_s=refusal.retry_after_s)

    def goes_on(self, refusal: Overloaded) -> bool:
        """Remember a replica's refusal; whether another may take the call."""
        if refusal.replica is None:
            return False
        self._refusal, now = refusal, time.monotonic()
        self.placement.refused(refusal.replica, now + _SPARED * refusal.retry_after_s)
        return not self.placement.all_refuse(now)

    def elsewhere(self, call: GenerateCall, waited: float) -> Sequence[str]:
        """The replicas that a call had better not be with, its own one among them; none to leave it there.

        Args:
            call: which has no first token yet.
            waited: the share of the time for its first token that has passed.
        """
        return self.placement.elsewhere(call.number, time.monotonic(), avoid=call.avoid, long=waited >= _HALF)

    def _update(self, replicas: Sequence[Replica]) -> None:
        """Take in which replicas there are, and their reports."""
        reports = {replica.name: replica.report for replica in replicas}
        self._nodes = {replica.name: replica.node for replica in replicas}
        self._others = {name: others for name, others in self._others.items() if name in reports}
        for name in self.placement.update(reports, time.monotonic()):
            calls: Mapping[str, int] = reports[name].get("calls", {})
            self._others[name] = sum(count for sender, count in calls.items() if sender != self._replicas.name)

    def _queues(self) -> dict[str, int]:
        """Calls in progress: those from here, as they are, and those of others that were reported last."""
        return {name: own + self._others.get(name, 0) for name, own in self._replicas.ongoing.items()}

    def _announce(self, node: str, keys: list[AdapterKey]) -> None:
        """Have the replica's node know, and fetch, what is wanted there; a courtesy."""
        if not self._wanted:
            asyncio.get_running_loop().call_later(_TOGETHER_S, self._tell_nodes)
        self._wanted.setdefault(node, []).extend(keys)

    def _tell_nodes(self) -> None:
        wanted, self._wanted = self._wanted, {}
        for node, keys in wanted.items():
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
