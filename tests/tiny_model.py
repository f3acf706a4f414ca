"""A model that loads in no time."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode


def write_model(folder: Path) -> Path:
    """A random Llama that the adapters of `make_adapter` fit, in a folder that has the name that they give."""
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=257, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config)
    for parameter in made.parameters():  # large enough that adapters show
        torch.nn.init.normal_(parameter, 0, 0.5)
    made.save_pretrained(folder)
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=["<end>"], chat_template=template
    ).save_pretrained(folder)
    return folder
