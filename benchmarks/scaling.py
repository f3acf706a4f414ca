"""Two replicas of the model against one, and a service that gets its second under load.

    python benchmarks/scaling.py [--replicas 2] [--clients N] [--requests N] [--only fixed|grown]

Starts `lorauter serve` with the shipped configuration (`serve.py`), first with one replica of LoraModel and then with
--replicas of them, each with a GPU of its own where there are any, and asks both the same real prompts, routed and of
the base model, by as many clients as all replicas together have rows. Then once more with `autoscaling_config`, from
one replica: 1.5 times as many clients as a replica has rows ask load after load; once all replicas are there, the first
tokens of one more load count, and the errors of all. The last lines are one figure each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
import yaml
from clients import Cell, Clients
from local_s3 import free_port
from serve import CHAT, CORES_A_PROCESS, MODELS, WARM_S, Prompts, Service, body, configuration, told

GROWN_S = 240.0  # until all replicas have to be there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--clients", type=int, help="for each replica, and its rows (4; on a GPU 128)")
    parser.add_argument("--requests", type=int, help="of each load (64; on a GPU 8192)")
    parser.add_argument("--only", choices=["fixed", "grown"], help="one half of it")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    clients, count = args.clients or (128 if on_gpu else 4), args.requests or (8192 if on_gpu else 64)
    print(f"{count} requests a load, {clients} rows, {torch.cuda.device_count()} GPUs", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the service ends too
    figures: dict[str, float] = {}
    errors: Counter[str] = Counter()
    with Clients(max(1, len(os.sched_getaffinity(0)) // CORES_A_PROCESS)) as asking:
        if args.only != "grown":
            rates = [
                fixed(asking, clients, replicas, args.replicas * clients, count, on_gpu, errors)
                for replicas in (1, args.replicas)
            ]
            figures |= {f"{name}_{args.replicas}_of_one": rates[1][name] / rates[0][name] for name in MODELS}
        if args.only != "fixed":
            figures |= grown(asking, clients, args.replicas, count, on_gpu, errors)
    for error, times in errors.most_common(5):
        print(f"{times} x {error}")
    for name, value in figures.items():
        print(f"{name} {value:.3f}")
    print(f"errors {sum(errors.values())}")


def fixed(
    asking: Clients, rows: int, replicas: int, clients: int, count: int, on_gpu: bool, errors: Counter[str]
) -> dict[str, float]:
    """Requests a second of so many replicas, by model."""
    rates = {}
    with served(rows, {"num_replicas": replicas}, on_gpu) as (service, url):
        told(f"{replicas} of LoraModel")
        prompts = warmed(asking, url, clients)
        for name, model in MODELS.items():
            before = service.cpu()
            cell = asked(asking, url, model, prompts.take(count), clients, errors)
            rates[name] = count / cell.seconds
            spent = ", ".join(f"{of} {1000 * s / count:.2f}" for of, s in (service.cpu() - before).most_common())
            told(f"{name}: {rates[name]:.1f} requests/s; CPU ms a request: {spent}")
    return rates


def grown(
    asking: Clients, rows: int, replicas: int, count: int, on_gpu: bool, errors: Counter[str]
) -> dict[str, float]:
    """How late first tokens are once a service has grown."""
    clients = rows * 3 // 2
    scaling = {"min_replicas": 1, "max_replicas": replicas, "target_ongoing_requests": max(1, rows * 3 // 4)}
    with served(rows, {"autoscaling_config": scaling}, on_gpu) as (_, url):
        told("one of LoraModel, which may have others beside it")
        prompts = warmed(asking, url, clients)
        began, there, latest = time.monotonic(), 1, 0.0
        while there < replicas:
            if time.monotonic() - began > GROWN_S:
                sys.exit(f"{there} of {replicas} replicas after {GROWN_S:.0f} s of load")
            cell = asked(asking, url, MODELS["routed"], prompts.take(count), clients, errors)
            there, latest = running(url), max(latest, *cell.firsts)
        told(
            f"all are there after {time.monotonic() - began:.0f} s of load, and no first token took over {latest:.2f} s"
        )
        firsts = sorted(asked(asking, url, MODELS["routed"], prompts.take(count), clients, errors).firsts)
    median, p99 = statistics.median(firsts), firsts[int(0.99 * (len(firsts) - 1))]
    told(f"from then on it comes after {1000 * median:.0f} ms, p99 {1000 * p99:.0f} ms")
    return {"grown_first_p99_of_median": p99 / median}


@contextmanager
def served(rows: int, scaling: dict[str, Any], on_gpu: bool) -> Iterator[tuple[Service, str]]:
    """The service as shipped, but for LoraModel's scaling; it and its URL."""
    port = free_port()
    shipped = configuration(port, rows, {})
    [application] = shipped["applications"]
    [model] = [part for part in application["deployments"] if part["name"] == "LoraModel"]
    del model["num_replicas"]
    model |= scaling
    if not on_gpu:  # else a replica has all cores
        model["ray_actor_options"] = {"num_cpus": 0.3}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        config = Path(folder) / "serve.yaml"
        config.write_text(yaml.safe_dump(shipped))
        with Service(config, port, Path(folder)) as service:
            yield service, f"http://127.0.0.1:{port}"


def warmed(asking: Clients, url: str, clients: int) -> Prompts:
    """Have all adapters come, and what looks twice at some queries; what may be asked then."""
    prompts = Prompts()
    for _ in range(2):
        asked(asking, url, MODELS["routed"], prompts.take(2 * clients), clients, Counter())
        time.sleep(WARM_S)
    return prompts


def asked(asking: Clients, url: str, model: str, prompts: list[str], clients: int, errors: Counter[str]) -> Cell:
    """A load, streamed; its errors are added."""
    cell = asking.ask(f"{url}{CHAT}", [body(model, prompt, True) for prompt in prompts], clients)
    errors.update(cell.errors)
    return cell


def running(url: str) -> int:
    """Replicas of LoraModel that run."""
    with urlopen(f"{url}/v1/deployments") as answer:
        [model] = [part for part in json.load(answer)["data"] if part["id"] == "LoraModel"]
    return int(model["replicas"].get("RUNNING", 0))


if __name__ == "__main__":
    main()
