from __future__ import annotations

import pytest
import yaml

from lorauter.yaml_text import read_yaml


def test_a_text_says_what_yaml_says() -> None:
    text = "a: &x {b: [1, '1', null]}\nc: {<<: *x, b: 2, d: *x}\n2: two\n'2': text\n"
    assert read_yaml(text) == read_yaml(text.encode()) == yaml.safe_load(text)
    assert read_yaml("") is None


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", '{"a": 1, "a": 1}', "- - {x: {y: 1, 'y': 2}}"])
def test_a_key_that_is_there_twice_is_told_with_its_place(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match=r"(?s)there twice.*line \d"):
        read_yaml(text)


@pytest.mark.parametrize("text", ["[" * 5000, "!!python/object/apply:os.system [true]", "a: [", "\x00"])
def test_what_is_no_yaml_of_plain_values_is_an_error_of_one_kind(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)
