"""The blocks of the paged key-value cache: who has which, and which may be used again for prompts that begin alike.

A full block is known by what computed it: the mixture of adapter versions and weights, and every token up to its end.
Knows ids of blocks and tokens; knows nothing of tensors or requests.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import count
from typing import NamedTuple

BLOCK = 16
"""Positions in a block."""
_LONG, _RUNS = 8, 64  # blocks of a beginning that is found in one look, and how many of these there are

Parent = Hashable
"""What precedes a block: the number of a known block, or for a first block whatever computes it."""


def blocks_of(length: int) -> int:
    """How many blocks a sequence of so many positions takes."""
    return -(-length // BLOCK)


class _Run(NamedTuple):
    """A long beginning that was found: its tokens, its blocks, and their numbers as long as they are its."""

    content: bytes
    blocks: list[int]
    numbers: list[int]


class BlockPool:
    """Blocks 1, 2, ...; block 0 is nobody's, for the padding of batches to write to.

    A block that nobody holds any more keeps its content until it is needed: the least recently used goes first.

    Args:
        size: how many blocks there are, without block 0.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._holders = [0] * (size + 1)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, size + 1))
        self._known: dict[tuple[Parent, bytes], int] = {}
        self._keys: dict[int, tuple[Parent, bytes]] = {}
        self._numbers: dict[int, int] = {}  # of known blocks; never given twice, so that no child outlives its parent
        self._next = count()
        self._runs: OrderedDict[tuple[Hashable, bytes], _Run] = OrderedDict()

    @property
    def free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    def take(self, wanted: int) -> list[int] | None:
        """Blocks to write to, or None if there are too few."""
        if wanted > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(wanted)]
        for block in blocks:
            if block in self._keys:
                self._forget(block)
            self._holders[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Hold these no longer. Of a sequence's blocks the last is the first to be used anew."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if block not in self._keys:
                    self._free.move_to_end(block, last=False)

    def find(self, root: Hashable, tokens: array[int], most: int) -> tuple[list[int], Parent]:
        """Known blocks with the first tokens of a sequence, now held by the caller too, and the parent of what follows.

        Args:
            root: what computes the sequence.
            tokens: its tokens.
            most: blocks at most.
        """
        size, content = BLOCK * tokens.itemsize, tokens.tobytes()
        known, numbers, holders = self._known, self._numbers, self._holders
        run = self._runs.get((root, content[: _LONG * size])) if most >= _LONG else None
        blocks = [] if run is None else self._again(run, content, most)
        again = len(blocks)
        parent: Parent = numbers[blocks[-1]] if blocks else root
        for start in range(len(blocks) * size, most * size, size):
            block = known.get((parent, content[start : start + size]))
            if block is None:
                break
            blocks.append(block)
            parent = numbers[block]
        for block in blocks:
            if not holders[block]:
                del self._free[block]
            holders[block] += 1
        if len(blocks) >= _LONG and (not again or run is None or len(blocks) > len(run.blocks)):
            self._note(root, content[: len(blocks) * size], blocks)
        return blocks, parent

    def _again(self, run: _Run, content: bytes, most: int) -> list[int]:
        """What of a run is the beginning of this content, if it is still known."""
        size = len(run.content) // len(run.blocks)
        least, most = _LONG, min(len(run.blocks), most)
        while least < most:
            count = -(-(least + most) // 2) if most < len(run.blocks) else most  # mostly all of it
            if run.content[: count * size] == content[: count * size]:
                least = count
            else:
                most = count - 1
        blocks = run.blocks[:least]
        return blocks if list(map(self._numbers.get, blocks)) == run.numbers[:least] else []

    def _note(self, root: Hashable, content: bytes, blocks: Sequence[int]) -> None:
        """A long beginning was found: whoever has it too finds it in one look."""
        beginning = root, content[: len(content) // len(blocks) * _LONG]
        self._runs[beginning] = _Run(content, list(blocks), [self._numbers[block] for block in blocks])
        self._runs.move_to_end(beginning)
        if len(self._runs) > _RUNS:
            self._runs.popitem(last=False)

    def publish(self, parent: Parent, tokens: array[int], blocks: Sequence[int]) -> Parent:
        """Let full blocks with these tokens, one after the other, which the caller holds, be found, and return the
        parent of the block after them.

        Where another block has the same content, that one stays known.
        """
        size, content = BLOCK * tokens.itemsize, tokens.tobytes()
        known, keys, numbers = self._known, self._keys, self._numbers
        for place, block in enumerate(blocks):
            key = parent, content[place * size : (place + 1) * size]
            of_content = known.setdefault(key, block)
            if of_content == block and block not in keys:
                keys[block] = key
                numbers[block] = next(self._next)
            parent = numbers[of_content]
        return parent

    def forget(self, blocks: Sequence[int] | None = None) -> None:
        """Let the content of these blocks, or of all, be found no more."""
        for block in list(self._keys) if blocks is None else blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._known[key], self._numbers[block]
