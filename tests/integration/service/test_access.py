"""A second ingress of two replicas that asks for keys, before the same model: tenants, roles, limits, and the logs."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray

from lorauter.keys import new_key

pytestmark = pytest.mark.integration

CANARY = "xylophagous-canary"
QUESTION = f"Short movie review: a joy to watch, {CANARY}.\nDid the critic think positively or negatively of the movie?"


def ask(secured: Any, name: str, model: str = "lorauter", **options: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, **options}
    with secured.client(name) as client:
        return client.post("/v1/chat/completions", json=body)


def test_no_key_no_answer(secured: Any) -> None:
    with httpx.Client(base_url=secured.url, timeout=60) as client:
        assert client.get("/healthz").status_code == 200
        refused = client.get("/v1/models")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
    with (
        openai.OpenAI(base_url=f"{secured.url}/v1", api_key="lr-wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()
    with openai.OpenAI(base_url=f"{secured.url}/v1", api_key=secured.keys["all"], max_retries=0) as own:
        assert "sst2" in [model.id for model in own.models.list()]
    assert ask(secured, "operator").status_code == 403


def test_a_tenant_gets_and_sees_its_own_adapters_alone(secured: Any) -> None:
    own = {"sst2", "sentiment140"}
    texts = [
        QUESTION,
        "Translate to English: Ein Hund schläft.",
        "Title: Anax\nText: A dragonfly.\nWhat kind of thing?",
    ]
    with secured.client("films") as client:
        assert {row["id"] for row in client.get("/v1/models").json()["data"]} == {"lorauter", "base", *own}
        assert {row["id"] for row in client.get("/v1/tasks").json()["data"]} == own
        decisions = client.post("/v1/route", json={"input": texts}).json()["data"]
        assert client.get("/v1/models/mrpc").status_code == 404
        for options in ({}, {"allow_adapters": ["mrpc", "sst2"]}):
            routed = client.post("/v1/route", json={"input": texts, **options}).json()["data"]
            assert all({row["name"] for row in decision["adapters"]} <= own for decision in routed)
            assert all({row["name"] for row in decision["tasks"]} <= own for decision in routed)
    assert decisions[0]["adapters"][0]["name"] == "sst2"
    with secured.client("all") as client:
        everybody = client.post("/v1/route", json={"input": texts}).json()["data"]
    assert everybody[1]["adapters"][0]["name"] == "multi30k_deen"
    assert ask(secured, "films", "sst2").status_code == 200
    others, missing = ask(secured, "films", "mrpc"), ask(secured, "films", "no-such")
    assert others.status_code == missing.status_code == 404
    assert others.text.replace("mrpc", "no-such") == missing.text
    by_hand = ask(secured, "films", lorauter={"adapters": {"sst2": 0.5, "mrpc": 0.5}})
    assert by_hand.status_code == 404
    assert ask(secured, "films").headers["x-lorauter-adapters"].startswith("s")


def test_a_tenants_admin_changes_its_own_alone(secured: Any, root: Path) -> None:
    adapter = root / "examples" / "adapters" / "sst2"
    files = {"config": (adapter / "adapter_config.json").read_bytes()}
    files["weights"] = (adapter / "adapter_model.safetensors").read_bytes()
    rows = [{"input": f"Is film {i} worth its length?", "target": "yes"} for i in range(10)]
    task = {"domain": "films", "metric": "em", "validation": rows}
    with secured.client("all") as client:
        before = client.get("/v1/tasks").json()["data"]
    with secured.client("films-admin") as client:
        for name in ("mrpc", "no-such"):
            answers = [
                client.delete(f"/v1/adapters/{name}"),
                client.post("/v1/adapters", json={"name": name}),
                client.post("/v1/adapters", data={"name": name}, files=files),
                client.delete(f"/v1/tasks/{name}"),
                client.post("/v1/tasks", json={**task, "name": name}),
            ]
            assert [answer.status_code for answer in answers] == [403] * 5, [answer.text for answer in answers]
            assert client.get(f"/v1/models/{name}").status_code == 404
        with secured.client("all") as all_of_them:
            assert all_of_them.get("/v1/tasks").json()["data"] == before
        added = client.post("/v1/adapters", data={"name": "sst-length"}, files=files)
        assert added.status_code == 200, added.text
        assert added.json()["catalog_version"] is None
        put = client.post("/v1/tasks", json={**task, "name": "sst-length"})
        assert put.status_code == 200, put.text
        deadline = time.monotonic() + 60
        while "sst-length" not in [row["id"] for row in client.get("/v1/tasks").json()["data"]]:
            assert time.monotonic() < deadline
        while (answer := ask(secured, "films", "sst-length")).status_code == 404:  # another replica may be behind
            assert time.monotonic() < deadline
        assert answer.status_code == 200, answer.text
        for kind in ("tasks", "adapters"):
            removed = client.delete(f"/v1/{kind}/sst-length")
            assert removed.status_code == 200, removed.text
        while "sst-length" in [row["id"] for row in client.get("/v1/models").json()["data"]]:
            assert time.monotonic() < deadline + 60


def test_nobody_is_told_where_things_lie(service: Any, secured: Any) -> None:
    with service.http as client:
        texts = [client.get("/v1/models/gpt-4o-mini").text, service.ask("gpt-4o-mini").text]
        texts.append(service.ask("lorauter", lorauter={"adapters": {"gpt-4o-mini": 1}}).text)
    texts += [ask(secured, "films", "gpt-4o-mini").text, ask(secured, "films", "sst2-unheard-of").text]
    for text in texts:
        assert "model_not_found" in text
        assert "://" not in text
        assert str(service.config.adapters) not in text
        assert "/root" not in text
        assert "/tmp" not in text


def test_a_page_in_a_browser_cannot_use_a_service_without_keys(service: Any) -> None:
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})

    def send(**headers: str) -> int:
        headers = {"Content-Type": "application/json", **headers}
        with service.http as client:
            return client.post("/v1/chat/completions", content=body, headers=headers).status_code

    assert send() == 200
    assert send(**{"Content-Type": "text/plain"}) == 415
    assert send(Origin="https://evil.example") == 403
    assert send(Host="evil.example") == 403  # as after DNS rebinding: it came over the loopback
    assert send(Host="localhost:8000", Origin="http://localhost:8000") == 200


def test_two_replicas_do_not_double_a_limit(secured: Any) -> None:
    def get(_: int) -> httpx.Response:
        with secured.client("few") as client:
            return client.post("/v1/route", json={"input": "Is the sky blue?"})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(get, range(20)))
    codes = [answer.status_code for answer in answers]
    assert codes.count(200) == 5
    assert codes.count(429) == 15
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 12
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


def test_tokens_are_counted_as_they_were(secured: Any) -> None:
    first = ask(secured, "frugal", stream=True)
    assert first.status_code == 200
    codes = [ask(secured, "frugal").status_code for _ in range(6)]
    used = ask(secured, "all").json()["usage"]["total_tokens"]
    assert 0 < codes.count(200) <= 120 // used + 1
    assert codes[-1] == 429


def test_the_limits_come_back_when_their_actor_dies(secured: Any) -> None:
    rows = ray.util.list_named_actors(all_namespaces=True)
    [row] = [row for row in rows if "limits" in row["name"]]
    actor = ray.get_actor(row["name"], namespace=row["namespace"])
    ray.kill(actor)
    deadline = time.monotonic() + 60
    while (answer := ask(secured, "frugal")).status_code != 200:
        assert answer.status_code in (429, 503), answer.text
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_changed_file_counts(secured: Any) -> None:
    keys = {name: key for name, key in secured.keys.items() if name != "operator"} | {"late": new_key()}
    late = replace(secured, keys=keys)

    def statuses(who: Any, name: str) -> set[int]:
        """Of as many requests as meet both replicas."""
        with who.client(name) as client:
            return {client.get("/v1/models/base").status_code for _ in range(20)}

    assert statuses(late, "late") == {401}
    late.write()
    deadline = time.monotonic() + 60
    while statuses(late, "late") != {200}:
        assert time.monotonic() < deadline
    assert statuses(secured, "operator") == {401}
    secured.file.write_text("[{name: broken")
    time.sleep(1.2)
    assert statuses(late, "late") == {200}
    secured.write()
    while statuses(secured, "operator") != {200}:
        assert time.monotonic() < deadline


def log_files() -> list[Path]:
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    return [path for path in folder.rglob("*") if path.is_file()]


def test_one_id_on_the_lines_of_all_deployments_and_nothing_that_is_secret(secured: Any) -> None:
    request_id = f"test-{os.getpid()}"
    body = {"model": "lorauter", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8}
    with secured.client("all", **{"x-request-id": request_id}) as client:
        answered = client.post("/v1/chat/completions", json=body)
        streamed = client.post("/v1/chat/completions", json={**body, "stream": True})
        client.post("/v1/completions", json={"model": "sst2", "prompt": QUESTION, "max_tokens": 1})
        client.post("/v1/chat/completions", json={**body, "surprise": CANARY})
        client.post("/v1/chat/completions", json={**body, "temperature": CANARY})
        json_type = {"Content-Type": "application/json"}
        client.post("/v1/chat/completions", content=b'{"model": "' + CANARY.encode(), headers=json_type)
        client.post("/v1/route", json={"input": [QUESTION, ""]})
        client.post("/v1/completions", json={"model": "base", "prompt": f"{CANARY} " * 3000})
        client.get("/v1/models", params={"q": CANARY})
    assert answered.headers["x-request-id"] == request_id
    assert streamed.status_code == 200
    wrong = f"lr-{CANARY}"
    httpx.get(f"{secured.url}/v1/models", headers={"Authorization": f"Bearer {wrong}"})
    assert ask(secured, "all").headers["x-request-id"] not in ("", request_id)
    insane = httpx.get(f"{secured.url}/v1/models", headers={"x-request-id": "x" * 300})
    assert insane.status_code == 401
    time.sleep(1)

    seen: dict[str, list[dict[str, Any]]] = {}
    for path in log_files():
        text = path.read_bytes().decode(errors="replace")
        assert CANARY not in text, path
        for key in secured.keys.values():
            assert key not in text, path
        if path.parent.name == "serve":
            for line in text.splitlines():
                if request_id in line:
                    row = json.loads(line)
                    if row.get("request_id") == request_id:
                        seen.setdefault(row.get("deployment", row.get("component_name")), []).append(row)
    below = {f"lorauter_{name}" for name in ("QueryEmbedder", "TaskRetriever", "LoraModel")}
    assert set(seen) == {"secured_Router", "proxy", *below}
    line = next(row for row in seen["secured_Router"] if row.get("model") == "lorauter")
    assert line["endpoint"] == "/v1/chat/completions"
    assert (line["status"], line["key_name"]) == (200, "all")
    assert line["completion_tokens"] == answered.json()["usage"]["completion_tokens"]
    assert 0 < line["first_token_seconds"] <= line["seconds"]
