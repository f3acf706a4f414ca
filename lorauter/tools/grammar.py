"""Grammars of answers that call tools, in llguidance's terms. Knows how families write calls; compiles nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorauter.tools.formats import ARGS, ToolFormat
from lorauter.tools.types import Tool, ToolUse

_AS_TEMPLATES_WRITE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Where these are, an object may have to have what `properties` does not list.
_OPEN = ("additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref", "if")


def calls_grammar(
    format: ToolFormat,
    use: ToolUse,
    ids: Mapping[str, int],
    *,
    beside: Sequence[int] = (),
    answer: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A grammar of answers: calls of tools by their schemas, and, where none is forced, text or another grammar's.

    Args:
        format: how calls are written.
        use: which.
        ids: the tokens of the format's marks, where they are tokens.
        beside: further tokens that may be in text and are none, such as those around a model's thoughts.
        answer: the grammars of what is no call, the first of which begins; without any it is text.
    """
    rules = _Rules(format, use, ids, beside)
    start = rules.forced() if use.forced else rules.free("answer" if answer else "text")
    lark = [f"start: {start}", f"call: {' | '.join(rules.calls())}", *rules.lines]
    schemas = [{"name": f"arguments_{place}", "json_schema": _schema(tool)} for place, tool in enumerate(use.tools)]
    others = [{**grammar, "name": "answer"} if place == 0 else dict(grammar) for place, grammar in enumerate(answer)]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lark)}, *schemas, *others]})


class _Rules:
    def __init__(self, format: ToolFormat, use: ToolUse, ids: Mapping[str, int], beside: Sequence[int]) -> None:
        self._format = format
        self._use = use
        self._ids = ids
        self._beside = ",".join(map(str, beside))
        self.lines: list[str] = []

    def calls(self) -> list[str]:
        """A call of each tool, without what is around it."""
        calls = []
        for place, tool in enumerate(self._use.tools):
            arguments = f"@arguments_{place}"
            if self._format.named:
                calls.append(f"{_text(tool.name)} {self._mark(ARGS)} {arguments}")
            else:
                begin = f'{{"name": {json.dumps(tool.name)}, "{self._format.arguments}": '
                calls.append(f'{_text(begin)} {arguments} "}}"')
        return calls

    def forced(self) -> str:
        """Calls, and nothing else."""
        if self._format.bare:
            return "call"
        unit = f"{self._mark(self._format.opener)} {self._behind()}"
        between = _text(self._format.space)
        return f"{unit} ({between} {unit})*" if self._several_openers else unit

    def free(self, other: str) -> str:
        """Calls, or something else; text may be beside calls."""
        opener = self._mark(self._format.opener)
        if other == "answer":
            self.lines.append("answer: @answer")
            # A call without an opener would begin as other JSON does.
            return f"answer | {f'{opener} call' if self._format.bare else self.forced()}"
        more = f"(<[{self._beside}]> TEXT)*" if self._beside else ""
        self.lines += [f"text: TEXT {more}", r"TEXT: /(.|\n)*/"]
        before = "TEXT"
        if self._format.bare:
            self.lines += [f"plain: PLAIN {more}", r"PLAIN: /([^{ \t\r\n](.|\n)*)?/"]
            before = "PLAIN"
        if self._format.opener in self._ids:
            self.lines.append(f"opened: {before} {more} {opener}")
        else:  # whatever comes up to its end belongs to it: no text goes on beyond it
            self.lines.append(f"opened[lazy]: {before} {opener}")
        if self._format.bare:
            return "call | opened call text | plain"
        return f"(opened {self._behind()}){'*' if self._several_openers else '?'} text"

    @property
    def _several_openers(self) -> bool:
        return self._several and not self._format.listed

    @property
    def _several(self) -> bool:
        return self._use.several and self._format.several

    def _behind(self) -> str:
        """What follows an opener, up to the closer."""
        format = self._format
        if format.listed:
            more = '("," " "? call)*' if self._several else ""
            return f'" "? "[" call {more} "]"'
        space, closer = _text(format.space), self._mark(format.closer)
        return " ".join(filter(None, (space, "call", space, closer)))

    def _mark(self, mark: str) -> str:
        return f"<[{self._ids[mark]}]>" if mark in self._ids else _text(mark)


def _text(text: str) -> str:
    """A text in Lark's language; none is nothing."""
    return json.dumps(text) if text else ""


def _schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments; of an object that lists its properties, these and no others."""
    schema = json.loads(tool.schema)
    schema = {"type": "object", **schema}
    if "properties" in schema and not any(name in schema for name in _OPEN):
        schema["additionalProperties"] = False
    return {**schema, "x-guidance": _AS_TEMPLATES_WRITE}
