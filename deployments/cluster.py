"""Starts a Ray of this process's own, or joins a cluster. Knows nothing of what is to run there."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import grpc
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from deployments.startup import explained
from lorauter.errors import ConfigError

logger = logging.getLogger("lorauter.cluster")

LOCAL = "local"
_ANSWER_S = 5.0
_HOST_AND_PORT = re.compile(r"[^/]+:\d+")
_ADVICE = (
    "it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what 'ray get-auth-token' says on the machine "
    "that started it"
)


def settle() -> None:
    """Say what Ray and Serve are to be like, where nobody has, before either is started here: who is started inherits
    it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Serve's proxies call the ingress by gRPC: half of the CPU time of Ray's own calls.
    os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    # Serve's controller looks for what has changed this often; at its own 0.1 s it takes a twentieth of a core at rest.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.25")
    # And every replica hands on what it has counted this often, whether there is anything or not, not each 0.1 s.
    os.environ.setdefault("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "1000")


def connect(address: str, **local: Any) -> None:
    """Join a cluster, or start one.

    Args:
        address: a cluster's `host:port`, "auto", or what else `ray.init` takes; LOCAL starts one.
        local: more arguments of `ray.init` for one that is started.

    Raises:
        ConfigError: there is no such cluster, or Ray does not start.
    """
    settle()
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING}
    if address == LOCAL:
        try:
            _start(quiet | local)
        except Exception as error:  # Ray raises bare ones, too
            raise ConfigError(f"Ray does not start: {explained(error)}") from error
        return
    try:
        place = canonicalize_bootstrap_address(address) if address == "auto" else address
        if place is None:
            raise ConnectionError("none runs on this machine, and RAY_ADDRESS names none")
        if _HOST_AND_PORT.fullmatch(place):
            _greet(place)
        ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        cause = explained(error.__cause__ or error)
        raise ConfigError(
            f"no Ray cluster can be reached at {address}: {cause}; start one ('ray start --head'), correct the "
            "address, or leave it out for a Ray of this machine's own",
            setting="address",
        ) from error


def _start(how: Mapping[str, Any]) -> None:
    """Start a Ray, if need be once more: its processes give each other up after 15 seconds, which is little where a
    machine is busy."""
    try:
        ray.init(LOCAL, **how)
    except Exception as error:
        if type(error) is not Exception:  # what is wrong stays wrong; a bare one tells of time alone
            raise
        logger.warning("Ray did not come up, and is started once more: %s", explained(error))
        ray.shutdown()
        ray.init(LOCAL, **how)


def _greet(place: str) -> None:
    """Ask a cluster's controller whether it is there, which Ray itself would find out in two minutes.

    A Ray that `ray.init` has started asks for a token, and one of another start may not; with the wrong mode this
    process could connect, and then nobody there would take it for alive. So the mode is what the controller asks for.

    Raises:
        ConnectionError: no controller is there, or it takes another token.
    """
    problem = _ask(place)
    if problem == grpc.StatusCode.UNAUTHENTICATED:
        if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise ConnectionError(_ADVICE)
        problem = _ask(place)
    if problem == grpc.StatusCode.UNAUTHENTICATED:
        raise ConnectionError(f"this machine's token is not the cluster's; {_ADVICE}")
    if problem is not None:
        raise ConnectionError(f"no Ray answers there ({problem.name})")


def _ask(place: str) -> grpc.StatusCode | None:
    with init_grpc_channel(place) as channel:
        services: Any = gcs_service_pb2_grpc  # generated: type checkers see nothing of them
        messages: Any = gcs_service_pb2
        try:
            services.NodeInfoGcsServiceStub(channel).CheckAlive(messages.CheckAliveRequest(), timeout=_ANSWER_S)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return None
