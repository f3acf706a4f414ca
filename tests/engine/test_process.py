"""An engine's device side in a process of its own: the same answers and errors, and neither outlives the other."""

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import counting
import psutil
import pytest
import transformers

from deployments.startup import explained
from lorauter.adapters.weights import CONFIG_FILE, LoraWeights
from lorauter.engine import Completion, EngineConfig, GenerationRequest, SamplingParams
from lorauter.engine.child import Child
from lorauter.engine.engine import Engine
from lorauter.engine.feed import feed
from lorauter.engine.load import load_decoder
from lorauter.engine.local import MultiLoraEngine
from lorauter.engine.messages import Begin, Drop
from lorauter.engine.process import Orders, Read, load_in_process, start_process
from lorauter.errors import (
    AdapterRejected,
    AdapterUnavailable,
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
    LorauterError,
    Overloaded,
    ServiceUnavailable,
)
from lorauter.pickled import PickledError

SETTINGS = {"max_batch": 4, "max_model_len": 1 << 12, "adapter_bytes": 1 << 20, "device": "cpu", "dtype": "float32"}
ENDLESS = {"max_tokens": 1 << 20, "ignore_eos": True}


def ask(text, adapters=(), **sampling):
    return GenerationRequest(tuple(text.encode("latin-1")), adapters, SamplingParams(**sampling))


