"""Calls that outlive what they were sent to: what is sent again, how often, and until when.

A call is sent again only if the replica or its node is gone, or has no room, or keeps it waiting, where another may
not; what else a replica has said, be it an error, counts. An answer that was under way goes on from its last token on
another replica, under the mixture that it began with, so that nothing comes twice. Knows nothing of which deployment
is called.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ray.exceptions import RayError, RayTaskError

from deployments.calls import Admitted, Begun, Choice, GenerateCall
from lorauter.engine.types import Chunk
from lorauter.errors import LorauterError, Overloaded, ServiceUnavailable
from lorauter.routing.compose import without

_ATTEMPTS = 3  # a request that kills whoever takes it must not get through them all
_PAUSE_S = 0.1  # before the second attempt; it doubles
_LOOK_S = 1.0  # between two looks at who has a row to spare
_numbers = itertools.count(1)  # of calls


class Others(Protocol):
    """The other replicas; see `deployments.admission`."""

    def goes_on(self, refusal: Overloaded) -> bool:
        """Remember a replica's refusal; whether another may take the call."""

    def elsewhere(self, call: GenerateCall, waited: float) -> Sequence[str]:
        """The replicas that a call had better not be with, its own one among them; none to leave it there."""

    def sent(self, call: int, break_off: Callable[[], object]) -> None:
        """A call is on its way, and can be broken off, by any thread, if whoever has it is gone without a word."""

    def ended(self, call: int) -> None:
        """A call is with no replica any more."""


class _Waits(Exception):
    """A call waits where it had better not."""

    def __init__(self, avoid: Sequence[str]) -> None:
        super().__init__()
        self.avoid = avoid


async def answered(send: Callable[[], Any], *passed_on: Callable[[Any], Any], timeout_s: float) -> Any:
    """The result of a call that may be made more than once, or of the last of several calls in one trip.

    Args:
        send: makes the call; returns a DeploymentResponse.
        passed_on: make further calls, each with the response to the one before, which is not waited for here.
        timeout_s: for all attempts together, the wait for a new replica included.

    Raises:
        ServiceUnavailable: no answer in time.
        Exception: what the replica raised, or the last of Ray's own errors; of several calls, the first that failed.
    """
    try:
        async with asyncio.timeout(timeout_s):
            for attempt in range(_ATTEMPTS):
                responses = [send()]
                for then in passed_on:
                    responses.append(then(responses[-1]))
                try:
                    return _said(await _last(responses))
                except (Exception, asyncio.CancelledError) as error:
                    if _cancelled(error):
                        for response in responses:
                            response.cancel()
                        raise
                    if attempt == _ATTEMPTS - 1 or not _is_gone(error):
                        raise _named(error) from error
                await asyncio.sleep(_PAUSE_S * 2**attempt)
    except TimeoutError as error:
        raise ServiceUnavailable(f"no replica has answered within {timeout_s:g} s") from error
    raise AssertionError("unreachable: the last attempt returns or raises")


async def _last(responses: Sequence[Any]) -> Any:
    """The last one's result; where that fails for want of an earlier one's, the error of that."""
    try:
        return await responses[-1]
    except (Exception, asyncio.CancelledError) as error:
        if not _cancelled(error):
            for response in responses[:-1]:
                await response
        raise


async def generated(
    send: Callable[[GenerateCall], Any],
    call: GenerateCall,
    *,
    timeout_s: float,
    others: Others | None = None,
) -> AsyncGenerator[Admitted | Chunk]:
    """An answer's stream: `Admitted` once, and every chunk once, whichever replicas it takes.

    Args:
        send: makes a streaming call; returns a DeploymentResponseGenerator.
        call: what is asked. Without a seed it gets one, so that another replica would draw the same.
        timeout_s: until the first token of each replica that does not die, the wait for a replica included.
        others: knows the other replicas; without it what one says is the last word.

    Raises:
        ServiceUnavailable: no token in time.
        Exception: what the replica raised, or the last of Ray's own errors.
    """
    if call.sampling.temperature > 0 and call.sampling.seed is None:
        call = replace(call, sampling=replace(call.sampling, seed=random.getrandbits(63)))
    admitted: Admitted | None = None
    left = {choice.place: list(choice.generated) for choice in call.choices}  # what is known of those not ended

    def note(chunk: Chunk) -> None:
        left[chunk.index] += chunk.token_ids
        if chunk.finish_reason is not None:
            del left[chunk.index]

    deaths = 0
    refused: set[str | None] = {None}
    call, loop = replace(call, number=next(_numbers)), asyncio.get_running_loop()
    until = time.monotonic() + timeout_s
    while True:
        stream = send(replace(call, choices=tuple(Choice(index, tuple(tokens)) for index, tokens in left.items())))
        if others is not None:
            others.sent(call.number, functools.partial(loop.call_soon_threadsafe, stream.cancel))
        try:
            begun: Begun = _said(await _first(stream, call, until, timeout_s, others))
            note(begun.chunk)
            if admitted is None:
                admitted = begun.admitted
                kept = without(call.adapters, {adapter.key for adapter in admitted.left_out})
                call = replace(call, adapters=kept, routed=False)  # what another replica can have is another mixture
                yield admitted
            yield begun.chunk
            async for item in stream:
                chunk = _said(item)
                note(chunk)
                yield chunk
            return
        except (Exception, asyncio.CancelledError, GeneratorExit) as error:
            if isinstance(error, GeneratorExit) or _cancelled(error):
                stream.cancel()
                raise
            if not left:  # all of it was there
                return
            if isinstance(error, _Waits):
                call = replace(call, avoid=tuple({*call.avoid, *error.avoid}))
                continue
            if isinstance(error, Overloaded) and others and others.goes_on(error) and error.replica not in refused:
                refused.add(error.replica)
                call = replace(call, avoid=tuple({*call.avoid, str(error.replica)}))
                continue
            deaths += 1
            if deaths == _ATTEMPTS or not _is_gone(error):
                raise _named(error) from error
        finally:
            if others is not None:
                others.ended(call.number)
        await asyncio.sleep(_PAUSE_S * 2 ** (deaths - 1))
        until = time.monotonic() + timeout_s


async def _first(stream: Any, call: GenerateCall, until: float, timeout_s: float, others: Others | None) -> Any:
    """The first that a replica says. Raises _Waits if the call had better wait elsewhere."""
    first = asyncio.ensure_future(anext(stream))
    try:
        while not first.done():
            left = until - time.monotonic()
            await asyncio.wait([first], timeout=max(0.0, min(left, _LOOK_S)))
            if first.done():
                break
            if left <= 0:
                raise ServiceUnavailable(f"no replica has begun to answer within {timeout_s:g} s")
            if others is not None and (avoid := others.elsewhere(call, 1 - left / timeout_s)):
                raise _Waits(avoid)
        return await first
    finally:
        if not first.done():
            stream.cancel()
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)


def _cancelled(error: BaseException) -> bool:
    """Whether the caller is cancelled, and not the call on its dying replica, which Serve tells in the same way."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _is_gone(error: BaseException) -> bool:
    """Whether this is Ray's word on a dead or unreachable replica, and not the replica's own."""
    return isinstance(error, RayError | asyncio.CancelledError) and not isinstance(error, RayTaskError)


def _said(item: Any) -> Any:
    """What a replica has said; raises it, if it is an error."""
    if isinstance(item, LorauterError):
        raise item
    return item


def _named(error: BaseException) -> Exception:
    """An error that no event loop takes for its own."""
    return error if isinstance(error, Exception) else ServiceUnavailable("the request was cancelled on its replica")
