"""Which adapters are resident, at what cost, and that their numbers stay right whatever moves."""

import random

import pytest
import torch

from lorauter.adapters.weights import ModelShape
from lorauter.engine.arena import aligned
from lorauter.engine.mixtures import Mixtures
from lorauter.engine.slots import AdapterSlots
from lorauter.errors import AdapterRejected, AdapterUnavailable

SHAPE = ModelShape(("hub/Tiny-Base", "alias"), 2, {"q_proj": (6, 8), "down_proj": (10, 6)})
Q, DOWN = 2 * (6 + 8), 2 * (10 + 6)  # numbers of one rank


def room(*sizes):
    """Bytes of stretches of so many float32 numbers."""
    return 4 * sum(map(aligned, sizes))


@pytest.fixture
def slots_of():
    def make(budget, dtype=torch.float32, **options):
        return AdapterSlots(SHAPE, budget_bytes=budget, max_rank=8, dtype=dtype, device=torch.device("cpu"), **options)

    return make


@pytest.fixture
def adapter(made):
    def make(name, **options):
        return made(SHAPE, name, **options)

    return make


@pytest.fixture
def take(hold):
    """Acquire adapters for a new sequence, which is returned, or None: `take(slots, a, b)`."""

    def acquire(slots, *adapters, soon=()):
        sequence = hold(slots, [(weights, 1.0) for weights in adapters])
        return sequence if slots.acquire(sequence, soon) else None

    return acquire


def assert_right(slots, mixtures):
    """The change of each row (a mixture of weights), in each layer and target, is sum_k w_k B_k A_k x."""
    for weights in {weights.key: weights for mixture in mixtures for weights, _ in mixture}.values():
        ((placed, _),) = slots.placed([(weights.key, 1.0)])
        table = Mixtures(slots.groups, SHAPE.layers, slots.arena, 1)
        for target, (inputs, outputs) in SHAPE.linears.items():
            for layer in range(SHAPE.layers):
                pair = weights.tensors.get((layer, target))
                if target not in placed.parts:
                    assert pair is None
                    continue
                a, b = table.pair(placed.parts[target], layer, inputs, outputs)
                expected = pair[1] @ pair[0] if pair else torch.zeros(outputs, inputs)
                torch.testing.assert_close(b.T @ a, expected, atol=1e-4, rtol=1e-4)


def test_the_least_recently_used_unpinned_adapter_goes_first(slots_of, adapter, take):
    a, b, c, d = (adapter(name, q_proj=2) for name in "abcd")
    slots = slots_of(room(*[2 * Q] * 3))
    for weights in (a, b, c, b):
        slots.release(take(slots, weights))
    assert slots.resident == [a.key, c.key, b.key]
    assert take(slots, a)
    assert take(slots, d)
    assert slots.resident == [b.key, a.key, d.key]
    assert take(slots, c)  # b is older than c's room
    assert slots.resident == [a.key, d.key, c.key]
    assert slots.used_bytes == room(*[2 * Q] * 3)


def test_what_is_wanted_soon_goes_last(slots_of, adapter, take):
    a, b, c = (adapter(name, q_proj=2) for name in "abc")
    slots = slots_of(room(2 * Q, 2 * Q))
    for weights in (a, b):
        slots.release(take(slots, weights))
    assert take(slots, c, soon={a.key})
    assert slots.resident == [a.key, c.key]


def test_pinned_adapters_stay_and_a_refused_acquire_leaves_nothing(slots_of, adapter, take):
    a, b, c, wide = adapter("a", q_proj=2), adapter("b", q_proj=2), adapter("c", q_proj=2), adapter("w", q_proj=5)
    slots = slots_of(room(*[2 * Q] * 3))
    first, second = take(slots, a), take(slots, a, b)  # a is pinned twice
    slots.release(take(slots, c))
    before = slots.resident
    assert not take(slots, wide)
    assert not take(slots, c, wide)  # c must not stay pinned
    assert slots.resident == before
    assert slots.used_bytes == room(*[2 * Q] * 3)
    assert_right(slots, [[(a, 1.0)], [(b, 1.0)], [(c, 1.0)]])
    slots.release(second)
    assert not take(slots, wide)
    slots.release(first)
    assert take(slots, wide)
    assert wide.key in slots.resident
    assert len(slots.resident) <= 2


def test_an_adapter_named_twice_is_pinned_once(slots_of, adapter, take):
    a, b = adapter("a", q_proj=4), adapter("b", q_proj=4)
    slots = slots_of(room(4 * Q))
    slots.release(take(slots, a, a))
    assert take(slots, b)


