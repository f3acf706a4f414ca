"""Functions that are called in a process of their own: what they return and raise, and what is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorauter.apart import Unaffordable, call_apart

CALLED = """
import sys

def known(*args):
    return args, "lorauter" in sys.modules

def wrong():
    raise ValueError("it is wrong")

def memory():
    return len(bytearray(1 << 40))

def time():
    while True:
        pass

def broken():
    raise OSError("a fault of its own")
"""


@pytest.fixture
def call(tmp_path: Path) -> Any:
    file = tmp_path / "called.py"
    file.write_text(CALLED)
    return lambda name, *args: call_apart(
        str(file), name, *args, cpu_s=1, memory_bytes=1 << 29, undone="it was not computed"
    )


def test_it_returns_what_json_says_and_raises_what_is_wrong(call: Any) -> None:
    assert call("known", 1, ["\u00e9"], None) == [[1, ["\u00e9"], None], False]
    with pytest.raises(ValueError, match=r"^it is wrong$"):
        call("wrong")


@pytest.mark.parametrize("name", ["memory", "time"])
def test_what_takes_too_much_is_unaffordable(call: Any, name: str) -> None:
    with pytest.raises(Unaffordable):
        call(name)


def test_another_end_is_no_fault_of_the_arguments(call: Any) -> None:
    with pytest.raises(OSError, match=r"^it was not computed: the process for it has ended with 1$"):
        call("broken")
