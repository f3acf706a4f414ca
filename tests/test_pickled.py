"""Values on their way to another process."""

import pickle
from dataclasses import dataclass, field, replace

from lorauter.pickled import Sparse


@dataclass(frozen=True)
class Options(Sparse):
    name: str
    count: int = 1
    words: tuple[str, ...] = ()
    numbers: list[int] = field(default_factory=list)


def test_a_sparse_value_arrives_whole_and_travels_as_what_differs_from_its_defaults():
    plain, full = Options("a"), Options("b", 2, ("x",), [3])
    assert plain.__getstate__() == {"name": "a", "numbers": []}
    for value in (plain, full):
        arrived = pickle.loads(pickle.dumps(value))
        assert (arrived, hash(arrived.words), repr(arrived)) == (value, hash(value.words), repr(value))
        assert replace(arrived, count=5) == replace(value, count=5)


def test_a_copy_with_changes_is_what_replace_makes():
    for value in (Options("b", 2, ("x",), [3]), pickle.loads(pickle.dumps(Options("a")))):
        assert value.but(name="c", count=1) == replace(value, name="c", count=1)
        assert value.name != "c"