def test_a_new_version_is_another_adapter(slots_of, adapter, take):
    old = adapter("a", q_proj=2)
    tensors = {where: (a * 2, b) for where, (a, b) in old.tensors.items()}
    new = type(old)("a", "2", "", tensors)
    slots = slots_of(room(2 * Q, 2 * Q))
    assert take(slots, old)
    assert take(slots, new)
    assert_right(slots, [[(old, 1.0)], [(new, 1.0)]])


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_and_goes_the_arena_stays_and_the_numbers_are_right(slots_of, adapter, hold, seed):
    """Adapters of three kinds of target modules, under a budget that is full."""
    draw = random.Random(seed)
    pool = []
    for i in range(12):
        ranks = {"q_proj": draw.randint(1, 8), "down_proj": draw.randint(1, 8)}
        targets = draw.choice([["q_proj"], ["down_proj"], ["q_proj", "down_proj"]])
        pool.append(adapter(f"{i}", layers=draw.choice([(0,), (1,), ()]), **{t: ranks[t] for t in targets}))
    budget = room(9 * Q + 11 * DOWN, 0, 4 * Q)
    slots, running, refused = slots_of(budget), [], 0
    arena = slots.arena.data_ptr()
    for _ in range(120):
        wanted = [(weights, 1.0) for weights in draw.sample(pool, draw.randint(1, 3))]
        if running and draw.random() < 0.4:
            slots.release(running.pop(draw.randrange(len(running)))[0])
        elif slots.acquire(sequence := hold(slots, wanted)):
            running.append((sequence, wanted))
        else:
            refused += 1
        assert slots.used_bytes <= budget
        assert {weights.key for _, mixture in running for weights, _ in mixture} <= set(slots.resident)
        assert_right(slots, [mixture for _, mixture in running])
    assert refused
    assert slots.arena.data_ptr() == arena
    for sequence, _ in running:
        slots.release(sequence)
    assert slots.acquire(hold(slots, [(adapter("last", q_proj=8, down_proj=8), 1.0)]))  # no pin was leaked


def test_a_copy_that_goes_on_beside_a_step_is_waited_for(slots_of, adapter, hold):
    """Where others run, a sequence is admitted in the step after the one in which its adapters' copies began."""
    a, b = adapter("a", q_proj=2), adapter("b", q_proj=2)
    slots = slots_of(1 << 12, ahead=True)
    slots.begin_step()
    first, second = hold(slots, [(a, 1.0)]), hold(slots, [(b, 1.0)])
    assert slots.acquire(first)  # nobody would wait for it
    assert not slots.acquire(second)
    assert not slots.has(second.mixture)
    assert not slots.acquire(second)
    slots.begin_step()
    assert slots.has(second.mixture)
    assert slots.acquire(second)
    assert slots.counters.misses == 2
    slots.release(second)
    slots.release(second)  # of no effect
    assert slots.acquire(hold(slots, [(b, 1.0)]))


def test_what_is_prepared_is_ready_a_step_later_and_gives_way_to_who_is_next(slots_of, adapter, hold):
    a, b, c, wide = adapter("a", q_proj=2), adapter("b", q_proj=2), adapter("c", q_proj=2), adapter("w", q_proj=4)
    slots = slots_of(room(*[2 * Q] * 3), ahead=True)
    running, second, third = (hold(slots, [(weights, 1.0)]) for weights in (a, b, c))
    slots.begin_step()
    assert slots.acquire(running)
    slots.prepare(second)
    slots.prepare(third)
    slots.begin_step()
    assert slots.has(second.mixture)
    assert slots.acquire(second)
    slots.release(second)
    assert not slots.acquire(hold(slots, [(wide, 1.0)]))  # which takes what the third has been promised
    assert third.mixture[0][0] not in slots.resident
    assert running.mixture[0][0] in slots.resident
    slots.begin_step()
    assert not slots.acquire(third)


def test_who_finds_no_room_is_not_searched_for_again_until_something_is_released(slots_of, adapter, hold, monkeypatch):
    """Else each step of a full device would cost as much as there are requests that wait."""
    slots, searches = slots_of(room(2 * Q, 2 * Q), ahead=True), []
    search = slots._make_room
    monkeypatch.setattr(slots, "_make_room", lambda *a, **options: searches.append(a) or search(*a, **options))
    running = [hold(slots, [(adapter(name, q_proj=2), 1.0)]) for name in "ab"]
    for sequence in running:
        slots.acquire(sequence)
        slots.begin_step()
        assert slots.acquire(sequence)
    waiting = [hold(slots, [(adapter(name, q_proj=2), 1.0)]) for name in "cdef"]
    searched = len(searches)
    for _ in range(10):
        slots.begin_step()
        assert not slots.acquire(waiting[0])
        for other in waiting[1:]:
            slots.prepare(other)
    assert len(searches) - searched == 2 * len(waiting)
    slots.release(running[0])
    assert not slots.acquire(waiting[0])  # it is on its way
    slots.begin_step()
    assert slots.acquire(waiting[0])
    for sequence in [*running, *waiting]:
        slots.release(sequence)
    assert not slots._refused


