"""Grammars in llguidance's terms, and what is wrong with those that cannot be compiled. Knows no tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher, LLParserLimits, grammar_from

from lorauter.engine.types import Grammar
from lorauter.errors import InvalidRequest

_LONGEST = 1 << 20  # characters of one
# A space, or a new line and its indentation: where more may follow, some models make nothing else.
_WHITESPACE = r"( |\n {0,16}|\n\t{0,8})?"
_TRIED = 256  # parts of a schema that are looked at for what is wrong
# Of what a single step may take: about 15 ms.
LIMITS = LLParserLimits(step_lexer_fuel=200_000, step_max_items=50_000)


def check_grammar(grammar: Grammar) -> None:
    """Raise InvalidRequest unless a grammar can be compiled, whatever the tokenizer."""
    check_length(grammar)
    wrong, found = LLMatcher.validate_grammar_with_warnings(source_of(grammar), limits=LIMITS)
    if wrong:
        raise _broken(grammar, one_line(found[0]))


def check_length(grammar: Grammar) -> None:
    """Raise InvalidRequest if a grammar is too long."""
    if len(grammar.text) > _LONGEST:
        raise InvalidRequest(
            f"got {len(grammar.text)} characters; a grammar has at most {_LONGEST}", param=grammar.param
        )


def _broken(grammar: Grammar, problem: str) -> InvalidRequest:
    """The error of a grammar that cannot be compiled: of a schema, with the place."""
    where, problem = _where(grammar, problem) if grammar.kind == "json" else ("", problem)
    return InvalidRequest(f"{grammar.param}{where} cannot be compiled: {problem}", param=grammar.param)


def _where(grammar: Grammar, problem: str) -> tuple[str, str]:
    """The smallest part of a schema that cannot be compiled, and what is wrong with it."""
    schema, path = json.loads(grammar.text), list[str]()
    tried = 0
    root = schema
    while tried < _TRIED:
        for name, part in _parts(schema):
            tried += 1
            defined = {key: root[key] for key in ("$defs", "definitions") if key in root and key not in part}
            whole = json.dumps({**part, **defined})
            compiled = LLMatcher.grammar_from_json_schema(whole)
            wrong, found = LLMatcher.validate_grammar_with_warnings(compiled, limits=LIMITS)
            if wrong:
                schema, path, problem = part, [*path, name], one_line(found[0])
                break
        else:
            break
    return f" at {'.'.join(path)}" if path else "", problem


def _parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas in a schema, with where they are."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if isinstance(value, dict) and key in ("properties", "patternProperties", "$defs", "definitions"):
            yield from ((f"{key}.{name}", part) for name, part in value.items() if isinstance(part, dict))
        elif isinstance(value, list) and key in ("anyOf", "allOf", "oneOf", "prefixItems"):
            yield from ((f"{key}.{i}", part) for i, part in enumerate(value) if isinstance(part, dict))
        elif isinstance(value, dict) and key in ("items", "additionalProperties", "not"):
            yield key, value


def param_of(grammar: Grammar | None) -> str:
    """What of a request an error of its grammar is about."""
    return "tools" if grammar is None else grammar.param


def source_of(grammar: Grammar) -> str:
    """A grammar as llguidance takes it. Raises InvalidRequest."""
    try:
        if grammar.kind == "json":
            options: Any = {"whitespace_pattern": grammar.whitespace or _WHITESPACE}
            return LLMatcher.grammar_from_json_schema(grammar.text, overrides=options)
        if grammar.kind == "choice":
            texts = [json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text)]
            if not texts:
                raise ValueError("there is nothing to choose from")
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
        return grammar_from("regex" if grammar.kind == "regex" else "grammar", grammar.text)
    except ValueError as error:
        raise InvalidRequest(
            f"{grammar.param} cannot be compiled: {one_line(str(error))}", param=grammar.param
        ) from error


def one_line(problem: str) -> str:
    """An error in one line that is not too long, without the parser's state."""
    return " ".join(problem.partition("<state>")[0].split())[:500]
