"""Which calls go on to another replica: what `deployments.placement` knows, asked by who sends them.

Serve's handles choose a replica once, and know nothing of what it says. A call goes on if the replica has no room for
it, and if it waits there while another replica has a row to spare: queues are as fair as one, however many replicas
there are and whenever one joins them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.calls import GenerateCall
from deployments.placement import Placement, placement_of
from lorauter.errors import Overloaded

_SPARED = 1 / 16  # of `retry_after_s`, for which a replica that has refused a call is not asked again
_HALF = 0.5  # of the time for a first token: then a call is with a replica that does not get to it


class Admission:
    """A deployment's replicas, as those see them who call it from this process.

    Args:
        handle: the deployment's.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._deployment = str(handle.deployment_id)
        self._refusal: Overloaded | None = None  # the last one

    def check(self, coming: int = 0) -> None:
        """Raise Overloaded if no replica has room: to route a request would only slow down those that are there.

        Args:
            coming: requests that are being routed.
        """
        if (placement := self._placement) is not None and placement.full(time.monotonic(), coming):
            refusal = self._refusal or Overloaded("every replica has as many requests as it takes", retry_after_s=1.0)
            raise Overloaded(str(refusal), retry_after_s=refusal.retry_after_s)

    def goes_on(self, refusal: Overloaded) -> bool:
        """Remember a replica's refusal; whether another may take the call."""
        placement = self._placement
        if placement is None or refusal.replica is None:
            return False
        self._refusal, now = refusal, time.monotonic()
        placement.refused(refusal.replica, now + _SPARED * refusal.retry_after_s)
        return not placement.all_refuse(now)

    def elsewhere(self, call: GenerateCall, waited: float) -> Sequence[str]:
        """The replicas that a call had better not be with, its own one among them; none to leave it there.

        Args:
            call: which has no first token yet.
            waited: the share of the time for its first token that has passed.
        """
        if (placement := self._placement) is None:
            return ()
        return placement.elsewhere(call.number, time.monotonic(), avoid=call.avoid, long=waited >= _HALF)

    def sent(self, call: int, break_off: Callable[[], object]) -> None:
        """A call is on its way, and can be broken off, by any thread."""
        if (placement := self._placement) is not None:
            placement.sent(call, break_off)

    def ended(self, call: int) -> None:
        """A call is with no replica any more."""
        if (placement := self._placement) is not None:
            placement.left(call)

    @property
    def _placement(self) -> Placement | None:
        """None before the first call, or with Serve's own request router."""
        return placement_of(self._deployment)
