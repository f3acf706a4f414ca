"""Single calls that are followed as their text comes. Knows how calls are written, not what is around them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Protocol

from lorauter.tools.formats import ARGS, CALL_ID
from lorauter.tools.json_text import SPACE, JsonScanner, State, is_object

_ARGUMENTS = ("arguments", "parameters")
_LONGEST_HEAD = 512
_HEAD = re.compile(rf"\s*(?P<name>[^\s\[{{]+)\s*(?:{re.escape(CALL_ID)}\s*[^\s\[{{]*\s*)?(?:{re.escape(ARGS)})?\s*")


class Scanner(Protocol):
    """Follows one call.

    Attributes:
        state: what is known of it.
        name: what is called, once it is known: one of the names there are.
    """

    state: State
    name: str | None

    def scan(self, text: str, start: int = 0) -> int:
        """Go on with a text from `start`; up to where it is of the call."""

    @property
    def begun(self) -> bool:
        """Whether the name is known, and the beginning of the arguments."""

    def take(self) -> str:
        """What is new of the arguments."""


class ObjectScanner:
    """Follows `{"name": ..., "arguments": {...}}`: its fields come in any order, and others with them.

    Arguments that were left out are none, and those that are a text, as some models have it, are what the text says.

    Args:
        names: of what may be called.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.state: State = "open"
        self.name: str | None = None
        self._names = names
        self._expects = "object"
        self._value = JsonScanner()
        self._raw = ""  # of a key or a value whose whole text counts
        self._key = ""
        self._seen: set[str] = set()
        self._arguments = ""
        self._streams = False  # the value is the arguments, as they are
        self._has_arguments = False

    @property
    def begun(self) -> bool:
        """See `Scanner`."""
        return self.name is not None and self._has_arguments

    def take(self) -> str:
        """See `Scanner`."""
        taken, self._arguments = self._arguments, ""
        return taken

    def scan(self, text: str, start: int = 0) -> int:
        """See `Scanner`."""
        place = start
        while place < len(text) and self.state == "open":
            if self._expects in ("in key", "in value"):
                place = self._go_on(text, place)
                continue
            match = SPACE.match(text, place)
            assert match is not None
            place = match.end()
            if place < len(text):
                place += self._structure(text[place])
        return place

    def _structure(self, char: str) -> int:
        """A character between keys and values; how far that goes."""
        expects = self._expects
        if expects == "value":
            self._begin("in value")
            if self._key in _ARGUMENTS:
                self._streams = char == "{"
                self._has_arguments = self._streams
                if char not in '{"n':
                    self.state = "broken"
            return 0
        if char == '"' and expects in ("key", "first key"):
            self._begin("in key")
            return 0
        if char == "}" and expects in ("more", "first key"):
            self._end()
            return 1 if self.state == "done" else 0
        follows = {("object", "{"): "first key", ("colon", ":"): "value", ("more", ","): "key"}.get((expects, char))
        if follows is None:
            self.state = "broken"
            return 0
        self._expects = follows
        return 1

    def _begin(self, expects: str) -> None:
        self._expects, self._value, self._raw = expects, JsonScanner(), ""

    def _go_on(self, text: str, place: int) -> int:
        end = self._value.scan(text, place)
        if self._streams:
            self._arguments += text[place:end]
        else:
            self._raw += text[place:end]
        if self._value.state == "broken":
            self.state = "broken"
        elif self._value.state == "done" and self._expects == "in key":
            self._known(json.loads(self._raw))
        elif self._value.state == "done":
            self._told()
        return end

    def _known(self, key: str) -> None:
        """A key."""
        self._key = _ARGUMENTS[0] if key in _ARGUMENTS else key
        self._expects = "colon"
        if self._key in self._seen:
            self.state = "broken"
        self._seen.add(self._key)

    def _told(self) -> None:
        """A value."""
        self._expects = "more"
        if self._key == "name":
            name = json.loads(self._raw) if self._raw.startswith('"') else None
            if name in self._names:
                self.name = name
            else:
                self.state = "broken"
        elif self._key in _ARGUMENTS and not self._streams:
            said = "{}" if self._raw == "null" else json.loads(self._raw).strip()
            if is_object(said or "{}"):
                self._arguments, self._has_arguments = said or "{}", True
            else:
                self.state = "broken"
        self._streams = False

    def _end(self) -> None:
        if self.name is None:
            self.state = "broken"
            return
        if not self._has_arguments:
            self._arguments, self._has_arguments = "{}", True
        self.state = "done"


class NamedScanner:
    """Follows `name[ARGS]{...}`.

    Args:
        names: of what may be called.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.state: State = "open"
        self.name: str | None = None
        self._names = names
        self._head = ""
        self._value = JsonScanner()
        self._arguments = ""

    @property
    def begun(self) -> bool:
        """See `Scanner`."""
        return self.name is not None

    def take(self) -> str:
        """See `Scanner`."""
        taken, self._arguments = self._arguments, ""
        return taken

    def scan(self, text: str, start: int = 0) -> int:
        """See `Scanner`."""
        place = start
        if self.name is None:
            brace = text.find("{", start)
            end = len(text) if brace < 0 else brace
            end = min(end, start + _LONGEST_HEAD - len(self._head))
            self._head += text[start:end]
            place = end
            if brace != end:
                self.state = "broken" if len(self._head) == _LONGEST_HEAD else "open"
                return place
            match = _HEAD.fullmatch(self._head)
            if match is None or match["name"] not in self._names:
                self.state = "broken"
                return place
            self.name = match["name"]
        end = self._value.scan(text, place)
        self._arguments += text[place:end]
        self.state = self._value.state
        return end
