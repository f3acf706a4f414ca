"""Who may do what: API keys as hashes, their roles, their limits, and the adapters they may use.

Knows keys and HTTP headers; knows nothing of Ray. `Limits` is what `deployments.limits` implements.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request

from deployments import observe
from deployments.browsers import check_no_other_site
from deployments.calls import Refused, Taken, Want
from deployments.config import AccessSettings
from deployments.scope import Permitted, permits
from deployments.told import Audience
from lorauter.errors import ConfigError, PermissionDenied, RateLimited, Unauthenticated
from lorauter.keys import ApiKey, Role, parse_keys

logger = logging.getLogger("lorauter.access")

_RECHECK_S = 1.0
Kind = Literal["requests", "tokens"]
T = TypeVar("T")


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

    def want(self, kind: Kind, amount: int) -> Want | None:
        """An amount against the key's limit; None where it has no such limit."""
        limit = None
        if self.key is not None:
            limit = self.key.requests_per_minute if kind == "requests" else self.key.tokens_per_minute
        return None if limit is None else Want(f"{self.name} {kind}", amount, limit)


class Limits(Protocol):
    """The counters behind the keys' limits."""

    async def take(self, wants: Sequence[Want]) -> Taken | Refused:
        """Take amounts, one after the other: what is left, or which of them is not there, and until when."""

    async def settle(self, want: Want) -> None:
        """Take more, or, with a negative amount, give back."""


class Access:
    """The door.

    Args:
        settings: where the keys are.
        limits: the counters; a service without keys needs none.

    Attributes:
        closed: whether a key is needed.
        cors_origins: whose pages may use the service.

    Raises:
        ConfigError: the keys cannot be read.
    """

    def __init__(self, settings: AccessSettings, limits: Limits | None = None) -> None:
        self.closed = settings.closed
        self.cors_origins = settings.cors_origins
        self._hosts = frozenset(map(str.lower, settings.trusted_hosts))
        self._limits = limits
        self._file = Path(settings.keys_file) if settings.keys_file is not None else None
        self._stamp: tuple[int, ...] | None = None
        self._checked = time.monotonic()
        self._callers: dict[bytes, Caller] = {}
        self._refused: dict[str, tuple[float, int]] = {}  # by bucket, until when, and under which limit
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

    def require(self, request: Request, *roles: Role) -> Visit:
        """A request of somebody whose key has one of these roles; it is the request's `state.visit` from then on.

        Raises:
            Unauthenticated, PermissionDenied; RateLimited, where the limits' word from before still holds.
        """
        caller = self.identify(_credentials(request.headers))
        observe.current().key_name = caller.name
        if caller.key is None:
            check_no_other_site(request, self._hosts, self.cors_origins)
            if "inference" not in roles:
                raise PermissionDenied("this needs an API key with the role 'admin', and no keys are configured")
        elif caller.key.roles.isdisjoint(roles):
            raise PermissionDenied(f"the key {caller.name!r} has not the role that this needs: {' or '.join(roles)}")
        visit = request.state.visit = Visit(caller, self)
        # Each request takes one and none is given back: until there is one again, no other can find one.
        if (want := caller.want("requests", 1)) is not None and (wait_s := self._still_refused(want)):
            visit.note(want, 0.0)
            raise _rate_limited(caller, want, wait_s)
        return visit

    def identify(self, authorization: str | None) -> Caller:
        """Whose key credentials as of an `Authorization` header have. Raises Unauthenticated."""
        if not self.closed:
            return Caller()
        self._reload()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("send an API key in the header 'Authorization: Bearer KEY', or 'x-api-key: KEY'")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()  # the header's own bytes
        caller = self._callers.get(digest)  # nobody can choose a digest: the time that this takes tells nothing
        if caller is None:
            raise Unauthenticated("the API key is not valid")
        return caller

    async def take(self, visit: Visit, wants: Sequence[Want | None]) -> None:
        """Count amounts against the limits of a visit's key, those of them that it has, in one go.

        Raises:
            RateLimited, ServiceUnavailable.
        """
        limited = [want for want in wants if want is not None]
        if not limited:
            return
        assert self._limits is not None
        took = await self._limits.take(limited)
        if isinstance(took, Refused):
            want = limited[took.want]
            self._refused[want.name] = time.monotonic() + took.wait_s, want.per_minute
            visit.note(want, 0.0)
            raise _rate_limited(visit.caller, want, took.wait_s)
        for want, left in zip(limited, took.left, strict=True):
            visit.note(want, left)

    async def settle(self, want: Want) -> None:
        """Count more, or, with a negative amount, give back."""
        assert self._limits is not None
        await self._limits.settle(want)

    def has_room(self, want: Want) -> bool:
        """Whether there may be enough for an amount: no other was refused a moment ago."""
        return not self._still_refused(want)

    def _still_refused(self, want: Want) -> float:
        """The seconds for which the limits' last refusal holds."""
        until, per_minute = self._refused.get(want.name, (0.0, 0))
        return max(0.0, until - time.monotonic()) if per_minute == want.per_minute else 0.0

    def _load(self, text: str, source: str) -> None:
        self._callers = {bytes.fromhex(row.sha256): Caller(row) for row in parse_keys(text, source)}

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
            logger.info("read %d API keys from %s", len(self._callers), self._file)
        except (OSError, UnicodeDecodeError) as error:
            logger.error("the API keys stay as they are: %s cannot be read (%s)", self._file, type(error).__name__)
        except ConfigError as error:
            logger.error("the API keys stay as they are: %s", error)


