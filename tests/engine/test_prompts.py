"""What prompts leave behind is what transformers computes, however many are read together."""

import pytest
import torch

from lorauter.engine.prompts import PromptReader

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
