"""Catalogs, tasks and adapters that change under traffic, on real Ray Serve, a real S3 server and the real model."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from catalogued import wait_for_catalog
from safetensors.torch import load_file, save

from lorauter.adapters import AdapterRepository, MemoryStore, open_store
from lorauter.catalog import Catalog, catalog_versions, change_catalog, current_version, use_version, without_tasks
from lorauter.catalog.catalog import CURRENT_FILE
from lorauter.catalog.parts import key_of
from lorauter.tasks import Example

pytestmark = pytest.mark.integration

WITHIN_S = 10.0
WEATHER = [f"Weather report: {sky} over {place}. Umbrella or sunglasses?" for sky in ("rain", "sun", "hail")
           for place in ("the bay", "the hills", "the old town", "the islands")]  # fmt: skip


@dataclass
class Traffic:
    """Clients that ask all the time, and what they were told: catalog version, names of tasks."""

    service: Any
    question: str
    told: list[tuple[str, set[str]]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # at which they were
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Traffic:
        self._threads = [threading.Thread(target=self._ask, args=(path,)) for path in ("route", "chat")]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, what: str) -> None:
        route = {"input": self.question}
        chat = {"model": "lorauter", "messages": [{"role": "user", "content": self.question}], "max_tokens": 2}
        with self.service.http as client:
            while not self._stop.wait(0.02):
                try:
                    if what == "route":
                        response = client.post("/v1/route", json=route)
                        decision = response.json()["data"][0]
                    else:
                        response = client.post("/v1/chat/completions", json=chat)
                        decision = response.json()["lorauter"]
                    assert response.status_code == 200
                    self.told.append((decision["catalog_version"], {task["name"] for task in decision["tasks"]}))
                    self.times.append(time.monotonic())
                except (httpx.HTTPError, ValueError, KeyError, AssertionError) as error:
                    self.failures.append(f"{error!r} {getattr(response, 'text', '')}")

    def wait_for(self, version: str, *, answers: int = 40) -> float:
        """Until that many answers in a row are of this version; returns the seconds until the first of them."""
        started = time.monotonic()
        while True:
            count = len(self.times)
            last = self.told[max(0, count - answers) : count]
            if len(last) == answers and {told for told, _ in last} == {version}:
                return self.times[count - answers] - started
            assert time.monotonic() - started < 20 * WITHIN_S, "timed out"  # so many answers take their time, too
            time.sleep(0.02)


@pytest.fixture
def catalog(service: Any) -> Iterator[Catalog]:
    """The catalog that is published, and is so again afterwards."""
    store = open_store(service.config.catalog)
    catalog = Catalog.load(store)
    yield catalog
    use_version(store, catalog.version)
    with service.http as client:
        deadline = time.monotonic() + 3 * WITHIN_S
        seen: list[str] = []
        while seen[-20:] != [catalog.version] * 20:
            assert time.monotonic() < deadline
            seen.append(client.get("/v1/tasks").json()["catalog_version"])


@pytest.fixture
def files(root: Path) -> dict[str, bytes]:
    """The files of an adapter for an upload."""
    folder = root / "examples" / "adapters" / "sst2"
    return {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }


def shortest(examples: Iterable[Example]) -> str:
    return min((example.input for example in examples), key=len)


def damaged(catalog: Catalog, uri: str) -> str:
    """Publish a catalog of which one file is not what it should be."""
    sound = MemoryStore()
    version = catalog.save(sound)
    store = open_store(uri)
    for key, content in sorted(sound.objects.items(), key=lambda item: item[0] == CURRENT_FILE):
        store.write(key, content + b"x" if key == key_of(catalog.segments[0].digests[0]) else content)
    return version


def test_a_published_catalog_and_the_old_one_again_take_over_without_a_lost_request(
    service: Any, catalog: Catalog, examples: Any
) -> None:
    question = shortest(examples("rte"))
    with Traffic(service, question) as traffic:
        traffic.wait_for(catalog.version)
        changed = without_tasks(catalog, ["rte"])
        changed.save(service.config.catalog)
        assert traffic.wait_for(changed.version) < WITHIN_S
        use_version(service.config.catalog, catalog.version)
        assert traffic.wait_for(catalog.version) < WITHIN_S
    assert traffic.failures == []
    # Each answer is of one version: whether it knows the task is what its version says.
    assert {(version, "rte" in tasks) for version, tasks in traffic.told} == {
        (catalog.version, True),
        (changed.version, False),
    }


def test_a_broken_catalog_is_refused_and_told_of(service: Any, catalog: Catalog, examples: Any) -> None:
    with Traffic(service, shortest(examples("rte"))) as traffic, service.http as client:
        broken = damaged(without_tasks(catalog, ["boolq"]), service.config.catalog)
        deadline = time.monotonic() + WITHIN_S
        refused: list[Any] = []
        while refused[-10:] != [broken] * 10:  # both replicas answer
            assert time.monotonic() < deadline
            refused.append(client.get("/v1/tasks").json().get("refused", {}).get("version"))
        assert "damaged" in client.get("/v1/tasks").json()["refused"]["reason"]
        use_version(service.config.catalog, catalog.version)
        while "refused" in client.get("/v1/tasks").json():
            assert time.monotonic() < deadline + WITHIN_S
    assert traffic.failures == []
    assert {version for version, _ in traffic.told} == {catalog.version}


def test_adapters_and_tasks_come_and_go_over_the_admin_api(
    service: Any, secured: Any, catalog: Catalog, files: dict[str, bytes]
) -> None:
    task = {
        "name": "weather",
        "domain": "tests",
        "metric": "em",
        "validation": [{"input": text, "target": "umbrella"} for text in WEATHER],
    }
    upload = {part: (part, content) for part, content in files.items()}
    with service.http as nobody:
        assert nobody.post("/v1/tasks", json=task).status_code == 403  # an ingress without keys
    with Traffic(service, WEATHER[0]) as traffic, secured.client("operator") as client:
        added = client.post("/v1/adapters", data={"name": "weather"}, files=upload)
        assert added.status_code == 200, added.text
        assert added.json()["tasks"] == []
        linked = client.post("/v1/tasks", json=task)
        assert linked.status_code == 200, linked.text
        assert linked.json()["adapters"] == ["weather"]
        assert traffic.wait_for(linked.json()["catalog_version"]) < WITHIN_S
        assert "weather" in traffic.told[-1][1]
        answer = service.ask("lorauter", WEATHER[1])
        assert answer.json()["lorauter"]["adapters"][0]["name"] == "weather"
        assert service.ask("weather").status_code == 200

        # Gone while requests are routed to it.
        gone = client.delete("/v1/adapters/weather")
        assert gone.status_code == 200, gone.text
        assert traffic.wait_for(gone.json()["catalog_version"]) < WITHIN_S
        deadline = time.monotonic() + WITHIN_S
        while service.ask("weather").status_code != 404:
            assert time.monotonic() < deadline
        assert "weather" not in {model["id"] for model in client.get("/v1/models").json()["data"]}
        assert client.delete("/v1/adapters/weather").status_code == 404
        removed = client.delete("/v1/tasks/weather")
        assert removed.status_code == 200, removed.text
        assert traffic.wait_for(removed.json()["catalog_version"]) < WITHIN_S
        assert "weather" not in traffic.told[-1][1]
        assert client.delete("/v1/tasks/weather").status_code == 404
    assert traffic.failures == []
    assert removed.json()["catalog_version"] == catalog.version, "the same bytes as before"


def test_a_wrong_adapter_is_refused_and_changes_nothing(
    service: Any, secured: Any, catalog: Catalog, files: dict[str, bytes]
) -> None:
    config = json.loads(files["config"])
    with secured.client("operator") as client:
        for wrong, said in (
            ({**files, "weights": b"\xff" * 1000}, "cannot be read"),
            ({**files, "config": json.dumps({**config, "use_dora": True}).encode()}, "use_dora"),
            ({**files, "config": json.dumps({**config, "base_model_name_or_path": "meta/x"}).encode()}, "meta/x"),
        ):
            response = client.post("/v1/adapters", data={"name": "wrong"}, files=wrong)
            assert response.status_code == 422, response.text
            assert said in response.json()["error"]["message"]
    assert current_version(service.config.catalog) == catalog.version
    assert "wrong" not in AdapterRepository(open_store(service.config.adapters)).names()


def test_admins_who_change_at_once_lose_nothing(service: Any, secured: Any, catalog: Catalog) -> None:
    names = [f"at-once-{i}" for i in range(4)]
    rows = [{"input": f"{word} {text}", "target": "x"} for word in ("really", "maybe") for text in WEATHER[:3]]
    statuses = []

    def add(name: str) -> None:
        task = {"name": name, "domain": "tests", "metric": "em", "validation": rows}
        with secured.client("operator") as client:
            statuses.append(client.post("/v1/tasks", json=task).status_code)

    threads = [threading.Thread(target=add, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 4
    known = {entry.name for entry in Catalog.load(service.config.catalog).tasks}
    assert known == {entry.name for entry in catalog.tasks} | set(names)
    assert len(catalog_versions(service.config.catalog)) >= 5


def test_a_list_of_changes_is_one_version_though_others_publish_too(
    service: Any, secured: Any, catalog: Catalog, root: Path, tmp_path: Path
) -> None:
    repository = AdapterRepository(open_store(service.config.adapters))
    shutil.copytree(root / "examples" / "adapters" / "sst2", tmp_path / "weather")
    pushed = repository.push(tmp_path / "weather")
    rows = [{"input": text, "target": "umbrella"} for text in WEATHER]
    task = {"name": "weather", "domain": "tests", "metric": "em", "validation": rows}
    changes = [{"put_task": task}, {"put_adapter": "weather"}, {"remove_task": "rte"}]
    done = []

    def change() -> None:
        with secured.client("operator") as client:
            wrong = client.post("/v1/catalog/changes", json={"changes": [*changes, {"remove_task": "nil"}]})
            done.append((wrong.status_code, None))
            response = client.post("/v1/catalog/changes", json={"changes": changes})
            done.append((response.status_code, response.json()))

    admin = threading.Thread(target=change)
    admin.start()
    for name in ("mrpc", "boolq"):  # as `lorauter catalog change` does
        change_catalog(service.config.catalog, lambda before, name=name: without_tasks(before, [name]), tasks=[name])
    admin.join(60)
    assert [status for status, _ in done] == [404, 200], done
    assert [row["id"] for row in done[1][1]["data"]] == ["weather", "weather", "rte"]
    now = Catalog.load(service.config.catalog)
    before = {entry.name for entry in catalog.tasks}
    assert {entry.name for entry in now.tasks} == before - {"rte", "mrpc", "boolq"} | {"weather"}
    assert now.adapters == {**catalog.adapters, "weather": pushed.version}
    with secured.client("operator") as client:
        assert client.delete("/v1/adapters/weather").status_code == 200


def test_a_running_answer_ends_on_the_adapters_old_version_and_new_ones_have_the_new(
    service: Any, catalog: Catalog, root: Path, tmp_path: Path
) -> None:
    repository = AdapterRepository(open_store(service.config.adapters))
    source = root / "examples" / "adapters" / "sst2"
    folder = tmp_path / "switched"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    weights = load_file(source / "adapter_model.safetensors")

    def push(change: Callable[[Any], Any]) -> str:
        (folder / "adapter_model.safetensors").write_bytes(save({name: change(of) for name, of in weights.items()}))
        repository.push(folder)
        return str(service.catalog("switched"))

    story = "Tell a long story about a fisherman and the sea."
    body = {"model": "switched", "messages": [{"role": "user", "content": story}], "max_tokens": 160}
    old, new = push(lambda tensor: tensor * 0), push(lambda tensor: tensor * 3)
    use_version(service.config.catalog, old)
    wait_for_catalog(service.url, old)
    whole = service.ask("switched", story, max_tokens=160).json()["choices"][0]["message"]["content"]
    before = service.ask("switched").json()["choices"]
    assert before == service.ask("base").json()["choices"]
    pieces, ahead = [], 0
    with service.http as client, client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))
            if len(pieces) == 10 and not ahead:  # no other request: in company, a near tie might turn
                use_version(service.config.catalog, new)
                wait_for_catalog(service.url, new)
                ahead = len(pieces)
    assert service.ask("switched").json()["choices"] != before
    assert ahead < len(pieces) - 20, "it was running still"
    assert "".join(pieces) == whole
    assert service.ask("switched", story, max_tokens=160).json()["choices"][0]["message"]["content"] != whole
    repository.remove("switched")
