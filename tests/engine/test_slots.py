"""Which adapters are resident, at what cost, and that their numbers stay right whatever moves."""

import random

import pytest
import torch

from lorauter.adapters.weights import ModelShape
from lorauter.errors import AdapterRejected, AdapterUnavailable

SHAPE = ModelShape(("hub/Tiny-Base", "alias"), 2, {"q_proj": (6, 8), "down_proj": (10, 6)})
Q, DOWN = 2 * (6 + 8) * 4, 2 * (10 + 6) * 4  # bytes of one rank in float32


@pytest.fixture
def slots_of(packing_slots):
    def make(budget, dtype=torch.float32):
        return packing_slots(SHAPE, budget_bytes=budget, max_rank=8, dtype=dtype, device=torch.device("cpu"))

    return make


@pytest.fixture
def adapter(made):
    def make(name, **options):
        return made(SHAPE, name, **options)

    return make


def assert_right(slots, mixtures):
    """The change of each row (a mixture of weights), in each layer and target, is sum_k w_k B_k A_k x."""
    batch = slots.batch([[(weights.key, weight) for weights, weight in mixture] for mixture in mixtures])
    order = torch.arange(len(mixtures)).repeat(2).flip(0)
    for target, (inputs, outputs) in SHAPE.linears.items():
        for layer in range(SHAPE.layers):
            x = torch.randn(len(order), inputs, generator=torch.Generator().manual_seed(layer))
            y = torch.ones(len(order), outputs)
            expected = y.clone()
            for i, row in enumerate(order):
                for weights, weight in mixtures[row]:
                    if (layer, target) in weights.tensors:
                        a, b = weights.tensors[layer, target]
                        expected[i] += weight * (b.float() @ (a.float() @ x[i]))
            if target in batch.groups:
                batch.select(order).groups[target].add(layer, x, y)
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_the_least_recently_used_unpinned_adapter_goes_first(slots_of, adapter):
    a, b, c, d = (adapter(name, q_proj=2) for name in "abcd")
    slots = slots_of(6 * Q)
    for weights in (a, b, c, b):
        assert slots.acquire([weights])
        slots.release([weights.key])
    assert slots.resident == [a.key, c.key, b.key]
    assert slots.acquire([a])
    assert slots.acquire([d])
    assert slots.resident == [b.key, a.key, d.key]
    assert slots.acquire([c])  # b is older than c's room
    assert slots.resident == [a.key, d.key, c.key]
    assert slots.used_bytes == 6 * Q


def test_pinned_adapters_stay_and_a_refused_acquire_leaves_nothing(slots_of, adapter):
    a, b, c, wide = adapter("a", q_proj=2), adapter("b", q_proj=2), adapter("c", q_proj=2), adapter("w", q_proj=5)
    slots = slots_of(6 * Q)
    assert slots.acquire([a])
    assert slots.acquire([a, b])  # a is pinned twice
    assert slots.acquire([c])
    slots.release([c.key])
    before = slots.resident
    assert not slots.acquire([wide])
    assert not slots.acquire([c, wide])  # c must not stay pinned
    assert slots.resident == before
    assert slots.used_bytes == 6 * Q
    assert_right(slots, [[(a, 1.0)], [(b, 1.0)], [(c, 1.0)]])
    slots.release([a.key, b.key])
    assert not slots.acquire([wide])
    slots.release([a.key])
    assert slots.acquire([wide])
    assert slots.resident == [wide.key]


def test_an_adapter_named_twice_is_pinned_once(slots_of, adapter):
    a, b = adapter("a", q_proj=4), adapter("b", q_proj=4)
    slots = slots_of(4 * Q)
    assert slots.acquire([a, a])
    assert_right(slots, [[(a, 0.5), (a, 0.25)]])
    slots.release([a.key, a.key])
    assert slots.acquire([b])


def test_a_new_version_is_another_adapter(slots_of, adapter):
    old = adapter("a", q_proj=2)
    tensors = {where: (a * 2, b) for where, (a, b) in old.tensors.items()}
    new = type(old)("a", "2", "", tensors)
    slots = slots_of(4 * Q)
    assert slots.acquire([old])
    assert slots.acquire([new])
    assert_right(slots, [[(old, 1.0)], [(new, 1.0)], [(old, 1.0), (new, -1.0)]])


