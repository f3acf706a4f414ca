"""Caches on several nodes of a real cluster, before a real S3 server whose answers are counted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from deployments.adapter_cache import _BEAT_S, _UNUSED_S, CacheSpec, _named, running_caches, start_cache
from deployments.config import CacheSettings
from lorauter.adapters import AdapterRepository, LoraWeights, open_store
from lorauter.names import AdapterKey

pytestmark = pytest.mark.integration

WEIGHTS = re.compile(rb"^GET \S*/([^/ ?]+)/[0-9a-f]+/adapter_model\.safetensors", re.MULTILINE)


class CountingProxy:
    """Passes S3's bytes on as they are (signatures cover the address that the client used), and counts.

    Attributes:
        gets: requests for weights, by adapter.
        bytes: that the store sent.
        pause: seconds before each answer's first bytes.
    """

    def __init__(self, upstream: str) -> None:
        host, port = upstream.removeprefix("http://").split(":")
        self._upstream = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.gets: Counter[str] = Counter()
        self.bytes = 0
        self.pause = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                store = socket.create_connection(self._upstream)
                threading.Thread(target=self._pump, args=(client, store, self._asked), daemon=True).start()
                threading.Thread(target=self._pump, args=(store, client, self._answered), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, see: Callable[[bytes], None]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                see(data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _asked(self, data: bytes) -> None:
        self.gets.update(name.decode() for name in WEIGHTS.findall(data))
        if self.pause and WEIGHTS.search(data):
            time.sleep(self.pause)

    def _answered(self, data: bytes) -> None:
        self.bytes += len(data)


class Nodes:
    """Nodes beside the session's own, without CPUs: they hold caches alone."""

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self._cluster = Cluster()
        self._cluster.head_node = head = ray._private.worker._global_node
        self._cluster.redis_address = head.redis_address
        self._cluster.global_state = ray._private.state.state
        self._joined: list[Any] = []

    def join(self) -> Any:
        """A new node's cache."""
        self._joined.append(self._cluster.add_node(num_cpus=0))
        return start_cache(self.spec, self._joined[-1].node_id)

    @property
    def nodes(self) -> list[str]:
        """The nodes' ids."""
        return [node.node_id for node in self._joined]

    def kill(self, number: int) -> None:
        """A node and all that runs on it, without a word."""
        self._cluster.remove_node(self._joined.pop(number), allow_graceful=False)

    def kill_all(self) -> None:
        while self._joined:
            self.kill(0)


