"""What there is to say of tools: which may be called, and what was called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of a call, or all of it.

    Attributes:
        index: the call's place among the answer's calls.
        arguments: of its arguments, JSON, what follows the pieces before.
        id: in its first piece, by which its result is told.
        name: in its first piece, what is called.
    """

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None
