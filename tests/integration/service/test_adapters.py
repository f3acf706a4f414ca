"""Adapters from a real S3 server: pulled once, kept, verified, refused, and missed when the store is away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch
from catalogued import wait_for_catalog
from ray import serve
from safetensors.torch import load_file, save

from deployments.adapter_listing import AdapterListing
from deployments.router import Router
from lorauter.adapters import AdapterManifest, AdapterRepository, open_store
from lorauter.catalog import Catalog, current_version, use_version, with_adapter

pytestmark = pytest.mark.integration

MESSAGE = [{"role": "user", "content": "Is the sky blue?"}]


def stats(service: Any) -> dict[str, Any]:
    result: dict[str, Any] = ray.get(service.cache.stats.remote())
    return result


def wait_until(condition: Any, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


@pytest.fixture
def copy(service: Any, root: Path) -> Iterator[Any]:
    """`copy(name, change, of)`: a plain PEFT folder in the store, made of sst2, or another, with its config or tensors
    changed, and in the catalog."""
    store, before = open_store(service.config.adapters), current_version(service.config.catalog)
    made = set()

    def make(name: str, change: Any = lambda config, tensors: None, of: str = "sst2") -> str:
        source = root / "examples" / "adapters" / of
        config = json.loads((source / "adapter_config.json").read_bytes())
        tensors = load_file(source / "adapter_model.safetensors")
        change(config, tensors)
        store.write(f"{name}/adapter_config.json", json.dumps(config).encode())
        store.write(f"{name}/adapter_model.safetensors", save(tensors))
        made.add(name)
        service.catalog(name)
        return name

    yield make
    use_version(service.config.catalog, before)
    for name in made:
        store.delete(f"{name}/adapter_config.json")
        store.delete(f"{name}/adapter_model.safetensors")


def test_twenty_first_requests_make_one_download(service: Any, copy: Any) -> None:
    name = copy("never-asked-for")
    before = stats(service)
    assert not any(resident == name for resident, _ in before["resident"])
    body = {"model": name, "messages": MESSAGE, "max_tokens": 2}
    answers = service.ask_together([body] * 20)
    direct = ray.get([service.cache.fetch.remote(service.key(name)) for _ in range(20)])
    assert [answer.status_code for answer in answers] == [200] * 20
    assert len({local.path for local in direct}) == 1
    assert stats(service)["downloads"] == before["downloads"] + 1


@pytest.mark.parametrize("how", ["process killed", "actor killed", "actor killed for good"])
def test_a_killed_cache_comes_back_and_reuses_its_disk(service: Any, copy: Any, how: str) -> None:
    assert service.ask("rte").status_code == 200
    actor = service.cache
    before = stats(service)
    if how == "process killed":
        os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
    else:
        ray.kill(actor, no_restart=how.endswith("good"))
    name = copy(f"after-{how.replace(' ', '-')}")  # needs the cache, which no memory can stand in for
    assert service.ask(name).status_code == 200
    assert service.ask("rte").status_code == 200
    after = stats(service)
    assert {name for name, _ in before["resident"]} < {name for name, _ in after["resident"]}
    assert after["downloads"] == 1  # counted anew since the restart: the new adapter alone


def test_a_truncated_object_is_detected_retried_and_reported(service: Any) -> None:
    [stored] = (service.store / "boolq").glob("*/adapter_model.safetensors")
    content = stored.read_bytes()
    before = stats(service)
    stored.write_bytes(content[: len(content) // 2])
    try:
        response = service.ask("boolq")
    finally:
        stored.write_bytes(content)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "adapter_unavailable"
    assert "boolq" in response.json()["error"]["message"]
    assert stats(service)["retries"] >= before["retries"] + 2
    assert not any(name == "boolq" for name, _ in stats(service)["resident"])
    assert service.ask("boolq").status_code == 200


def test_flipped_bits_are_detected(service: Any) -> None:
    [stored] = (service.store / "evalution").glob("*/adapter_model.safetensors")
    content = stored.read_bytes()
    stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        response = service.ask("evalution")
    finally:
        stored.write_bytes(content)
    assert response.status_code == 503
    assert "damaged" in response.json()["error"]["message"]


def test_a_store_that_is_down(service: Any, s3_server: Any) -> None:
    assert service.ask("agnews").status_code == 200
    s3_server.stop()
    try:
        cached = service.ask("agnews")
        started = time.monotonic()
        missing = service.ask("odd_man_out")
        seconds = time.monotonic() - started
        base = service.ask("base")
    finally:
        s3_server.start()
    assert cached.status_code == 200
    assert base.status_code == 200
    assert missing.status_code == 503
    assert "odd_man_out" in missing.json()["error"]["message"]
    assert seconds < 20
    assert service.ask("odd_man_out").status_code == 200


def test_every_tier_counts(service: Any) -> None:
    handle = serve.get_deployment_handle("LoraModel", "lorauter")
    assert service.ask("dbpedia").status_code == 200
    before = handle.stats.remote().result()
    assert service.ask("dbpedia").status_code == 200
    after = handle.stats.remote().result()
    assert after["device"]["hits"] > before["device"]["hits"]
    assert after["host"]["hits"] > before["host"]["hits"]
    assert after["device"]["misses"] == before["device"]["misses"] >= 1
    assert after["host"]["misses"] == before["host"]["misses"] >= 1
    assert "dbpedia" in {name for name, _ in after["resident"]}
    assert after["resident_bytes"] > 0
    assert stats(service)["downloads"] >= 1


def nan(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def rank(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["r"] = 64
    for key, tensor in tensors.items():
        tensors[key] = torch.cat([tensor] * 8, dim=0 if ".lora_A." in key else 1).contiguous()


def shape(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if ".lora_A." in key:
            tensors[key] = tensor[:, :-8].contiguous()


def prefix(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for key in list(tensors):
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        pytest.param(nan, "NaN", id="nan"),
        pytest.param(rank, "rank 64", id="rank"),
        pytest.param(shape, "568", id="shape"),
        pytest.param(prefix, "not named like", id="prefix"),
        pytest.param(lambda c, _: c.update(use_dora=True), "use_dora", id="dora"),
        pytest.param(lambda c, _: c.update(base_model_name_or_path="meta/Llama-2-7b"), "Llama-2-7b", id="base"),
    ],
)
def test_a_bad_adapter_is_refused_by_name_and_harms_nobody(service: Any, copy: Any, change: Any, cause: str) -> None:
    name = copy(f"bad-{cause.replace(' ', '-')}", change)
    for _ in range(2):
        response = service.ask(name)
        assert response.status_code == 422
        assert name in response.json()["error"]["message"]
        assert cause in response.json()["error"]["message"]
    assert service.ask("sst2").status_code == 200


def test_a_corrupt_file_without_a_hash_is_refused(service: Any, copy: Any) -> None:
    name = copy("corrupt")
    open_store(service.config.adapters).write(f"{name}/adapter_model.safetensors", b"\xff" * 1000)
    service.catalog(name)
    response = service.ask(name)
    assert response.status_code == 422
    assert name in response.json()["error"]["message"]


def test_a_damaged_copy_on_the_disk_is_fetched_again(service: Any, copy: Any) -> None:
    name = copy("damaged-on-disk")
    local = ray.get(service.cache.fetch.remote(service.key(name)))
    path = local.path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert service.ask(name).status_code == 200


def test_a_replaced_adapter_is_served_anew(service: Any, copy: Any) -> None:
    text = "Translate to English: Zwei Hunde spielen im Schnee."  # no near tie, which rounding could turn
    name, told = copy("replaced"), "Two dogs play in the snow."
    first = service.ask(name, text).json()["choices"][0]["message"]["content"]
    assert first == service.ask("sst2", text).json()["choices"][0]["message"]["content"] != told
    copy(name, of="multi30k_deen")
    assert service.ask(name, text).json()["choices"][0]["message"]["content"] == told


def test_what_no_catalog_names_is_not_served(service: Any, copy: Any, root: Path, tmp_path: Path) -> None:
    repository = AdapterRepository(open_store(service.config.adapters))
    shutil.copytree(root / "examples" / "adapters" / "sst2", tmp_path / "uncatalogued")
    repository.push(tmp_path / "uncatalogued")
    try:
        assert service.ask("uncatalogued").status_code == 404
        with service.http as client:
            models = {model["id"] for model in client.get("/v1/models").json()["data"]}
            assert "sst2" in models
            assert "uncatalogued" not in models
            assert client.get("/v1/models/uncatalogued").status_code == 404
    finally:
        repository.remove("uncatalogued")


def test_a_routed_query_goes_on_without_an_adapter_that_is_broken(service: Any, examples: Any) -> None:
    """The tiers have none of it: its task's query is answered by others, and the answer says so."""
    name, text = "tomqa", examples("tomqa")[0].input
    assert not any(held == name for held, _ in stats(service)["resident"])
    whole = {path: path.read_bytes() for path in (service.store / name).glob("*/adapter_model.safetensors")}
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2])
    try:
        routed, named = service.ask("lorauter", text), service.ask(name, text)
        retries = stats(service)["retries"]
        again = service.ask("lorauter", text)
        assert stats(service)["retries"] == retries, "a broken adapter is not fetched for every query"
    finally:
        for path, content in whole.items():
            path.write_bytes(content)
    assert named.status_code == 503
    for answer in (routed, again):
        assert answer.status_code == 200, answer.text
        decision = answer.json()["lorauter"]
        assert {"name": name, "version": service.key(name).version, "cause": "unavailable"} in decision["left_out"]
        assert name not in {adapter["name"] for adapter in decision["adapters"]}
        assert sum(adapter["weight"] for adapter in decision["adapters"]) == pytest.approx(1)
    assert service.ask(name, text).status_code == 200
    assert service.ask("lorauter", text).json()["lorauter"]["adapters"][0]["name"] == name


