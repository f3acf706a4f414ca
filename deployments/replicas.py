"""A deployment's replicas, called over connections of their own: who they are Serve tells, what they say it never sees.

A replica tells Serve where it listens (`ReplicaServer`), Serve tells who calls it (`Replicas`), and is told in turn how
many calls each has, by which it scales. A replica that is to go, which Serve tells of at once, gets no new calls, and
ends with its last one; one that cannot be reached gets none until it can.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.serve._private.common import ReplicaID, RunningReplicaInfo
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace
from ray.serve.context import _get_serve_request_context, _set_request_context
from ray.serve.handle import DeploymentHandle

from deployments import tracing
from deployments.logs import as_it_goes
from deployments.rpc import Address, RpcCall, RpcClient, RpcServer
from deployments.rpc_connection import ConnectionLost
from lorauter.errors import Overloaded
from lorauter.garbage import settle

logger = logging.getLogger("lorauter.calls")

_ADDRESS = "lorauter_rpc"
_REQUEST_ID = "request-id"
_RETRY_AFTER_S = 1.0
_WAITING = 1000  # calls
_FIRST_LOOK_S, _LOOK_S = 0.2, 5.0


class ReplicaServer:
    """A replica's own server.

    Args:
        part: the deployment's name, for traces.
        handlers: see `RpcServer`.
    """

    def __init__(self, part: str, handlers: Mapping[str, Callable[..., Any]]) -> None:
        self._server = RpcServer(handlers, partial(_Within, part))

    async def metadata(self) -> dict[str, Any]:
        """Listen, on the node's address in the cluster. To be returned by Serve's hook `record_replica_metadata`, which
        it asks once, when the replica is ready."""
        settle()
        return {_ADDRESS: tuple(await self._server.start(_node_ip()))}

    @property
    def ongoing(self) -> int:
        """Calls in progress."""
        return self._server.ongoing

    @property
    def ongoing_by(self) -> dict[str, int]:
        """The same by who has sent them (`Replicas.name`)."""
        return self._server.ongoing_by

    async def drained(self) -> None:
        """Wait until no call is in progress. To be awaited by what the replica's `__del__` returns, which Serve calls
        once it has told of the replica's leaving."""
        await self._server.drained()


def by_name(*methods: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Methods as handlers, under the names that they have."""
    return {method.__name__: method for method in methods}


def _node_ip() -> str:
    ip: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return ip


class _Within:
    """What a call's lines in the log and its spans go by. No generator, as each call has one."""

    __slots__ = ("_context", "_method", "_part", "_spans", "_started")

    def __init__(self, part: str, method: str, context: Mapping[str, str]) -> None:
        self._part = part
        self._method = method
        self._context = context
        self._spans: ExitStack | None = None

    def __enter__(self) -> None:
        _set_request_context(request_id=self._context.get(_REQUEST_ID, ""))
        self._started = time.perf_counter()
        if tracing.tracer() is not None:
            self._spans = ExitStack()
            self._spans.enter_context(tracing.continued(self._context))
            self._spans.enter_context(tracing.span(f"{self._part}.{self._method}"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        as_it_goes(logger, f"call {self._method}", {"seconds": round(time.perf_counter() - self._started, 6)})
        if self._spans is not None:
            self._spans.__exit__(kind, error, trace)
        if isinstance(error, RayTaskError):  # an actor's, in a class that Ray makes on the spot: no pickle names it
            raise error.cause if isinstance(error.cause, Exception) else error from None


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
    leaves: bool = False


class Replicas:
    """The replicas of a deployment.

    Args:
        handle: the deployment's; it is not called.
        most: calls that a replica has from here at once.

    Attributes:
        name: by which replicas know who their calls are from.
    """

    def __init__(self, handle: DeploymentHandle[Any], *, most: int = _WAITING) -> None:
        self.name = secrets.token_hex(4)
        self._deployment = handle.deployment_id
        self._most = most
        self._infos: dict[str, RunningReplicaInfo] = {}  # Serve's last word
        self._known: dict[str, _Known] = {}  # those of them that can be reached
        self._lost: dict[str, asyncio.Task[None]] = {}  # the others: who looks for them
        self._listeners: list[Callable[[Sequence[Replica]], object]] = []
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

    def listen(self, listener: Callable[[Sequence[Replica]], object]) -> None:
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
        self._infos = {
            info.replica_id.unique_id: info for info in targets.running_replicas if _ADDRESS in info.replica_metadata
        }
        for name in self._known.keys() - self._infos.keys():
            known = self._known.pop(name)
            known.leaves = True
            if known.client.ongoing == 0:
                known.client.close()
        for name, info in self._infos.items():
            if name in self._known:
                self._known[name].replica = _replica(info)
            elif name not in self._lost:
                self._known[name] = self._meet(info)
        self._changed()

    def _changed(self) -> None:
        if self._known:
            self._arrived.set()
        else:
            self._arrived.clear()
        for listener in self._listeners:
            listener([known.replica for known in self._known.values()])

    def _meet(self, info: RunningReplicaInfo) -> _Known:
        def ended() -> None:
            self._counts.dec_num_running_requests_for_replica(known.id)
            if known.leaves and known.client.ongoing == 0:
                known.client.close()

        client = RpcClient(Address(*info.replica_metadata[_ADDRESS]), ended, lambda: self._lose(known), self.name)
        known = _Known(_replica(info), info.replica_id, client)
        return known

    def _lose(self, known: _Known) -> None:
        """A replica cannot be reached: it has no calls until it can, long before Serve knows whether it is dead."""
        name = known.replica.name
        if self._known.pop(name, None) is not None:
            self._lost[name] = asyncio.create_task(self._find(known))
            self._changed()

    async def _find(self, known: _Known) -> None:
        name, pause_s = known.replica.name, _FIRST_LOOK_S
        try:
            while name in self._infos:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LOOK_S)
                with suppress(ConnectionLost):
                    await known.client.connect()
                    break
        finally:
            del self._lost[name]
        if name in self._infos:
            known.replica = _replica(self._infos[name])
            self._known[name] = known
            self._changed()
        else:
            known.client.close()


def _replica(info: RunningReplicaInfo) -> Replica:
    return Replica(info.replica_id.unique_id, info.node_id or "", info.routing_stats)


def _serves_counts(handle: DeploymentHandle[Any]) -> Any:
    """What Serve scales a deployment by: the calls that are with each replica, and those that wait for one."""
    if not handle.is_initialized:
        handle._init()  # type: ignore[no-untyped-call]
    router: Any = handle._router
    return router._asyncio_router._metrics_manager