@pytest.fixture(scope="module")
def proxy(service: Any, s3_server: Any) -> Iterator[CountingProxy]:
    proxy = CountingProxy(s3_server.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def nodes(proxy: CountingProxy, s3_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    work = tmp_path_factory.mktemp("nodes")
    settings = CacheSettings(directory=str(work / "disk"), disk_bytes=200_000)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3_server.env, "AWS_ENDPOINT_URL_S3": proxy.endpoint}.items():
            patch.setenv(name, value)
        nodes = Nodes(CacheSpec(f"{s3_server.bucket('node-caches')}/adapters", settings))
        yield nodes
        for cache in running_caches(nodes.spec):
            ray.kill(cache)
        nodes.kill_all()
    shutil.rmtree(work, ignore_errors=True)


@pytest.fixture(scope="module")
def caches(nodes: Nodes) -> list[Any]:
    """The caches of three nodes."""
    caches = [nodes.join() for _ in range(3)]
    ray.get([cache.stats.remote() for cache in caches])
    return caches


@pytest.fixture
def push(nodes: Nodes, s3: Any, make_adapter: Callable[..., Path], tmp_path: Path) -> Callable[..., AdapterKey]:
    """`push(name, **config)`: publishes an adapter, or another version of it; returns its key."""
    repository = AdapterRepository(open_store(nodes.spec.adapters))
    return lambda name, **config: repository.push(make_adapter(tmp_path, name, rank=64, **config)).key


def stats(cache: Any) -> dict[str, Any]:
    result: dict[str, Any] = ray.get(cache.stats.remote(), timeout=30)
    return result


def total(caches: list[Any], counter: str) -> int:
    return sum(stats(cache)[counter] for cache in caches)


def fetch(cache: Any, key: AdapterKey) -> Any:
    local = ray.get(cache.fetch.remote(key), timeout=60)
    assert local.key == key
    LoraWeights.load(local.path, name=key.name, version=key.version)
    return local


def test_a_node_takes_an_adapter_from_a_node_that_has_it(caches: list[Any], push: Any, proxy: CountingProxy) -> None:
    key = push("lent")
    first = fetch(caches[0], key)
    sent = proxy.bytes
    others = [fetch(cache, key) for cache in caches[1:]]
    assert len({local.path for local in (first, *others)}) == 3
    assert proxy.gets["lent"] == 1
    assert proxy.bytes == sent, "not even for a manifest"
    assert [stats(cache)["downloads"] for cache in caches] == [1, 0, 0]
    assert [stats(cache)["peer_copies"] for cache in caches] == [0, 1, 1]


def test_nodes_that_want_the_same_at_once_ask_the_store_once(
    caches: list[Any], push: Any, proxy: CountingProxy
) -> None:
    keys = [push(f"wanted-{i}") for i in range(6)]
    proxy.pause = 0.2
    try:
        found = ray.get([cache.fetch.remote(key) for key in keys for cache in caches], timeout=60)
    finally:
        proxy.pause = 0.0
    assert len({local.path for local in found}) == 18
    assert {key.name: proxy.gets[key.name] for key in keys} == {key.name: 1 for key in keys}


def test_versions_of_one_adapter_are_lent_apart(caches: list[Any], push: Any, proxy: CountingProxy) -> None:
    old = push("replaced")
    fetch(caches[0], old)
    new = push("replaced", lora_alpha=7)
    assert old != new
    fetch(caches[1], new)
    assert proxy.gets["replaced"] == 2, "who has another version has nothing to lend"
    for key in (old, new):
        for cache in caches:
            fetch(cache, key)
    assert proxy.gets["replaced"] == 2


def test_a_copy_that_was_damaged_at_a_peer_is_refused_and_the_store_asked(
    caches: list[Any], push: Any, proxy: CountingProxy
) -> None:
    key = push("damaged")
    weights = fetch(caches[0], key).path / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = stats(caches[1])
    sound = fetch(caches[1], key)
    assert (sound.path / "adapter_model.safetensors").read_bytes() == content
    assert (proxy.gets["damaged"], stats(caches[1])["downloads"]) == (2, before["downloads"] + 1)


def test_a_plain_folder_is_lent_too(caches: list[Any], nodes: Nodes, push: Any, proxy: CountingProxy) -> None:
    pushed = push("plain")
    store = open_store(nodes.spec.adapters)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        store.write(f"plain/{file}", store.read(f"plain/{pushed.version}/{file}"))
    store.delete("plain/adapter.json")
    plain = AdapterRepository(store).manifest("plain").key
    assert plain.version != pushed.version
    fetch(caches[0], plain)
    before = total(caches, "downloads")
    fetch(caches[1], plain)
    assert total(caches, "downloads") == before
    store.write("plain/adapter_config.json", store.read("plain/adapter_config.json") + b"\n")
    fetch(caches[2], plain)  # what the store has no longer, the nodes have
    assert total(caches, "downloads") == before


def test_a_peer_that_hangs_costs_a_moment_and_no_answer(caches: list[Any], push: Any, alone: None) -> None:
    lonely, lonelier = push("lonely"), push("lonelier")
    fetch(caches[0], lonely)
    hung = ray.get(caches[0].pid.remote())
    os.kill(hung, signal.SIGSTOP)
    try:
        started = time.monotonic()
        fetch(caches[1], lonely)
        first = time.monotonic() - started
        started = time.monotonic()
        fetch(caches[1], lonelier)
        second = time.monotonic() - started
    finally:
        os.kill(hung, signal.SIGCONT)
    assert first < 5
    assert second < 1, "it is left alone for a while"


def test_killed_while_downloading_a_cache_keeps_no_half_and_goes_on(
    caches: list[Any], push: Any, proxy: CountingProxy
) -> None:
    key = push("cut")
    victim = caches[2]
    held = stats(victim)["resident"]
    proxy.pause = 1.0
    try:
        flight = victim.fetch.remote(key)
        while not proxy.gets["cut"]:
            time.sleep(0.02)
        os.kill(ray.get(victim.pid.remote()), signal.SIGKILL)
        local = ray.get(flight, timeout=60)  # Ray starts it again, and the call with it
    finally:
        proxy.pause = 0.0
    LoraWeights.load(local.path, name="cut", version=key.version)
    after = stats(victim)
    assert sorted(after["resident"]) == sorted([*held, key])
    assert not list((local.path.parents[1] / ".incoming").iterdir())


def test_a_dead_node_holds_nobody_up_and_a_new_one_gets_its_own_cache(
    caches: list[Any], nodes: Nodes, push: Any, proxy: CountingProxy
) -> None:
    survivor = push("survivor")
    fetch(caches[0], survivor)
    nodes.kill(0)
    started = time.monotonic()
    fetch(caches[1], survivor)
    assert time.monotonic() - started < 5
    joined = nodes.join()
    assert fetch(joined, survivor).path.is_dir()
    assert proxy.gets["survivor"] <= 2  # the new one took it from a node, or found it on the dead one's disk
    deadline = time.monotonic() + 20
    while len(running_caches(nodes.spec)) != 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_budget_holds_for_what_is_lent(caches: list[Any], nodes: Nodes, push: Any) -> None:
    keys = [push(f"many-{i}") for i in range(40)]
    live = running_caches(nodes.spec)
    for cache in live[:2]:
        ray.get([cache.fetch.remote(key) for key in keys], timeout=120)
        assert stats(cache)["size_bytes"] <= nodes.spec.settings.disk_bytes
        assert stats(cache)["evictions"] > 0


def test_a_cache_of_older_settings_ends_once_nobody_uses_it_and_one_of_new_settings_is_there(
    nodes: Nodes, caches: list[Any], push: Any, service: Any
) -> None:
    """The service's is used: it does not end, though another one is started beside it."""
    key = push("old-settings")
    new = CacheSpec(nodes.spec.adapters, nodes.spec.settings.model_copy(update={"disk_bytes": 300_000}))
    handles = running_caches(nodes.spec)
    roots = [fetch(cache, key).path.parents[1] for cache in handles]
    node = nodes.nodes[0]
    assert nodes.spec.prefix + node in _named()
    used, started = start_cache(new, node), time.monotonic()
    start_cache(new)  # beside the service's
    pid = ray.get(service.cache.pid.remote())
    try:
        deadline = time.monotonic() + 60
        while nodes.spec.prefix + node in _named():
            assert time.monotonic() < deadline
            ray.get(used.holdings.remote())
            time.sleep(0.5)
        assert len(running_caches(nodes.spec)) == len(handles) - 1, "those of the other nodes have no other beside them"
        assert sum(root.exists() for root in roots) == len(roots) - 1, "its disk goes along"
        assert new.prefix + node in _named()
        time.sleep(max(0.0, started + _UNUSED_S + 2 * _BEAT_S - time.monotonic()))
        assert ray.get(service.cache.pid.remote()) == pid
    finally:
        for cache in running_caches(new):
            ray.kill(cache)
