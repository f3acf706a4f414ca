"""Where the time of steps goes: on the host by phase, in an engine's own process, and on a GPU by kernel.

Cases: `moving`'s still batch with the base model and with adapters, and `held`'s batch, free and half held.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_held import ROWS, SCHEMA
from engine_moving import example_prompts

from lorauter.defaults import resolve_adapters, resolve_model
from lorauter.engine import EngineConfig, GenerationRequest, SamplingParams, load_engine
from lorauter.engine.engine import warm_up
from lorauter.engine.load import load_decoder
from lorauter.engine.types import Grammar

Cases = dict[str, list[GenerationRequest]]


def profile(args: argparse.Namespace) -> None:
    """Print both, of each case."""
    rows = args.batch or (128 if torch.cuda.is_available() else 16)
    pool = Path(resolve_adapters("default"))
    folders = [p for p in sorted(pool.iterdir()) if (p / "adapter_config.json").is_file()]
    config = EngineConfig(max_batch=rows, max_model_len=1024, prefix_reuse=False)
    from lorauter.engine.process import start_process

    engine: Any = start_process(functools.partial(_load, resolve_model("default")), config)
    warm_up(engine)
    _each(
        engine, cases(engine, [engine.read(p, name=p.name, version="1")[0] for p in folders], rows), lambda run: run()
    )
    engine.close()
    if torch.cuda.is_available():
        engine = load_engine(resolve_model("default"), config)
        warm_up(engine)
        adapters = [engine.read(p, name=p.name, version="1")[0] for p in folders]
        _each(engine, cases(engine, adapters, rows), kernels)
        engine.close()


def _each(engine: Any, made: Cases, around: Callable[[Callable[[], object]], None]) -> None:
    for name, requests in made.items():
        for _ in range(2):
            engine.generate(requests)
        time.sleep(1.5)  # what the other process says of these is said
        print(f"=== {name}", flush=True)
        around(functools.partial(engine.generate, requests))
        time.sleep(1.5)


def cases(engine: Any, adapters: Sequence[Any], rows: int) -> Cases:
    """What is asked of an engine."""
    texts = example_prompts(rows)
    prompts = [tuple(engine.codec.chat([{"role": "user", "content": text}])) for _, text in texts]
    sampling = SamplingParams(max_tokens=64, ignore_eos=True)
    base = [GenerationRequest(prompt, sampling=sampling) for prompt in prompts]
    grammar = Grammar("json", json.dumps(SCHEMA), "response_format")
    form = replace(sampling, grammar=grammar)
    return {
        f"{rows} rows, base": base,
        f"{rows} rows, {len(adapters)} adapters": [
            replace(one, adapters=((adapters[i % len(adapters)], 1.0),)) for i, one in enumerate(base)
        ],
        f"{ROWS} rows, free": base[:ROWS],
        f"{ROWS} rows, half held": [replace(one, sampling=form) if i % 2 else one for i, one in enumerate(base[:ROWS])],
    }


def kernels(run: Callable[[], object]) -> None:
    """The device's time by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    found = trace.key_averages()
    total = sum(event.self_device_time_total for event in found)
    print(f"device busy {total / 1e3:.1f} ms")
    for event in sorted(found, key=lambda event: -event.self_device_time_total)[:22]:
        each = event.self_device_time_total / max(1, event.count)
        print(
            f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:7} x {each:8.1f} us  {event.key[:90]}",
            flush=True,
        )


# --- the other process


def _load(path: str) -> Any:
    _watch()
    return load_decoder(path, device="cuda" if torch.cuda.is_available() else "cpu")


def _watch() -> None:
    """Time the phases of the core's thread, and of finding what may come; tell whenever it becomes idle."""
    from lorauter.engine import core, grammars, scheduler
    from lorauter.engine.cuda_flights import CudaFlight
    from lorauter.engine.cuda_runner import CudaRunner
    from lorauter.engine.runner import Runner

    spent: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    main = threading.local()

    def timed(owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            outer, main.inner = getattr(main, "inner", 0.0), 0.0
            began = time.perf_counter()
            try:
                return inner(*given, **named)
            finally:
                took = time.perf_counter() - began
                spent[label].append(took - main.inner)  # without what is timed of itself
                main.inner = outer + took

        setattr(owner, name, call)

    timed(scheduler.Scheduler, "plan", "plan")
    timed(scheduler.Scheduler, "take", "take tokens")
    timed(CudaRunner if torch.cuda.is_available() else Runner, "launch", "launch")
    timed(CudaFlight, "wait", "wait for the device")
    timed(core.EngineCore, "_choose", "choose")
    timed(core.EngineCore, "_check", "check tokens")
    timed(core.EngineCore, "_land", "land, the rest")
    timed(core.EngineCore, "_tell", "tell")
    timed(core.EngineCore, "_wait", "inbox")
    timed(grammars.Grammars, "advance", "hand to masks")
    timed(grammars.Grammars, "_find", "(beside) masks")
    check, tell, refuse = core.EngineCore._check, core.EngineCore._tell, scheduler.Scheduler._refuse

    def checking(self: Any, tokens: list[int]) -> Any:
        for sequence in self.scheduler.decided:
            if (held := self._held.get(sequence.id)) is not None and not self.scheduler.is_void(sequence):
                counts["masks that are there once the token is" if held.known else "that are not"] += 1
        return check(self, tokens)

    def refusing(self: Any, sequence: Any) -> None:
        counts["refused"] += 1
        refuse(self, sequence)

    def telling(self: Any, *, idle: bool = False) -> None:
        tell(self, idle=idle)
        if idle and len(spent["plan"]) > 20:
            steps = len(spent["launch"])
            total = sum(sum(times) for label, times in spent.items() if not label.startswith("("))
            print(f"{steps} steps, {1e3 * total / steps:.3f} ms each; held tokens: {dict(counts)}")
            for label, times in sorted(spent.items(), key=lambda item: -sum(item[1])):
                each, p90 = 1e6 * statistics.fmean(times), 1e6 * sorted(times)[len(times) * 9 // 10]
                print(f"  {label:28}{1e6 * sum(times) / steps:8.0f} us a step, {each:8.0f} a call, p90 {p90:8.0f}")
            print(end="", flush=True)
            spent.clear()
            counts.clear()

    core.EngineCore._check = checking  # type: ignore[method-assign]
    core.EngineCore._tell = telling  # type: ignore[method-assign]
    scheduler.Scheduler._refuse = refusing  # type: ignore[method-assign]
