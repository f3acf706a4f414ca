"""What a run of the command line left behind, for the tests of its commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    code: object
    out: str
    err: str

    def refused(self, part: str) -> None:
        """It ended with one line of error that holds `part`."""
        *before, last = self.err.splitlines()
        assert self.code == 1, self
        assert last.startswith("error: "), self
        assert part in last, self
        assert not any(line.startswith(("error", "Traceback")) for line in before), self


Cli = Callable[..., Ran]
"""Runs `lorauter` with arguments to its end."""
