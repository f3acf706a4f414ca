import random
from array import array

import pytest

from lorauter.engine import blocks as blocks_module
from lorauter.engine.blocks import BLOCK, BlockPool, blocks_of

TOKENS = array("i", range(3 * BLOCK + 5))
MIX = ((("a", "1"), 1.0),)


def publish(pool, root, tokens, blocks):
    parent = root
    for place in range(len(tokens) // BLOCK):
        parent = pool.publish(parent, tokens[place * BLOCK : (place + 1) * BLOCK], [blocks[place]])
    return parent


def test_full_blocks_of_the_same_beginning_are_found():
    pool = BlockPool(10)
    blocks = pool.take(blocks_of(len(TOKENS)))
    publish(pool, MIX, TOKENS, blocks)
    found, parent = pool.find(MIX, TOKENS, 9)
    assert found == blocks[:3]
    assert pool.find(MIX, TOKENS, 2)[0] == blocks[:2]
    other = array("i", [*TOKENS[:20], 7, *TOKENS[21:]])
    assert pool.find(MIX, other, 9)[0] == blocks[:1]
    assert pool.find(MIX, array("i", [9, *TOKENS[1:]]), 9)[0] == []
    assert pool.publish(parent, array("i", [5] * BLOCK), [blocks[3]]) is not None


@pytest.mark.parametrize(
    "root",
    [
        (),
        ((("a", "2"), 1.0),),  # another version
        ((("a", "1"), 0.5),),  # another weight
        ((("b", "1"), 1.0),),
        ((("a", "1"), 1.0), (("b", "1"), 1.0)),
    ],
)
def test_what_something_else_has_computed_is_not_found(root):
    pool = BlockPool(10)
    publish(pool, MIX, TOKENS, pool.take(4))
    assert pool.find(root, TOKENS, 9)[0] == []


def test_free_blocks_keep_their_content_until_they_are_needed_the_last_ones_first():
    pool = BlockPool(4)
    blocks = pool.take(4)
    publish(pool, MIX, TOKENS, blocks)
    pool.release(blocks)
    assert pool.free == 4
    assert pool.take(1) == [blocks[3]]  # nothing was known of it
    assert pool.take(1) == [blocks[2]]  # the end of a beginning is of less use than its start
    found, _ = pool.find(MIX, TOKENS, 9)
    assert found == blocks[:2]
    assert pool.take(1) is None  # who has found them holds them
    pool.release(found)
    assert pool.take(2) is not None
    assert pool.find(MIX, TOKENS, 9)[0] == []


def test_a_child_is_not_found_behind_another_parent():
    """Its first block was needed, and what is there now is no beginning of it."""
    pool = BlockPool(3)
    blocks = pool.take(2)
    publish(pool, MIX, TOKENS[: 2 * BLOCK], blocks)
    pool.forget(blocks[:1])
    again = pool.take(1)
    pool.publish(MIX, TOKENS[:BLOCK], [again[0]])
    assert pool.find(MIX, TOKENS, 9)[0] == again


def test_the_first_of_two_with_the_same_content_stays_known():
    pool = BlockPool(4)
    one, two = pool.take(2), pool.take(2)
    first = publish(pool, MIX, TOKENS[: 2 * BLOCK], one)
    assert publish(pool, MIX, TOKENS[: 2 * BLOCK], two) == first
    assert pool.find(MIX, TOKENS, 9)[0] == one


@pytest.mark.parametrize("seed", range(5))
def test_blocks_have_as_many_holders_as_hold_them(seed):
    draw = random.Random(seed)
    pool, held = BlockPool(12), []
    for _ in range(400):
        if held and draw.random() < 0.5:
            pool.release(held.pop(draw.randrange(len(held))))
        else:
            tokens = array("i", [draw.randrange(2)] * BLOCK + [draw.randrange(2)] * BLOCK + [1])
            found, parent = pool.find(MIX, tokens, 2)
            fresh = pool.take(3 - len(found))
            if fresh is None:
                pool.release(found)
                continue
            for place in range(len(found), 2):
                parent = pool.publish(parent, tokens[place * BLOCK : (place + 1) * BLOCK], [fresh[place - len(found)]])
            held.append(found + fresh)
        assert pool.free == 12 - len({block for blocks in held for block in blocks})
        assert 0 not in {block for blocks in held for block in blocks}


@pytest.mark.parametrize("seed", range(5))
def test_a_long_beginning_is_found_in_one_look_as_it_is_block_by_block(seed, monkeypatch):
    """Whatever has been taken from those that had it, and however much of it somebody has."""
    draw = random.Random(seed)
    beginning = [draw.randrange(9) for _ in range(30 * BLOCK)]
    pools, held = [BlockPool(70), BlockPool(70)], []
    for _ in range(120):
        here = draw.choice([3, 9, 20, 30]) * BLOCK
        tokens = array("i", [*beginning[:here], *(draw.randrange(9) for _ in range(draw.randrange(3 * BLOCK)))])
        most, root = draw.choice([2, 40, 40, 40]), draw.choice([MIX, MIX, MIX, ()])
        found = []
        for pool, long in zip(pools, (blocks_module._LONG, 1000), strict=True):
            monkeypatch.setattr(blocks_module, "_LONG", long)
            blocks, parent = pool.find(root, tokens, min(most, len(tokens) // BLOCK))
            fresh = pool.take(len(tokens) // BLOCK - len(blocks))
            if fresh is None:
                pool.release(blocks)
                blocks = None
            else:
                for place, block in enumerate(fresh, len(blocks)):
                    parent = pool.publish(parent, tokens[place * BLOCK : (place + 1) * BLOCK], [block])
                blocks += fresh
            found.append(blocks)
        monkeypatch.undo()
        assert found[0] == found[1]
        if found[0] is not None:
            held.append(found[0])
        if len(held) > 1 or found[0] is None:
            gone, forgotten = held.pop(draw.randrange(len(held))), draw.choice([0, 0, 0, 2])
            for pool in pools:
                pool.forget(gone[len(gone) - forgotten :])
                pool.release(gone)
    assert pools[0]._runs
    assert not pools[1]._runs
