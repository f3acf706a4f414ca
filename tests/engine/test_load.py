import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers

from lorauter.engine import EngineConfig, GenerationRequest, SamplingParams, load_engine
from lorauter.engine.engine import warm_up
from lorauter.engine.load import load_decoder
from lorauter.errors import AdapterRejected, ConfigError


@pytest.fixture
def folder(pool, tokenizer, tmp_path):
    """The tiny Llama as a folder, whose generation config knows two ends of text."""
    path = tmp_path / "Tiny"
    pool.base("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    transformers.GenerationConfig(eos_token_id=[257, 3]).save_pretrained(path)
    return path


def test_a_folder_becomes_an_engine(pool, folder, made):
    engine = load_engine(str(folder), EngineConfig(max_batch=2, device="cpu", dtype="float32", threads=1))
    try:
        adapters = pool.mix((("patterns", 1.0),))  # says "hub/Tiny"
        request = GenerationRequest((5, 6, 7), adapters, SamplingParams(12, ignore_eos=True))
        (answer,) = engine.generate([request])
        assert answer.token_ids == pool.continued("llama", (5, 6, 7), 12, (("patterns", 1.0),))
        assert engine.codec.eos_ids == {256, 257, 3}
        assert engine.codec.chat([{"role": "user", "content": "x"}])[0] == 258
        shape = pool.decoder("llama").shape
        engine.pack(made(shape, "a", base="TINY", q_proj=1))
        with pytest.raises(AdapterRejected, match="base_model_aliases"):
            engine.pack(made(shape, "a", base="other", q_proj=1))
    finally:
        engine.close()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_settings_reach_the_engine(pool, folder, made, dtype):
    config = EngineConfig(max_model_len=50, dtype=dtype, threads=2)
    engine = load_engine(str(folder), config, aliases=["hub/other"])
    try:
        assert torch.get_num_threads() == 2
        assert engine.max_model_len == 50
        engine.pack(made(pool.decoder("llama").shape, "a", base="other", q_proj=1))
        (answer,) = engine.generate([GenerationRequest((5,), sampling=SamplingParams(4, ignore_eos=True))])
        assert len(answer.token_ids) == 4
    finally:
        engine.close()


def test_what_a_tokenizer_was_trained_with_cuts_no_prompt(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(32)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    _, codec = load_decoder(str(folder), device="cpu", dtype="float32", threads=1)
    assert codec.plain("x" * 100) == (ord("x"),) * 100
    assert len(codec.chat([{"role": "user", "content": "x" * 100}])) > 100
    assert codec.plain("ab") == (ord("a"), ord("b"))


def test_warming_up_tells_the_engine_its_pace(pool, start):
    engine = start(pool.decoder("llama"), max_batch=3, max_model_len=20)
    warm_up(engine)
    assert 0 < engine.pace.seconds(1) < engine.pace.seconds(6)
    assert engine.load == (0, 0)


def test_what_is_no_model_is_a_wrong_setting(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        load_engine(str(tmp_path))
    assert caught.value.setting == "base_model"


def test_the_engine_needs_nothing_heavier_than_transformers():
    heavy = "ray faiss sentence_transformers pydantic boto3 peft"
    code = f"import sys, lorauter.engine; print(*set('{heavy}'.split()) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
