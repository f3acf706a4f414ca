"""What is followed as JSON is what Python's own reader takes, however it comes."""

import json
import random

import pytest

from lorauter.tools.json_text import JsonScanner, is_object


def value(draw, depth=3):
    kind = draw.randrange(9 if depth else 6)
    if kind == 0:
        return draw.choice([True, False, None])
    if kind == 1:
        return draw.choice([0, -1, 17, 1.5, -2e-7, 1e300])
    if kind < 6:
        return "".join(draw.choice('ab"\\/\n\té😀{}[],: <>') for _ in range(draw.randrange(6)))
    if kind == 6:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {str(value(draw, 0)): value(draw, depth - 1) for _ in range(draw.randrange(4))}


def is_json(text):
    """Strict JSON, which Python's reader is not of itself."""

    def refuse(word):
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def followed(text, cuts=()):
    """The state after a text that comes in pieces, and how far it went."""
    scanner, read = JsonScanner(), 0
    for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True):
        if scanner.state == "open":
            piece = text[start:end]
            read = start + scanner.scan(piece)
    return scanner.state, read


def test_random_values_are_followed_to_their_ends_however_they_come():
    draw = random.Random(1)
    for _ in range(2000):
        text = json.dumps(
            value(draw), ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, None, 1]),
        )  # fmt: skip
        text = " " * draw.randrange(2) + text
        cuts = sorted(draw.sample(range(len(text) + 1), min(len(text), draw.randrange(5))))
        state, read = followed(text + "|", cuts)
        assert (state, read) == ("done", len(text)), text


def test_what_is_no_json_is_known_for_it():
    draw = random.Random(2)
    broken = 0
    for _ in range(6000):
        text = list(json.dumps(value(draw)))
        for _ in range(draw.randrange(1, 3)):
            place = draw.randrange(len(text) + 1)
            text[place : place + draw.randrange(2)] = draw.choice(
                ['"', "\\", "{", "}", "]", ",", ":", "1", "x", "e", " "]
            )
        changed = "".join(text)
        state, read = followed(changed + "|")
        whole = state == "done" and not changed[read:].strip(" \n\t\r")
        assert whole == is_json(changed), changed
        broken += not whole
        cuts = sorted(draw.sample(range(len(changed) + 1), min(len(changed), draw.randrange(5))))
        assert followed(changed + "|", cuts) == (state, read)
    assert broken > 1500


@pytest.mark.parametrize(
    "text",
    [
        "01 ",
        "1. ",
        "-,",
        "[1,]",
        '{"a":1,}',
        '{"a"}',
        '"\t"',
        r'"\x"',
        r'"\u12g4"',
        "nul ",
        "[}",
        "NaN",
        "'a'",
        "]",
        "}",
        ",",
        ":",
        "[" * 500,
    ],
)
def test_malformed_values(text):
    assert followed(text)[0] == "broken"


def test_objects():
    assert is_object('{"a": [1, {"b": null}]}')
    assert not any(map(is_object, ["{", '{"a": 1} ', " {}", "[]", "", '"{}"']))