async def collect(engine, request):
    return Completion.of([chunk async for chunk in engine.stream(request)])


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def together(engine, *requests):
    async def run():
        return await asyncio.gather(*(collect(engine, request) for request in requests), return_exceptions=True)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The counting one; closed, it leaves nothing behind, and nobody is told that it has died."""
    told = []
    engine = start_process(counting.load, EngineConfig(**SETTINGS, max_queue=4), ended=told.append)
    child = _child(engine)
    yield engine
    engine.close()
    assert (child.is_running(), told) == (False, [])
    with pytest.raises(RuntimeError, match="closed"):
        engine.check_health()


@pytest.fixture(scope="module")
def folder(pool, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "Tiny"
    pool.base("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    transformers.GenerationConfig(eos_token_id=[257, 3]).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny(folder) -> Iterator[Engine]:
    engine = load_in_process(str(folder), EngineConfig(**SETTINGS | {"max_queue": 64, "threads": 1}))
    yield engine
    engine.close()


def _child(engine: Engine) -> psutil.Process:
    return psutil.Process(engine._core._process.pid)


def test_answers_and_errors_are_those_of_an_engine_in_this_process(engine) -> None:
    engine.check_health()
    asked = [ask("a", max_tokens=3), ask("a", max_tokens=9, stop=("ef",)), ask("c" * 40, max_tokens=2)]
    asked += [ask("!"), ask("x" * (1 << 12)), GenerationRequest((999,))]
    *answers, bad, long, unknown = together(engine, *asked)
    assert [(answer.text, answer.finish_reason) for answer in answers] == [
        *[("bcd", "length"), ("bcd", "stop"), ("de", "length")]
    ]
    assert type(bad) is LorauterError
    assert "base model's output is not finite" in str(bad)
    assert (type(long), long.prompt_tokens, long.max_tokens) == (ContextLengthExceeded, 1 << 12, 1 << 12)
    assert (type(unknown), unknown.param) == (InvalidRequest, "prompt")
    assert [answer.text for answer in engine.generate([ask("a", max_tokens=2)] * 20)] == ["bc"] * 20
    with pytest.raises(RuntimeError, match="forward failed"):
        engine.generate([ask("?")])
    with pytest.raises(RuntimeError, match="Stubborn: forward failed"):
        engine.generate([ask("\0")])
    engine.check_health()
    resumed = replace(ask("a", max_tokens=5), generated=(98, 99))
    assert engine.generate([resumed])[0].text == "def"


def test_what_it_is_like_is_told_without_being_asked(engine) -> None:
    assert (engine.max_model_len, engine.facts.shape.layers, engine.facts.adapter_bytes) == (1 << 12, 1, 1 << 20)
    assert engine.pace.seconds(1) > 0

    async def run():
        streams = [engine.stream(ask("a", **ENDLESS)) for _ in range(6)]
        firsts = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.gather(*firsts[:4])
        await until(lambda: engine.load == (4, 2))
        await until(lambda: engine.counters.cache_used > 0)
        refused = [asyncio.ensure_future(collect(engine, ask("a"))) for _ in range(3)]
        await asyncio.wait(refused, return_when=asyncio.FIRST_EXCEPTION)
        assert any(task.done() and isinstance(task.exception(), Overloaded) for task in refused)
        for task in (*firsts[4:], *refused):
            task.cancel()
        await asyncio.gather(*firsts[4:], *refused, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
        await until(lambda: engine.load == (0, 0) and engine.counters.cache_used == 0)

    asyncio.run(run())


def test_adapters_are_read_there_and_kept_while_they_are_held(pool, tiny, folder) -> None:
    prompt, mixture = (5, 6, 7), (("patterns", 1.0), ("attention", -0.7))
    handles = {}
    for name, _ in mixture:
        handles[name], warnings = tiny.read(pool.folder / name, name=name, version="1")
        assert warnings == ()
        assert handles[name].nbytes > 0
    request = GenerationRequest(
        prompt, tuple((handles[name], weight) for name, weight in mixture), SamplingParams(12, ignore_eos=True)
    )
    (answer,) = tiny.generate([request])
    assert answer.token_ids == pool.continued("llama", prompt, 12, mixture)
    assert sorted(tiny.counters.resident) == [("attention", "1"), ("patterns", "1")]
    assert tiny.counters.adapters.misses == 2
    numbers = {handle.number for handle in handles.values()}
    del request
    handles.clear()
    gc.collect()
    assert set(tiny._core._released) == numbers
    tiny.generate([GenerationRequest(prompt, sampling=SamplingParams(2))])
    assert not tiny._core._released


def test_an_adapter_that_cannot_be_read_is_refused_as_here(pool, tiny, tmp_path) -> None:
    with pytest.raises(AdapterRejected) as there:
        tiny.read(tmp_path, name="gone", version="1")
    with pytest.raises(AdapterRejected) as here:
        LoraWeights.load(tmp_path, name="gone", version="1")
    assert (str(there.value), there.value.adapter) == (str(here.value), "gone")
    assert type(there.value.__cause__) is type(here.value.__cause__)
    assert not (tmp_path / CONFIG_FILE).exists()


def test_what_is_fed_is_repeatable_and_as_in_this_process(pool, tiny, folder) -> None:
    handles = {name: tiny.read(pool.folder / name, name=name, version="1")[0] for name in ("patterns", "one-layer")}
    asked = [
        (
            tuple((i * j) % 256 for j in range(3 + i % 7)),
            ("patterns", "one-layer", None)[i % 3],
            SamplingParams(1 + 7 * i % 19, temperature=1.0, seed=i, stop=("a", "e", "\x10") if i % 2 else ()),
        )
        for i in range(60)
    ]

    def requests(adapters):
        return [
            GenerationRequest(prompt, ((adapters[name], 1.0),) if name else (), sampling)
            for prompt, name, sampling in asked
        ]

    here = MultiLoraEngine(
        *load_decoder(str(folder), device="cpu", dtype="float32", threads=1),
        EngineConfig(**SETTINGS | {"max_queue": 64}),
    )
    try:
        expected = [outcome.result for outcome in feed(here, requests(pool.adapters))]
    finally:
        here.close()
    for _ in range(3):
        assert [outcome.result for outcome in feed(tiny, requests(handles))] == expected
    assert tiny.load == (0, 0)


def test_a_process_speaks_in_this_ones_log_and_ends_what_waits_for_it_when_it_dies(caplog, tmp_path) -> None:
    told = []
    os.mkfifo(tmp_path / CONFIG_FILE)  # which nobody writes
    engine = start_process(counting.load, EngineConfig(**SETTINGS), ended=told.append)
    assert ("lorauter.engine", "it only counts") in [(r.name, r.getMessage()) for r in caplog.records]

    async def run():
        tasks = [asyncio.create_task(collect(engine, ask("a", **ENDLESS))) for _ in range(6)]
        read = asyncio.create_task(asyncio.to_thread(engine.read, tmp_path, name="slow", version="1"))
        await until(lambda: engine.load == (4, 2) and engine._core._reads)
        _child(engine).kill()
        with pytest.raises(AdapterUnavailable, match="'slow': the engine's process has ended"):
            await read
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(run())
    assert told == ["the engine's process was killed by SIGKILL"]
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [(ServiceUnavailable, told[0])] * 6
    with pytest.raises(RuntimeError, match="was killed by SIGKILL"):
        engine.check_health()
    with pytest.raises(LorauterError, match="is closed"):
        engine.generate([ask("a")])
    with pytest.raises(LorauterError, match="has ended"):
        engine.read("nowhere", name="a", version="1")
    engine.close()


def test_a_step_that_does_not_end_is_noticed_and_ends_with_the_starter(tmp_path) -> None:
    script = (
        "import counting, os, signal, time\n"
        "from lorauter.engine import EngineConfig, GenerationRequest\n"
        "from lorauter.engine.process import start_process\n"
        f"engine = start_process(counting.load, EngineConfig(**{SETTINGS}, step_timeout_s=0.2))\n"
        "engine.submit(GenerationRequest(tuple(b'^')), print)\n"
        "time.sleep(0.5)\n"
        "try:\n    engine.check_health()\n"
        "except RuntimeError as error:\n    print(error, engine._core._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=50)
    *said, pid = done.stdout.split()
    assert said[-3:] == ["has", "not", "ended"], done.stderr
    deadline = time.monotonic() + 5
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_goes_wrong_at_the_start_comes_out_as_what_it_is(tmp_path) -> None:
    with pytest.raises(ConfigError) as there:
        load_in_process(str(tmp_path), EngineConfig(**SETTINGS))
    with pytest.raises(ConfigError) as here:
        load_decoder(str(tmp_path), device="cpu")
    assert (str(there.value), there.value.setting) == (str(here.value), "base_model")
    with pytest.raises(RuntimeError) as full:
        start_process(counting.load_without_room, EngineConfig(**SETTINGS))
    assert "no room on the GPU: CUDA out of memory" in explained(full.value)
    with pytest.raises(MemoryError) as killed:
        start_process(counting.load_and_be_killed, EngineConfig(**SETTINGS))
    assert "take a smaller base model" in explained(killed.value)


@pytest.mark.parametrize(
    ("load", "problem"), [(lambda: counting.load(), "pickle"), (counting.load_unreadable, "no codec")]
)
def test_what_cannot_be_said_to_a_process_or_read_of_it_ends_its_start(load, problem, caplog) -> None:
    with pytest.raises(Exception, match=problem):
        start_process(load, EngineConfig(**SETTINGS))
    assert "the engine's process is given up" in caplog.text


def test_an_error_keeps_its_causes_and_what_cannot_travel_its_words() -> None:
    class Local(Exception):
        pass

    def fail():
        try:
            raise OSError(5, "disk")
        except OSError as error:
            raise AdapterRejected("is broken", adapter="a") from error

    with pytest.raises(AdapterRejected) as caught:
        fail()
    found = PickledError.of(caught.value).raised()
    assert (str(found), found.adapter) == (str(caught.value), "a")
    assert isinstance(found.__cause__, OSError)
    assert found.__cause__.errno == 5
    assert str(PickledError.of(Local("odd")).raised()) == "Local: odd"


class _Channel(list):
    send = list.append


def test_the_process_forgets_what_nobody_holds_once_it_has_obeyed() -> None:
    class Core:
        def __init__(self):
            self.taken = []

        def take(self, orders):
            self.taken += orders

        def read(self, path, *, name, version):
            if path is None:
                raise AdapterRejected("no", adapter=name)
            return replace_packed(name), ("warned",)

    class Packed:
        nbytes = 8

    def replace_packed(name):
        return Packed()

    core, channel = Core(), _Channel()
    child = Child(channel, core)
    for number, path in ((7, "here"), (8, None)):
        assert child.obey(Read(number, path, ("a", "1")))
    child._readers.shutdown()
    by_number = {done.number: done for done in channel}
    assert (by_number[7].nbytes, by_number[7].warnings, by_number[7].error) == (8, ("warned",), None)
    assert isinstance(by_number[8].error.raised(), AdapterRejected)
    begin = Begin(0, [1], 1, 2, ((7, 1.0),), SamplingParams(), 0, None, ())
    assert child.obey(Orders([begin, Drop(0)], [7]))
    [(packed, weight)] = core.taken[0].adapters
    assert isinstance(packed, Packed)
    assert weight == 1.0
    assert core.taken[1] == Drop(0)
    assert not child._adapters
    assert not child.obey(None)
