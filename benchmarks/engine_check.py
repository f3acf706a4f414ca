"""The GPU's numbers: mixed batches against merged float32 models."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from operator import eq
from typing import Any

import torch
from engine_common import ATTENTION, number_tokenizer, report
from transformers import LlamaConfig

from lorauter.engine import EngineConfig, GenerationRequest, MultiLoraEngine, SamplingParams
from lorauter.engine.model import Decoder
from lorauter.engine.slots import pack
from lorauter.engine.text import TextCodec


def check(args: argparse.Namespace) -> None:
    """On a GPU: tokens of mixed batches equal those of merged float32 models, whatever else is in the batch."""
    from transformers import MistralConfig, Qwen3Config

    sizes = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 3,
             "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    check_model("Llama", LlamaConfig(**sizes))
    check_model("Qwen3, norms of queries and keys", Qwen3Config(**sizes, head_dim=32))
    check_model("Mistral, sliding window", MistralConfig(**sizes, sliding_window=24))


def check_model(title: str, config: Any) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().cuda()
    engine = MultiLoraEngine(
        Decoder(reference), TextCodec(number_tokenizer(512)),
        EngineConfig(max_batch=6, max_model_len=256, step_tokens=48, adapter_bytes=1 << 26),
    )  # fmt: skip
    shape, adapters = engine.slots.shape, []
    pairs: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    kinds = [(4, ATTENTION), (8, tuple(shape.linears)), (3, ("down_proj", "up_proj")), (48, ("q_proj", "o_proj"))]
    for i, (rank, targets) in enumerate(kinds * 5):
        pairs[f"a{i}"] = {
            t: (torch.randn(rank, 3, shape.linears[t][0]) / 8, torch.randn(rank, 3, shape.linears[t][1]) / 2 / rank)
            for t in targets
        }
        adapters.append(pack((f"a{i}", "1"), pairs[f"a{i}"], torch.float32, pin=True))
    draw = random.Random(0)
    requests = []
    for i in range(24):
        chosen = draw.sample(adapters, i % 4)
        prompt = tuple(draw.randrange(512) for _ in range(draw.choice([1, 5, 40, 130])))
        mixture = tuple((adapter, draw.uniform(-0.5, 1)) for adapter in chosen)
        requests.append(GenerationRequest(prompt, mixture, SamplingParams(draw.choice([1, 7, 60]), ignore_eos=True)))
    answers = engine.generate(requests)
    same = total = 0
    for request, answer in zip(requests, answers, strict=True):
        merged = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().cuda()
        merged.load_state_dict(reference.state_dict())
        with torch.inference_mode():
            for adapter, weight in request.adapters:
                for target, (a, b) in pairs[adapter.name].items():
                    for layer, block in enumerate(merged.model.layers):
                        module = getattr(block.self_attn if target in ATTENTION else block.mlp, target)
                        module.weight += weight * (b[:, layer].T @ a[:, layer]).cuda()
            ids = torch.tensor([[*request.prompt, *answer.token_ids]], device="cuda")
            logits = merged(ids).logits[0, len(request.prompt) - 1 : -1]
            best = logits.max(-1).values
            got = logits.gather(-1, ids[0, len(request.prompt) :, None])[:, 0]
        same += int((best - got < 2e-3).sum())
        total += len(answer.token_ids)
        assert len(answer.token_ids) == request.sampling.max_tokens
    report(f"{title}: tokens that are the merged model's likeliest", same / total, f"of {total}")
    again = engine.generate(requests[::-1])[::-1]
    report(f"{title}: the same answers in another order", sum(map(eq, answers, again)) / 24, "of 24")
    sampled = [
        replace(request, sampling=replace(request.sampling, temperature=0.8 * (i % 2), top_p=0.9, seed=i))
        for i, request in enumerate(requests)
    ]
    first, second = engine.generate(sampled), engine.generate(sampled[::-1])[::-1]
    report(f"{title}: the same with every other one sampled", sum(map(eq, first, second)) / 24, "of 24")
    report(f"{title}: of those, greedy ones as before", sum(map(eq, first[::2], answers[::2])) / 12, "of 12")
    engine.close()
    assert same == total
