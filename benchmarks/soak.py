"""The long soak: a cluster of two Ray nodes under Zipf traffic over 500 adapters, while faults are injected.

    python benchmarks/soak.py [--minutes 30] [--adapters 500] [--rate 2] [--fault-every 20] [--report docs/soak.md]

Real parts throughout: two raylets, the app of `deployments.app` with the default model, a replica and a node cache on
each node, an S3 server (rclone), requests over HTTP. Adapters are `word_adapters`: each says one word of its own, so
that every single answer is judged as right, told (an error that says so), lost (no answer, or one that breaks off),
duplicated or wrong (another adapter's, or a replaced version's). In turn, every `--fault-every` seconds, a replica is
killed, a node's cache is killed, the S3 server is down for a while, an adapter is replaced, and an adapter is published
with its weights cut in half. Prints JSON, writes the report, and fails if an answer was lost, duplicated or wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from local_s3 import LocalS3, free_port
from ray import serve
from ray.cluster_utils import Cluster
from soak_report import Judge, MemorySample, Outcome, markdown, summary
from word_adapters import WordAdapters

from deployments.app import assemble
from deployments.cluster import settle
from deployments.config import AppConfig
from lorauter.adapters import AdapterManifest, AdapterRepository, open_store
from lorauter.adapters.weights import WEIGHTS_FILE
from lorauter.catalog import Catalog, with_adapter
from lorauter.defaults import BASE_MODEL, resolve_model
from lorauter.tasks import read_tasks

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "soak"
TOKENS = 8
GRACE_S = 10.0  # after a change is published, answers must be the new version's
OUTAGE_S = 8.0  # of the S3 server, and how long a cut adapter stays cut
TIMEOUT_S = 60.0  # after which a request counts as lost
IN_FLIGHT = 64
SAMPLE_EVERY_S = 5.0
_REPLICAS, _CACHES = ("serve", "#LoraModel#"), ("lorauter", "adapter-cache-")  # namespace, and part of the name
# Roles by the process's name, as Ray and rclone set it.
ROLES = {"LoraModel": "LoraModel", "AdapterCache": "AdapterCache", "Router": "Router", "TaskRetriever": "TaskRetriever"}
ROLES |= {"QueryEmbedder": "QueryEmbedder", "ServeController": "controller", "Proxy": "proxy", "raylet": "raylet"}
ROLES |= {"gcs_server": "gcs_server", "rclone": "S3 server"}


class Pool:
    """The adapters in the store, what each says, and what was done to them."""

    def __init__(self, makers: WordAdapters, count: int, judge: Judge, folder: Path) -> None:
        self._makers = makers
        self._words = iter(makers.words)
        self._folder = folder
        self._judge = judge
        self._repository = AdapterRepository(open_store(f"s3://{BUCKET}/adapters"))
        self.names = [f"tenant-{i:03d}" for i in range(count)]
        if len(makers.words) < 1.2 * count:  # each further version of an adapter takes a word, too
            raise SystemExit(f"the model has {len(makers.words)} words that can be told apart; --adapters is {count}")

    def push_all(self) -> None:
        with ThreadPoolExecutor(2) as pushers:
            list(pushers.map(self._push, self.names, [next(self._words) for _ in self.names]))

    def replace(self, name: str) -> None:
        """Publish another version."""
        word = next(self._words)
        self._publish(self._push(name, word))
        self._judge.replaced(name, word, time.monotonic() + GRACE_S)

    def cut(self, name: str) -> str:
        """Publish another version whose weights' second half is cut off; returns the word that it says once whole."""
        word = next(self._words)
        self._judge.says(name, word, time.monotonic())
        local = self._write(name, word)
        manifest = self._repository.push(local)  # whole at first, since push refuses what cannot be read
        store, key = self._repository.store, manifest.files[WEIGHTS_FILE].key
        whole = (local / WEIGHTS_FILE).read_bytes()
        store.write(key, whole[: len(whole) // 2])
        self._publish(manifest)
        return word

    def mend(self, name: str) -> None:
        self._repository.push(self._folder / name, force=True)

    def _push(self, name: str, word: str) -> AdapterManifest:
        self._judge.says(name, word, time.monotonic())
        return self._repository.push(self._write(name, word))

    def _publish(self, manifest: AdapterManifest) -> None:
        catalog = f"s3://{BUCKET}/catalog"
        with_adapter(Catalog.load(catalog), manifest).save(catalog)

    def _write(self, name: str, word: str) -> Path:
        local = self._folder / name
        self._makers.write(local, word, rank=4 if len(word) % 2 else 8)
        return local


class Faults:
    """What is done to the service, in turn."""

    def __init__(self, server: LocalS3, pool: Pool, judge: Judge, rng: random.Random) -> None:
        self._server, self._pool, self._judge, self._rng = server, pool, judge, rng
        self.log: list[tuple[float, str]] = []
        self._spared = {part: _actors(*part)[0] for part in (_REPLICAS, _CACHES)}
        self._kinds = (self.kill_replica, self.kill_cache, self.store_down, self.replace_adapter, self.cut_adapter)

    async def run(self, started: float, until: float, every: float) -> None:
        """One fault every `every` seconds, the last early enough for its end to be seen."""
        i = 0
        while time.monotonic() + every + GRACE_S < until:
            await asyncio.sleep(started + (i + 1) * every - time.monotonic())
            kind = self._kinds[i % len(self._kinds)]
            print(f"{time.monotonic() - started:6.0f} s  {kind.__name__}", file=sys.stderr, flush=True)
            self.log.append((time.monotonic() - started, kind.__name__))
            await kind()
            i += 1

    async def kill_replica(self) -> None:
        await asyncio.to_thread(self._kill, _REPLICAS)

    async def kill_cache(self) -> None:
        await asyncio.to_thread(self._kill, _CACHES)

    async def store_down(self) -> None:
        await asyncio.to_thread(self._server.stop)
        await asyncio.sleep(OUTAGE_S)
        await asyncio.to_thread(self._server.start)

    async def replace_adapter(self) -> None:
        await asyncio.to_thread(self._pool.replace, self._popular())

    async def cut_adapter(self) -> None:
        name = self._popular()
        word = await asyncio.to_thread(self._pool.cut, name)
        await asyncio.sleep(OUTAGE_S)
        await asyncio.to_thread(self._pool.mend, name)
        self._judge.replaced(name, word, time.monotonic() + GRACE_S)

    def _kill(self, kind: tuple[str, str]) -> None:
        """End one actor's process at once, as a crash would. One is always spared, to see whether its memory grows."""
        names = [name for name in _actors(*kind) if name != self._spared[kind]]
        if names:  # else the last one killed is not back yet
            ray.kill(ray.get_actor(self._rng.choice(names), namespace=kind[0]), no_restart=kind == _REPLICAS)

    def _popular(self) -> str:
        # The Zipf order is the names' own; of those that are seldom asked for, no request would notice.
        return self._rng.choice(self._pool.names[:2])


def _actors(namespace: str, part: str) -> list[str]:
    rows = ray.util.list_named_actors(all_namespaces=True)
    return sorted(row["name"] for row in rows if row["namespace"] == namespace and part in row["name"])


class Traffic:
    """Requests that arrive at random, at a fixed mean rate, whatever became of the earlier ones."""

    def __init__(self, url: str, pool: Pool, judge: Judge, rng: random.Random) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None))
        self._names, self._judge, self._rng = pool.names, judge, rng
        self._shares = [1 / (rank + 1) for rank in range(len(pool.names))]  # Zipf, exponent 1
        self._questions = [e.input for task in read_tasks(ROOT / "examples" / "tasks") for e in task.validation]
        self.outcomes: list[Outcome] = []
        self.not_sent = 0

    async def run(self, started: float, until: float, rate: float) -> None:
        running: set[asyncio.Task[None]] = set()
        while time.monotonic() < until:
            await asyncio.sleep(self._rng.expovariate(rate))
            if len(running) >= IN_FLIGHT:
                self.not_sent += 1
                continue
            running.add(task := asyncio.create_task(self._ask(started)))
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        await self._client.aclose()

    async def _ask(self, started: float) -> None:
        body, heaviest = self._body()
        begun = time.monotonic()
        try:
            if body.get("stream"):
                async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                    raw = (await response.aread()).decode()
            else:
                response = await self._client.post("/v1/chat/completions", json=body)
                raw = response.text
            kind, detail = self._judge.judge(body, heaviest, response.status_code, raw, begun, time.monotonic())
        except httpx.HTTPError as error:
            kind, detail = "lost", type(error).__name__
        except (ValueError, LookupError) as error:
            kind, detail = "wrong", f"no answer of ours ({error!r}): {raw[:200]!r}"
        ended = time.monotonic()
        self.outcomes.append(Outcome(begun - started, ended - begun, kind, detail))
        if kind in ("lost", "wrong", "duplicated"):
            print(f"{begun - started:6.0f} s  {kind}: {detail} (asked {heaviest})", file=sys.stderr, flush=True)

    def _body(self) -> tuple[dict[str, Any], str | None]:
        """A request, and the adapter whose word it has to be answered with; None if the router chooses."""
        name, other = self._rng.choices(self._names, self._shares, k=2)
        chat: dict[str, Any] = {
            "model": name,
            "messages": [{"role": "user", "content": self._rng.choice(self._questions)}],
            "max_tokens": TOKENS,
        }
        share = self._rng.random()
        if share < 0.2:
            return {**chat, "stream": True}, name
        if share < 0.3 and name != other:
            return {**chat, "model": "lorauter", "lorauter": {"adapters": {name: 0.75, other: 0.25}}}, name
        if share < 0.4:
            return {**chat, "model": "lorauter"}, None
        return chat, name