def test_a_mixture_goes_on_without_a_version_that_the_store_lacks(service: Any, examples: Any) -> None:
    store = open_store(service.config.catalog)
    catalog = Catalog.load(store)
    body = {"model": "lorauter", "messages": [{"role": "user", "content": examples("sst2")[0].input}], "max_tokens": 2}
    body["lorauter"] = {"top_k": 3, "temperature": 5}
    with service.http as client:
        whole = client.post("/v1/chat/completions", json=body).json()["lorauter"]["adapters"]
        assert len(whole) == 3
        changed = with_adapter(catalog, AdapterManifest(whole[0]["name"], "0" * 16, {}))
        changed.save(store)
        try:
            wait_for_catalog(service.url, changed.version)
            decision = client.post("/v1/chat/completions", json=body).json()["lorauter"]
        finally:
            use_version(store, catalog.version)
    assert decision["left_out"] == [{"name": whole[0]["name"], "version": "0" * 16, "cause": "not_found"}]
    assert [row["name"] for row in decision["adapters"]] == [row["name"] for row in whole[1:]]
    scale = 1 / (whole[1]["weight"] + whole[2]["weight"])
    assert [row["weight"] for row in decision["adapters"]] == pytest.approx(
        [scale * row["weight"] for row in whole[1:]]
    )