def test_as_many_columns_are_in_use_at_once_as_the_kernels_take(slots_of, adapter, take, monkeypatch):
    monkeypatch.setattr("lorauter.engine.slots.MOST_TILES", 2)
    a, b, c = (adapter(name, q_proj=2) for name in "abc")
    slots = slots_of(1 << 12)
    held = take(slots, a, b)
    assert not take(slots, c)
    assert take(slots, a)
    slots.release(held)
    assert take(slots, c)
    with pytest.raises(AdapterUnavailable, match=r"3 adapters.*32 columns in q_proj"):
        slots.check([slots.pack(weights) for weights in (a, b, c)])


def test_a_too_large_request_is_refused_before_it_waits(slots_of, adapter):
    slots = slots_of(room(4 * Q))
    a, b = (slots.pack(adapter(name, q_proj=3)) for name in "ab")
    slots.check([slots.pack(adapter("a", q_proj=4))])
    slots.check([a, a])
    with pytest.raises(AdapterUnavailable, match=r"'b'.*1024 bytes.*512") as caught:
        slots.check([a, b])
    assert caught.value.adapter == "b"


WIDER = ModelShape((), 2, {"q_proj": (7, 8), "down_proj": (10, 6)})
OTHER = ModelShape((), 3, {"q_proj": (6, 8), "down_proj": (10, 6), "up_proj": (6, 10)})


@pytest.mark.parametrize(
    ("shape", "options", "needle"),
    [
        (WIDER, {"q_proj": 2}, r"layer 0 q_proj maps 7 to 8 features.*6 to 8"),
        (OTHER, {"q_proj": 2}, r"changes layer 2.* has 2"),
        (OTHER, {"up_proj": 2, "layers": [0]}, r"up_proj maps 6 to 10 features.*none"),
        (SHAPE, {"q_proj": 9}, r"rank 9.* up to 8"),
        (SHAPE, {"q_proj": 1, "base": "hub/other"}, r"'hub/other'.*'hub/Tiny-Base'"),
    ],
)
def test_an_adapter_of_another_model_is_rejected_by_name(slots_of, made, shape, options, needle):
    with pytest.raises(AdapterRejected, match=needle) as caught:
        slots_of(1 << 12).pack(made(shape, "odd-one", **options))
    assert caught.value.adapter == "odd-one"
    assert "odd-one" in str(caught.value)


@pytest.mark.parametrize("base", ["", "tiny-base", "elsewhere/TINY-BASE/", "/models/alias"])
def test_the_base_models_name_is_its_last_part(slots_of, adapter, base):
    slots_of(1 << 12).pack(adapter("a", q_proj=1, base=base))


def test_numbers_too_large_for_the_dtype_are_rejected(slots_of, adapter):
    slots, large = slots_of(1 << 12, torch.float16), adapter("large", q_proj=2)
    for _, b in large.tensors.values():
        b *= 1e6
    with pytest.raises(AdapterRejected, match="float16") as caught:
        slots.pack(large)
    assert caught.value.adapter == "large"


def test_rows_sum_their_adapters_in_the_same_order_wherever_these_are(slots_of, adapter, take):
    a, b, c = (adapter(name, q_proj=2, down_proj=1) for name in "abc")
    for loaded in ((a, b, c), (c, a, b), (b, c, a)):
        slots = slots_of(1 << 12)
        for weights in loaded:
            assert take(slots, weights)
        table = Mixtures(slots.groups, SHAPE.layers, slots.arena, 2)
        table.assign(0, slots.placed([(weights.key, 1.0) for weights in loaded]))
        assert [placed.key for placed, _ in table.rows[0]] == [a.key, b.key, c.key]


def test_what_is_wanted_moves_out_of_the_way_of_what_is_wanted_with_it(slots_of, adapter, take):
    """Else two that fit the device together could wait for ever."""
    a, b, c = (adapter(name, q_proj=2) for name in "abc")
    slots, big = slots_of(room(*[2 * Q] * 3)), adapter("big", q_proj=4)
    for weights in (a, b, c):
        slots.release(take(slots, weights))
    assert take(slots, b, big)
    assert_right(slots, [[(b, 1.0), (big, 1.0)]])
    assert set(slots.resident) == {b.key, big.key}
