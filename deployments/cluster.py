"""Starts a Ray of this process's own, or joins a cluster. Knows nothing of what is to run there."""

from __future__ import annotations

import logging
import os
import re
import socket
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import canonicalize_bootstrap_address

from deployments.startup import explained
from lorauter.errors import ConfigError

LOCAL = "local"
_ANSWER_S = 5.0
_HOST_AND_PORT = re.compile(r"\[?(?P<host>[^/\]]+)\]?:(?P<port>\d+)")


def connect(address: str, **local: Any) -> None:
    """Join a cluster, or start one.

    Args:
        address: a cluster's `host:port`, "auto", or what else `ray.init` takes; LOCAL starts one.
        local: more arguments of `ray.init` for one that is started.

    Raises:
        ConfigError: there is no such cluster, or Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING}
    if address == LOCAL:
        try:
            ray.init(LOCAL, **quiet, **local)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"Ray does not start: {explained(error)}") from error
        return
    try:
        place = canonicalize_bootstrap_address(address) if address == "auto" else address
        if place is None:
            raise ConnectionError("none runs on this machine, and RAY_ADDRESS names none")
        if found := _HOST_AND_PORT.fullmatch(place):  # Ray itself would wait for minutes
            socket.create_connection((found["host"], int(found["port"])), _ANSWER_S).close()
        # A Ray that `ray.init` has started asks for a token, which `ray.init` does not bring along by itself.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError, OverflowError) as error:
        cause = explained(error.__cause__ or error)
        raise ConfigError(
            f"no Ray cluster can be reached at {address}: {cause}; start one ('ray start --head'), correct the "
            "address, or leave it out for a Ray of this machine's own",
            setting="address",
        ) from error
