"""A base model out of its folder: the tensors and frequencies that transformers makes of it, or nothing."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorauter.engine.model import Decoder
from lorauter.engine.weights import read_model

CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen2-window", "qwen3"])
def kind(request):
    return request.param


@pytest.fixture
def folder(pool, kind, tmp_path):
    pool.base(kind).save_pretrained(tmp_path / kind)
    return tmp_path / kind


@pytest.fixture
def llama(pool, tmp_path):
    pool.base("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def assert_as_transformers(folder, dtype=torch.float32):
    read = read_model(str(folder), dtype, CPU)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = loaded.state_dict()
    assert read is not None and type(read).__name__ == type(loaded).__name__
    assert read.state_dict().keys() == expected.keys()
    for name, tensor in read.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    positions = torch.arange(90)[None]
    for mine, theirs in zip(
        read.model.rotary_emb(torch.empty(0, dtype=dtype), positions),
        loaded.model.rotary_emb(torch.empty(0, dtype=dtype), positions),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    norms = ((model.model.norm, model.model.layers[2].input_layernorm) for model in (read, loaded))
    assert len({norm.variance_epsilon for pair in norms for norm in pair}) == 1
    assert read.generation_config.eos_token_id == loaded.generation_config.eos_token_id
    mine, theirs = Decoder(read), Decoder(loaded)
    sizes = ("heads", "kv_heads", "head_dim", "hidden", "intermediate", "max_positions", "shape", "vocabulary")
    assert [getattr(mine, size) for size in sizes] == [getattr(theirs, size) for size in sizes]
    assert [layer.window for layer in mine.layers] == [layer.window for layer in theirs.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_has_what_transformers_reads_of_it(folder, dtype):
    assert_as_transformers(folder, dtype)


def test_a_folder_with_its_weights_in_several_files(pool, llama):
    for file in llama.glob("*.safetensors"):
        file.unlink()
    pool.base("llama").save_pretrained(llama, max_shard_size="50KB")
    assert len(list(llama.glob("*.safetensors"))) > 1
    assert_as_transformers(llama)


def test_layers_are_in_their_order(pool, tmp_path):
    config = pool.base("llama").config.to_dict() | {"num_hidden_layers": 12}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    for i, layer in enumerate(made.model.layers):
        torch.nn.init.constant_(layer.input_layernorm.weight, i)
    made.save_pretrained(tmp_path)
    assert_as_transformers(tmp_path)
    read = read_model(str(tmp_path), torch.float32, CPU)
    assert [int(layer.input_layernorm.weight[0]) for layer in read.model.layers] == list(range(12))


def test_ends_of_text_are_those_of_generation(llama):
    transformers.GenerationConfig(eos_token_id=[257, 3]).save_pretrained(llama)
    assert_as_transformers(llama)
    (llama / "generation_config.json").unlink()
    assert_as_transformers(llama)


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_one_more(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})


def of_another_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})


def cut_off(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def setting(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    "change",
    [
        without_a_tensor,
        with_one_more,
        of_another_shape,
        cut_off,
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").unlink(),
        setting(quantization_config={"quant_method": "awq"}),
        setting(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        setting(architectures=["LlamaForSequenceClassification"]),
        setting(architectures=["MistralForCausalLM"]),
        setting(architectures=None),
        setting(attention_bias=True),
        setting(tie_word_embeddings=False),
    ],
)
def test_what_is_not_usual_is_left_to_transformers(llama, change):
    change(llama)
    assert read_model(str(llama), torch.float32, CPU) is None


def test_it_is_loaded_without_transformers_own_modules(llama, tokenizer):
    tokenizer.save_pretrained(llama)
    code = "import sys; from lorauter.engine.load import load_decoder; "
    code += "load_decoder(sys.argv[1], device='cpu'); "
    code += (
        "print([name for name in ('transformers.modeling_utils', 'torch.distributed.tensor') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(llama)], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "[]\n", ran.stderr