class Visit:
    """One request, counted once against its key's limits.

    Attributes:
        caller: who sent it.
    """

    def __init__(self, caller: Caller, access: Access) -> None:
        self.caller = caller
        self._access = access
        self._counted = False
        self._left: dict[str, tuple[int, float]] = {}  # by kind: the limit, and what is left of it

    def note(self, want: Want, left: float) -> None:
        """Note what is left of a limit."""
        self._left[_kind(want)] = want.per_minute, max(left, 0.0)

    @property
    def headers(self) -> dict[str, str]:
        """What is left of the key's limits, in OpenAI's words: until `reset` all of it is there again."""
        headers = {}
        for kind, (limit, left) in self._left.items():
            headers[f"x-ratelimit-limit-{kind}"] = str(limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(int(left))
            headers[f"x-ratelimit-reset-{kind}"] = f"{(limit - left) * 60 / limit:.3f}s"
        return headers

    async def count(self) -> None:
        """Count the request, unless it is. Raises RateLimited, ServiceUnavailable."""
        await self._access.take(self, [self._uncounted()])

    async def reserve(
        self, tokens: int, meanwhile: Callable[[], Awaitable[T]], *, at_least: int
    ) -> tuple[Reservation, T]:
        """Count the request, and the tokens that its answer takes at most, while what does not hang on that is done.

        Args:
            meanwhile: is done at the same time, unless the key's last request found no tokens left. What it raises
                comes after a refusal, and gives the tokens back.
            at_least: what the answer takes, if its client leaves before that is known.

        Raises:
            RateLimited, ServiceUnavailable; what `meanwhile` raises.
        """
        want = self.caller.want("tokens", tokens)
        wants = [self._uncounted(), want]
        begun = None
        if any(wants) and (want is None or self._access.has_room(want)):
            begun = asyncio.ensure_future(meanwhile())
            begun.add_done_callback(lambda done: done.cancelled() or done.exception())  # a refusal goes before it
        try:
            await self._access.take(self, wants)
        except BaseException:
            if begun is not None:
                begun.cancel()
            raise
        reservation = Reservation(self._access, want, tokens, at_least)
        try:
            return reservation, await (meanwhile() if begun is None else begun)
        except BaseException as error:
            await reservation.drop(error)
            raise

    def _uncounted(self) -> Want | None:
        """The request itself, the first time that it is asked for."""
        counted, self._counted = self._counted, True
        return None if counted else self.caller.want("requests", 1)


class Reservation:
    """Tokens counted for an answer before it is made."""

    def __init__(self, access: Access, want: Want | None, tokens: int, at_least: int) -> None:
        self.at_least = at_least
        self._access = access
        self._want = want
        self._tokens = tokens

    async def settle(self, used: int) -> None:
        """Count what the answer took in truth, in place of what was thought; once."""
        difference, self._tokens = used - self._tokens, used
        if self._want is not None and difference:
            await self._access.settle(self._want._replace(amount=difference))

    async def drop(self, error: BaseException, used: int = 0) -> None:
        """Count what an error leaves: what was used; where it is the client that has left, not less than the least."""
        await self.settle(used if isinstance(error, Exception) else max(used, self.at_least))


def _credentials(headers: Headers) -> str | None:
    """What an `Authorization` header says; where it holds no key, the key that Anthropic's clients send otherwise."""
    authorization, key = headers.get("authorization"), headers.get("x-api-key")
    scheme, _, own = (authorization or "").partition(" ")
    holds_key = scheme.lower() == "bearer" and own.strip()
    return authorization if holds_key or key is None else f"Bearer {key}"


def _rate_limited(caller: Caller, want: Want, wait_s: float) -> RateLimited:
    problem = f"the key {caller.name!r} may use {want.per_minute} {_kind(want)} a minute"
    return RateLimited(problem, retry_after_s=wait_s)


def _kind(want: Want) -> str:
    return want.name.rpartition(" ")[2]


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes with a file; None while there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
