"""The engine on one GPU with a batch that stands still: random weights of the 8B and 135M shapes, and its peers."""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from engine_common import (
    ATTENTION,
    MLP,
    SHAPES,
    gpu_engine,
    measure,
    random_adapters,
    random_model,
    random_requests,
    report,
    run,
)

from lorauter.engine import GenerationRequest, MultiLoraEngine
from lorauter.engine.blocks import BLOCK
from lorauter.engine.slots import PackedAdapter

ADAPTER_BYTES = {"8B": 8 << 30, "135M": 4 << 30}  # room for the 256 adapters that are resident
CACHE_BYTES = {"8B": 16 << 30, "135M": 8 << 30}


def gpu(args: argparse.Namespace) -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for shape in SHAPES if args.shape is None else [args.shape]:
        if args.long:
            long_prompt(shape, args.long)
            free()
            continue
        model = random_model(shape, "cuda")
        if args.zipf:
            target_sets(shape, model, args)
            zipf(shape, model, args)
            del model
            free()
            continue
        if args.peers:
            gpu_peers(shape, model)
        engine = gpu_engine(shape, model, adapter_bytes=ADAPTER_BYTES[shape], cache_bytes=CACHE_BYTES[shape])
        del model
        gc.collect()
        torch.cuda.empty_cache()
        memory(shape, engine)
        gpu_throughput(shape, engine, args)
        engine.close()
        del engine
        free()


def long_prompt(shape: str, length: int) -> None:
    """One prompt of so many tokens, and an answer of 16, under no adapter and under three."""
    model = random_model(shape, "cuda", positions=length + 64)
    engine = gpu_engine(shape, model, max_model_len=length + 64, max_batch=8)
    adapters = random_adapters(engine, 3)
    for k in (0, 3):
        mixture = [(adapter, 1 / 3) for adapter in adapters[:k]]
        requests = random_requests(1, length, 16, SHAPES[shape]["vocab_size"], lambda _, mixture=mixture: mixture)
        took = [16 / run(engine, requests) for _ in range(4)]
        report(f"{shape}, a prompt of {length} tokens, {k} adapters", statistics.median(took[1:]), "s")
    engine.close()


def free() -> None:
    """Give back what a closed engine held."""
    gc.collect()
    torch.cuda.empty_cache()


def gpu_throughput(shape: str, engine: MultiLoraEngine, args: argparse.Namespace) -> None:
    adapters = random_adapters(engine, 256)

    def case(batch: int, k: int, pool: int = 16) -> Callable[[], float]:
        requests = random_requests(
            batch,
            128,
            128,
            SHAPES[shape]["vocab_size"],
            lambda i: [(adapters[(i * (1 if pool == 16 else k) + j) % pool], 1 / k) for j in range(k)],
        )
        return lambda: run(engine, requests)

    alone = measure({f"{shape}, batch 32, base, no adapter resident": case(32, 0)}, args.repeats).popitem()[1]
    for batch in (32, 128):
        title = f"{shape}, batch {batch}"
        names = {k: f"{title}, K = {k}" if k else f"{title}, base" for k in (0, 1, 3)}
        results = measure({name: case(batch, k) for k, name in names.items()}, args.repeats)
        report(f"{title}, K = 3 of base", results[names[3]] / results[names[0]], "")
        report(f"{title}, K = 3 of K = 1", results[names[3]] / results[names[1]], "")
        if args.profile:
            profile(engine, case(batch, 3), f"{title}, K = 3")
    # What is resident but not used must cost nothing; what is used, only its own share.
    title = f"{shape}, batch 32, 256 resident"
    cases = {"K = 3, of 256": case(32, 3, 256), "K = 3, of 16": case(32, 3), "base": case(32, 0)}
    results = measure({f"{title}, {name}": one for name, one in cases.items()}, args.repeats)
    report(f"{title}, base of base with none", results[f"{title}, base"] / alone, "")


