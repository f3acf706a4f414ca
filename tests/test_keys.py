from __future__ import annotations

from typing import Any

import pytest
import yaml

from lorauter.errors import ConfigError
from lorauter.keys import ApiKey, hash_key, new_key, parse_keys

HASH = hash_key("lr-key")


def test_keys_are_long_and_unlike() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) >= 43
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_right_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="line 4"):
        parse_keys(f"- name: a\n  sha256: {HASH}\n  adapters: [a]\n  adapters: ['*']\n", "keys")


def test_a_row_has_defaults() -> None:
    [row] = parse_keys(f"- name: a\n  sha256: {HASH}\n", "keys")
    assert row == ApiKey(name="a", sha256=HASH, roles=frozenset({"inference"}))
    assert (row.adapters, row.requests_per_minute, row.tokens_per_minute) == (None, None, None)
    assert parse_keys("", "keys") == parse_keys("[]", "keys") == []


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"sha256": HASH}, r"0\.name"),
        ({"name": "a"}, r"0\.sha256"),
        ({"name": "a", "sha256": "lr-the-key-itself"}, r"0\.sha256"),
        ({"name": "a", "sha256": HASH.upper()}, r"0\.sha256"),
        ({"name": "a b", "sha256": HASH}, r"0\.name.*letters"),
        ({"name": "a", "sha256": HASH, "key": "lr-the-key-itself"}, r"0\.key"),
        ({"name": "a", "sha256": HASH, "roles": ["lr-the-key-itself"]}, r"0\.roles"),
        ({"name": "a", "sha256": HASH, "roles": []}, r"0\.roles"),
        ({"name": "a", "sha256": HASH, "adapters": "team-*"}, r"0\.adapters"),
        ({"name": "a", "sha256": HASH, "requests_per_minute": 0}, r"0\.requests_per_minute"),
        ({"name": "a", "sha256": HASH, "tokens_per_minute": -1}, r"0\.tokens_per_minute"),
        ("lr-the-key-itself", "keys by their place"),
    ],
)
def test_a_wrong_row_is_named_and_no_key_repeated(row: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        parse_keys(yaml.safe_dump([row]), "keys.yaml")
    assert str(caught.value).startswith("keys.yaml")
    assert "lr-the-key" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("text", ["[lr-secret", "{lr-secret: [", "lr-secret", "5", "a: !!python/object:os.system lr-x"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, "keys.yaml")
    assert "lr-" not in str(caught.value)


@pytest.mark.parametrize("field", ["name", "sha256"])
def test_a_name_and_a_key_stand_once(field: str) -> None:
    rows = [{"name": "a", "sha256": HASH}, {"name": "b", "sha256": hash_key("other")}]
    rows[1][field] = rows[0][field]
    with pytest.raises(ConfigError, match=f"same {field}"):
        parse_keys(yaml.safe_dump(rows), "keys.yaml")
