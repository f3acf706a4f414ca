"""Graphs of prompts without a GPU: the kernels in Triton's interpreter, which has a process of its own, and in place of
graphs what they have recorded."""

import weakref

import pytest
import torch
from graph_stand_in import stand_in_for_graphs
from kernel_cases import pass_in_the_interpreter

from lorauter.engine.prompts import PromptReader, alike, prompt_memory

pytest.importorskip("triton")
LIMIT_S = 600  # the interpreter's
LENGTHS = ((18, 3), (1, 5, 2))


class Cases:
    @pytest.mark.parametrize("kind", ["qwen2-window", "qwen3"])
    def test_a_pass_says_what_other_steps_say_whatever_was_read_before(self, monkeypatch, pool, forced, kind):
        from lorauter.engine.cuda_prompts import PromptGraphs

        stand_in_for_graphs(monkeypatch, compute=True)
        decoder = pool.decoder(kind)
        graphs = PromptGraphs(decoder, prompt_memory(decoder, 3, 32), [1, 2], [24])
        expected = PromptReader(decoder, [1, 2], length=32)
        for lengths in LENGTHS:
            prompts = [sequence.tokens for sequence in forced([(n, n) for n in lengths])]
            torch.testing.assert_close(graphs.states(prompts), expected.states(prompts), atol=1e-4, rtol=1e-4)


def test_in_the_interpreter():
    pass_in_the_interpreter(__file__, with_fixtures=True)


def test_sizes_are_few():
    from lorauter.engine.cuda_prompts import graph_sizes

    assert graph_sizes(1000) == [128, 192, 256, 384, 512, 768, 1024]
    assert graph_sizes(50) == [64]


def test_all_that_a_graph_reads_stays_where_it_is(monkeypatch, pool):
    """A graph has addresses: what lay there would be another's, were it let go."""
    from lorauter.engine import cuda_prompts

    stand_in_for_graphs(monkeypatch)
    decoder, read = pool.decoder("llama"), []

    class Reading:
        device, heads, kv_heads = decoder.device, decoder.heads, decoder.kv_heads

        def states(self, step, batch, layers):
            read.extend(map(weakref.ref, (step, batch.tokens, batch.rows, batch.outputs, batch.counts, batch.queries)))
            return torch.zeros(4, len(layers), decoder.hidden)

    graphs = cuda_prompts.PromptGraphs(Reading(), prompt_memory(decoder, 4, 64), [1], [32])
    assert graphs.states([(1, 2, 3)]).shape == (1, 1, decoder.hidden)
    assert len(read) == 12
    assert all(tensor() is not None for tensor in read[7:])


def test_states_that_differ_are_told_from_those_that_round_otherwise():
    states = torch.randn(3, 2, 64)
    assert alike(states, states + 1e-3)
    assert not alike(states, states * torch.tensor([1.0, -1.0, 1.0])[:, None, None])
    assert not alike(states, states * torch.nan)


@pytest.mark.parametrize(
    ("off", "told"),
    [
        (0.0, []),
        (1.0, ["prompts are read without CUDA graphs, whose states differ"]),
        (None, ["prompts are read without CUDA graphs: no room"]),
    ],
)
def test_a_reader_goes_by_graphs_that_say_what_pytorch_says_and_by_no_others(monkeypatch, pool, caplog, off, told):
    from lorauter.engine import cuda_prompts

    reader = PromptReader(pool.decoder("llama"), [1, 3], length=64)

    class Graphs:
        def __init__(self, *_):
            if off is None:
                raise RuntimeError("no room")

        def states(self, prompts):
            return reader._launched(prompts).flip(-1) * off + reader._launched(prompts) * (1 - off)

    monkeypatch.setattr(cuda_prompts, "PromptGraphs", Graphs)
    assert isinstance(reader._by_graphs(), Graphs) == (not told)
    assert [record.message for record in caplog.records] == told


def test_a_reader_goes_on_without_graphs_that_fail(pool, caplog):
    reader = PromptReader(pool.decoder("llama"), [1], length=64)
    expected = reader.states([(1, 2, 3)])

    class Failing:
        def states(self, prompts):
            raise RuntimeError("a GPU's")

    reader._graphs = Failing()
    for _ in range(2):
        torch.testing.assert_close(reader.states([(1, 2, 3)]), expected)
    assert [record.message for record in caplog.records] == [
        "prompts are read without CUDA graphs from now on: a GPU's"
    ]
