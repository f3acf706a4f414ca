"""What prompts leave behind is what transformers computes, however many are read together."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from graph_stand_in import stand_in_for_graphs

from lorauter.engine.prompt_graphs import PromptGraphs, filled, grid
from lorauter.engine.prompts import PromptReader, WholePrompts

LENGTHS = (1, 40, 17, 16, 2, 33, *range(1, 20))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("layers", [[1, 3], [2]])
@pytest.mark.parametrize("kind", ["llama", "qwen2-window", "qwen3"])
def test_states_are_transformers(pool, forced, kind, layers, whole):
    prompts = [sequence.tokens for sequence in forced([(length, length + 1) for length in LENGTHS])]
    reader = PromptReader(pool.decoder(kind), layers, length=41, whole=whole)
    states = reader.states(prompts)
    assert states.shape == (len(prompts), len(layers), 64)
    seen = {}
    base = pool.base(kind)
    handles = [
        base.model.layers[layer - 1].register_forward_hook(
            lambda _, __, out, layer=layer: seen.__setitem__(layer, out[0] if isinstance(out, tuple) else out)
        )
        for layer in layers
    ]
    try:
        for prompt, got in zip(prompts, states, strict=True):
            with torch.inference_mode():
                base(torch.tensor([prompt]))
            expected = torch.stack([seen[layer][0, -1] for layer in layers])
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(reader.states(prompts[:1])[0], states[0], atol=1e-5, rtol=1e-5)
    assert reader.states([]).shape == (0, len(layers), 64)


@pytest.mark.parametrize("kind", ["llama", "qwen2-window"])
def test_a_grid_that_is_filled_anew_says_the_same(pool, forced, kind):
    """What a graph repeats on a GPU: the step is made before it is known what is read."""
    decoder = pool.decoder(kind)
    reader = PromptReader(decoder, [1, 3], length=64, whole=True)
    batch = grid((4, 64), decoder.device)
    step = WholePrompts(reader._memory, batch)
    for lengths in ((40, 3, 64), (1, 17, 33, 2)):
        prompts = [s.tokens[:length] for s, length in zip(forced([(n, n + 1) for n in lengths]), lengths, strict=True)]
        for part, values in zip((batch.tokens, batch.outputs), filled(prompts, (4, 64)), strict=True):
            part.copy_(values)
        with torch.inference_mode():
            found = decoder.states(step, batch, [1, 3])[: len(prompts)]
        torch.testing.assert_close(found, reader.states(prompts), atol=1e-5, rtol=1e-5)


def test_all_that_a_graph_reads_stays_where_it_is(pool, monkeypatch):
    """A graph has addresses: what lay there would be another's, were it let go."""
    stand_in_for_graphs(monkeypatch)
    decoder, read = pool.decoder("llama"), []

    def states(step, batch, layers):
        read.extend(map(weakref.ref, (step._places, batch.tokens, batch.rows, batch.positions, batch.outputs)))
        return torch.zeros(len(batch.spans), len(layers), decoder.hidden)

    reading = SimpleNamespace(device=decoder.device, states=states, hidden=decoder.hidden)
    memory = decoder.memory(blocks=1, rows=4, length=64)
    graphs = PromptGraphs(reading, memory, WholePrompts, [1])
    assert graphs.states([(1, 2, 3)], (1, 32)).shape == (1, 1, decoder.hidden)
    assert len(read) == 10
    assert all(tensor() is not None for tensor in read[5:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_say_what_steps_say():
    from lorauter.defaults import load_states

    reader = load_states("default", device="cuda")._reader
    assert reader._graphs is not None
    prompts = [tuple(range(1, 2 + 7 * i)) for i in range(9)]
    expected = reader._launched(prompts).cpu().float()
    for _ in range(2):
        found = reader.states(prompts).float()
        assert (torch.cosine_similarity(found, expected, dim=-1) > 0.99).all()
