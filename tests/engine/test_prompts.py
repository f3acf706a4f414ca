"""What prompts leave behind is what transformers computes, however many are read together."""

import pytest
import torch

from lorauter.engine.prompts import Packed, PromptReader
from lorauter.engine.step import Span

LENGTHS = (1, 40, 17, 16, 2, 33, *range(1, 20))


@pytest.mark.parametrize("layers", [[1, 3], [2]])
@pytest.mark.parametrize("kind", ["llama", "qwen2-window", "qwen3"])
def test_states_are_transformers(pool, forced, kind, layers):
    prompts = [sequence.tokens for sequence in forced([(length, length + 1) for length in LENGTHS])]
    reader = PromptReader(pool.decoder(kind), layers, length=41)
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


def test_prompts_lie_one_after_the_other_and_padding_in_nobodys_row():
    packed = Packed.of([(5, 6, 7), [8], (9, 9)], 8, 64)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 9, 0, 0]
    assert packed.rows.tolist() == [0, 0, 0, 1, 2, 2, 64, 64]
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1, 0, 0]
    assert packed.ends.tolist() == [2, 3, 5]
    assert packed.spans == [Span(0, 0, 3), Span(1, 0, 1), Span(2, 0, 2)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_say_what_steps_say():
    from lorauter.defaults import load_states

    reader = load_states("default", device="cuda")._reader
    assert reader._graphs is not None
    for prompts in ([tuple(range(1, 2 + 7 * i)) for i in range(9)], [tuple(range(1, 400))] * 30, [(1,)]):
        found = reader.states(prompts).float()
        expected = torch.cat([reader._launched([prompt]) for prompt in prompts]).float()
        assert (torch.cosine_similarity(found, expected, dim=-1) > 0.99).all()
        torch.testing.assert_close(reader.states(prompts).float(), found)
