"""Choice of replicas: Serve's default router and ours, side by side on one machine as three Ray nodes.

    python benchmarks/cluster.py [--rate 8] [--seconds 30] [--rounds 8] [--json FILE]

Three raylets, each with an AdapterCache and a folder of its own; a real S3 server (`rclone serve s3`); the whole app
twice, once with Serve's router (power of two choices) and once with the residency router, each with a LoraModel
replica on every node. The engine is the real one, on a small random Llama, so that three replicas fit a small
machine. Requests come over HTTP at random moments (Poisson), for adapters of a Zipf distribution; a share of them
mixes three adapters, a task's own and those of its two neighbours. The apps take turns, with the same requests at
the same moments, and start with every tier empty. A load is an adapter brought to a tier that did not have it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import ray
import torch
from local_s3 import LocalS3, free_port
from ray import serve
from ray.cluster_utils import Cluster
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deployments.adapter_cache import CacheSpec, running_caches
from deployments.app import DEPLOYMENTS, assemble
from deployments.cluster import settle
from deployments.config import AppConfig
from deployments.router import Router
from lorauter.adapters import AdapterRepository, open_store
from lorauter.defaults import resolve_model

NODES, ADAPTERS, SLOTS, HOST_SLOTS = 3, 200, 40, 80
HIDDEN, LAYERS, RANK = 256, 8, 16
KEY_VALUE = HIDDEN // 2
WIDTHS = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, KEY_VALUE), "v_proj": (HIDDEN, KEY_VALUE),
          "o_proj": (HIDDEN, HIDDEN)}  # fmt: skip
ADAPTER_BYTES = 4 * LAYERS * RANK * sum(map(sum, WIDTHS.values()))
BASE = "lorauter/benchmark-base"
ROUTERS = ("default", "residency")


def by_load(_: object, queues: dict[str, int], *args: object, avoid: tuple[str, ...] = ()) -> list[str]:
    """The less busy of two replicas, as Serve chooses."""
    two = random.sample(list(queues), min(2, len(queues)))
    return sorted(two, key=queues.__getitem__)


class ByLoad(Router.func_or_class):
    """An ingress that chooses replicas so."""

    async def __init__(self, *args: object) -> None:
        await super().__init__(*args)
        self._dispatch.placement.rank = by_load


@dataclass
class Arm:
    """One app and what was seen of it; latencies in seconds, by round."""

    config: AppConfig
    latencies: list[list[float]] = field(default_factory=list)
    failed: Counter[int] = field(default_factory=Counter)
    wanted: set[str] = field(default_factory=set)


def write_model(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("default"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64, num_key_value_heads=KEY_VALUE // 64, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def push_adapters(folder: Path, uri: str) -> None:
    repository = AdapterRepository(open_store(uri))
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": BASE, "r": RANK, "lora_alpha": RANK,
        "target_modules": list(WIDTHS),
    }  # fmt: skip
    for number in range(ADAPTERS):
        adapter = folder / name(number)
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        tensors = {}
        for layer in range(LAYERS):
            for target, (width_in, width_out) in WIDTHS.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                tensors[f"{key}.lora_A.weight"] = 0.05 * torch.randn(RANK, width_in, dtype=torch.bfloat16)
                tensors[f"{key}.lora_B.weight"] = 0.05 * torch.randn(width_out, RANK, dtype=torch.bfloat16)
        save_file(tensors, adapter / "adapter_model.safetensors")
        repository.push(adapter)


def name(number: int) -> str:
    return f"task-{number % ADAPTERS:03}"


def draw(rng: random.Random, mix: float) -> dict[str, float]:
    """A request's adapters and weights: Zipf's law with exponent 1."""
    own = rng.choices(range(ADAPTERS), [1 / (rank + 1) for rank in range(ADAPTERS)])[0]
    if rng.random() >= mix:
        return {name(own): 1.0}
    first = own - own % 3  # neighbours are neighbours of each other
    return {name(first + k): 0.6 if first + k == own else 0.2 for k in range(3)}


async def warm_up(url: str) -> None:
    """Answers without adapters, so that no app pays for what a process does once; the tiers stay empty."""
    async with httpx.AsyncClient(timeout=120) as client:
        for _ in range(8):
            body = {"model": "base", "prompt": "Good morning.", "max_tokens": 4}
            for answer in await asyncio.gather(*[client.post(f"{url}/v1/completions", json=body) for _ in range(6)]):
                answer.raise_for_status()


async def play(url: str, arm: Arm, args: argparse.Namespace, seed: int) -> None:
    """A round of requests, each sent at its moment however long those before it take."""
    rng = random.Random(seed)
    latencies: list[float] = []

    async def ask(client: httpx.AsyncClient, at: float, adapters: dict[str, float]) -> None:
        body = {"model": "lorauter", "prompt": "What does the emperor dragonfly eat, and where does it live?",
                "max_tokens": args.tokens, "lorauter": {"adapters": adapters}}  # fmt: skip
        answer = await client.post(f"{url}/v1/completions", json=body)
        if answer.status_code == 200:
            latencies.append(time.monotonic() - at)
            arm.wanted |= set(adapters)
        else:
            arm.failed[answer.status_code] += 1

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        started = time.monotonic()
        at, tasks = 0.0, []
        while (at := at + rng.expovariate(args.rate)) < args.seconds:
            await asyncio.sleep(max(0.0, started + at - time.monotonic()))
            tasks.append(asyncio.create_task(ask(client, started + at, draw(rng, args.mix))))
        await asyncio.gather(*tasks)
    arm.latencies.append(latencies)


def tiers(router: str, arm: Arm) -> dict[str, float]:
    """What the app's replicas and node caches have counted."""
    handle = serve.get_deployment_handle("LoraModel", router)
    replicas: dict[str, Any] = {}
    while len(replicas) < NODES:
        stats = handle.stats.remote().result()
        replicas[stats["replica"]] = stats
    assert len({stats["node"] for stats in replicas.values()}) == NODES
    caches = ray.get(
        [cache.stats.remote() for cache in running_caches(CacheSpec(arm.config.adapters, arm.config.cache))]
    )
    count = {
        f"{tier} {what}": sum(stats[tier][what] for stats in replicas.values())
        for tier in ("device", "host")
        for what in ("hits", "misses")
    }
    return {
        "device hit rate": count["device hits"] / (count["device hits"] + count["device misses"]),
        "loads to a device": count["device misses"],
        "loads to host memory": count["host misses"],
        "loads from S3": sum(cache["downloads"] for cache in caches),
        "S3 bytes": sum(cache["downloaded_bytes"] for cache in caches),
        "S3 bytes per adapter and node": sum(cache["downloaded_bytes"] for cache in caches) / len(arm.wanted) / NODES,
    }


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def figures(router: str, arm: Arm) -> dict[str, float]:
    every = [latency for one in arm.latencies for latency in one]
    found: dict[str, float] = {"requests": len(every), "failed": sum(arm.failed.values()), **tiers(router, arm)}
    found["all loads"] = sum(found[key] for key in found if key.startswith("loads"))
    for title, share in (("p50", 0.5), ("p99", 0.99)):
        found[f"{title}, ms"] = 1000 * quantile(every, share)
        found[f"{title}, median of rounds, ms"] = 1000 * median(quantile(one, share) for one in arm.latencies)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=8, help="requests per second")
    parser.add_argument("--seconds", type=float, default=30, help="of a round")
    parser.add_argument("--rounds", type=int, default=8, help="for each app")
    parser.add_argument("--mix", type=float, default=0.3, help="share of requests under three adapters")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))).resolve()
        store = LocalS3(work / "s3", "bucket")
        os.environ.update(store.env)
        store.start()
        stack.callback(store.stop)
        uri = "s3://bucket/adapters"
        write_model(work / "model")
        push_adapters(work / "adapters", uri)
        settle()
        node = {"num_cpus": 4, "resources": {"model": len(ROUTERS)}, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        stack.callback(cluster.shutdown)
        for _ in range(NODES - 1):
            cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        stack.callback(ray.shutdown)
        port = free_port()
        http = {"host": "127.0.0.1", "port": port}
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config={"log_level": "WARNING"})
        stack.callback(serve.shutdown)
        arms = {}
        for router in ROUTERS:
            config = AppConfig.parse(
                {
                    "base_model": str(work / "model"), "base_model_aliases": [BASE], "adapters": uri,
                    "engine": {"max_batch": 8, "max_model_len": 256, "threads": 1,
                               "dtype": "float32", "adapter_bytes": SLOTS * ADAPTER_BYTES},
                    "host": {"adapter_bytes": HOST_SLOTS * ADAPTER_BYTES},
                    "cache": {"directory": str(work / "cache" / router)},
                }
            )  # fmt: skip
            light = {"ray_actor_options": {"num_cpus": 0.1}}
            model = {"num_replicas": NODES, "max_replicas_per_node": 1,
                     "ray_actor_options": {"num_cpus": 0.1, "resources": {"model": 1}}}  # fmt: skip
            overrides = {**dict.fromkeys(DEPLOYMENTS, light), "LoraModel": model}
            if router == "default":
                overrides["Router"] = {**light, "func_or_class": ByLoad}
            serve.run(assemble(config, overrides), name=router, route_prefix=f"/{router}")
            arms[router] = Arm(config)
        for router in ROUTERS:
            asyncio.run(warm_up(f"http://127.0.0.1:{port}/{router}"))
        for turn in range(args.rounds):
            for router in ROUTERS if turn % 2 else reversed(ROUTERS):
                asyncio.run(play(f"http://127.0.0.1:{port}/{router}", arms[router], args, seed=turn))
        found = {router: figures(router, arm) for router, arm in arms.items()}

    print(f"{'':34}{ROUTERS[0]:>14}{ROUTERS[1]:>14}{'ratio':>8}")
    for key, value in found["default"].items():
        ours = found["residency"][key]
        print(f"{key:34}{value:14.5g}{ours:14.5g}{ours / value if value else 1:8.2f}")
    if args.json:
        args.json.write_text(json.dumps({"args": {k: str(v) for k, v in vars(args).items()}, **found}, indent=1))


if __name__ == "__main__":
    main()