def test_rows_without_adapters_need_no_batch(slots_of):
    assert slots_of(Q).batch([(), ()]) is None


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_and_goes_the_budget_holds_and_the_numbers_are_right(slots_of, adapter, seed):
    draw = random.Random(seed)
    pool = []
    for i in range(12):
        ranks = {"q_proj": draw.randint(1, 8), "down_proj": draw.randint(1, 8)}
        targets = draw.choice([["q_proj"], ["down_proj"], ["q_proj", "down_proj"]])
        pool.append(adapter(f"{i}", layers=draw.choice([(0,), (1,), ()]), **{t: ranks[t] for t in targets}))
    budget = 9 * Q + 11 * DOWN
    slots, running, refused = slots_of(budget), [], 0
    for _ in range(120):
        wanted = draw.sample(pool, draw.randint(1, 3))
        if running and draw.random() < 0.4:
            slots.release([weights.key for weights, _ in running.pop(draw.randrange(len(running)))])
        elif slots.acquire(wanted):
            running.append([(weights, draw.uniform(-2, 2)) for weights in wanted])
        else:
            refused += 1
        assert slots.used_bytes <= budget
        assert {weights.key for mixture in running for weights, _ in mixture} <= set(slots.resident)
        if running:
            assert_right(slots, [*running, []])
            stacks = slots.stacks.values()
            assert slots.used_bytes <= sum(stack.a.nbytes + stack.b.nbytes for stack in stacks) <= budget
    assert refused
    for mixture in running:
        slots.release([weights.key for weights, _ in mixture])
    assert slots.acquire([adapter("last", q_proj=8, down_proj=8)])  # no pin was leaked


@pytest.mark.parametrize("failing", range(6))
def test_running_out_of_memory_harms_nothing_that_is_resident(slots_of, adapter, monkeypatch, failing):
    a, b, big = adapter("a", q_proj=3, down_proj=2), adapter("b", q_proj=2), adapter("big", q_proj=8, down_proj=8)
    slots = slots_of(13 * Q + 10 * DOWN)
    assert slots.acquire([b])
    assert slots.acquire([a])
    slots.release([b.key])
    allocate, calls = torch.Tensor.new_zeros, []

    def new_zeros(self, *size):
        calls.append(size)
        if len(calls) > failing:
            raise torch.OutOfMemoryError("full")
        return allocate(self, *size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", new_zeros)
        assert not slots.acquire([big])  # a's request holds what there is: it may come later
        tried = len(calls)
        assert not slots.acquire([big])
        assert len(calls) == tried  # and the device is not asked again before
        slots.release([a.key])
        with pytest.raises(AdapterUnavailable, match=r"'big'.*no memory"):
            slots.acquire([big])
        assert slots.acquire([a])  # what is there already needs no more
    assert big.key not in slots.resident
    assert_right(slots, [[(a, 1.5)], []])
    slots.release([a.key])
    assert slots.acquire([a])
    assert slots.acquire([big])
    assert_right(slots, [[(a, 1.5)], [(big, -1.0), (a, 1.0)]])


def test_a_too_large_request_is_refused_before_it_waits(slots_of, adapter):
    slots = slots_of(4 * Q)
    slots.check([adapter("a", q_proj=4)])
    slots.check([adapter("a", q_proj=3), adapter("a", q_proj=3)])
    with pytest.raises(AdapterUnavailable, match=r"'b'.*560 bytes.*448") as caught:
        slots.check([adapter("a", q_proj=3), adapter("b", q_proj=2)])
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
        slots_of(1 << 20).check([made(shape, "odd-one", **options)])
    assert caught.value.adapter == "odd-one"
    assert "odd-one" in str(caught.value)


@pytest.mark.parametrize("base", ["", "tiny-base", "elsewhere/TINY-BASE/", "/models/alias"])
def test_the_base_models_name_is_its_last_part(slots_of, adapter, base):
    slots_of(1 << 20).check([adapter("a", q_proj=1, base=base)])


def test_numbers_too_large_for_the_dtype_are_rejected(slots_of, adapter):
    slots, a, large = slots_of(1 << 20, torch.float16), adapter("a", q_proj=2), adapter("large", q_proj=2)
    assert slots.acquire([a])
    used = slots.used_bytes
    for _, b in large.tensors.values():
        b *= 1e6
    with pytest.raises(AdapterRejected, match="float16") as caught:
        slots.acquire([large])
    assert caught.value.adapter == "large"
    assert slots.resident == [a.key]
    assert slots.used_bytes == used


def test_columns_are_summed_in_the_same_order_whatever_was_loaded_before(slots_of, adapter):
    a, b, c, other = (adapter(name, q_proj=2, down_proj=1) for name in ("a", "b", "c", "other"))

    def columns(*loaded):
        slots = slots_of(1 << 20)
        for weights in loaded:
            assert slots.acquire([weights])
        batch = slots.batch([[(b.key, 0.5), (a.key, 0.3)], [(c.key, 1.0), (a.key, 0.2)]])
        groups = [batch.groups[target] for target in SHAPE.linears]
        return [(g.a[:, g.a_places], torch.cat([s[:, g.b_places] for s in g.bs]), g.mask) for g in groups]

    expected = columns(a, b, c)
    for loaded in ((c, a, b), (other, b, a, c), (b, other, c, a)):
        for found, wanted in zip(columns(*loaded), expected, strict=True):
            for one, two in zip(found, wanted, strict=True):
                assert torch.equal(one, two)
