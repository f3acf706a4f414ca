"""Calls are read from text as families of models write it, and however it is cut into pieces."""

import itertools
import json
import random

import pytest

from lorauter.tools.formats import FORMATS
from lorauter.tools.reading import CallReader, joined

NAMES = {"look", "add-up", "now"}
LOOK = ("look", '{"city": "Paris"}')


def read(format, text, cuts=(), *, eager=True, cut=False, names=NAMES, **options):
    """Text and calls of an answer that comes in pieces, and whether it ended in whole calls."""
    reader = CallReader(FORMATS[format], names, eager=eager, **options)
    said, calls = "", []
    for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True):
        more, pieces = reader.read(text[start:end])
        said += more
        calls += pieces
    more, pieces = reader.end(cut=cut)
    calls += pieces
    heads = [piece for piece in calls if piece.name is not None]
    assert [head.index for head in heads] == list(range(len(heads)))
    assert all(head.id and not head.arguments for head in heads)
    assert len({head.id for head in heads}) == len(heads)
    assert [piece.index for piece in calls] == sorted(piece.index for piece in calls)
    return said + more, [(call.name, call.arguments) for call in joined(calls)], reader.called


HERMES = '<tool_call>\n{"name": "look", "arguments": {"city": "Paris"}}\n</tool_call>'
LLAMA = '{"name": "look", "parameters": {"city": "Paris"}}'
MISTRAL = '[TOOL_CALLS] [{"name": "look", "arguments": {"city": "Paris"}}]'
ARGS = '[TOOL_CALLS]look[ARGS]{"city": "Paris"}'
NOW = ("now", "{}")


@pytest.mark.parametrize(
    ("format", "text", "said", "calls"),
    [
        ("hermes", HERMES, "", [LOOK]),
        ("hermes", f"Let me see.\n\n{HERMES}\n", "Let me see.", [LOOK]),
        ("hermes", f"{HERMES}\n{HERMES}", "", [LOOK, LOOK]),
        ("hermes", f"{HERMES}{HERMES}", "", [LOOK, LOOK]),
        ("hermes", f"One {HERMES} two {HERMES} three", "One two three", [LOOK, LOOK]),
        ("hermes", f"{HERMES}\nDone.", "Done.", [LOOK]),
        ("hermes", HERMES.removesuffix("</tool_call>"), "", [LOOK]),  # some models leave it out
        ("hermes", HERMES.replace("\n", ""), "", [LOOK]),
        ("hermes", '<tool_call>{"arguments": {"a": [1, "}"]}, "id": 7, "name": "add-up"}</tool_call>', "",
         [("add-up", '{"a": [1, "}"]}')]),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [NOW]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [NOW]),
        ("hermes", '<tool_call>{"name": "now", "arguments": ""}</tool_call>', "", [NOW]),
        ("hermes", '<tool_call>{"name": "look", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', "", [LOOK]),
        ("hermes", '<tool_call>{"name": "look", "parameters": {"city": "Paris"}}</tool_call>', "", [LOOK]),
        ("hermes", '<tool_call>{"name": "look", "arguments": {"city": "</tool_call>"}}</tool_call>', "",
         [("look", '{"city": "</tool_call>"}')]),
        ("hermes", f"<tool_call>[{LLAMA}, {LLAMA}]</tool_call> so", "so", [LOOK, LOOK]),
        ("hermes", f"<tool_call>[\n{LLAMA}\n]", "", [LOOK]),
        ("hermes", f"<tool_call>\n{LLAMA}\n{LLAMA}\n</tool_call>\n", "", [LOOK, LOOK]),
        ("mistral", f"{MISTRAL} so", "so", [LOOK]),
        ("mistral-args", f"{ARGS}]", "]", [LOOK]),
        ("hermes", "just text <tool", "just text <tool", []),
        ("hermes", " spaced \n", " spaced \n", []),
        ("hermes", "", "", []),
        ("llama", LLAMA, "", [LOOK]),
        ("llama", f" \n{LLAMA}", "", [LOOK]),
        ("llama", f"<|python_tag|>{LLAMA}", "", [LOOK]),
        ("llama", f"{LLAMA}; {LLAMA}", "", [LOOK, LOOK]),
        ("llama", f'{{"type": "function", {LLAMA[1:]}', "", [LOOK]),
        ("llama", f"See: {LLAMA}", f"See: {LLAMA}", []),
        ("llama", f"{LLAMA} and so on", "and so on", [LOOK]),
        ("llama", '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
        ("llama", '{"age": 3}', '{"age": 3}', []),
        ("llama", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ("mistral", MISTRAL, "", [LOOK]),
        ("mistral", MISTRAL.replace("] [", "]["), "", [LOOK]),
        ("mistral", MISTRAL[:-1] + ', {"name": "now", "arguments": {}, "id": "abcdefghi"}]', "", [LOOK, NOW]),
        ("mistral", f"Let me see.{MISTRAL}", "Let me see.", [LOOK]),
        ("mistral", ARGS, "", [LOOK]),
        ("mistral-args", ARGS, "", [LOOK]),
        ("mistral-args", f"Yes.{ARGS}{ARGS}", "Yes.", [LOOK, LOOK]),
        ("mistral-args", '[TOOL_CALLS]look[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}', "", [LOOK]),
        ("mistral-args", '[TOOL_CALLS]look{"city": "Paris"}', "", [LOOK]),
        ("mistral-args", MISTRAL, "", [LOOK]),
    ],
)  # fmt: skip
def test_calls_as_families_write_them(format, text, said, calls):
    for eager, cut in itertools.product([True, False], [True, False]):
        assert read(format, text, eager=eager, cut=cut) == (said, calls, bool(calls))
        assert read(format, text, range(1, len(text)), eager=eager, cut=cut) == (said, calls, bool(calls))


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("hermes", "<tool_call>\nlook(city)\n</tool_call>"),
        ("hermes", '<tool_call>{"name": "nowhere", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": 7, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "arguments": "Paris"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "arguments": nothing}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "name": "now"}</tool_call>'),
        ("hermes", '<tool_call>["look"]</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", '),
        ("hermes", "<tool_call>"),
        ("hermes", "a </tool_call> b"),
        ("hermes", "<tool_call>[]</tool_call>"),
        ("llama", '{"name": "look"'),
        ("mistral", "[TOOL_CALLS] [look]"),
        ("mistral", "[TOOL_CALLS]"),
        ("mistral-args", "[TOOL_CALLS]nowhere[ARGS]{}"),
        ("mistral-args", "[TOOL_CALLS]" + "x" * 1000 + "{}"),
    ],
)
def test_what_is_no_call_is_text(format, text):
    for cuts, eager in itertools.product([(), range(1, len(text))], [True, False]):
        assert read(format, text, cuts, eager=eager) == (text, [], False)


