"""Catalogs of many tasks and adapters: building, changing, loading, holding and asking them, embedding aside.

    python benchmarks/catalog_scale.py [--sizes 10000 100000] [--examples 4] [--changes 5] [--folder DIR]

There are as many adapters as tasks. Tasks are random directions in families, with examples of words of their own among
common ones; a query is an example that the catalog does not have. The catalog is published in a folder. Each step runs
in a process of its own, whose greatest memory is told. Prints `NAME VALUE` lines; `_100000` in a name is the size.

    build_s            all segments, the fit, and publishing
    first_change_s     a process that has nothing yet: load, replace one task's examples, fit, publish
    change_s           one that goes on with what it has, as the service's does: median of --changes
    change_mb          what such a change writes
    load_s, load_mb    a process that begins to serve; the memory that it holds then
    reload_s           what it takes to go on with a version in which one task differs; median of --changes
    reload_mb          what it reads of the store for that
    query_ms           retrieve, rerank and compose, one query at a time, on one core: median of 300
    paper_ms           the same by the recipe `paper`
    scoped_ms          the same as query_ms for a key that may use one adapter in ten
    half_ms            the same for one that may use every second
    narrow_ms          the same for one that may use one in a thousand
    top_1              queries whose task came first; exact_1 by comparing with every centroid
    recall_64          of the 64 nearest tasks, how many a search finds
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deployments.scope import ScopedOptions
from lorauter.adapters.store import DirectoryStore
from lorauter.catalog import Catalog, change_catalog, publish, with_tasks
from lorauter.catalog.build import Draft, make_segment
from lorauter.catalog.segments import Examples, runs
from lorauter.encoder import Embeddings, normalised
from lorauter.routing import Retriever, RoutingConfig, RoutingOptions, compose
from lorauter.tasks import Example, Task

DIMENSION, QUERIES, FAMILIES = 384, 300, 500
VOCABULARY = [f"w{i}" for i in range(20_000)]


class World:
    """Task i of a catalog, its examples and their embeddings, from i alone."""

    name = "random"

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self._families = np.random.default_rng(0).standard_normal((FAMILIES, DIMENSION), np.float32)

    def task(self, i: int, seed: int = 0) -> tuple[Task, Embeddings]:
        draw, noise = random.Random(i), np.random.default_rng(i)
        own, direction = draw.sample(VOCABULARY, 12), noise.standard_normal(DIMENSION, np.float32)
        direction += 0.7 * self._families[draw.randrange(FAMILIES)]
        draw, noise = random.Random(i + seed * 1_000_003), np.random.default_rng(i + seed * 1_000_003)
        texts = [" ".join(own[:6] + draw.sample(VOCABULARY, 24)) for _ in range(self.examples)]
        spread = noise.standard_normal((self.examples, DIMENSION), np.float32)
        task = Task(f"task{i:06}", "random", "em", tuple(Example(text, "x") for text in texts))
        return task, normalised(direction + 0.7 * spread)


class Known:
    """An encoder that has embedded a task before."""

    name = "random"

    def __init__(self, task: Task, rows: Embeddings, probe: Embeddings) -> None:
        self._rows = {e.input: row for e, row in zip(task.validation, rows, strict=True)}
        self._probe = probe

    def encode(self, texts: Any) -> Embeddings:
        return np.stack([self._rows.get(text, self._probe) for text in texts])


class Counting(DirectoryStore):
    """A folder that counts bytes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read_bytes = self.written_bytes = 0

    def read(self, key: str) -> bytes:
        content = super().read(key)
        self.read_bytes += len(content)
        return content

    def write(self, key: str, content: bytes | Path) -> None:
        self.written_bytes += len(content) if isinstance(content, bytes) else content.stat().st_size
        super().write(key, content)


def build(root: Path, size: int, examples: int) -> dict[str, float]:
    world, adapters = World(examples), {f"adapter{i:06}": "0a1b2c3d" for i in range(size)}
    made = [world.task(i) for i in range(size)]
    started = time.perf_counter()
    names = [task.name for task, _ in made]
    drafts = [
        Draft(task, tuple(f"adapter{(i * 7 + j) % size:06}" for j in range(4)), {}, Examples.of(task, rows))
        for i, (task, rows) in enumerate(made)
    ]
    segments = tuple(make_segment(drafts[start:end], adapters) for start, end in runs(names))
    catalog = Catalog(segments, made[0][1][0], adapters, "random", "")
    publish(catalog, root, over=None)
    return {"build_s": time.perf_counter() - started}


