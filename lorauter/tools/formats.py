"""How the families of models write calls of tools. Knows the marks around calls and what is in them, as values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import SystemRandom
from typing import Literal

FormatName = Literal["hermes", "llama", "mistral", "mistral-args"]
FormatSetting = Literal["auto", FormatName]
_RANDOM = SystemRandom()
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def _long_id() -> str:
    return "call_" + "".join(_RANDOM.choices(_LETTERS, k=24))


def _short_id() -> str:
    return "".join(_RANDOM.choices(_LETTERS, k=9))


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written: after `opener` a call, or several, up to `closer`.

    A call is an object, `{"name": ..., <arguments>: {...}}`, or with `named` its name, `[ARGS]`, and its arguments.

    Attributes:
        name: the family's.
        opener: what begins calls.
        closer: what ends them; may be left out, and empty where nothing does.
        listed: behind one opener is a list of all calls.
        separator: what is between two calls behind one opener that are no list; empty where each has its own.
        space: what is written between opener, call and closer.
        arguments: the field of a call that has its arguments.
        bare: an answer may begin with a call without an opener, and is forced to.
        named: see above; where `listed` or this is set, both are read.
        several: whether an answer of several calls can be told to the model again, by its template.
        new_id: a fresh id of a call, such as the template takes.
    """

    name: FormatName
    opener: str
    closer: str = ""
    listed: bool = False
    separator: str = ""
    space: str = ""
    arguments: str = "arguments"
    bare: bool = False
    named: bool = False
    several: bool = True
    new_id: Callable[[], str] = _long_id

    @property
    def marks(self) -> tuple[str, ...]:
        """What may be a token of its own, which no text is."""
        return (self.opener, *filter(None, [self.closer]), *((CALL_ID, ARGS) if self.reads_names else ()))

    @property
    def reads_names(self) -> bool:
        """Whether a call may be written with its name before its arguments."""
        return self.listed or self.named


CALL_ID, ARGS = "[CALL_ID]", "[ARGS]"
_MISTRAL = "[TOOL_CALLS]"
FORMATS: dict[FormatName, ToolFormat] = {
    "hermes": ToolFormat("hermes", "<tool_call>", "</tool_call>", space="\n"),
    "llama": ToolFormat("llama", "<|python_tag|>", separator=";", arguments="parameters", bare=True, several=False),
    "mistral": ToolFormat("mistral", _MISTRAL, listed=True, new_id=_short_id),
    "mistral-args": ToolFormat("mistral-args", _MISTRAL, named=True, new_id=_short_id),
}


def knows_tools(template: str) -> bool:
    """Whether a chat template shows the model the tools there are."""
    return re.search(r"\btools\b", template) is not None


def found_in(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, if it is one of these."""
    if _MISTRAL in template:
        return FORMATS["mistral-args" if ARGS in template else "mistral"]
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return FORMATS["hermes"]
    if '"parameters": ' in template and "ipython" in template:
        return FORMATS["llama"]
    return None
