"""The engine under requests that come and go: real prompts of the example tasks, each under its task's adapter.

Closed: all at once, more than there are rows. Open: Poisson arrivals at 70 % of that rate. Against the engine's own
figure where the batch stands still, and vLLM's on the same prompts. The engine has a process of its own, as a replica's
and vLLM's have.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from engine_common import ROOT, figures, random_adapters, random_model, report
from vllm_peer import Timed, VllmPeer

from lorauter.defaults import BASE_MODEL, resolve_adapters, resolve_model
from lorauter.engine import EngineConfig, GenerationRequest, MultiLoraEngine, SamplingParams
from lorauter.engine.engine import Engine, warm_up
from lorauter.engine.load import load_decoder
from lorauter.engine.messages import Adapter
from lorauter.engine.model import Decoder
from lorauter.engine.process import load_in_process

NEW_TOKENS = 64
Mixture = tuple[tuple[Adapter, float], ...]
Mix = Callable[[int], Mixture]


class Load:
    """An engine, and what is asked of it."""

    def __init__(self, engine: Engine, adapters: dict[str, Adapter], prompts: Sequence[tuple[str, str]]):
        self.engine = engine
        self.adapters = adapters
        self.tasks = [task for task, _ in prompts]
        self.prompts = [engine.codec.chat([{"role": "user", "content": text}]) for _, text in prompts]
        self.names = sorted(adapters)

    def base(self, i: int) -> Mixture:
        return ()

    def own(self, i: int) -> Mixture:
        """The adapter of the prompt's task."""
        return ((self.adapters[self.tasks[i % len(self.tasks)]], 1.0),)

    def three(self, i: int) -> Mixture:
        return tuple((self.adapters[self.names[(3 * i + j) % len(self.names)]], 1 / 3) for j in range(3))

    def requests(
        self, mix: Mix, count: int | None = None, *, ignore_eos: bool, lengths: Callable[[int], int] | None = None
    ) -> list[GenerationRequest]:
        return [
            GenerationRequest(
                self.prompts[i % len(self.prompts)],
                mix(i),
                SamplingParams(max_tokens=lengths(i) if lengths else NEW_TOKENS, ignore_eos=ignore_eos),
            )
            for i in range(count or len(self.prompts))
        ]


