"""Chats with tools for chat templates that know none: all that is said of tools as text, as Hermes' models have it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Turn = dict[str, Any]

_TOLD = """\
You may call functions to answer. These are there, each with a JSON schema of its arguments:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as a JSON object between these tags:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """A chat whose system message tells of tools."""
    told = _TOLD.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    turns = [dict(message) for message in messages]
    if turns[0]["role"] == "system":
        turns[0]["content"] = f"{turns[0]['content']}\n\n{told}".lstrip()
        return turns
    return [{"role": "system", "content": told}, *turns]


def without_tools(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """A chat in which calls of tools and their results are text."""
    turns: list[Turn] = []
    answered = False
    for message in messages:
        said = message["content"]
        for call in message.get("tool_calls", ()):
            function = {name: call["function"][name] for name in ("name", "arguments")}
            said += f"\n<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"
        if message["role"] != "tool":
            turns.append({"role": message["role"], "content": said.lstrip("\n") if "tool_calls" in message else said})
        elif answered:
            turns[-1]["content"] += f"\n<tool_response>\n{said}\n</tool_response>"
        else:
            turns.append({"role": "user", "content": f"<tool_response>\n{said}\n</tool_response>"})
        answered = message["role"] == "tool"
    return turns
