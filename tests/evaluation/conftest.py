"""A tiny random Llama with a byte tokenizer behind a real engine, and rows for it."""

from collections.abc import Iterator

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorauter.engine import EngineConfig, MultiLoraEngine
from lorauter.engine.model import Decoder
from lorauter.engine.text import TextCodec

CHAT = "{% for m in messages %}{{ m.content }}>{% endfor %}"
SIZES = {  # every layer is (8, 8), as those of the adapters of `make_adapter`
    "vocab_size": 257,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 48,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    return Decoder(model, names=("tiny-base",))


@pytest.fixture(scope="session")
def codec() -> TextCodec:
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TextCodec(
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=CHAT)
    )


class RecordingEngine(MultiLoraEngine):
    """An engine that keeps the requests of each `generate`."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.calls = []

    def generate(self, requests):
        self.calls.append(list(requests))
        return super().generate(requests)


@pytest.fixture
def engine(decoder, codec) -> Iterator[RecordingEngine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = RecordingEngine(decoder, codec, EngineConfig(max_batch=4, adapter_bytes=1 << 20, max_rank=8))
    yield engine
    engine.close()
    torch.set_num_threads(threads)
