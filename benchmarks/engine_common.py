"""What the engine's benchmarks share: random models and adapters, timed runs, and how figures are told."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorauter.engine import EngineConfig, GenerationRequest, MultiLoraEngine, SamplingParams
from lorauter.engine.engine import warm_up
from lorauter.engine.model import Decoder
from lorauter.engine.slots import PackedAdapter, pack
from lorauter.engine.text import TextCodec

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0},
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
figures: dict[str, Any] = {}


def report(name: str, value: float, unit: str = "tokens/s") -> None:
    figures[name] = round(value, 4)
    print(f"{name:64} {value:10.2f} {unit}", flush=True)


def measure(cases: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of each case, all taking turns, after one turn to warm up."""
    results: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            value = case()
            if turn:
                results[name].append(value)
    medians = {name: statistics.median(values) for name, values in results.items()}
    for name, value in medians.items():
        report(name, value)
    return medians


# --- random models


def random_model(shape: str, device: str, dtype: torch.dtype = torch.bfloat16, positions: int = 4096) -> Any:
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=positions)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"{i} ": i for i in range(vocabulary)}, unk_token="0 "))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_adapters(
    engine: MultiLoraEngine,
    count: int,
    rank: int = 16,
    targets: Sequence[str] = ATTENTION,
    name: str = "adapter",
) -> list[PackedAdapter]:
    """Adapters of their own memory each; the content differs by a factor alone."""
    shape, dtype = engine.slots.shape, engine.decoder.dtype
    pin = engine.decoder.device.type == "cuda"
    proto = {
        target: (
            (torch.randn(rank, shape.layers, shape.linears[target][0]) / shape.linears[target][0] ** 0.5).to(dtype),
            (torch.randn(rank, shape.layers, shape.linears[target][1]) / 64).to(dtype),
        )
        for target in targets
    }
    adapters = []
    for i in range(count):
        factor = 0.5 + i / count
        pairs = {target: (a * factor, b) for target, (a, b) in proto.items()}
        adapters.append(pack((f"{name}-{i}", "1"), pairs, dtype, pin=pin))
    return adapters


def random_requests(
    count: int, prompt: int, new: int, vocabulary: int, mixture: Callable[[int], Sequence[tuple[PackedAdapter, float]]]
) -> list[GenerationRequest]:
    draw = random.Random(0)
    return [
        GenerationRequest(
            tuple(draw.randrange(vocabulary) for _ in range(prompt)),
            tuple(mixture(i)),
            SamplingParams(max_tokens=new, ignore_eos=True),
        )
        for i in range(count)
    ]


def run(engine: MultiLoraEngine, requests: Sequence[GenerationRequest]) -> float:
    started = time.perf_counter()
    answers = engine.generate(requests)
    return sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - started)


def gpu_engine(shape: str, model: Any, **config: Any) -> MultiLoraEngine:
    settings = {"max_batch": 128, "max_model_len": 512, "max_queue": 4096, "prefix_reuse": False, **config}
    tokenizer = number_tokenizer(SHAPES[shape]["vocab_size"])
    engine = MultiLoraEngine(Decoder(model), TextCodec(tokenizer), EngineConfig(**settings))
    warm_up(engine)
    return engine
