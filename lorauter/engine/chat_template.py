"""A chat as its template's text, as transformers renders it: `tests/engine/test_chat_template.py` compares the two.

transformers itself would take a second to load in each process that makes prompts, and longer to render one than it
takes to tokenize it. Templates come from whoever made the model: they run in Jinja's sandbox, and see plain values
alone. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

RESERVED = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize "
    "sanitize_control_tokens padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs kwargs".split()
)
"""What is no variable of a template's own: what transformers' `apply_chat_template` is called with."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(lineno)

    def _said(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict` in a template, without what a class lets one reach."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` in a template, without names of Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace of a chat template cannot hold {name!r}")


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes what is special in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class ChatTemplate:
    """A template.

    Args:
        text: it.
        special: the tokenizer's special tokens by name (`bos_token`), which are variables of it.
    """

    def __init__(self, text: str, special: Mapping[str, str]) -> None:
        self._text = text
        self._special = dict(special)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _environment().from_string(self._text)

    @cached_property
    def literals(self) -> str:
        """All that stands in it as text, piece by piece with a null between."""
        tree = _environment().parse(self._text)
        said = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
        said |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        return "\0".join(said)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any],
    ) -> str:
        """The chat as text. Raises ValueError, jinja2.TemplateError: it cannot be had so."""
        if not messages:
            raise ValueError("there is no message")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        chat = [
            _with_reasoning({key: _plain(value) for key, value in turn.items() if value is not None})
            for turn in messages
        ]
        last = None
        if continue_final_message:
            last = chat[-1].get("content")
            if not isinstance(last, str) or "content" not in self._text:
                raise ValueError("the last message has no content that the template would go on with")
            chat[-1] = {**chat[-1], "content": last + _TAG}
        text = self._compiled.render(
            messages=chat,
            tools=_plain(tools) or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**self._special, **_plain(variables)},
        )
        return text if last is None else _up_to(text, last)


def _with_reasoning(turn: dict[str, Any]) -> dict[str, Any]:
    """A message with what it was thinking under the names that templates read."""
    thought = next((turn[name] for name in _REASONING if name in turn), None)
    return turn if thought is None else {"thinking": thought, **turn, "reasoning_content": thought}


def _up_to(text: str, last: str) -> str:
    """A chat that ends with its last message's content, which is marked in it."""
    if last.strip() not in text or _TAG.strip() not in text:
        raise ValueError("the last message cannot be gone on with: the template leaves out a part of it")
    place = text.rindex(_TAG.strip())
    # Where the template has stripped the content, the mark's own space is gone.
    return text[:place] if text.startswith(_TAG, place) else text[:place].rstrip()


def _plain(value: Any) -> Any:
    """A value as JSON has it; what is none of its values by its type's name alone."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    return f"<{type(value).__name__}>"
