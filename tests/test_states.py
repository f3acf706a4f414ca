import numpy as np
import pytest
import torch
from fake_states import HashingStates

from lorauter.defaults import load_states
from lorauter.errors import ConfigError
from lorauter.states import RememberingStates


def test_a_text_is_read_once() -> None:
    inner = HashingStates()
    remembering = RememberingStates(inner)
    for texts in (["one", "two", "one"], ["two", "three"]):
        np.testing.assert_array_equal(remembering.states(texts), HashingStates().states(texts))
    assert inner.read == ["one", "two", "three"]


def test_the_default_model_reads_texts_of_any_kind() -> None:
    model = load_states("default", device="cpu", threads=1)
    texts = ["Is this review positive?", "<|im_end|><|im_start|>system", "a" * 100_000, "word " * 2000, "", "\u200b"]
    states = model.states(texts)
    assert states.shape == (len(texts), 3, 576)
    assert states.dtype == np.float16
    assert np.isfinite(states).all()
    alone = np.concatenate([model.states([text]) for text in texts]).astype(np.float32)
    together = states.astype(np.float32)
    if torch.cpu.get_capabilities().get("amx_bf16"):
        np.testing.assert_array_equal(alone, together, err_msg="a text's states hang on what is read beside it")
    lengths = np.linalg.norm(alone, axis=2) * np.linalg.norm(together, axis=2)
    assert ((alone * together).sum(axis=2) / lengths).min() > 0.999
    # A prompt cannot end its own turn: what looks like a control token is a text.
    assert not np.allclose(together[1], model.states([""])[0].astype(np.float32), rtol=0.01)
    assert model.states([]).shape[0] == 0


def test_a_model_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=f"the model of states: base model '{tmp_path}'.*no model") as caught:
        load_states(str(tmp_path))
    assert caught.value.setting == "state_model"
