"""config.json as transformers reads it, or left to it."""

import json

import pytest
import transformers
from transformers import AutoConfig, AutoTokenizer

from lorauter.engine.model_config import known_to_tokenizer, read_config

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
USUAL = {
    **SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "eos_token_id": 2, "rope_theta": 1e4,
}  # fmt: skip
USED = (
    *SIZES, "model_type", "architectures", "hidden_act", "rms_norm_eps", "eos_token_id", "rope_parameters",
    "tie_word_embeddings",
)  # fmt: skip


def write(folder, **said):
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**USUAL, **said}.items() if v != "left out"}))
    return folder


OF_QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "max_window_layers": 2}


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"rope_scaling": None, "tie_word_embeddings": True, "attention_bias": True, "torch_dtype": "bfloat16"},
        {"rope_theta": "left out", "rope_parameters": {"rope_type": "default", "rope_theta": 100000}},
        {"eos_token_id": [2, 7], "head_dim": 16},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
        {**OF_QWEN, "use_sliding_window": False},
        OF_QWEN,
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "tie_word_embeddings": True},
    ],
)
def test_it_says_what_transformers_says(tmp_path, said):
    mine, theirs = read_config(write(tmp_path, **said)), AutoConfig.from_pretrained(tmp_path)
    assert mine is not None
    assert [getattr(mine, name) for name in USED] == [getattr(theirs, name) for name in USED]
    assert bool(mine.attention_bias) == bool(getattr(theirs, "attention_bias", False))
    assert (mine.head_dim or 8) == (getattr(theirs, "head_dim", None) or 8)
    windowed = getattr(mine, "use_sliding_window", True)
    assert (mine.sliding_window if windowed else None) == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize(
    "said",
    [
        {"model_type": "gpt2"},
        {"model_type": ["llama"]},
        {"num_key_value_heads": None},
        {"hidden_size": "left out"},
        {"hidden_size": "32"},
        {"num_hidden_layers": True},
        {"rms_norm_eps": "left out"},
        {"eos_token_id": "left out"},
        {"rope_theta": "left out"},
        {"rope_theta": "10000"},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": []},
        {"architectures": 5},
        {"layer_types": ["full_attention"]},
        {"model_type": "mistral", "sliding_window": "64"},
        {"quantization_config": {"quant_method": "awq"}},
        {"model_type": "mistral"},
        {"model_type": "qwen3"},
        {**OF_QWEN, "use_sliding_window": True},
    ],
)
def test_the_rest_is_left_to_transformers(tmp_path, said):
    assert read_config(write(tmp_path, **said)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", b"\xff"])
def test_a_file_that_is_no_config_too(tmp_path, text):
    assert read_config(tmp_path) is None
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_config(tmp_path) is None


def test_a_tokenizer_is_the_same(tmp_path, tokenizer):
    tokenizer.save_pretrained(write(tmp_path))
    known = known_to_tokenizer(str(tmp_path))
    assert known is not None
    mine, theirs = (AutoTokenizer.from_pretrained(tmp_path, config=config) for config in (known, None))
    assert type(mine) is type(theirs)
    assert mine.init_kwargs == theirs.init_kwargs
    assert mine.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert isinstance(mine, transformers.PreTrainedTokenizerFast)


@pytest.mark.parametrize("said", [{"tokenizer_class": None}, {"auto_map": {"AutoTokenizer": ["a.B", None]}}])
def test_of_what_class_it_is_has_to_be_said(tmp_path, tokenizer, said):
    tokenizer.save_pretrained(write(tmp_path))
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    assert known_to_tokenizer(str(tmp_path)) is None
    assert known_to_tokenizer("hub/name") is None
