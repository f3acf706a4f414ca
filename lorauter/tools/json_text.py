"""JSON that is followed as its text comes: how far it goes, and whether it may become a value. Knows JSON alone."""

from __future__ import annotations

import re
from typing import Literal

State = Literal["open", "done", "broken"]
"""A value that has not ended, one that has, and what is none."""

SPACE = re.compile(r"[ \t\n\r]*")
_DEEPEST = 128
_PLAIN = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]*')  # half a character is no text
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_OF_NUMBERS = re.compile(r"[0-9+\-.eE]*")
_WORDS = {"t": "true", "f": "false", "n": "null"}
_ESCAPED, _HEX = frozenset('"\\/bfnrt'), frozenset("0123456789abcdefABCDEF")


class JsonScanner:
    """Follows one value.

    Attributes:
        state: what is known of it. A number has ended once something else follows.
    """

    def __init__(self) -> None:
        self.state: State = "open"
        self._open: list[str] = []  # brackets
        self._expects = "value"
        self._rest = ""  # of a word, or a number so far
        self._hex = 0

    def scan(self, text: str, start: int = 0) -> int:
        """Go on with a text from `start`; up to where it is of the value: the end, or else the value's, or what broke
        it."""
        place, end = start, len(text)
        while place < end and self.state == "open":
            place = self._step(text, place)
        return place

    def _step(self, text: str, place: int) -> int:
        """One character, or several alike."""
        expects, char = self._expects, text[place]
        if expects == "string":
            return self._in_string(text, place)
        if expects == "number":
            match = _OF_NUMBERS.match(text, place)
            assert match is not None
            self._rest += match[0]
            if match.end() < len(text):
                if _NUMBER.fullmatch(self._rest):
                    self._ended()
                else:
                    self.state = "broken"
            return match.end()
        if expects == "word":
            if char != self._rest[0]:
                self.state = "broken"
                return place
            self._rest = self._rest[1:]
            if not self._rest:
                self._ended()
            return place + 1
        if expects == "escape":
            self._hex = 4 if char == "u" else 0
            self._expects = "hex" if self._hex else "string"
            return self._take(place, char == "u" or char in _ESCAPED)
        if expects == "hex":
            self._hex -= 1
            self._expects = "hex" if self._hex else "string"
            return self._take(place, char in _HEX)
        if char in " \t\n\r":
            return place + 1
        return self._take(place, self._structure(char))

    def _in_string(self, text: str, place: int) -> int:
        match = _PLAIN.match(text, place)
        assert match is not None
        place = match.end()
        if place == len(text):
            return place
        if text[place] == '"':
            self._ended()
        elif text[place] == "\\":
            self._expects = "escape"
        else:
            self.state = "broken"
            return place
        return place + 1

    def _structure(self, char: str) -> bool:
        """A character between strings, numbers and words; whether it may be there."""
        expects = self._expects
        if expects == "colon":
            self._expects = "value"
            return char == ":"
        if expects == "more":
            if char == ",":
                self._expects = "key" if self._open[-1] == "{" else "value"
                return True
            return self._close(char)
        if char == "}" and expects == "first key":
            return self._close(char)
        if expects in ("key", "first key"):
            self._open.append('"')
            self._expects = "string"
            return char == '"'
        if char == "]" and expects == "first value":
            return self._close(char)
        if char in "{[":
            self._open.append(char)
            self._expects = "first key" if char == "{" else "first value"
            return len(self._open) <= _DEEPEST
        if char == '"':
            self._expects = "string"
        elif char in _WORDS:
            self._expects, self._rest = "word", _WORDS[char][1:]
        elif char in "-0123456789":
            self._expects, self._rest = "number", char
        else:
            return False
        return True

    def _close(self, char: str) -> bool:
        fits = {"}": "{", "]": "["}.get(char) == self._open[-1]
        if fits:
            self._open.pop()
            self._ended()
        return fits

    def _ended(self) -> None:
        """A value, or a key, has ended."""
        if self._open and self._open[-1] == '"':
            self._open.pop()
            self._expects = "colon"
        elif self._open:
            self._expects = "more"
        else:
            self.state = "done"

    def _take(self, place: int, fits: bool) -> int:
        if not fits:
            self.state = "broken"
            return place
        return place + 1


def is_object(text: str) -> bool:
    """Whether a text is a JSON object, and nothing else."""
    scanner = JsonScanner()
    return text.startswith("{") and scanner.scan(text) == len(text) and scanner.state == "done"
