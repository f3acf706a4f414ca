"""The whole service, from HTTP to HTTP, against its own engine alone on the same prompts in the same run.

    python benchmarks/serve.py [--quick] [--clients N] [--requests N]
    python benchmarks/serve.py --shape 8B                     # on a GPU: random weights of that shape
    python benchmarks/serve.py --vllm-url http://HOST:PORT    # vLLM's server too, on the same load

Starts `lorauter serve` with the shipped configuration (a batch of --clients rows) and asks it real prompts of the
example tasks, each once, by clients that ask one after the other, in several processes (`clients.py`; what they take is
told): routed and of the base model, streamed and whole. The engine alone, in a process of its own with the niceness of
Ray's workers, answers the same prompts under the mixtures that the library chooses for them, all at once; it runs
before and after, and its mean counts (before alone with --shape, whose weights take a while to load, and with --quick
where that took more than a minute). A share may be above 1: the library's engine makes text of its tokens in the
interpreter that feeds its device, and the service's has one for itself. Then what the service says a routed request
waits for, and the time to the first token of a lone request and beside 31 others. The last lines are one figure each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import torch
import yaml
from clients import Cell, Clients
from engine_common import ATTENTION, ROOT, SHAPES, random_model
from local_s3 import free_port

from lorauter.tasks import read_tasks

WORKER_NICENESS = 15  # Ray's own setting for its workers
MAX_TOKENS = 64
CORES_A_PROCESS = 4  # of the clients
WARM_S = 4.0
STARTED = time.monotonic()
AT_ONCE = 32
PARTS = {
    "engine": "lorauter.engine.child",
    "its replica": "ServeReplica:lorauter:LoraModel",
    "Router": "ServeReplica:lorauter:Router",
    "proxy": "ProxyActor",
    "QueryEmbedder": "ServeReplica:lorauter:QueryEmbedder",
    "TaskRetriever": "ServeReplica:lorauter:TaskRetriever",
}
MODELS = {"routed": "lorauter", "base": "base"}
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Extent:
    """How much is asked.

    Attributes:
        fewest: requests of a load by each client at least.
        load_s: seconds that a load of more than these takes the engine alone at most.
        probe: the same of what tells the engine's speed, and of what warms the service.
        warm: loads before those that count.
        lone: requests that are asked one after the other.
        crowd: requests of each of those that ask together.
        long_s: seconds of the engine alone after which it is not measured a second time.
    """

    fewest: int = 4
    load_s: float = 15.0
    probe: int = 2
    warm: int = 2
    lone: int = 12
    crowd: int = 3
    long_s: float = math.inf


QUICK = Extent(fewest=2, load_s=5.0, probe=1, warm=1, lone=4, crowd=1, long_s=60.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests: some four minutes on two CPU cores")
    parser.add_argument("--clients", type=int, help="clients, and rows of the batch (16; on a GPU 128)")
    parser.add_argument("--requests", type=int, help="of each load (192; on a GPU 4096, with --shape 8B 1024)")
    parser.add_argument("--repeats", type=int, default=1, help="of each load; the median counts")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights, in place of the default model")
    parser.add_argument("--vllm-url", help="a running server of vLLM: with the base model as its first one")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        alone(json.loads(args.alone.read_text()))
        return
    on_gpu = torch.cuda.is_available()
    clients = args.clients or (128 if on_gpu else 16)
    usual = (1024 if args.shape == "8B" else 4096) if on_gpu else 192
    count = args.requests or usual // (3 if args.quick else 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the service ends too
    with (
        tempfile.TemporaryDirectory(prefix="serve-") as folder,
        Clients(max(1, len(os.sched_getaffinity(0)) // CORES_A_PROCESS)) as asking,
    ):
        run(args, Path(folder), asking, clients, count, on_gpu)


def run(args: argparse.Namespace, folder: Path, asking: Clients, clients: int, count: int, on_gpu: bool) -> None:
    print(
        f"{count} requests a load, {clients} at once, {torch.cuda.get_device_name() if on_gpu else 'CPU'}", flush=True
    )
    settings = random_pool(args.shape, folder) if args.shape else {}
    prompts = Prompts()
    of_way = {way: prompts.take(count) for way in ("streamed", "whole")}
    loads = {f"{model}_{way}": load for model in MODELS for way, load in of_way.items()}
    port = free_port()
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(configuration(port, clients, settings)))
    extent = QUICK if args.quick else Extent()
    task = {"clients": clients, "settings": settings, "loads": loads, "probe": prompts.take(extent.probe * clients)}
    task |= {"fewest": extent.fewest * clients, "load_s": extent.load_s}
    before = measure_alone(task, folder)
    once = args.shape or time.monotonic() - STARTED > extent.long_s
    if (fewer := before["count"]) < count:
        count, loads = fewer, {name: load[:fewer] for name, load in loads.items()}
        task |= {"loads": loads}
        told(f"{count} requests a load, as the engine takes its time")
    with Service(config, port, folder) as service:
        told("the service is there")
        url = f"http://127.0.0.1:{port}"

        def ask(model: str, load: list[str], at_once: int, *, streamed: bool) -> Cell:
            return asking.ask(f"{url}{CHAT}", [body(model, prompt, streamed) for prompt in load], at_once)

        for _ in range(extent.warm):  # all adapters come, and what looks twice at some queries
            ask("lorauter", prompts.take(extent.probe * clients), clients, streamed=True)
            time.sleep(WARM_S)
        cells: dict[str, list[Cell]] = {}
        for _ in range(args.repeats):
            for name, load in loads.items():
                model, way = name.split("_")
                before_cpu = service.cpu()
                cell = ask(MODELS[model], load, clients, streamed=way == "streamed")
                cell.cpu = service.cpu() - before_cpu
                cells.setdefault(name, []).append(cell)
                told(f"{name}: {count / cell.seconds:.1f} requests/s, {cell.errors.total()} errors")
                loads[name] = [f"{text} " for text in load]  # what was computed of the last ones is no help
        timed = asking.ask(f"{url}{CHAT}", [{**body("lorauter", text, False), "lorauter": {"timings": True}}
                                            for text in loads["routed_whole"]], clients)  # fmt: skip
        lone = ask("base", prompts.take(extent.lone), 1, streamed=True)
        crowd = ask("base", prompts.take(extent.crowd * AT_ONCE), AT_ONCE, streamed=True)
    after = before if once else measure_alone({**task, "routed": before["routed"]}, folder)
    vllm = {}
    if args.vllm_url:
        with urlopen(f"{args.vllm_url}/v1/models") as answer:
            model = json.load(answer)["data"][0]["id"]
        for way in ("streamed", "whole"):
            bodies = [body(model, prompt, way == "streamed") for prompt in loads[f"base_{way}"]]
            vllm[way] = count / asking.ask(f"{args.vllm_url}{CHAT}", bodies, clients).seconds
    tell_waits(timed, count, clients)
    report(cells, (before, after), count, lone, crowd, vllm)


def body(model: str, prompt: str, streamed: bool) -> dict[str, Any]:
    """A request."""
    message = {"role": "user", "content": prompt}
    return {"model": model, "messages": [message], "max_tokens": MAX_TOKENS, "temperature": 0, "stream": streamed}


def told(what: str) -> None:
    """Say how far it is."""
    print(f"[{time.monotonic() - STARTED:5.0f} s] {what}", flush=True)


def tell_waits(timed: Cell, count: int, clients: int) -> None:
    """Print where a routed request spends its time."""
    print(f"a routed answer takes {1000 * clients * timed.seconds / count:.1f} ms in the mean; of it (median, p99)")
    for step in ("embed_s", "retrieve_s", "adapters_s", "queue_s", "first_token_s"):
        if taken := sorted(1000 * seconds for timing in timed.timings if (seconds := timing[step]) is not None):
            p99 = taken[int(0.99 * (len(taken) - 1))]
            print(f"  {step.removesuffix('_s'):12} {statistics.median(taken):8.1f} {p99:8.1f} ms")


def report(
    cells: dict[str, list[Cell]],
    runs: tuple[dict[str, Any], dict[str, Any]],
    count: int,
    lone: Cell,
    crowd: Cell,
    vllm: dict[str, float],
) -> None:
    """Print all, the figures last."""
    figures: dict[str, float] = {}
    errors: Counter[str] = sum((cell.errors for row in cells.values() for cell in row), lone.errors + crowd.errors)
    print(f"{'':18} {'service':>12} {'engine alone':>22}   requests/s")
    for name, row in cells.items():
        served = count / statistics.median(cell.seconds for cell in row)
        own = [count / found[name]["seconds"] for found in runs]
        figures[name] = served / statistics.fmean(own)
        tokens = runs[0][name]["tokens"] / count
        same = sum(text == runs[0][name]["texts"][i] for i, text in row[0].texts.items())
        told = f", {same} of {len(row[0].texts)} answers the same" if row[0].texts else ""
        print(f"{name:18} {served:12.2f} {own[0]:12.2f} {own[1]:9.2f}   {tokens:.1f} tokens each{told}")
    parts = [*PARTS, "all else"]
    print(f"CPU ms a request   {' '.join(f'{part:>13}' for part in parts)}       clients (busiest)   engine alone")
    for name, row in cells.items():
        each = [1000 * statistics.fmean(cell.cpu[part] for cell in row) / count for part in parts]
        clients = 1000 * statistics.fmean(cell.clients_cpu for cell in row) / count
        busiest = max(cell.clients_busy for cell in row)
        own = 1000 * cpu_alone(runs, name) / count
        print(f"{name:18} {' '.join(f'{ms:13.2f}' for ms in each)} {clients:13.2f} ({busiest:6.0%}) {own:14.2f}")
    for way, rate in vllm.items():
        figures[f"base_{way}_of_vllm"] = count / statistics.median(c.seconds for c in cells[f"base_{way}"]) / rate
    alone_s, median_s = statistics.median(lone.firsts), statistics.median(crowd.firsts)
    p99_s = sorted(crowd.firsts)[int(0.99 * (len(crowd.firsts) - 1))]
    figures["first_token_alone_ms"] = 1000 * alone_s
    figures[f"first_token_{AT_ONCE}_ms"] = 1000 * median_s
    figures[f"first_token_{AT_ONCE}_p99_ms"] = 1000 * p99_s
    figures[f"first_token_{AT_ONCE}_of_alone"] = median_s / alone_s
    figures[f"first_token_{AT_ONCE}_p99_of_median"] = p99_s / median_s
    for error, times in errors.most_common(5):
        print(f"{times} x {error}")
    for name, value in figures.items():
        print(f"{name} {value:.3f}")
    print(f"errors {sum(errors.values())}")


def cpu_alone(runs: tuple[dict[str, Any], dict[str, Any]], name: str) -> float:
    """Seconds of CPU time that the engine alone has taken for a load."""
    return statistics.fmean(found[name]["cpu"] for found in runs)


class Prompts:
    """Prompts of the example tasks, the tasks taking turns, with a number before those that come again: none is the
    same twice, so that of none anything was computed before."""

    def __init__(self) -> None:
        tasks = read_tasks(ROOT / "examples" / "tasks")
        rows = [[example.input for example in (*task.test, *task.validation)] for task in tasks]
        self._every = [row[i] for i in range(max(map(len, rows))) for row in rows if i < len(row)]
        self._numbers = itertools.count()

    def take(self, count: int) -> list[str]:
        """The next ones."""
        turns = [divmod(n, len(self._every)) for n in itertools.islice(self._numbers, count)]
        return [f"{turn}. {self._every[i]}" if turn else self._every[i] for turn, i in turns]


# --- the service


def configuration(port: int, clients: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The shipped one, on another port, with a batch of as many rows as there are clients."""
    shipped: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    shipped["http_options"]["port"] = port
    [application] = shipped["applications"]
    application["args"] |= settings
    application["args"]["engine"]["max_batch"] = clients
    return shipped


