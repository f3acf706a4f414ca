"""Steps on their way to and from a GPU: the host's memory that they read and write, which is pinned and made once.

Nothing here waits for the GPU but whoever takes a step's tokens, or needs memory that a step long past still has. Knows
nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorauter.engine.logprobs import StepRanks
from lorauter.engine.plan import Ints

_STEPS = 4  # a step that is computed, one that waits behind it, and choices beside them


class Staging:
    """The host's memory of one step or choice.

    Args:
        numbers: that it may read.
        tokens: that it may bring.
        device: of the GPU; on another nothing is pinned.

    Attributes:
        numbers: to be written before it is launched.
    """

    def __init__(self, numbers: int, tokens: int, device: torch.device) -> None:
        pin = device.type == "cuda"
        self._numbers = torch.zeros(numbers, dtype=torch.int32, pin_memory=pin)
        self.numbers: Ints = self._numbers.numpy()
        self._tokens = torch.zeros(tokens, dtype=torch.int32, pin_memory=pin)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._flight: CudaFlight | None = None

    def send(self, to: Tensor) -> None:
        """The first numbers, as many as `to` has, are on their way there."""
        to.copy_(self._numbers[: len(to)], non_blocking=True)

    def launched(self, tokens: Tensor, ranks: StepRanks | None, places: Sequence[int] | None) -> CudaFlight:
        """What has been launched so far brings these tokens (n,) int32, on the device."""
        host = self._tokens[: len(tokens)]
        host.copy_(tokens, non_blocking=True)
        self._done.record()
        self._flight = CudaFlight(host, ranks, self._done, places)
        return self._flight

    def free(self) -> None:
        """Wait until what had it last has no use for it."""
        if self._flight is not None:
            self._flight.wait()
            self._flight = None


class CudaFlight:
    """A step or choice on its way: `tokens` is on the host once `done` has happened, those at `places` its result."""

    def __init__(
        self, tokens: Tensor, ranks: StepRanks | None, done: torch.cuda.Event, places: Sequence[int] | None
    ) -> None:
        self._tokens = tokens
        self.ranks = ranks
        self.done = done
        self._places = places
        self._result: list[int] | None = None

    @property
    def computed(self) -> bool:
        """See `Flight.computed`."""
        return self._result is not None or bool(self.done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[int]:
        """See `Flight.wait`."""
        if self._result is None:
            self.done.synchronize()
            result: list[int] = self._tokens.tolist()
            self._result = result if self._places is None else [result[place] for place in self._places]
        return self._result


class StagingRing:
    """The memory of steps, which take turns. Arguments are `Staging`'s."""

    def __init__(self, numbers: int, tokens: int, device: torch.device) -> None:
        self._all = [Staging(numbers, tokens, device) for _ in range(_STEPS)]
        self._next = 0

    def take(self) -> Staging:
        """That of the next step."""
        staging = self._all[self._next]
        self._next = (self._next + 1) % _STEPS
        staging.free()
        return staging
