"""Calls that outlive what they were sent to: what is sent again, how often, and until when.

A call is sent again only if the replica or its machine is gone, or has no room, or keeps it waiting, where another may
not; what else a replica has said, be it an error, counts. An answer that was under way goes on from its last token on
another replica, under the mixture that it began with, so that nothing comes twice. Knows nothing of which deployment
is called.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from deployments.calls import Admitted, Begun, Choice, GenerateCall
from deployments.rpc import RpcCall
from deployments.rpc_connection import ConnectionLost
from lorauter.engine.types import Chunk
from lorauter.errors import Overloaded, ServiceUnavailable
from lorauter.routing.compose import without

_ATTEMPTS = 3  # a request that kills whoever takes it must not get through them all
_PAUSE_S = 0.1  # before the second attempt; it doubles
_LOOK_S = 1.0  # between two looks at who has a row to spare


class Sender(Protocol):
    """Who knows the replicas; see `deployments.dispatch`."""

    async def send(self, call: GenerateCall) -> RpcCall:
        """Have a replica answer a call, once there is one."""

    def ended(self, call: GenerateCall) -> None:
        """A call is with no replica any more."""

    def goes_on(self, refusal: Overloaded) -> bool:
        """Remember a replica's refusal; whether another may take the call."""

    def elsewhere(self, call: GenerateCall, waited: float) -> Sequence[str]:
        """The replicas that a call had better not be with, its own one among them; none to leave it there."""


class _Waits(Exception):
    """A call waits where it had better not."""

    def __init__(self, avoid: Sequence[str]) -> None:
        super().__init__()
        self.avoid = avoid


async def answered(send: Callable[[], Awaitable[RpcCall]], *, timeout_s: float) -> Any:
    """The result of a call that may be made more than once.

    Args:
        send: makes the call.
        timeout_s: for all attempts together, the wait for a replica included.

    Raises:
        ServiceUnavailable: no answer in time, or every replica that was asked is gone.
        Exception: what the replica raised.
    """
    try:
        async with asyncio.timeout(timeout_s):
            for attempt in range(_ATTEMPTS):
                try:
                    return await (await send())
                except ConnectionLost as error:
                    if attempt == _ATTEMPTS - 1:
                        raise _gone(error) from error
                await asyncio.sleep(_PAUSE_S * 2**attempt)
    except TimeoutError as error:
        raise ServiceUnavailable(f"no replica has answered within {timeout_s:g} s") from error
    raise AssertionError("unreachable: the last attempt returns or raises")


async def generated(sender: Sender, call: GenerateCall, *, timeout_s: float) -> AsyncGenerator[Admitted | Chunk]:
    """An answer's stream: `Admitted` once, and every chunk once, whichever replicas it takes.

    Args:
        sender: makes the calls.
        call: what is asked. Without a seed it gets one, so that another replica would draw the same.
        timeout_s: until the first token of each replica that does not die, the wait for a replica included.

    Raises:
        ServiceUnavailable: no token in time, or every replica that was asked is gone.
        Exception: what the replica raised.
    """
    if call.sampling.temperature > 0 and call.sampling.seed is None:
        call = replace(call, sampling=replace(call.sampling, seed=random.getrandbits(63)))
    admitted: Admitted | None = None
    left = {choice.place: list(choice.generated) for choice in call.choices}  # what is known of those not ended

    def note(chunk: Chunk) -> None:
        left[chunk.index] += chunk.token_ids
        if chunk.finish_reason is not None:
            del left[chunk.index]

    def again() -> GenerateCall:
        """The call for another replica: what it can have is another mixture, and what is known it goes on after."""
        choices = tuple(Choice(index, tuple(tokens)) for index, tokens in left.items())
        if admitted is None:
            return replace(call, choices=choices)
        kept = without(call.adapters, {adapter.key for adapter in admitted.left_out})
        return replace(call, choices=choices, adapters=kept, routed=False)

    deaths = 0
    refused: set[str | None] = {None}
    until = time.monotonic() + timeout_s
    while True:
        stream: RpcCall | None = None
        try:
            stream = await _sent(sender, call, until, timeout_s)
            begun: Begun = await _first(stream, call, until, timeout_s, sender)
            note(begun.chunk)
            if admitted is None:
                admitted = begun.admitted
                yield admitted
            yield begun.chunk
            async for chunk in stream:
                note(chunk)
                yield chunk
            return
        except _Waits as waits:
            call = replace(call, avoid=tuple({*call.avoid, *waits.avoid}))
            continue
        except Overloaded as error:
            if not sender.goes_on(error) or error.replica in refused:
                raise
            refused.add(error.replica)
            call = replace(call, avoid=tuple({*call.avoid, str(error.replica)}))
            continue
        except ConnectionLost as error:
            if not left:  # all of it was there
                return
            deaths += 1
            if deaths == _ATTEMPTS:
                raise _gone(error) from error
            resumed = again()
        finally:
            if stream is not None:
                stream.cancel()
            sender.ended(call)
        call = resumed
        await asyncio.sleep(_PAUSE_S * 2 ** (deaths - 1))
        until = time.monotonic() + timeout_s


async def _sent(sender: Sender, call: GenerateCall, until: float, timeout_s: float) -> RpcCall:
    """A call on its way. Raises ServiceUnavailable: there is no replica."""
    try:
        async with asyncio.timeout(until - time.monotonic()):
            return await sender.send(call)
    except TimeoutError as error:
        raise ServiceUnavailable(f"there was no replica to answer within {timeout_s:g} s") from error


async def _first(stream: RpcCall, call: GenerateCall, until: float, timeout_s: float, sender: Sender) -> Begun:
    """The first that a replica says. Raises _Waits if the call had better wait elsewhere."""
    left = until - time.monotonic()
    while not await stream.has_said(within=max(0.0, min(left, _LOOK_S))):
        if left <= 0:
            raise ServiceUnavailable(f"no replica has begun to answer within {timeout_s:g} s")
        if avoid := sender.elsewhere(call, 1 - left / timeout_s):
            raise _Waits(avoid)
        left = until - time.monotonic()
    begun: Begun = await anext(stream)
    return begun


def _gone(error: ConnectionLost) -> ServiceUnavailable:
    return ServiceUnavailable(f"no replica has lived to answer: {error}")