BROKEN = '<tool_call>\n{"name": "look", "arguments": {"city": Paris}}\n</tool_call>'


def test_a_call_that_turns_out_to_be_none_is_text_unless_it_was_given_out():
    assert read("hermes", f"{BROKEN}\n{HERMES}", eager=False) == (BROKEN, [LOOK], True)
    said, calls, called = read("hermes", f"{BROKEN}\n{HERMES}")
    assert (said, calls, called) == ("Paris}}\n</tool_call>", [("look", '{"city": '), LOOK], False)


@pytest.mark.parametrize("eager", [True, False])
def test_a_call_that_is_cut_is_one_with_the_arguments_that_it_has(eager):
    for end in range(HERMES.index('{"city') + 1, HERMES.index("}") + 1):
        said, calls, called = read("hermes", f"Wait. {HERMES[:end]}", eager=eager, cut=True)
        assert (said, called) == ("Wait.", False)
        assert calls == [("look", HERMES[HERMES.index('{"city') : end])]
    unfinished = HERMES[: HERMES.index("Paris")]
    assert read("hermes", unfinished, eager=False) == (unfinished, [], False)  # the model left it so


def test_of_a_forced_call_nothing_is_text():
    for end in range(len(HERMES)):
        said, calls, called = read("hermes", HERMES[:end], cut=True, forced=True)
        assert said == ""
        assert called == (end > HERMES.rindex("}"))
        assert bool(calls) == (end > HERMES.index('{"city'))


@pytest.mark.parametrize("eager", [True, False])
def test_calls_after_the_first_are_dropped_where_there_may_be_one(eager):
    text = f"One {HERMES} {HERMES} two"
    assert read("hermes", text, eager=eager, several=False) == ("One two", [LOOK], True)
    assert read("llama", f"{LLAMA};{LLAMA}", eager=eager, several=False) == ("", [LOOK], True)


def test_calls_are_given_out_as_they_come():
    reader = CallReader(FORMATS["hermes"], NAMES)
    assert reader.read("Hi <tool_") == ("Hi", ())
    assert reader.read('call>{"name": "look", "argu') == ("", ())
    _, [head, first] = reader.read('ments": {"city": "Pa')
    assert (head.index, head.name, head.arguments) == (0, "look", "")
    assert (first.arguments, first.id) == ('{"city": "Pa', None)
    _, [more] = reader.read('ris"}')
    assert more.arguments == 'ris"}'
    assert reader.read("}</tool_call>") == ("", ())
    assert not CallReader(FORMATS["hermes"], NAMES).called


def test_ids_are_such_as_templates_take():
    for format, length in (("mistral", 9), ("mistral-args", 9), ("hermes", 29)):
        assert len(FORMATS[format].new_id()) == length
    assert FORMATS["mistral"].new_id().isalnum()


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_however_an_answer_is_cut_into_pieces_the_same_comes_of_it(format):
    draw = random.Random(format)
    parts = [
        HERMES, LLAMA, MISTRAL, ARGS, BROKEN, FORMATS[format].opener, FORMATS[format].closer, "[ARGS]", ";", ",",
        '{"name": "look", "arguments": {"a": {"b": [1, 2.5e3, null]}}}', "look", "\n ", "é😀", "<", "}", '"', "{", "[",
    ]  # fmt: skip
    called = 0
    for _ in range(600):
        text = "".join(draw.choice(parts) for _ in range(draw.randrange(1, 9)))
        options = {"eager": draw.random() < 0.5, "cut": draw.random() < 0.5, "several": draw.random() < 0.8}
        whole = read(format, text, **options)
        for _ in range(3):
            cuts = sorted(draw.sample(range(len(text) + 1), min(len(text), draw.randrange(12))))
            assert read(format, text, cuts, **options) == whole, text
        assert read(format, text, range(1, len(text)), **options) == whole, text
        if not options["eager"] and not options["cut"]:
            assert all(isinstance(json.loads(arguments), dict) for _, arguments in whole[1])
        if not whole[1]:
            assert whole[0] == text
        called += bool(whole[1])
    assert called > 50
