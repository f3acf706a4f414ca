"""Calls of tools read from an answer's text as it comes. Knows how families write calls; knows no API and no tokens.

    reader = CallReader(FORMATS["hermes"], {"look"})
    for piece in answer:
        text, calls = reader.read(piece)
    text, calls = reader.end(cut=False)

What is no call is text, the marks around it too: a call of a name that there is not, one that is no JSON, one that the
model leaves unfinished. Nothing is given out before it is certain. However the text is cut into pieces, the same comes
of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from lorauter.tools.formats import ToolFormat
from lorauter.tools.json_text import SPACE
from lorauter.tools.scanning import NamedScanner, ObjectScanner, Scanner
from lorauter.tools.types import CallPiece

Read = tuple[str, tuple[CallPiece, ...]]
"""New text, and new pieces of calls."""


class CallReader:
    """Reads one answer.

    Args:
        format: how calls are written in it.
        names: of what may be called; a call of anything else is text.
        eager: calls are given out as they come. What is given out stays: a call that turns out to be no JSON keeps the
            arguments that it has by then, and what follows is text. Else a call is given out once it is whole.
        several: calls after the first are given out too; else they are dropped.
        forced: the answer is nothing but calls: what is part of none is dropped.
    """

    def __init__(
        self,
        format: ToolFormat,
        names: Collection[str],
        *,
        eager: bool = True,
        several: bool = True,
        forced: bool = False,
    ) -> None:
        self._format = format
        self._names = names
        self._eager = eager
        self._several = several
        self._forced = forced
        self._state = "start" if format.bare else "text"
        self._pending = ""  # what has come and is not read
        self._raw = ""  # what has been read since the last certain thing, in a call
        self._space = ""  # at the text's end: dropped where a call follows
        self._said = False
        self._listed = False
        self._scanner: Scanner | None = None
        self._index = -1  # of the call that was given out last
        self._given = False  # the call that is being read
        self._whole = 0
        self._text: list[str] = []
        self._told = 0  # characters of text
        self._calls: list[CallPiece] = []

    @property
    def called(self) -> bool:
        """Whether there are calls, and all of them are whole."""
        return self._whole == self._index + 1 > 0

    def read(self, text: str) -> Read:
        """What is certain with a further piece of the answer."""
        self._pending += text
        self._go_on(last=False)
        return self._taken()

    def end(self, *, cut: bool) -> Read:
        """What there is left to say of the answer.

        Args:
            cut: it was not the model that ended it: a call that has begun is one, with the arguments that it has.
        """
        self._go_on(last=True)
        scanner = self._scanner
        if self._state == "call" and scanner is not None and scanner.begun and (cut or self._given):
            self._give(scanner)
        else:
            self._say(self._raw)
        if self._index < 0 and not self._forced:
            self._tell(self._space)
        return self._taken()

    def _taken(self) -> Read:
        taken = "".join(self._text), tuple(self._calls)
        self._text, self._calls = [], []
        return taken

    def _go_on(self, *, last: bool) -> None:
        while self._pending and self._step(last):
            pass

    def _say(self, text: str) -> None:
        """Text, its last space held back."""
        self._raw = ""
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        if self._forced or not said:
            return
        if not self._said and self._index >= 0:  # before it are calls, and nothing else
            said = said.lstrip()
        self._said = True
        self._tell(said)

    def _tell(self, text: str) -> None:
        self._text.append(text)
        self._told += len(text)

    def _drop(self, characters: int) -> None:
        """So many characters are read, and may be part of a call."""
        if not self._given:
            self._raw += self._pending[:characters]
        self._pending = self._pending[characters:]

    def _step(self, last: bool) -> bool:
        """Read some of what is pending; whether another step may follow."""
        match self._state:
            case "start":
                return self._at_start(last)
            case "text":
                return self._in_text(last)
            case "opened":
                return self._opened()
            case "before call":
                return self._before_call()
            case "call":
                return self._in_call()
            case _:
                return self._after_call(last)

    def _at_start(self, last: bool) -> bool:
        begins = self._pending.lstrip()
        if not begins and not last:
            return False
        self._state = "before call" if begins.startswith("{") else "text"
        return True

    def _in_text(self, last: bool) -> bool:
        opener = self._format.opener
        place = self._pending.find(opener)
        if place >= 0:
            self._say(self._pending[:place])
            self._pending = self._pending[place:]
            self._drop(len(opener))
            self._state = "opened"
            return True
        held = 0 if last else _overlap(self._pending, opener)
        self._say(self._pending[: len(self._pending) - held])
        self._pending = self._pending[len(self._pending) - held :]
        return False

    def _opened(self) -> bool:
        self._skip_space()
        if not self._pending:
            return False
        self._listed = self._pending.startswith("[")
        if self._listed:
            self._drop(1)
        self._state = "before call"
        return True

    def _before_call(self) -> bool:
        self._skip_space()
        if not self._pending:
            return False
        named = self._format.reads_names and not self._pending.startswith("{")
        self._scanner = (NamedScanner if named else ObjectScanner)(self._names)
        self._state = "call"
        return True

    def _in_call(self) -> bool:
        scanner = self._scanner
        assert scanner is not None
        self._drop(scanner.scan(self._pending))
        if scanner.state == "done" or (self._eager and scanner.begun):
            self._give(scanner)
        elif scanner.state == "broken":
            self._say(self._raw)
        if scanner.state == "open":
            return False
        self._state = "text"
        if scanner.state == "done":
            self._whole += self._given
            self._state = "after call"
        self._raw, self._given = "", False
        return True

    def _after_call(self, last: bool) -> bool:
        self._skip_space()
        rest, closer = self._pending, self._format.closer
        if not rest:
            return False
        if rest[0] == ("," if self._listed else self._format.separator):
            self._drop(1)
            self._state = "before call"
        elif closer and not self._listed and rest[0] == "{":  # some models write one call after the other
            self._state = "before call"
        elif self._listed and rest[0] == "]":
            self._listed, self._raw, self._pending = False, "", rest[1:]
        elif closer and rest.startswith(closer):
            self._raw, self._pending, self._state = "", rest[len(closer) :], "text"
        elif closer.startswith(rest):  # it may yet become one, or was cut
            if last:
                self._pending = ""
            return False
        else:
            self._say(self._raw)
            self._state = "text"
        return True

    def _skip_space(self) -> None:
        match = SPACE.match(self._pending)
        assert match is not None
        self._drop(match.end())

    def _give(self, scanner: Scanner) -> None:
        """Give out what is new of a call."""
        if not self._given:
            self._space = ""
            if self._index >= 0 and not self._several:
                return
            self._given = True
            self._index += 1
            self._calls.append(CallPiece(self._index, "", self._format.new_id(), scanner.name, self._told))
        if arguments := scanner.take():
            self._calls.append(CallPiece(self._index, arguments))


def _overlap(text: str, mark: str) -> int:
    """How much of a text's end may yet become a mark."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def joined(pieces: Sequence[CallPiece]) -> tuple[CallPiece, ...]:
    """Pieces of calls as whole calls."""
    whole: dict[int, CallPiece] = {}
    for piece in pieces:
        first = whole.get(piece.index)
        if first is not None:
            piece = replace(first, arguments=first.arguments + piece.arguments)
        whole[piece.index] = piece
    return tuple(whole.values())
