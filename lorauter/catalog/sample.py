"""A sample of a catalog's tasks with their examples: what is global is fitted to it, however many tasks there are.

It is the tasks that come first by a hash of their names, as many as have so many examples together: of a catalog of
hundreds of tasks all of them. A task that changes is seldom one of a large catalog's sample, and the sample follows
from the catalog's content, not from how it came about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorauter.catalog.lexicon import Grams
from lorauter.catalog.parts import Arrays, text_in, texts_of
from lorauter.catalog.segments import Examples, name_hash
from lorauter.catalog.whitening import States
from lorauter.encoder import Embeddings

MOST_EXAMPLES = 16_384


@dataclass(frozen=True, eq=False)
class Sample:
    """S tasks.

    Attributes:
        names: of each.
        digests: of each, as a segment has them.
        examples: of each, (n, d) float32 unit rows.
        grams: of each, the n inputs taken apart.
        states: of each, the n inputs'; none of any where the catalog has none.
    """

    names: tuple[str, ...]
    digests: tuple[int, ...]
    examples: tuple[Embeddings, ...]
    grams: tuple[tuple[Grams, ...], ...]
    states: tuple[States, ...] = ()

    @classmethod
    def take(cls, chosen: Sequence[tuple[str, int]], read: Callable[[str], Examples], known: Sample | None) -> Sample:
        """The tasks of these names and digests.

        Args:
            read: a task's examples.
            known: another sample, whose tasks need not be read again.
        """
        there = {} if known is None else {key: i for i, key in enumerate(zip(known.names, known.digests, strict=True))}
        examples, grams = [], []
        states: list[States] = []
        for name, digest in chosen:
            place = there.get((name, digest))
            if known is not None and place is not None:
                examples.append(known.examples[place])
                grams.append(known.grams[place])
                states += known.states[place : place + 1]
            else:
                found = read(name)
                examples.append(found.embeddings)
                grams.append(found.grams)
                states += [] if found.states is None else [found.states]
        names, digests = zip(*chosen, strict=True)
        return cls(names, digests, tuple(examples), tuple(grams), tuple(states))

    def arrays(self) -> Arrays:
        """What `from_arrays` takes."""
        flat = [ids for task in self.grams for ids in task]
        return {
            **texts_of([list(self.names)]),
            "digests": np.array(self.digests, np.uint64),
            "ends": np.cumsum([len(rows) for rows in self.examples], dtype=np.int64),
            "embeddings": np.concatenate(self.examples),
            "grams": np.concatenate(flat).astype(np.uint16),
            "grams_ends": np.cumsum([len(ids) for ids in flat], dtype=np.int64),
            **({"states": np.concatenate(self.states)} if self.states else {}),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Sample:
        """The inverse of `arrays`. Raises KeyError, ValueError."""
        ends = arrays["ends"]
        flat = np.split(arrays["grams"].astype(np.int64), arrays["grams_ends"][:-1])
        starts = np.concatenate([[0], ends[:-1]])
        return cls(
            tuple(text_in(arrays, 0)),
            tuple(arrays["digests"].tolist()),
            tuple(np.split(arrays["embeddings"], ends[:-1])),
            tuple(tuple(flat[start:end]) for start, end in zip(starts, ends, strict=True)),
            tuple(np.split(arrays["states"], ends[:-1])) if "states" in arrays else (),
        )


def choose(names: Sequence[str], sizes: NDArray[np.int64]) -> tuple[list[int], bool]:
    """Places of the tasks of the sample, the first one by its hash first, and whether it is all of them.

    Args:
        names: of all tasks.
        sizes: their numbers of examples.
    """
    if int(sizes.sum()) <= MOST_EXAMPLES:
        return list(range(len(names))), True
    order = sorted(range(len(names)), key=lambda i: (name_hash(names[i]), names[i]))
    fits = np.cumsum(sizes[order]) <= MOST_EXAMPLES
    return order[: max(1, int(fits.sum()))], False