class Service:
    """`lorauter serve` from here to the block's end; what it prints is told if it does not start."""

    def __init__(self, config: Path, port: int, folder: Path) -> None:
        self._port, self._log = port, folder / "serve.log"
        command = [sys.executable, "-m", "lorauter_cli", "serve", "--config", str(config)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> Service:
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{self._port}/healthz"):
                    return self
            except OSError:
                if self._process.poll() is not None:
                    sys.exit(self._log.read_text())
                time.sleep(0.5)

    def cpu(self) -> Counter[str]:
        """Seconds of CPU time so far, by process."""
        seconds: Counter[str] = Counter()
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                command, times = " ".join(process.cmdline()), process.cpu_times()
            except psutil.Error:  # it has ended
                continue
            part = next((name for name, title in PARTS.items() if title in command), "all else")
            seconds[part] += times.user + times.system
        return seconds

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)


# --- the engine alone


def measure_alone(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds, tokens and answers of each load, by the engine in a process of its own, and the mixtures, which the next
    run is told."""
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, __file__, "--alone", str(folder / "task.json")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    rates = ", ".join(f"{load} {len(found[load]['texts']) / found[load]['seconds']:.1f}" for load in task["loads"])
    told(f"the engine alone: {rates} requests/s")
    return found


def alone(task: dict[str, Any]) -> None:
    """What `measure_alone` starts."""
    from lorauter.adapters import LoraWeights
    from lorauter.defaults import base_model_aliases, resolve_adapters, resolve_model
    from lorauter.engine import EngineConfig, GenerationRequest, SamplingParams, load_engine
    from lorauter.engine.engine import warm_up
    from lorauter.engine.slots import PackedAdapter

    os.nice(WORKER_NICENESS - os.nice(0))
    torch.set_num_threads(1)  # the encoder's threads would be beside the engine's for good
    routed = task.get("routed") or mixtures(task)
    name = task["settings"].get("base_model", "default")
    pool = Path(resolve_adapters(task["settings"].get("adapters", "default")))
    engine = load_engine(resolve_model(name), EngineConfig(max_batch=task["clients"]), aliases=base_model_aliases(name))
    used = {adapter for load in routed.values() for mixture in load for adapter, _ in mixture}
    packed: dict[str, PackedAdapter] = {
        name: engine.pack(LoraWeights.load(pool / name, name=name, version="1")) for name in sorted(used)
    }

    def asked(prompt: str, mixture: Sequence[tuple[str, float]] = ()) -> GenerationRequest:
        tokens = engine.codec.chat([{"role": "user", "content": prompt}])
        adapters = tuple((packed[adapter], weight) for adapter, weight in mixture)
        return GenerationRequest(tokens, adapters, SamplingParams(max_tokens=MAX_TOKENS))

    loads = {
        load: [asked(*each) for each in zip(prompts, routed.get(load) or [()] * len(prompts), strict=False)]
        for load, prompts in task["loads"].items()
    }
    warm_up(engine)
    began = time.perf_counter()
    engine.generate([asked(prompt) for prompt in task["probe"]])
    rate = len(task["probe"]) / (time.perf_counter() - began)
    count = max(task["fewest"], int(task["load_s"] * rate))
    found: dict[str, Any] = {"routed": routed, "count": count}
    for load, requests in loads.items():
        requests = requests[:count]
        began, cpu = time.perf_counter(), time.process_time()
        answers = engine.generate(requests)
        found[load] = {
            "seconds": time.perf_counter() - began,
            "cpu": time.process_time() - cpu,
            "tokens": sum(len(answer.token_ids) for answer in answers),
            "texts": [answer.text for answer in answers],
        }
    engine.close()
    print(json.dumps(found))


def mixtures(task: dict[str, Any]) -> dict[str, list[list[tuple[str, float]]]]:
    """The mixture of each prompt that is routed, by load."""
    from lorauter import Router
    from lorauter.defaults import resolve_catalog

    router = Router.load(resolve_catalog(task["settings"].get("catalog", "default")))
    return {
        load: [[(one.name, one.weight) for one in decision.adapters] for decision in router.route(prompts)]
        for load, prompts in task["loads"].items()
        if "routed" in load
    }


# --- random weights


def random_pool(shape: str, folder: Path) -> dict[str, Any]:
    """A model of a shape, an adapter of random numbers for each example task, and their catalog: settings for these."""
    import safetensors.torch
    from transformers import AutoTokenizer

    from lorauter.defaults import resolve_model

    model, adapters, catalog = folder / "model", folder / "adapters", folder / "catalog"
    random_model(shape, "cuda" if torch.cuda.is_available() else "cpu").save_pretrained(model)
    told("the model is saved")
    AutoTokenizer.from_pretrained(resolve_model("default")).save_pretrained(model)
    sizes = SHAPES[shape]
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    narrow = hidden // heads * sizes["num_key_value_heads"]
    outputs = {"q_proj": hidden, "k_proj": narrow, "v_proj": narrow, "o_proj": hidden}
    for task in read_tasks(ROOT / "examples" / "tasks"):
        one = adapters / task.name
        one.mkdir(parents=True)
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 16,
            "target_modules": list(ATTENTION), "base_model_name_or_path": str(model),
        }  # fmt: skip
        (one / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for layer in range(sizes["num_hidden_layers"]):
            for target, width in outputs.items():
                stem = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(16, hidden) / hidden**0.5
                tensors[f"{stem}.lora_B.weight"] = torch.randn(width, 16) / 64
        safetensors.torch.save_file(tensors, one / "adapter_model.safetensors")
    command = [sys.executable, "-m", "lorauter_cli", "catalog", "build"]
    command += ["--tasks", str(ROOT / "examples" / "tasks"), "--adapters", str(adapters), "--out", str(catalog)]
    subprocess.run(command, check=True)
    told("its adapters and their catalog are there")
    return {"base_model": str(model), "adapters": str(adapters), "catalog": str(catalog)}


if __name__ == "__main__":
    main()
