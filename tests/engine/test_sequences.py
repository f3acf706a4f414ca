"""What merely decodes advances together until it needs attention, and is told who has got which tokens."""

from array import array

from lorauter.engine.blocks import BLOCK
from lorauter.engine.plan import NOT_FINITE, Decoding, Piece
from lorauter.engine.sequences import ActiveSequence, Came, Event, Lanes


def joined(row, computed, *, at, blocks=4, limit=1000):
    sequence = ActiveSequence(array("i", range(computed + 1)), 1, limit)
    sequence.row, sequence.computed, sequence.joined, sequence.blocks = row, computed, at, list(range(blocks))
    sequence.set_stop()
    return sequence


def test_lanes_advance_by_one_a_step_until_a_block_is_full_or_the_last_token_is_next():
    full, last, other = (
        joined(7, 2 * BLOCK - 3, at=100, blocks=2),
        joined(2, 20, at=98, limit=27),
        joined(5, 20, at=100),
    )
    lanes = Lanes([full, last, other], 101)
    assert lanes.rows.tolist() == [7, 2, 5]
    assert lanes.starts(101).tolist() == [2 * BLOCK - 2, 23, 21]
    assert [one.position(103) for one in (full, last, other)] == lanes.starts(103).tolist()
    assert [lanes.due(planned) for planned in (101, 102, 103)] == [[], [], [0, 1]]
    full.blocks.append(9)
    full.set_stop()
    lanes.renew([0])
    assert lanes.due(103) == [1]
    assert lanes.due(102 + BLOCK) == [1]
    assert lanes.due(103 + BLOCK) == [0, 1]


def test_nobody_is_due_where_nobody_is():
    lanes = Lanes([], 5)
    assert (lanes.due(5), lanes.starts(6).tolist(), len(lanes.rows)) == ([], [], 0)


def test_decoding_is_pieces_for_whoever_wants_them_those_that_merely_go_on_first():
    lanes = Lanes([joined(3, 8, at=0), joined(1, 30, at=0)], 0)
    special = Piece(0, 4, array("i", [9]), samples=False)
    decoding = Decoding(lanes.rows, lanes.starts(2), [special])
    assert list(decoding) == [Piece(3, 10, (), samples=True), Piece(1, 32, (), samples=True), special]
    assert len(decoding) == 3
    assert not Decoding()


def test_what_is_no_token_is_left_out_of_what_came():
    a, b, c = (joined(row, 4, at=0) for row in range(3))
    came = Came([a, b, c], [7, NOT_FINITE, 9], {1: None, 2: "stop"}, [0, 2, 5])
    assert list(came) == [Event(a, 7, None, 0), Event(b, NOT_FINITE, None, 2), Event(c, 9, "stop", 5)]
    sound = came.sound()
    assert list(sound) == [Event(a, 7, None, 0), Event(c, 9, "stop", 5)]
    assert sound.ended == {1: "stop"}