def _changing(world: World, i: int, seed: int) -> Callable[[Catalog], Catalog]:
    task, rows = world.task(i, seed)
    return lambda before: with_tasks(before, [task], Known(task, rows, before.probe))


def change(root: Path, size: int, examples: int, changes: int) -> dict[str, float]:
    world, store = World(examples), Counting(root)
    took, written, catalog = [], [], None
    for nth in range(changes + 1):
        edit, before, started = _changing(world, (nth + 1) * 7919 % size, 1), store.written_bytes, time.perf_counter()
        catalog = change_catalog(store, edit, known=catalog)
        took.append(time.perf_counter() - started)
        written.append((store.written_bytes - before) / 1e6)
    return {
        "first_change_s": took[0],
        "change_s": statistics.median(took[1:]),
        "change_mb": statistics.median(written[1:]),
    }


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def load(root: Path, size: int, examples: int, changes: int) -> dict[str, float]:
    store, empty = Counting(root), _resident_mb()
    started = time.perf_counter()
    catalog = Catalog.load(store)
    Retriever(catalog, RoutingConfig())
    figures = {"load_s": time.perf_counter() - started, "load_mb": _resident_mb() - empty}
    took, read = [], []
    for nth in range(changes):
        edit = _changing(World(examples), (nth + 1) * 104729 % size, 2)
        change_catalog(root, edit, known=catalog)
        before, started = store.read_bytes, time.perf_counter()
        catalog = Catalog.load(store, known=catalog)
        catalog.index.search(catalog.probe[None], 1)
        Retriever(catalog, RoutingConfig())
        took.append(time.perf_counter() - started)
        read.append((store.read_bytes - before) / 1e6)
    return figures | {"reload_s": statistics.median(took), "reload_mb": statistics.median(read)}


def query(root: Path, size: int, examples: int) -> dict[str, float]:
    import faiss
    from threadpoolctl import threadpool_limits

    faiss.omp_set_num_threads(1)
    world, catalog, figures = World(examples), Catalog.load(root), {}
    queries = [world.task(i * size // QUERIES, 3) for i in range(QUERIES)]
    cases = {
        "query_ms": ("default", RoutingOptions()),
        "paper_ms": ("paper", RoutingOptions()),
        "scoped_ms": ("default", ScopedOptions(permitted=("adapter*7",))),
        "half_ms": ("default", ScopedOptions(permitted=("adapter*[02468]",))),
        "narrow_ms": ("default", ScopedOptions(permitted=("adapter*777",))),
    }
    with threadpool_limits(1):
        for name, (preset, options) in cases.items():
            retriever, times, first = Retriever(catalog, RoutingConfig(preset=preset)), [], 0
            for task, rows in [queries[0], *queries]:
                started = time.perf_counter()
                (found,) = retriever.retrieve(rows[:1], [task.validation[0].input], [options])
                compose(found, options, retriever.config, catalog_version="", versions=catalog.adapters)
                times.append(time.perf_counter() - started)
                first += found.tasks[0].name == task.name
            figures[name] = 1000 * statistics.median(times[1:])
            if name == "query_ms":
                figures["top_1"] = (first - 1) / QUERIES
        centroids = catalog.centroids
        hits = exact = 0
        for task, rows in queries:
            nearest = np.argsort(-(centroids @ rows[0]))[:64]
            exact += catalog.names[nearest[0]] == task.name
            hits += len({*nearest.tolist()} & {*catalog.index.search(rows[:1], 64)[0].tolist()})
    return figures | {"exact_1": exact / QUERIES, "recall_64": hits / 64 / QUERIES}


def _run(step: Callable[..., dict[str, float]], args: tuple[Any, ...], answers: Any) -> None:
    figures = step(*args)
    answers.put({**figures, f"{step.__name__}_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3})


def measure(root: Path, size: int, examples: int, changes: int) -> Iterator[tuple[str, float]]:
    context = multiprocessing.get_context("spawn")
    for step, args in ((build, ()), (change, (changes,)), (load, (changes,)), (query, ())):
        answers = context.Queue()
        process = context.Process(target=_run, args=(step, (root, size, examples, *args), answers))
        process.start()
        figures = answers.get()
        process.join()
        yield from figures.items()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--examples", type=int, default=4, help="of each task")
    parser.add_argument("--changes", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to publish; a temporary one otherwise")
    args = parser.parse_args()
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as root:
            for name, value in measure(Path(root), size, args.examples, args.changes):
                print(f"{name}_{size} {value:.4g}", flush=True)


if __name__ == "__main__":
    main()