def moving(args: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        print(torch.cuda.get_device_name(), torch.__version__)
    rows = args.batch or (128 if on_gpu else 16)
    engine, adapters, model, folders = start(args, rows)
    load = Load(engine, adapters, example_prompts(args.requests))
    sizes = [len(prompt) for prompt in load.prompts]
    print(f"{len(sizes)} prompts of {statistics.fmean(sizes):.0f} tokens, {len(adapters)} adapters, {rows} rows")
    if not args.quick:
        first_requests(load)
    closed = closed_runs(load, args.repeats)
    steady = steady_rate(load, rows)
    still = still_rate(load, rows, args.repeats)
    report("adapters: tokens while all rows are taken and change", steady)
    report("adapters: tokens where the batch stands still", still)
    if not args.quick:
        open_run(load, 0.7 * closed["adapters, as they come"].requests_s, args.open_s)
    engine.close()
    if not args.quick and not args.shape:
        shared_prefix(load, model, folders)
    ratios: dict[str, float] = {
        "moving_of_still": steady / still,
        "adapters_of_base": closed["adapters, 64 each"].tokens_s / closed["base, 64 each"].tokens_s,
        "three_of_one": closed["three a request, 64 each"].tokens_s / closed["adapters, 64 each"].tokens_s,
    }
    if args.vllm:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        ratios |= against_vllm(args, load, model, folders, rows, closed, on_gpu)
    for name, value in ratios.items():
        figures[name] = value
    for name in (*OPEN_FIGURES, *ratios):
        if name in figures:
            print(f"{name} {figures[name]:.3f}")


def start(args: argparse.Namespace, rows: int) -> tuple[Engine, dict[str, Adapter], str, dict[str, Path]]:
    """The default model with the example adapters, or random weights of a shape, in this process then."""
    path = resolve_model("default")
    began = time.perf_counter()
    pool = Path(resolve_adapters("default"))
    folders = {p.name: p for p in sorted(pool.iterdir()) if (p / "adapter_config.json").is_file()}
    config = EngineConfig(max_batch=rows, max_model_len=2048, max_queue=4096, prefix_reuse=False)
    engine: Engine
    if args.shape:
        _, codec = load_decoder(path, device="cpu")
        engine = MultiLoraEngine(Decoder(random_model(args.shape, "cuda")), codec, config)
        adapters: dict[str, Adapter] = dict(zip(folders, random_adapters(engine, len(folders)), strict=True))
    else:
        engine = load_in_process(path, config, aliases=[BASE_MODEL])
        adapters = {name: engine.read(p, name=name, version="1")[0] for name, p in folders.items()}
    warm_up(engine)  # as a replica does before it takes requests
    report("ready after", time.perf_counter() - began, "s")
    return engine, adapters, path, folders


def example_prompts(count: int) -> list[tuple[str, str]]:
    """Validation examples of the example tasks, the tasks taking turns: (task, text)."""
    from lorauter.tasks import read_tasks

    tasks = read_tasks(ROOT / "examples" / "tasks")
    most = max(len(task.validation) for task in tasks)
    texts = [(task.name, task.validation[i].input) for i in range(most) for task in tasks if i < len(task.validation)]
    return [texts[i % len(texts)] for i in range(count)]


def first_requests(load: Load) -> None:
    """The first request after the start against the tenth: nothing is compiled or captured in traffic."""
    times = []
    for i in range(10):
        began = time.perf_counter()
        load.engine.generate(load.requests(load.own, i + 1, ignore_eos=True)[-1:])
        times.append(time.perf_counter() - began)
    report("first request after the start of the tenth", times[0] / times[-1], "")


def timed(engine: Engine, requests: Sequence[GenerationRequest]) -> Timed:
    began = time.perf_counter()
    answers = engine.generate(requests)
    seconds = time.perf_counter() - began
    return Timed(len(requests) / seconds, sum(len(answer.token_ids) for answer in answers) / seconds)


def closed_runs(load: Load, repeats: int) -> dict[str, Timed]:
    """All requests at once; medians of runs that take turns, after one to warm up."""
    cases = {
        "adapters, as they come": load.requests(load.own, ignore_eos=False),
        "base, as they come": load.requests(load.base, ignore_eos=False),
        "adapters, 64 each": load.requests(load.own, ignore_eos=True),
        "base, 64 each": load.requests(load.base, ignore_eos=True),
        "three a request, 64 each": load.requests(load.three, ignore_eos=True),
    }
    runs: dict[str, list[Timed]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, requests in cases.items():
            figure = timed(load.engine, requests)
            if turn:
                runs[name].append(figure)
    return {name: told(f"closed, {name}", figures_of) for name, figures_of in runs.items()}


def told(name: str, runs: Sequence[Timed]) -> Timed:
    median = Timed(statistics.median(run.requests_s for run in runs), statistics.median(run.tokens_s for run in runs))
    report(name, median.requests_s, f"requests/s, {median.tokens_s:.0f} tokens/s")
    return median


def steady_rate(load: Load, rows: int) -> float:
    """Tokens a second while rows are left and taken all the time: answers of 32 to 96 tokens, 64 in the mean."""
    draw = random.Random(0)
    requests = load.requests(load.own, 5 * rows, ignore_eos=True, lengths=lambda i: draw.randint(32, 96))
    arrivals: list[tuple[float, int]] = []
    ends: list[float] = []

    async def one(request: GenerationRequest) -> None:
        arrivals.extend([(time.perf_counter(), len(chunk.token_ids)) async for chunk in load.engine.stream(request)])
        ends.append(time.perf_counter())

    async def everyone() -> None:
        await asyncio.gather(*map(one, requests))

    asyncio.run(everyone())
    # From when as many have ended as there are rows until there is nobody left to take a place.
    first, last = sorted(ends)[rows], sorted(ends)[len(requests) - rows - 1]
    return sum(tokens for at, tokens in arrivals if first < at <= last) / (last - first)


def still_rate(load: Load, rows: int, repeats: int) -> float:
    requests = load.requests(load.own, rows, ignore_eos=True)
    return statistics.median([timed(load.engine, requests).tokens_s for _ in range(repeats + 1)][1:])


OPEN_FIGURES = ("gap_p99_of_median", "first_median_of_alone", "first_p99_of_alone", "prefix_first_of_cold")


def open_run(load: Load, rate: float, seconds: float) -> None:
    """Poisson arrivals; gaps between an answer's chunks, and times to the first."""
    draw = random.Random(1)
    requests = load.requests(load.own, ignore_eos=False)
    gaps: list[float] = []
    firsts: list[float] = []

    async def one(request: GenerationRequest, firsts: list[float]) -> None:
        last, first = time.perf_counter(), True
        async for _ in load.engine.stream(request):
            now = time.perf_counter()
            (firsts if first else gaps).append(now - last)
            last, first = now, False

    async def arrivals() -> None:
        tasks = []
        began = at = time.perf_counter()
        while at < began + seconds:
            tasks.append(asyncio.create_task(one(draw.choice(requests), firsts)))
            at += draw.expovariate(rate)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
        await asyncio.gather(*tasks)

    alone: list[float] = []
    for request in requests[:24]:
        asyncio.run(one(request, alone))
    gaps.clear()
    asyncio.run(arrivals())
    gap, alone_first = statistics.median(gaps), statistics.median(alone)
    report(f"open, {rate:.0f} requests/s: median gap; p99", 1e3 * gap, f"ms; {1e3 * percentile(gaps, 99):.2f} ms")
    report(
        "open: median time to first token (alone); p99",
        1e3 * statistics.median(firsts),
        f"({1e3 * alone_first:.2f}); {1e3 * percentile(firsts, 99):.2f} ms",
    )
    figures["gap_p99_of_median"] = percentile(gaps, 99) / gap
    figures["first_median_of_alone"] = statistics.median(firsts) / alone_first
    figures["first_p99_of_alone"] = percentile(firsts, 99) / alone_first


def percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def shared_prefix(load: Load, model: str, folders: dict[str, Path]) -> None:
    """32 requests behind one system prompt of 1,500 tokens, against 32 behind one of their own each."""
    draw = random.Random(2)

    def prefix() -> tuple[int, ...]:
        return tuple(draw.randrange(1000, 20000) for _ in range(1500))

    config = EngineConfig(max_batch=32, max_model_len=2048, adapter_bytes=1 << 28, cache_bytes=4 << 30)
    engine = load_in_process(model, config, aliases=[BASE_MODEL])
    load.adapters = {name: engine.read(p, name=name, version="1")[0] for name, p in folders.items()}

    def median_first(prefixes: Sequence[tuple[int, ...]]) -> float:
        firsts: list[float] = []

        async def one(i: int) -> None:
            began = time.perf_counter()
            request = GenerationRequest(
                (*prefixes[i], *load.prompts[i % len(load.prompts)]), load.own(i), SamplingParams(max_tokens=2)
            )
            async for _ in engine.stream(request):
                firsts.append(time.perf_counter() - began)
                break

        async def everyone() -> None:
            await asyncio.gather(*map(one, range(32)))

        asyncio.run(everyone())
        return statistics.median(firsts)

    median_first([prefix() for _ in range(32)])
    cold = median_first([prefix() for _ in range(32)])
    shared = [prefix()] * 32
    warm = [median_first(shared) for _ in range(3)]
    engine.close()
    report("32 behind 1,500 tokens: median first token, cold; shared, new; shared, known", 1e3 * cold,
           f"ms; {1e3 * warm[0]:.1f} ms; {1e3 * warm[-1]:.1f} ms")  # fmt: skip
    figures["prefix_first_of_cold"] = warm[-1] / cold


def against_vllm(
    args: argparse.Namespace,
    load: Load,
    model: str,
    folders: dict[str, Path],
    rows: int,
    closed: dict[str, Timed],
    on_gpu: bool,
) -> dict[str, float]:
    """The closed cases by vLLM, LoRA switched on for those with adapters alone."""
    settings: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": rows}
    settings |= (
        {"gpu_memory_utilization": 0.4, "attention_backend": "FLASH_ATTN"} if on_gpu else {"enforce_eager": True}
    )
    ratios = {}
    for kind in ("adapters", "base"):
        used = folders if kind == "adapters" else {}
        peer = VllmPeer(args.vllm, model, load.prompts, used, settings)
        names: list[str | None] = [task if used else None for task in load.tasks]
        for case, ignore_eos in ((f"{kind}, as they come", False), (f"{kind}, 64 each", True)):
            runs = [peer.run(names, NEW_TOKENS, ignore_eos=ignore_eos) for _ in range(args.repeats + 1)][1:]
            theirs = told(f"vLLM, closed, {case}", runs)
            name = f"{kind}_of_vllm_{'64_each' if ignore_eos else 'as_they_come'}"
            ours = closed[case]
            ratios[name] = ours.tokens_s / theirs.tokens_s if ignore_eos else ours.requests_s / theirs.requests_s
        peer.close()
    return ratios
