"""What there is to say of tools: which may be called, and what was called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tool:
    """What may be called.

    Attributes:
        name: what it is called by.
        schema: JSON schema of its arguments, an object's, as text.
        param: what the request calls the schema, for errors.
        strict: a call has to be of the schema, also where none is forced.
    """

    name: str
    schema: str
    param: str = "tools"
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools an answer may call, or has to.

    Attributes:
        tools: those that may be called; at least one.
        forced: the answer is a call of one of them, and nothing else.
        several: it may have more than one call.
    """

    tools: tuple[Tool, ...]
    forced: bool = False
    several: bool = True

    @property
    def is_held(self) -> bool:
        """Whether the answer has to be of a grammar for their sake."""
        return self.forced or any(tool.strict for tool in self.tools)


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of a call, or all of it.

    Attributes:
        index: the call's place among the answer's calls.
        arguments: of its arguments, JSON, what follows the pieces before.
        id: in its first piece, by which its result is told.
        name: in its first piece, what is called.
        after: in its first piece, how many characters of the answer's text come before it.
    """

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None
    after: int = 0