async def _watch_memory(started: float, until: float) -> list[MemorySample]:
    """Resident bytes of every process below this one, by role."""
    samples = []
    while time.monotonic() < until:
        samples.append(await asyncio.to_thread(_memory, time.monotonic() - started))
        await asyncio.sleep(SAMPLE_EVERY_S)
    return samples


def _memory(at: float) -> MemorySample:
    resident = {}
    for process in psutil.Process().children(recursive=True):
        try:
            name = " ".join(process.cmdline()[:1])
            role = next((role for part, role in ROLES.items() if part in name), None)
            if role is not None:
                resident[role, process.pid] = process.memory_info().rss
        except psutil.Error:  # ended meanwhile
            continue
    return MemorySample(at, resident)


def _start_app(work: Path) -> str:
    """The app, with a replica of the model, and so a cache, on each of the two nodes; returns its URL."""
    config = AppConfig.parse(
        {
            "adapters": f"s3://{BUCKET}/adapters",
            "catalog": f"s3://{BUCKET}/catalog",
            # Budgets far below what the adapters take together, so that every tier evicts all the time.
            "engine": {
                "max_batch": 8,
                "max_model_len": 512,
                "max_rank": 8,
                "threads": 1,
                "adapter_bytes": 16 << 20,
            },
            "host": {"adapter_bytes": 64 << 20},
            "cache": {"directory": str(work / "disk"), "disk_bytes": 128 << 20},
        }
    )
    port = free_port()
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": port},
        logging_config={"log_level": "WARNING"},
    )
    model = {"num_replicas": 2, "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 1}}
    serve.run(assemble(config, {"LoraModel": model}), name="lorauter")
    return f"http://127.0.0.1:{port}"


def _build_catalog(names: list[str], work: Path) -> None:
    """The example tasks, each served by one of the adapters."""
    tasks = [task.name for task in read_tasks(ROOT / "examples" / "tasks")]
    mapping = work / "mapping.json"
    mapping.write_text(json.dumps({task: [names[i]] for i, task in enumerate(tasks)}))
    command = [str(Path(sys.executable).parent / "lorauter"), "catalog", "build", "--tasks", "examples/tasks"]
    command += ["--adapters", f"s3://{BUCKET}/adapters", "--mapping", str(mapping), "--out", f"s3://{BUCKET}/catalog"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


async def _soak(url: str, pool: Pool, judge: Judge, server: LocalS3, args: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    until = started + 60 * args.minutes
    traffic = Traffic(url, pool, judge, random.Random(1))
    faults = Faults(server, pool, judge, random.Random(2))
    memory, *_ = await asyncio.gather(
        _watch_memory(started, until),
        traffic.run(started, until, args.rate),
        faults.run(started, until, args.fault_every),
    )
    return summary(traffic.outcomes, faults.log, memory, seconds=60 * args.minutes, not_sent=traffic.not_sent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--rate", type=float, default=2, help="requests a second")
    parser.add_argument("--fault-every", type=float, default=20, help="seconds")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "soak.md")
    args = parser.parse_args()

    work = Path(tempfile.mkdtemp(prefix="lorauter-soak-"))
    server = LocalS3(work / "s3", BUCKET)
    os.environ.update(server.env, RAY_DEDUP_LOGS="0")
    settle()
    server.start()
    judge = Judge(TOKENS)
    pool = Pool(WordAdapters(resolve_model("default"), BASE_MODEL), args.adapters, judge, work / "made")
    cluster = None
    try:
        print(f"publishing {args.adapters} adapters", file=sys.stderr, flush=True)
        pool.push_all()
        _build_catalog(pool.names, work)
        print("starting two nodes and the app", file=sys.stderr, flush=True)
        node = {"num_cpus": 2, "object_store_memory": 200 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        result = asyncio.run(_soak(_start_app(work), pool, judge, server, args))
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        if cluster is not None:
            cluster.shutdown()
        server.stop()
        shutil.rmtree(work, ignore_errors=True)
    command = (
        f"python benchmarks/soak.py --minutes {args.minutes:g} --adapters {args.adapters} --rate {args.rate:g} "
        f"--fault-every {args.fault_every:g}"
    )
    print(json.dumps(result, indent=1))
    args.report.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    args.report.write_text(markdown(result, command, machine))
    outcomes = result["outcomes"]
    sys.exit(1 if any(outcomes.get(kind) for kind in ("lost", "duplicated", "wrong")) else 0)


if __name__ == "__main__":
    main()
