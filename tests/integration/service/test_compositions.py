"""An adapter composed for a task while the service runs: real Ray Serve, S3 and model, and fits of two examples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from lorauter.adapters import AdapterRepository, open_store
from lorauter.adapters.provenance import Composition

pytestmark = pytest.mark.integration

TASK = {
    "name": "weekdays",
    "domain": "tests",
    "metric": "em",
    "validation": [
        {"input": f"{tweet}\nIs this tweet happy?", "target": "Business"}
        for tweet in ("such a lovely day", "i hate mondays")
    ],
}


def composers() -> list[str]:
    names = [row["name"] for row in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if name.startswith("composer-")]


@pytest.fixture
def task(service: Any, secured: Any) -> Iterator[None]:
    """It is in the catalog, with no adapter of its own; afterwards it is not, nor what was composed for it."""
    with secured.client("operator") as client:
        assert client.post("/v1/tasks", json=TASK).json()["adapters"] == []
        yield
        for row in client.get("/v1/compositions").json()["data"]:
            client.post(f"/v1/compositions/{row['id']}/cancel")
        client.delete("/v1/adapters/weekdays.composed")
        assert client.delete("/v1/tasks/weekdays").status_code == 200
    service.settle()


def test_a_task_without_an_adapter_gets_one_that_is_composed(
    service: Any, secured: Any, task: None, alone: None
) -> None:
    """Alone: it computes for most of a minute, and only where nobody else wants to."""
    repository = AdapterRepository(open_store(service.config.adapters))
    with secured.client("operator") as client:
        asked = client.post("/v1/compositions", json={"task": "weekdays"})
        assert asked.status_code == 200, asked.text
        again = client.post("/v1/compositions", json={"task": "weekdays"})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
        behind = client.post("/v1/compositions", json={"task": "rte"}).json()
        path = f"/v1/compositions/{behind['id']}"
        assert client.get(path).json()["ahead"] == 1
        assert client.post(f"{path}/cancel").json()["status"] == "cancelled"

        told, seen = asked.json(), set()
        deadline = time.monotonic() + 480
        while told["status"] in ("queued", "running", "publishing") and time.monotonic() < deadline:
            time.sleep(0.5)
            told = client.get(f"/v1/compositions/{told['id']}").json()
            seen.add((told["status"], 0 < told["progress"] < 1))
        assert (told["status"], told.get("kept")) == ("done", True), told
        assert ("running", True) in seen
        likelihood = told["scores"]["log_likelihood"]
        assert likelihood["after"] - likelihood["before"] == pytest.approx(likelihood["gain"], abs=1e-3)
        assert likelihood["gain"] > likelihood["error"]

        service.settle()  # in use, without a restart
        [served] = client.get("/v1/tasks/weekdays").json()["adapters"]
        assert (served["name"], served["composed"], served["stale"]) == ("weekdays.composed", True, False)
        answer = service.ask("lorauter", TASK["validation"][0]["input"]).json()
        first = answer["lorauter"]["adapters"][0]
        assert (first["name"], first["version"], first["composed"]) == ("weekdays.composed", told["version"], True)
        assert answer["choices"][0]["message"]["content"] == "Business"
        of = Composition.of(repository.manifest("weekdays.composed").provenance)
        assert of is not None
        assert (of.task, len(of.sources)) == ("weekdays", told["sources"])

        while composers() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert composers() == [], "its process has ended, and its memory is free"
        listed = [row["id"] for row in client.get("/v1/compositions").json()["data"]]
        assert listed == [behind["id"], told["id"]]
        with secured.client("films-admin") as other:
            assert other.get("/v1/compositions").json()["data"] == []
            assert other.get(f"/v1/compositions/{told['id']}").status_code == 404
        assert client.delete("/v1/adapters/weekdays.composed").status_code == 200
