"""Texts held against schemas from anybody: as jsonschema has it, and never for long."""

import time

import pytest

from lorauter.json_schema import first_misfit

SUM = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
YEAR = {"type": "string", "pattern": "^[0-9]{4}$"}
LAST = {f"d{i}": {"oneOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}


@pytest.mark.parametrize(
    ("schema", "texts", "found"),
    [
        (SUM, ['{"sum": 1}', '{"sum": 2}'], None),
        (SUM, ['{"sum": 1}', "{}"], (1, "is not of the schema in answers: 'sum' is a required property")),
        (SUM, ["{"], (0, "is no JSON, and answers is a schema: ")),
        (YEAR, ['"1999"', '"2024"'], None),
        (YEAR, ['"1999"', '"24"'], (1, "is not of the schema in answers: '24' does not match")),
        (YEAR, ["nineteen"], (0, "is no JSON, and answers is a schema: ")),
        ({"$defs": {"sum": SUM}, "$ref": "#/$defs/sum"}, ['{"sum": 1}', '{"sum": "1"}'], (1, "is not of the schema")),
    ],
)
def test_the_first_text_that_is_not_of_a_schema_is_told(schema, texts, found) -> None:
    told = first_misfit(schema, texts)
    assert (told is None) == (found is None)
    if told is not None:
        assert told[0] == found[0]
        assert told[1].startswith(found[1])


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": 3}, "answers is no JSON schema"),
        ({"pattern": r"\p{Lu}"}, "answers is no JSON schema: .* is not a 'regex'"),
        ({"$ref": "http://127.0.0.1:1/x"}, "answers cannot be tried: "),
    ],
)
def test_what_cannot_be_tried_is_said(schema, said) -> None:
    with pytest.raises(ValueError, match=said):
        first_misfit(schema, ['"x"'])


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string", "pattern": "^(a+)+$"}, f'"{"a" * 60}!"'),
        ({"$defs": {**LAST, "d40": {"type": "integer"}}, "$ref": "#/$defs/d0"}, '"x"'),
    ],
    ids=["repeats inside repeats", "references to two"],
)
def test_one_that_would_take_for_ever_is_given_up(schema, text) -> None:
    used = time.process_time()
    with pytest.raises(ValueError, match=r"answers takes more than \d s, or too much memory"):
        first_misfit(schema, [text])
    assert time.process_time() - used < 1, "not in this process"