def memory(shape: str, engine: MultiLoraEngine) -> None:
    """Memory in use against what the shapes imply."""
    s = SHAPES[shape]
    head = s["hidden_size"] // s["num_attention_heads"]
    attention = s["hidden_size"] * head * (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"])
    layer = attention + 3 * s["hidden_size"] * s["intermediate_size"] + 2 * s["hidden_size"]
    tables = (1 if s.get("tie_word_embeddings") else 2) * s["vocab_size"] * s["hidden_size"]
    weights = 2 * (s["num_hidden_layers"] * layer + tables + s["hidden_size"])
    positions = engine.facts.cache_blocks * BLOCK
    cache = 2 * 2 * s["num_hidden_layers"] * positions * s["num_key_value_heads"] * head
    own = weights + cache + engine.slots.arena.nbytes
    report(f"{shape}, weights, cache and adapters' arena by shape", own / 1e9, "GB")
    report(f"{shape}, in use", torch.cuda.memory_allocated() / 1e9, "GB")


def gpu_peers(shape: str, model: Any) -> None:
    """transformers `generate` and PEFT's mixed batch, batch 32, 128 prompt tokens, fewer new ones."""
    from peft import LoraConfig, get_peft_model

    ids = torch.randint(SHAPES[shape]["vocab_size"], (32, 128), device="cuda")

    def generate(target: Any, new: int, **options: Any) -> float:
        best = []
        for _ in range(2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            target.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0, **options,
            )  # fmt: skip
            torch.cuda.synchronize()
            best.append(32 * new / (time.perf_counter() - started))
        return best[-1]

    report(f"{shape}, batch 32, transformers generate, no adapters", generate(model, 64))
    config = LoraConfig(r=16, lora_alpha=16, target_modules=list(ATTENTION), init_lora_weights=False)
    mixed = get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=False)
    for i in range(1, 16):
        mixed.add_adapter(f"a{i}", config)
    mixed.to(torch.bfloat16).eval()
    report(f"{shape}, batch 32, PEFT mixed batch", generate(mixed, 8, adapter_names=[f"a{i % 16}" for i in range(32)]))
    mixed.unload()


def zipf(shape: str, model: Any, args: argparse.Namespace) -> None:
    """1,000 adapters in host memory, 64 slots, requests on 3 each in a Zipf order, against 64 that are all resident.

    Once with answers of 128 tokens, over the whole run: there all end in the same step, and a client that finds no room
    waits for a whole generation (1,169 steps for 1,038, whatever the engine does). Once with answers of 64 to 192, from
    when each client has had one until one has no more to ask.
    """
    started = time.perf_counter()
    size = adapter_bytes(shape)
    engine = gpu_engine(shape, model, adapter_bytes=64 * size, cache_bytes=CACHE_BYTES[shape])
    adapters = random_adapters(engine, args.zipf)
    print(f"{args.zipf} adapters of {size / 1e6:.1f} MB made in {time.perf_counter() - started:.0f} s")
    draw = random.Random(1)
    shares = [1 / (i + 1) for i in range(len(adapters))]

    def wave(pool: Sequence[PackedAdapter], lengths: tuple[int, int]) -> list[GenerationRequest]:
        def mixture(_: int) -> list[tuple[PackedAdapter, float]]:
            chosen: dict[tuple[str, str], PackedAdapter] = {}
            while len(chosen) < 3:
                adapter = draw.choices(pool, shares[: len(pool)])[0]
                chosen[adapter.key] = adapter
            return [(adapter, 1 / 3) for adapter in chosen.values()]

        return [
            replace(request, sampling=replace(request.sampling, max_tokens=draw.randint(*lengths)))
            for request in random_requests(256, 128, 128, SHAPES[shape]["vocab_size"], mixture)
        ]

    def timed(requests: Sequence[GenerationRequest]) -> tuple[float, float, float]:
        """Of 32 clients that each wait for their answers: tokens a second of the whole run, and while all ask; the
        median time to first token."""
        firsts: list[float] = []
        begun: list[float] = []  # when a client has asked for the second time
        over: list[float] = []
        arrivals: list[tuple[float, int]] = []

        async def client(mine: Sequence[GenerationRequest]) -> None:
            for i, request in enumerate(mine):
                started, first = time.perf_counter(), True
                if i == 1:
                    begun.append(started)
                async for chunk in engine.stream(request):
                    arrivals.append((time.perf_counter(), len(chunk.token_ids)))
                    if first:
                        firsts.append(time.perf_counter() - started)
                        first = False
            over.append(time.perf_counter())

        async def everyone() -> None:
            await asyncio.gather(*[client(requests[i::32]) for i in range(32)])

        started = time.perf_counter()
        asyncio.run(everyone())
        whole = sum(count for _, count in arrivals) / (time.perf_counter() - started)
        since, until = max(begun), min(over)
        steady = sum(count for at, count in arrivals if since < at <= until) / (until - since)
        return whole, steady, statistics.median(firsts)

    for lengths, which, name in (((128, 128), 0, "128 tokens each"), ((64, 192), 1, "64 to 192 tokens, while all ask")):
        timed(wave(adapters[:64], lengths))
        resident = timed(wave(adapters[:64], lengths))
        before = engine.slots.counters.misses
        timed(wave(adapters, lengths))
        all_of_them = timed(wave(adapters, lengths))
        loads = (engine.slots.counters.misses - before) / 2
        title = f"{shape}, Zipf, {name}"
        report(f"{title}: 64 adapters", resident[which])
        report(f"{title}: {len(adapters)}, 64 slots", all_of_them[which])
        report(f"{title}: loads in 256 requests", loads, "")
        report(f"{title}: of all resident", all_of_them[which] / resident[which], "")
        report(f"{title}: first token of all resident", all_of_them[2] / resident[2], "")
    engine.close()