def test_without_a_catalog_the_stores_adapters_are_served_by_name(service: Any, root: Path, tmp_path: Path) -> None:
    """A second ingress before the same model, whose word on what is served is a listing."""
    config = service.config.model_copy(update={"catalog": None})
    listing = AdapterListing.options(ray_actor_options={"num_cpus": 0.05}).bind(config.adapters, 0.2)
    embedder, model = (serve.get_deployment_handle(name, "lorauter") for name in ("QueryEmbedder", "LoraModel"))
    router = Router.options(ray_actor_options={"num_cpus": 0.05}).bind(config, embedder, listing, model, None)
    serve.run(router, name="listed", route_prefix="/listed")
    repository = AdapterRepository(open_store(config.adapters))
    shutil.copytree(root / "examples" / "adapters" / "sst2", tmp_path / "uncatalogued")
    repository.push(tmp_path / "uncatalogued")
    try:
        with httpx.Client(base_url=f"{service.url}/listed", timeout=120) as client:

            def ask(name: str) -> Any:
                return client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGE, "max_tokens": 2})

            wait_until(lambda: ask("uncatalogued").status_code == 200)
            assert ask("nowhere").status_code == 404
            assert "no catalog" in ask("lorauter").json()["error"]["message"]
            assert "uncatalogued" in {model["id"] for model in client.get("/v1/models").json()["data"]}
            repository.remove("uncatalogued")
            wait_until(lambda: ask("uncatalogued").status_code == 404)
    finally:
        serve.delete("listed")
