"""Time to route one query, embedding aside, on one core, as the catalog grows.

    python benchmarks/routing_scale.py [--sizes 1000 10000 100000]

Tasks are random directions with four examples of random words each; queries resemble a task's examples. Prints the
median over 300 queries of retrieving, reranking and composing, one query at a time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import faiss
import numpy as np
import torch

from lorauter.catalog.catalog import Catalog, CatalogTask, RankedAdapter
from lorauter.encoder import normalised
from lorauter.routing import Retriever, RoutingConfig, RoutingOptions, compose
from lorauter.tasks import Example, Task

DIMENSION, EXAMPLES, QUERIES = 384, 4, 300


def make_catalog(size: int) -> Catalog:
    draw, noise = random.Random(0), np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(20000)]
    entries = []
    for i in range(size):
        own = draw.sample(vocabulary, 12)
        examples = tuple(Example(" ".join(own[:6] + draw.sample(vocabulary, 24)), "x") for _ in range(EXAMPLES))
        ranked = tuple(RankedAdapter(f"a{(i * 7 + j) % 1000}", 1.0 / (j + 1)) for j in range(8))
        entries.append(CatalogTask(Task(f"t{i}", "random", "em", examples), ranked))
    directions = noise.standard_normal((size, 1, DIMENSION), np.float32)
    spread = noise.standard_normal((size, EXAMPLES, DIMENSION), np.float32)
    rows = normalised((directions + 0.7 * spread).reshape(-1, DIMENSION))
    centroids = normalised(rows.reshape(size, EXAMPLES, DIMENSION).mean(axis=1))
    names = {f"a{i}": "1" for i in range(1000)}
    return Catalog(tuple(entries), centroids, rows, centroids[0], names, "random", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10000, 100000])
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    print(f"{'tasks':>8} {'fit, s':>8} {'route, ms':>10} {'paper, ms':>10}")
    for size in args.sizes:
        catalog = make_catalog(size)
        started = time.perf_counter()
        assert catalog.reranker
        fit = time.perf_counter() - started
        medians = []
        for preset in ("default", "paper"):
            retriever = Retriever(catalog, RoutingConfig(preset=preset))
            times = []
            for i in range(QUERIES):
                task = i * size // QUERIES
                query, text = catalog.examples[task * EXAMPLES][None], catalog.tasks[task].task.validation[0].input
                started = time.perf_counter()
                (found,) = retriever.retrieve(query, [text], [RoutingOptions()])
                compose(found, RoutingOptions(), retriever.config, catalog_version="", versions=catalog.adapters)
                times.append(time.perf_counter() - started)
            medians.append(1000 * statistics.median(times))
        print(f"{size:8} {fit:8.1f} {medians[0]:10.2f} {medians[1]:10.2f}", flush=True)


if __name__ == "__main__":
    main()
