"""Who may do what: API keys as hashes, their roles, their limits, and the adapters they may use.

Knows keys and HTTP headers; knows nothing of Ray. `Limits` is what `deployments.limits` implements.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from starlette.requests import Request

from deployments import observe
from deployments.browsers import check_no_other_site
from deployments.config import AccessSettings
from deployments.scope import Permitted, permits
from deployments.told import Audience
from lorauter.errors import ConfigError, PermissionDenied, RateLimited, Unauthenticated
from lorauter.keys import ApiKey, Role, parse_keys

logger = logging.getLogger("lorauter.access")

_RECHECK_S = 1.0


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request: a key's rights, or everybody's of a service without keys."""

    key: ApiKey | None = None

    @property
    def name(self) -> str | None:
        """The key's name; None without keys."""
        return self.key.name if self.key else None

    @property
    def permitted(self) -> Permitted:
        """The patterns of adapters that may be used; None is all."""
        patterns = self.key.adapters if self.key else None
        return None if patterns is None or "*" in patterns else patterns

    @property
    def audience(self) -> Audience:
        """What errors may tell."""
        if self.permitted is not None:
            return "limited"
        return "operator" if self.key is not None and "admin" in self.key.roles else "unlimited"

    def permits(self, adapter: str) -> bool:
        """Whether an adapter may be used."""
        return permits(self.permitted, adapter)


class Limits(Protocol):
    """The counters behind the keys' limits."""

    async def take(self, name: str, amount: float, per_minute: int) -> float:
        """Take an amount, if it is there: 0.0; else the seconds until it will be."""

    async def settle(self, name: str, amount: float, per_minute: int) -> None:
        """Take more, or, with a negative amount, give back."""


class Access:
    """The door.

    Args:
        settings: where the keys are.
        limits: the counters; a service without keys needs none.

    Raises:
        ConfigError: the keys cannot be read.
    """

    def __init__(self, settings: AccessSettings, limits: Limits | None = None) -> None:
        self._closed = settings.closed
        self._hosts = frozenset(map(str.lower, settings.trusted_hosts))
        self._limits = limits
        self._file = Path(settings.keys_file) if settings.keys_file is not None else None
        self._stamp: tuple[int, ...] | None = None
        self._checked = time.monotonic()
        self._rows: list[tuple[bytes, Caller]] = []
        if self._file is not None:
            try:
                self._stamp = _stamp(self._file)
                self._load(self._file.read_text(), str(self._file))
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"the keys cannot be read: {error}", setting="access.keys_file"
                ) from None  # a decoding error's context would show the file
        elif settings.keys_env is not None:
            text = os.environ.get(settings.keys_env)
            if text is None:
                raise ConfigError(
                    f"the environment variable {settings.keys_env} is not set on this machine; it should hold the keys",
                    setting="access.keys_env",
                )
            self._load(text, settings.keys_env)
        else:
            logger.warning("no API keys are configured: everybody who reaches the service may use it")

    async def require(self, request: Request, *roles: Role) -> Caller:
        """Who sent a request, if the key has one of these roles; counted against its limit of requests.

        Raises:
            Unauthenticated, PermissionDenied, RateLimited, ServiceUnavailable.
        """
        caller = self.identify(request.headers.get("authorization"))
        observe.current().key_name = caller.name
        if caller.key is None:
            check_no_other_site(request, self._hosts)
            if "inference" not in roles:
                raise PermissionDenied("this needs an API key with the role 'admin', and no keys are configured")
            return caller
        if caller.key.roles.isdisjoint(roles):
            raise PermissionDenied(f"the key {caller.name!r} has not the role that this needs: {' or '.join(roles)}")
        await self._take(caller, "requests", 1, caller.key.requests_per_minute)
        return caller

    def identify(self, authorization: str | None) -> Caller:
        """Whose key an `Authorization` header carries. Raises Unauthenticated."""
        if not self._closed:
            return Caller()
        self._reload()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("send an API key in the header 'Authorization: Bearer KEY'")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()  # the header's own bytes
        found = None
        for known, caller in self._rows:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthenticated("the API key is not valid")
        return found

    async def reserve(self, caller: Caller, tokens: int, *, at_least: int = 0) -> Reservation:
        """Count tokens that an answer is about to take at most, and what it takes at least.

        Raises:
            RateLimited, ServiceUnavailable.
        """
        limit = caller.key.tokens_per_minute if caller.key else None
        await self._take(caller, "tokens", tokens, limit)
        return Reservation(caller, tokens, at_least, limit, self._limits)

    async def _take(self, caller: Caller, kind: str, amount: int, limit: int | None) -> None:
        if limit is None:
            return
        assert self._limits is not None
        wait = await self._limits.take(f"{caller.name} {kind}", amount, limit)
        if wait:
            raise RateLimited(f"the key {caller.name!r} may use {limit} {kind} a minute", retry_after_s=wait)

    def _load(self, text: str, source: str) -> None:
        self._rows = [(bytes.fromhex(row.sha256), Caller(row)) for row in parse_keys(text, source)]

    def _reload(self) -> None:
        """Read the file again if it has changed; while it is missing or wrong, the keys stay as they were."""
        now = time.monotonic()
        if self._file is None or now - self._checked < _RECHECK_S:
            return
        self._checked = now
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._load(self._file.read_text(), str(self._file))
            logger.info("read %d API keys from %s", len(self._rows), self._file)
        except (OSError, UnicodeDecodeError) as error:
            logger.error("the API keys stay as they are: %s cannot be read (%s)", self._file, type(error).__name__)
        except ConfigError as error:
            logger.error("the API keys stay as they are: %s", error)


class Reservation:
    """Tokens counted for an answer before it is made.

    Attributes:
        at_least: what it takes, if its client leaves before that is known.
    """

    def __init__(self, caller: Caller, tokens: int, at_least: int, limit: int | None, limits: Limits | None) -> None:
        self.at_least = at_least
        self._caller = caller
        self._tokens = tokens
        self._limit = limit
        self._limits = limits

    async def settle(self, used: int) -> None:
        """Count what the answer took in truth, in place of what was thought; once."""
        difference, self._tokens = used - self._tokens, used
        if self._limit is not None and self._limits is not None and difference:
            await self._limits.settle(f"{self._caller.name} tokens", difference, self._limit)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes with a file; None while there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
