"""A cluster that may lose any of its parts, and clients that know the right answer to all that they ask."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from catalogued import catalog_adapters
from families import command, family, kill
from faulty_s3 import FaultyS3
from local_s3 import free_port

from lorauter.adapters import AdapterRepository, open_store

REPLICAS = {"Router": 1, "QueryEmbedder": 1, "TaskRetriever": 1, "LoraModel": 2}


@dataclass
class FaultCluster:
    """The cluster as its tests see it: a URL, processes that they may kill, and the S3 server's faults."""

    url: str
    s3: FaultyS3
    adapters: str
    disk: Path  # the caches' folder, one below it for each node
    _process: subprocess.Popen[str]

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of the cluster with this in their title or command."""
        return [process for process in family(self._process) if title in command(process)]

    def replicas(self, deployment: str) -> list[psutil.Process]:
        return self.processes(f"ServeReplica:lorauter:{deployment}")

    def kill_node(self, process: psutil.Process) -> None:
        """End all that runs on the node of a process."""
        raylet = next(parent for parent in process.parents() if parent.name() == "raylet")
        kill([raylet, *raylet.children(recursive=True)])

    def _say(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def add_node(self) -> None:
        assert self._say("add").strip() == "added"

    def whole(self) -> bool:
        """Whether as many replicas run as should."""
        running: dict[str, int] = json.loads(self._say("status"))
        wanted = {name: running[name] for name in REPLICAS} == REPLICAS
        return wanted and len(self.replicas("LoraModel")) == REPLICAS["LoraModel"]

    def wait_until_whole(self, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.whole():
            assert time.monotonic() < deadline, self._say("status")
            time.sleep(0.5)


@pytest.fixture(scope="package")
def _cluster(
    s3_server: Any, published: str, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaultCluster]:
    work = tmp_path_factory.mktemp("cluster")
    s3 = FaultyS3(int(s3_server.endpoint.rpartition(":")[2]))
    config = {
        "adapters": f"{published}/adapters",
        "catalog": f"{published}/catalog",
        # float32, so that an answer is the same in any company.
        "engine": {
            "max_batch": 8,
            "max_model_len": 512,
            "dtype": "float32",
            "threads": 1,
        },
        "host": {"wait_s": 20},
        "cache": {"directory": str(work / "disk")},
    }
    (work / "config.json").write_text(json.dumps(config))
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temporary:  # a short path
        port = free_port()
        env = {**os.environ, **s3_server.env, "AWS_ENDPOINT_URL_S3": s3.endpoint, "RAY_USAGE_STATS_ENABLED": "0"}
        env |= {"RAY_TMPDIR": temporary, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        env.pop("RAY_ADDRESS", None)
        with (work / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("cluster.py")), str(work / "config.json"), str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip() == "ready":
                    break
            else:
                pytest.fail((work / "log").read_text())
            yield FaultCluster(f"http://127.0.0.1:{port}", s3, f"{published}/adapters", work / "disk", process)
        finally:
            children = family(process)
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _, alive = psutil.wait_procs(children, timeout=5)
            kill(alive)
            process.stdout.close()
            s3.close()
            shutil.rmtree(work, ignore_errors=True)


@pytest.fixture
def cluster(_cluster: FaultCluster) -> Iterator[FaultCluster]:
    """The cluster, whole, and the store without faults; whole again afterwards."""
    _cluster.wait_until_whole()
    yield _cluster
    _cluster.s3.heal()


@dataclass(frozen=True)
class Question:
    """A request whose answer is known."""

    body: dict[str, Any]
    answer: str
    tokens: int

    def of(self, model: str) -> Question:
        """The same of another model that answers the same."""
        return Question({**self.body, "model": model}, self.answer, self.tokens)


@dataclass
class Count:
    """What became of requests.

    Attributes:
        right: whole and as known.
        told: clients heard that it failed, by a status or by an event in the stream; the messages.
        refused: answered with 429 and `Retry-After`, and asked again.
        lost: ended without an end and without a word.
        duplicated, wrong: said more than it should, or something else; what was said.
    """

    right: int = 0
    told: list[str] = field(default_factory=list)
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    under_way: int = 0  # streams that have begun and not ended

    def assert_all_right(self, *, at_least: int) -> None:
        """Nothing is lost, twice or wrong, and nobody was even told of a failure."""
        self.assert_sound()
        assert not self.told, Counter(self.told)
        assert self.right >= at_least

    def assert_sound(self) -> None:
        assert (self.lost, self.duplicated, self.wrong) == ([], [], [])


async def ask(client: httpx.AsyncClient, question: Question, count: Count) -> None:
    """Ask by a stream until it is taken, and count what comes."""
    body = {**question.body, "stream": True, "stream_options": {"include_usage": True}}
    while True:
        begun = False
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    said = (await response.aread()).decode()
                    if response.status_code != 429:
                        ours = response.headers["Content-Type"].startswith("application/json")
                        message = json.loads(said)["error"]["message"] if ours else said  # else Serve's proxy's own
                        count.told.append(f"{response.status_code} {message}")
                        return
                    count.refused += 1
                    pause = float(response.headers["Retry-After"])
                else:
                    pause = 0.0
                    text, tokens, ends, failure = "", 0, 0, None
                    async for line in response.aiter_lines():
                        if line == "data: [DONE]":
                            ends += 1
                        elif line:
                            event = json.loads(line.removeprefix("data: "))
                            failure = event.get("error", failure)
                            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                            for choice in event.get("choices", ()):
                                text += choice["delta"].get("content", "")
                                if text and not begun:
                                    begun = True
                                    count.under_way += 1
        except httpx.HTTPError as error:
            count.lost.append(repr(error))
            return
        finally:
            count.under_way -= begun
        if pause:
            await asyncio.sleep(pause)
            continue
        if failure is not None:
            count.told.append(failure["message"])
        elif not ends:
            count.lost.append(text)
        elif ends > 1 or len(text) > len(question.answer) or tokens > question.tokens:
            count.duplicated.append(text)
        elif (text, tokens) != (question.answer, question.tokens):
            count.wrong.append(text)
        else:
            count.right += 1
        return


@dataclass(frozen=True)
class Clients:
    """Clients of the cluster."""

    url: str

    async def ask_all(self, questions: Sequence[Question]) -> Count:
        """Ask each once, all at the same moment."""
        count = Count()
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            await asyncio.gather(*(ask(client, question, count) for question in questions))
        return count

    @asynccontextmanager
    async def asking(self, questions: Sequence[Question], clients: int) -> AsyncIterator[Count]:
        """So many clients that ask one question after the other, until the block ends and all are answered."""
        count, ended = Count(), False

        async def run(client: httpx.AsyncClient, i: int) -> None:
            while not ended:
                await ask(client, questions[i % len(questions)], count)
                i += clients

        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            tasks = [asyncio.create_task(run(client, i)) for i in range(clients)]
            try:
                yield count
            finally:
                ended = True
                await asyncio.gather(*tasks)


@pytest.fixture
def clients(cluster: FaultCluster) -> Clients:
    return Clients(cluster.url)


@pytest.fixture(scope="package")
def known(_cluster: FaultCluster) -> Callable[..., Question]:
    """`known(model, text, **options)`: a question with the answer that the healthy cluster gives."""
    cache: dict[str, Question] = {}

    def learn(model: str, text: str, **options: Any) -> Question:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **options}
        key = json.dumps(body)
        if key not in cache:
            response = httpx.post(f"{_cluster.url}/v1/chat/completions", json=body, timeout=120).raise_for_status()
            answer = response.json()
            text = answer["choices"][0]["message"]["content"]
            cache[key] = Question(body, text, answer["usage"]["completion_tokens"])
        return cache[key]

    return learn


@pytest.fixture(scope="package")
def stories(known: Callable[..., Question]) -> list[Question]:
    """Questions with long answers: greedy, sampled by a seed, and under a mixture."""
    options = {"max_tokens": 32}
    mixture = {"adapters": {"sst2": 0.6, "agnews": 0.4}}
    return [
        known("base", "Tell me a story about a dragon.", **options),
        known("base", "How do bees find flowers?", **options, temperature=0.8, seed=7),
        known("lorauter", "Write about the sea, the wind and the ships.", **options, lorauter=mixture),
        known("base", "Why is the sky blue?", **options),
    ]


@pytest.fixture(scope="package")
def routed(known: Callable[..., Question], examples: Any) -> list[Question]:
    """Questions that are routed."""
    return [known("lorauter", examples(task)[0].input, max_tokens=12) for task in ("dbpedia", "sst2", "agnews")]


@pytest.fixture
def unseen(
    cluster: FaultCluster, s3: Any, known: Callable[..., Question], examples: Any, root: Path, tmp_path: Path
) -> Callable[[int], list[Question]]:
    """`unseen(n)`: questions to n adapters that no node has had, copies of one whose answer is known."""
    question = known("sst2", examples("sst2")[0].input, max_tokens=12)
    repository = AdapterRepository(open_store(cluster.adapters))
    made = 0

    def make(n: int) -> list[Question]:
        nonlocal made
        questions = []
        for _ in range(n):
            made += 1
            name = f"{tmp_path.name.replace('_', '-')}-{made}"
            shutil.copytree(root / "examples" / "adapters" / "sst2", tmp_path / name)
            repository.push(tmp_path / name)
            questions.append(question.of(name))
        catalog_adapters(cluster.url, cluster.adapters, *(question.body["model"] for question in questions))
        return questions

    return make
