"""Whatever a grammar of calls lets through is read as calls of their tools, with arguments of their schemas."""

import json
import random

import jsonschema
import pytest

from lorauter.engine import SamplingParams
from lorauter.engine.grammars import Grammars
from lorauter.engine.types import Grammar
from lorauter.errors import InvalidRequest
from lorauter.tools.formats import FORMATS
from lorauter.tools.reading import CallReader, joined
from lorauter.tools.types import Tool, ToolUse

SCHEMAS = {
    "look": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city"],
        "$defs": {"city": {"type": "string", "maxLength": 4}},
    },
    "look_up": {"type": "object", "properties": {"word": {"enum": ["a", "<tool_call>", 'b"']}}, "required": ["word"]},
    "now": {"type": "object", "properties": {}},
}
TOOLS = tuple(Tool(name, json.dumps(schema), f"tools.{name}") for name, schema in SCHEMAS.items())
ANSWER = Grammar("json", '{"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}')


@pytest.fixture
def grammars_of():
    made = []

    def make(codec):
        made.append(Grammars(codec.backend, codec.eos_ids, 259, codec.tool_format))
        return made[-1]

    yield make
    for one in made:
        one.close()


def walk(codec, grammars, use, draw, grammar=None, prefer=b"", most=600):
    """A random answer, as the text of its tokens."""
    held = grammars.begin(grammar, (), use)
    stream, text = codec.stream(SamplingParams(calls=use)), ""
    for step in range(most):
        mask = held.mask().tolist()
        allowed = [token for token in range(32 * len(mask)) if mask[token // 32] >> (token % 32) & 1]
        token = prefer[step] if step < len(prefer) else draw.choice(allowed)
        assert token in allowed
        if token in codec.eos_ids:
            return text + stream.flush()
        text += stream.push(token)[0]
        grammars.advance([(held, token)])
    return None


def read(format, use, text):
    reader = CallReader(FORMATS[format], {tool.name for tool in use.tools}, several=use.several, forced=use.forced)
    said, calls = reader.read(text)
    more, rest = reader.end(cut=False)
    return said + more, joined([*calls, *rest]), reader.called


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_forced_answer_is_calls_and_nothing_else(codec_of, grammars_of, format, several, tokens):
    codec, draw, counts = codec_of(format, tokens=tokens), random.Random(3), set()
    grammars = grammars_of(codec)
    use = ToolUse(TOOLS, forced=True, several=several)
    for _ in range(12):
        text = walk(codec, grammars, use, draw)
        if text is None:
            continue
        said, calls, called = read(format, use, text)
        assert (said, called) == ("", True), text
        for call in calls:
            arguments = json.loads(call.arguments)
            jsonschema.validate(arguments, SCHEMAS[call.name])
            if call.name == "now":
                assert call.arguments == "{}"
            elif "\\" not in call.arguments:
                assert call.arguments == json.dumps(arguments, ensure_ascii=False)  # as templates write it
        counts.add(len(calls))
    assert counts
    assert (max(counts) > 1) == (several and FORMATS[format].several)


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_strict_tools_are_held_to_their_schemas_in_free_text(codec_of, grammars_of, format, tokens):
    codec = codec_of(format, tokens=tokens)
    use = ToolUse((Tool("look", json.dumps(SCHEMAS["look"]), strict=True),))
    assert use.is_held
    grammars = grammars_of(codec)
    assert walk(codec, grammars, use, random.Random(0), prefer=(*b"Hello.", *codec.eos_ids)) == "Hello."
    opener = codec.backend.encode(FORMATS[format].opener, add_special_tokens=False).ids
    begins = () if format == "llama" else tuple(b"So: ")
    for seed in range(6):
        text = walk(codec, grammars, use, random.Random(seed), prefer=(*begins, *opener))
        if text is not None:
            said, calls, _ = read(format, use, text)
            assert said.startswith("So:") or format == "llama"
            jsonschema.validate(json.loads(calls[0].arguments), SCHEMAS["look"])


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_tokens_around_thoughts_may_be_beside_strict_tools(codec_of, grammars_of, format):
    codec = codec_of(format, tokens=True)
    codec.backend.add_tokens(["<think>", "</think>"])
    [begin, end] = (codec.backend.token_to_id(token) for token in ("<think>", "</think>"))
    use = ToolUse((Tool("now", "{}", strict=True),))
    thought = (begin, *b"Hm.", end)
    opener = codec.backend.token_to_id(FORMATS[format].opener)
    for prefer in ((*thought, *b"Yes.", *codec.eos_ids), (*thought, opener)):
        text = walk(codec, grammars_of(codec), use, random.Random(1), prefer=prefer)
        assert text is None or text.startswith("<think>Hm.</think>")
    [control] = set(codec.backend.encode("<start>", add_special_tokens=False).ids)
    with pytest.raises(AssertionError):
        walk(codec, grammars_of(codec), use, random.Random(1), prefer=(control,))


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_what_is_no_call_is_held_to_the_answers_own_grammar(codec_of, grammars_of, format):
    codec, draw = codec_of(format, tokens=True), random.Random(1)
    grammars, use, seen = grammars_of(codec), ToolUse(TOOLS), set()
    for _ in range(20):
        text = walk(codec, grammars, use, draw, ANSWER)
        if text is not None:
            said, calls, _ = read(format, use, text)
            seen.add(bool(calls))
            if not calls:
                assert isinstance(json.loads(said)["x"], bool)
    assert seen == {True, False}


def test_a_schema_that_cannot_be_compiled_is_told_with_its_place(codec_of, grammars_of):
    grammars = grammars_of(codec_of("hermes", tokens=False))
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
    use = ToolUse((TOOLS[0], Tool("f", json.dumps(bad), "tools.1.function.parameters")), forced=True)
    with pytest.raises(InvalidRequest, match=r"function.parameters at properties.a cannot be compiled") as caught:
        grammars.begin(None, (), use)
    assert caught.value.param == "tools.1.function.parameters"


def test_what_is_compiled_is_found_again(codec_of, grammars_of, monkeypatch):
    grammars = grammars_of(codec_of("hermes", tokens=False))
    for forced in (True, False):
        grammars.begin(None, (), ToolUse(TOOLS, forced=forced))
    monkeypatch.setattr(grammars, "_compile", None)
    for forced in (True, False):
        grammars.begin(None, (), ToolUse(TOOLS, forced=forced))
