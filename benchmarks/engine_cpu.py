"""The engine on a CPU: SmolLM2-135M and adapters of a pool, with its peers in the same run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from engine_common import measure, report, run
from vllm_peer import VllmPeer

from lorauter.engine import EngineConfig, GenerationRequest, SamplingParams
from lorauter.engine.slots import PackedAdapter


def cpu(args: argparse.Namespace) -> None:
    from lorauter.adapters import LoraWeights
    from lorauter.defaults import BASE_MODEL, resolve_model
    from lorauter.engine import load_engine
    from lorauter.tasks import read_task

    path = resolve_model("default")
    config = EngineConfig(max_batch=32, max_model_len=512, prefix_reuse=False, device="cpu", dtype="bfloat16")
    engine = load_engine(path, config, aliases=[BASE_MODEL])
    eight = ("sst2", "imdb", "rte", "cb", "qqp", "agnews", "xsum", "multi30k_deen")
    pool = {p.name: p for p in sorted(args.pool.iterdir()) if (p / "adapter_config.json").is_file()}
    packed = {name: engine.pack(LoraWeights.load(p, name=name, version="1")) for name, p in pool.items()}
    names = list(packed)
    task = read_task(args.tasks / "e2e_nlg.json.gz")
    texts = [example.input for example in task.validation[:32]]
    prompts = [engine.codec.chat([{"role": "user", "content": text}]) for text in texts]
    print(f"{len(prompts)} prompts of {sum(map(len, prompts)) / len(prompts):.0f} tokens, {len(names)} adapters")

    def case(mixture: Callable[[int], Sequence[tuple[PackedAdapter, float]]]) -> Callable[[], float]:
        sampling = SamplingParams(max_tokens=64, ignore_eos=True)
        requests = [GenerationRequest(ids, tuple(mixture(i)), sampling) for i, ids in enumerate(prompts)]
        return lambda: run(engine, requests)

    alone = measure({"engine, no adapter resident": case(lambda i: ())}, args.repeats).popitem()[1]
    base, mixed = hf_peers(path, prompts, [pool[name] for name in eight])
    vllm: dict[str, Callable[[], float]] = {}
    if args.vllm:
        settings = {"enforce_eager": True, "max_num_seqs": 32, "max_model_len": 512}
        plain = VllmPeer(args.vllm, path, prompts, {}, settings)
        adapted = VllmPeer(args.vllm, path, prompts, {name: pool[name] for name in eight}, settings)
        vllm = {
            "vLLM, no adapters": lambda: plain.run([None] * len(prompts)).tokens_s,
            "vLLM, 8 adapters": lambda: adapted.run([eight[i % 8] for i in range(len(prompts))]).tokens_s,
        }
    results = measure(
        {
            "engine, no adapters": case(lambda i: ()),
            "engine, 8 adapters": case(lambda i: [(packed[eight[i % 8]], 1.0)]),
            "engine, 40 resident, K = 1": case(lambda i: [(packed[names[i % len(names)]], 1.0)]),
            "engine, 40 resident, K = 3": case(
                lambda i: [(packed[names[(3 * i + j) % len(names)]], 1 / 3) for j in range(3)]
            ),
            "transformers generate, no adapters": base,
            "PEFT mixed batch, 8 adapters": mixed,
            **vllm,
        },
        args.repeats,
    )
    own = results["engine, no adapters"]
    report("no adapters, 40 resident, of none resident", own / alone, "")
    report("8 adapters of no adapters", results["engine, 8 adapters"] / own, "")
    if vllm:
        report("no adapters of vLLM", own / results["vLLM, no adapters"], "")
        report("8 adapters of vLLM", results["engine, 8 adapters"] / results["vLLM, 8 adapters"], "")
    report("no adapters of transformers", own / results["transformers generate, no adapters"], "")
    report("8 adapters of PEFT mixed", results["engine, 8 adapters"] / results["PEFT mixed batch, 8 adapters"], "")
    report("40 resident, K = 3 of no adapters", results["engine, 40 resident, K = 3"] / own, "")
    report("K = 3 of K = 1", results["engine, 40 resident, K = 3"] / results["engine, 40 resident, K = 1"], "")
    engine.close()


def hf_peers(
    path: str, prompts: Sequence[Sequence[int]], adapters: Sequence[Path]
) -> tuple[Callable[[], float], Callable[[], float]]:
    """transformers `generate` without adapters, and PEFT's mixed batch with eight (an eighth of the new tokens)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(p)) + list(p) for p in prompts])
    attended = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def generate(model: Any, new: int, **options: Any) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=attended,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                **options,
            )
        return len(prompts) * new / (time.perf_counter() - started)

    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), adapters[0], adapter_name=adapters[0].name
    )
    for adapter in adapters[1:]:
        model.load_adapter(adapter, adapter_name=adapter.name)
    names = [adapters[i % len(adapters)].name for i in range(len(prompts))]
    return lambda: generate(plain, 64), lambda: generate(model, 8, adapter_names=names)
