"""The fakes of a batch job's parts: an engine that echoes, adapters by name, a router that needs no model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from lorauter.catalog import build_catalog
from lorauter.encoder import HashingEncoder
from lorauter.engine import Chunk, EngineConfig, GenerationRequest, SamplingParams
from lorauter.engine.types import Prompt
from lorauter.errors import AdapterNotFound, AdapterRejected, AdapterUnavailable, ContextLengthExceeded
from lorauter.names import AdapterKey
from lorauter.routing import Router
from lorauter.tasks import Task


class EchoingEngine:
    """Answers with the names of a request's adapters, in a thread of its own; takes prompts of up to 50 characters."""

    def __init__(self) -> None:
        self.config = EngineConfig(max_batch=4, max_queue=4)
        self.max_model_len = 50
        self.codec = SimpleNamespace(encode=self._encode)
        self.served: list[tuple[str, ...]] = []
        self.sampled: list[SamplingParams] = []
        self.prompts: list[str] = []
        self.running = 0
        self._lock = threading.Condition()
        self._asked: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        said = ">".join(turn["content"] for turn in prompt.messages) if prompt.text is None else prompt.text
        return tuple(said.encode())

    def held(self) -> threading.Condition:
        return self._lock

    def lockstep(self) -> nullcontext[None]:
        return nullcontext()

    def check_health(self) -> None:
        return

    def submit(self, request: GenerationRequest, sink: Callable[[Any], None]) -> None:
        if len(request.prompt) > 50:
            raise ContextLengthExceeded(len(request.prompt), 50)
        self._asked.put((request, sink))

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            with self._lock:
                pass
            request, sink = asked
            self.served.append(tuple(packed.name for packed, _ in request.adapters))
            self.sampled.append(request.sampling)
            self.prompts.append(bytes(request.prompt).decode())
            sink(Chunk("+".join(self.served[-1]), (1, 2), "stop"))

    def close(self) -> None:
        self._asked.put(None)


class NamedAdapters:
    """Adapters that are nothing but names; "missing" is not there, "broken" not to be served, "flaky" not at once."""

    def __init__(self) -> None:
        self.counters = SimpleNamespace(misses=0)
        self.asked: list[str] = []

    async def get(self, key: AdapterKey) -> Any:
        name = key.name
        self.asked.append(name)
        if name == "missing":
            raise AdapterNotFound("not found", adapter=name)
        if name == "broken":
            raise AdapterRejected("it has NaNs", adapter=name)
        if name == "flaky" and self.asked.count(name) < 3:
            raise AdapterUnavailable("the store is down", adapter=name)
        return SimpleNamespace(name=name, key=key)


@pytest.fixture
def echoing() -> Iterator[EchoingEngine]:
    engine = EchoingEngine()
    yield engine
    engine.close()


@pytest.fixture
def adapters() -> NamedAdapters:
    return NamedAdapters()


@pytest.fixture
def router(make_task: Callable[..., Task], make_adapter: Callable[..., Path], tmp_path: Path) -> Router:
    """A router of two tasks, sums and poems, each with an adapter of its name."""
    from lorauter.adapters import AdapterRepository, open_store

    for name in ("sums", "poems"):
        make_adapter(tmp_path / "pool", name)
    tasks = [make_task("sums", "add numbers one", "add numbers two"), make_task("poems", "rhyme verses", "rhyme lines")]
    catalog = build_catalog(tasks, HashingEncoder(), repository=AdapterRepository(open_store(tmp_path / "pool")))
    return Router(catalog, HashingEncoder())