def target_sets(shape: str, model: Any, args: argparse.Namespace) -> None:
    """Adapters of three kinds of target modules under a full budget, against the mean of those of one kind each. As
    many requests are of each kind as of the others: the harmonic mean is what three engines would make."""
    kinds = (ATTENTION, MLP, ATTENTION + MLP)
    budget = 24 * adapter_bytes(shape)

    def rate(targets: Sequence[Sequence[str]]) -> float:
        engine = gpu_engine(shape, model, adapter_bytes=budget, cache_bytes=CACHE_BYTES[shape])
        arena = engine.slots.arena.data_ptr()
        adapters = [
            adapter for i, each in enumerate(targets) for adapter in random_adapters(engine, 16, 16, each, f"kind-{i}")
        ]
        draw = random.Random(2)
        requests = random_requests(256, 128, 64, SHAPES[shape]["vocab_size"], lambda i: [(draw.choice(adapters), 1.0)])
        run(engine, requests)
        figure = statistics.median(run(engine, requests) for _ in range(args.repeats))
        assert engine.slots.arena.data_ptr() == arena
        report(f"{shape}, target sets, loads", engine.slots.counters.misses, "")
        engine.close()
        del engine
        free()
        return figure

    one, three = [rate([each] * 3) for each in kinds], rate(kinds)
    for each, figure in zip(("attention", "MLP", "all"), one, strict=True):
        report(f"{shape}, target sets, {each}", figure)
    report(f"{shape}, target sets, three kinds", three)
    report(f"{shape}, three kinds of target sets of one kind", three / statistics.fmean(one), "")
    report(f"{shape}, three kinds of target sets of the harmonic mean", three / statistics.harmonic_mean(one), "")


def adapter_bytes(shape: str) -> int:
    """Of an adapter of rank 16 on q, k, v and o in bf16."""
    s = SHAPES[shape]
    head = s["hidden_size"] // s["num_attention_heads"]
    kv = s["num_key_value_heads"] * head
    return (
        2
        * 16
        * s["num_hidden_layers"]
        * (4 * s["hidden_size"] + 2 * kv + s["num_attention_heads"] * head + s["hidden_size"])
    )


def profile(engine: MultiLoraEngine, case: Callable[[], float], name: str) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as trace:
        case()
        torch.cuda.synchronize()
    print(name)
    print(trace.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=60))
