"""A deployment's replicas, called over connections of their own: who they are Serve tells, what they say it never sees.

A replica tells Serve where it listens (`ReplicaServer`), Serve tells who calls it (`Replicas`), and is told in turn how
many calls each has, by which it scales. A replica that is to go, which Serve tells of at once, gets no new calls, and
ends with its last one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.serve._private.common import ReplicaID, RunningReplicaInfo
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace
from ray.serve.context import _get_serve_request_context, _set_request_context
from ray.serve.handle import DeploymentHandle

from deployments import tracing
from deployments.rpc import Address, RpcCall, RpcClient, RpcServer
from lorauter.errors import Overloaded

_ADDRESS = "lorauter_rpc"
_REQUEST_ID = "request-id"
_RETRY_AFTER_S = 1.0
_WAITING = 1000  # calls


class ReplicaServer:
    """A replica's own server.

    Args:
        handlers: see `RpcServer`.
    """

    def __init__(self, handlers: Mapping[str, Callable[..., Any]]) -> None:
        self._server = RpcServer(handlers, _within)

    async def metadata(self) -> dict[str, Any]:
        """Listen, on the node's address in the cluster. To be returned by Serve's hook `record_replica_metadata`, which
        it asks once, when the replica is ready."""
        return {_ADDRESS: tuple(await self._server.start(_node_ip()))}

    @property
    def ongoing(self) -> int:
        """Calls in progress."""
        return self._server.ongoing

    async def drained(self) -> None:
        """Wait until no call is in progress. To be awaited by what the replica's `__del__` returns, which Serve calls
        once it has told of the replica's leaving."""
        await self._server.drained()


def _node_ip() -> str:
    ip: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return ip


@contextmanager
def _within(context: Mapping[str, str]) -> Iterator[None]:
    """What a call's lines in the log and its spans go by."""
    _set_request_context(request_id=context.get(_REQUEST_ID, ""))
    with tracing.continued(context):
        yield


def _context() -> dict[str, str]:
    return {_REQUEST_ID: _get_serve_request_context().request_id, **tracing.carried()}


@dataclass(frozen=True)
class Replica:
    """A replica that takes calls: its name, its node, and its last report (`record_routing_stats`)."""

    name: str
    node: str
    report: Mapping[str, Any]


@dataclass
class _Known:
    replica: Replica
    id: ReplicaID
    client: RpcClient
    leaves: bool = field(default=False)


class Replicas:
    """The replicas of a deployment.

    Args:
        handle: the deployment's; it is not called.
        most: calls that a replica has from here at once.
    """

    def __init__(self, handle: DeploymentHandle[Any], *, most: int = _WAITING) -> None:
        self._deployment = handle.deployment_id
        self._most = most
        self._known: dict[str, _Known] = {}
        self._listeners: list[Callable[[Sequence[Replica]], None]] = []
        self._arrived = asyncio.Event()
        self._counts = _serves_counts(handle)
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        listened_for: dict[Any, Callable[[Any], None]] = {
            (LongPollNamespace.DEPLOYMENT_TARGETS, self._deployment): self._told
        }
        self._news = LongPollClient(
            controller,
            listened_for,
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"lorauter:{ray.get_runtime_context().get_actor_id()}:{self._deployment}",
        )

    def listen(self, listener: Callable[[Sequence[Replica]], None]) -> None:
        """Have somebody told of the replicas there are, now and whenever they or their reports change."""
        self._listeners.append(listener)
        listener([known.replica for known in self._known.values()])

    @property
    def ongoing(self) -> dict[str, int]:
        """Calls in progress from here, by replica."""
        return {name: known.client.ongoing for name, known in self._known.items()}

    async def arrived(self) -> None:
        """Wait until there is a replica. Serve is told that somebody waits."""
        if self._known:
            return
        self._counts.inc_num_queued_requests()
        try:
            await self._arrived.wait()
        finally:
            self._counts.dec_num_queued_requests()

    async def call(self, method: str, *args: Any) -> RpcCall:
        """Call the less busy of two replicas, once there is one. Raises Overloaded."""
        await self.arrived()
        two = random.sample(list(self._known), min(2, len(self._known)))
        return self.call_of(min(two, key=lambda name: self._known[name].client.ongoing), method, *args)

    def call_of(self, replica: str, method: str, *args: Any) -> RpcCall:
        """Call a replica. Raises Overloaded: it has as many calls as it takes."""
        known = self._known[replica]
        if known.client.ongoing >= self._most:
            raise Overloaded(
                f"{self._deployment.name} has {known.client.ongoing} calls to answer; try again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._counts.inc_num_running_requests_for_replica(known.id)
        return known.client.call(method, *args, context=_context())

    def _told(self, targets: Any) -> None:
        """Serve's: a DeploymentTargetInfo."""
        there = {
            info.replica_id.unique_id: info for info in targets.running_replicas if _ADDRESS in info.replica_metadata
        }
        for name in self._known.keys() - there.keys():
            known = self._known.pop(name)
            known.leaves = True
            if known.client.ongoing == 0:
                known.client.close()
        for name, info in there.items():
            replica = Replica(name, info.node_id or "", info.routing_stats)
            if name in self._known:
                self._known[name].replica = replica
            else:
                self._known[name] = self._meet(replica, info)
        if self._known:
            self._arrived.set()
        else:
            self._arrived.clear()
        for listener in self._listeners:
            listener([known.replica for known in self._known.values()])

    def _meet(self, replica: Replica, info: RunningReplicaInfo) -> _Known:
        def ended() -> None:
            self._counts.dec_num_running_requests_for_replica(known.id)
            if known.leaves and known.client.ongoing == 0:
                known.client.close()

        client = RpcClient(Address(*info.replica_metadata[_ADDRESS]), ended)
        known = _Known(replica, info.replica_id, client)
        return known


def _serves_counts(handle: DeploymentHandle[Any]) -> Any:
    """What Serve scales a deployment by: the calls that are with each replica, and those that wait for one."""
    if not handle.is_initialized:
        handle._init()  # type: ignore[no-untyped-call]
    router: Any = handle._router
    return router._asyncio_router._metrics_manager
