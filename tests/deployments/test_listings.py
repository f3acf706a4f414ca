"""Lists over HTTP: pages, searches, and what is told of each row."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fake_service import FakeService, refused, send

from deployments.calls import CatalogDescription

TASKS = {"films": [("adder", 0.5), ("poet", None)], "poems": [("poet", 0.9)], "sums": []}


class Service(FakeService):
    async def describe(self) -> CatalogDescription:
        tasks = [
            {"id": name, "object": "task", "adapters": [{"name": of, "score": score} for of, score in adapters]}
            for name, adapters in TASKS.items()
        ]
        return CatalogDescription("v1", tasks, ["adder", "gone", "poet"])


def get(path: str, **query: Any) -> httpx.Response:
    response: httpx.Response = send(Service(), "GET", path, params=query)
    return response


def ids(path: str, **query: Any) -> list[str]:
    response = get(path, **query)
    assert response.status_code == 200, response.text
    return [row["id"] for row in response.json()["data"]]


@pytest.mark.parametrize(
    ("path", "all_of_them"),
    [("/v1/tasks", ["films", "poems", "sums"]), ("/v1/models", ["lorauter", "base", "adder", "gone", "poet"])],
)
def test_lists_come_in_pages_and_by_search(path: str, all_of_them: list[str]) -> None:
    assert ids(path) == all_of_them
    page = get(path, limit=2).json()
    assert (page["total"], page["has_more"], page["last_id"]) == (len(all_of_them), True, all_of_them[1])
    assert ids(path, limit=2, after=page["last_id"]) == all_of_them[2:4]
    assert ids(path, search="PoE") == [name for name in all_of_them if "poe" in name]
    assert get(path, search="<b>").json()["total"] == 0
    for wrong in ({"limit": 0}, {"limit": "x"}, {"limit": 10**9}, {"after": "nobody"}):
        assert refused(get(path, **wrong), 400)["param"] == next(iter(wrong))


def test_tasks_have_examples_where_they_are_wanted() -> None:
    assert "examples" not in get("/v1/tasks").json()["data"][0]
    rows = get("/v1/tasks", examples=1, limit=2).json()["data"]
    assert [row["examples"] for row in rows] == [[{"input": "1 + 1", "target": "2"}]] * 2
    task = get("/v1/tasks/films").json()
    assert (task["id"], len(task["examples"])) == ("films", 2)
    assert refused(get("/v1/tasks/nobody"), 404, "task_not_found")
    assert refused(get("/v1/tasks", examples=-1), 400)["param"] == "examples"


def test_adapters_have_their_tasks_and_where_they_are() -> None:
    adder, poet = get("/v1/adapters").json()["data"]  # "gone" has no version any more
    assert (adder["id"], adder["version"], adder["tasks"]) == ("adder", "a1", [{"id": "films", "score": 0.5}])
    assert [task["id"] for task in poet["tasks"]] == ["films", "poems"]
    assert (poet["resident"], poet["demand"]) == ({"device": 2, "disk": 1}, 1.5)
    assert ids("/v1/adapters", search="oe") == ["poet"]
    for limit in ("1001", "0000000011001", "000000001" + "0" * 5000):
        assert refused(get("/v1/adapters", limit=limit), 400)["param"] == "limit"


def test_the_map_is_told_which_tasks_are_wanted_in_any_case() -> None:
    service = Service()
    assert send(service, "GET", "/v1/map?task=a&task=b").json()["catalog_version"] == "v1"
    assert service.placed == [(None, ["a", "b"])]


def test_who_asks_a_service_without_keys_may_ask() -> None:
    assert get("/v1/access").json() == {
        "object": "access",
        "name": None,
        "roles": ["inference"],
        "adapters": None,
        "requests_per_minute": None,
        "tokens_per_minute": None,
    }
