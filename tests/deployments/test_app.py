from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call_as_serve_does

from deployments.app import DEPLOYMENTS, assemble, build
from deployments.config import AccessSettings, AppConfig
from lorauter.errors import ConfigError

CONFIG = AppConfig(adapters="s3://bucket/adapters", catalog="s3://bucket/catalog")


def parts(app: Application) -> dict[str, Any]:
    """The app's deployments by name, the ingress last."""
    deployment = app._bound_deployment
    below = [arg for arg in deployment.init_args if isinstance(arg, Application)]
    return {name: part for one in below for name, part in parts(one).items()} | {deployment.name: deployment}


def test_serve_validates_the_settings_by_the_builders_annotation() -> None:
    app = call_as_serve_does(build, {"adapters": "s3://b/a", "catalog": "s3://b/c", "engine": {"max_batch": 3}})
    config = parts(app)["Router"].init_args[0]
    assert isinstance(config, AppConfig)
    assert (config.adapters, config.engine.max_batch) == ("s3://b/a", 3)
    with pytest.raises(ValidationError, match=r"engine\.surprise"):
        call_as_serve_does(build, {"engine": {"surprise": 1}})


def test_the_deployments_and_what_they_are_given() -> None:
    found = parts(assemble(CONFIG, {}))
    assert set(found) == set(DEPLOYMENTS)
    assert list(found)[-1] == "Router"
    assert found["QueryEmbedder"].init_args == ("default", "default")
    config, embedder = found["TaskRetriever"].init_args
    here = CONFIG.model_copy(update={"engine": replace(CONFIG.engine, device="cpu")})
    assert config == here
    assert embedder._bound_deployment.name == "QueryEmbedder"
    assert found["LoraModel"].init_args == (here,)


def test_an_editor_goes_with_stores_of_ones_own_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = parts(assemble(CONFIG, {}))["CatalogEditor"]
    assert (editor.init_args[0].adapters, editor.init_args[0].catalog) == (CONFIG.adapters, CONFIG.catalog)
    assert "autoscaling_config" in editor._deployment_config.user_configured_option_names
    monkeypatch.setattr("deployments.app.resolve_catalog", lambda catalog: str(tmp_path))
    for default in ({"adapters": "default"}, {"catalog": "default"}):
        found = parts(assemble(CONFIG.model_copy(update=default), {}))
        assert set(found) == set(DEPLOYMENTS) - {"CatalogEditor"}
        assert found["Router"].init_args[-1] is None


def test_what_is_said_of_a_deployment_goes_before_what_is_derived() -> None:
    found = parts(assemble(CONFIG, {"LoraModel": {"num_replicas": 2}, "Router": {"num_replicas": 3}}))
    assert (found["LoraModel"].num_replicas, found["Router"].num_replicas) == (2, 3)
    assert found["LoraModel"]._deployment_config.request_router_config.request_routing_stats_period_s == 1.0


def test_an_ingress_that_listens_itself_does_not_scale_by_what_serve_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    clustered(monkeypatch, CPU=16)
    api = CONFIG.api.model_copy(update={"listen": "127.0.0.1:8000"})
    config = CONFIG.model_copy(update={"api": api})
    router = parts(assemble(config, {}))["Router"]
    assert router.num_replicas == 8 and router._deployment_config.autoscaling_config is None
    assert parts(assemble(config, {"Router": {"num_replicas": 1}}))["Router"].num_replicas == 1


def clustered(monkeypatch: pytest.MonkeyPatch, **resources: float) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)


def test_on_a_gpu_the_encoder_is_beside_the_engine_and_more_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clustered(monkeypatch, CPU=16, GPU=1)

    def gpus(**asked: float) -> tuple[float, float]:
        overrides = {name: {"ray_actor_options": {"num_gpus": gpus}} for name, gpus in asked.items()}
        found = parts(assemble(CONFIG, overrides))
        asks = [found[name].ray_actor_options.get("num_gpus", 0) for name in ("LoraModel", "QueryEmbedder")]
        return asks[0], asks[1]

    assert gpus() == (0.9, 0.1)
    assert gpus(LoraModel=1) == (1, 0), "what is said is meant"
    assert gpus(LoraModel=0) == (0, 0)
    assert gpus(QueryEmbedder=0) == (1, 0)
    assert gpus(QueryEmbedder=0.25) == (0.75, 0.25)
    model = parts(assemble(CONFIG, {}))["LoraModel"]
    assert model.init_args[0].engine.device == "cuda"
    assert model.init_args[0].engine.rows == 128
    on_cpu = parts(assemble(CONFIG, {"LoraModel": {"ray_actor_options": {"num_gpus": 0}}}))["LoraModel"]
    assert on_cpu.init_args[0].engine.rows == 16


@pytest.mark.parametrize(
    ("there", "gpu_gib", "said", "replicas", "each", "beside"),
    [
        ({"CPU": 16, "GPU": 1}, 80, {}, 2, 0.05, 2),
        ({"CPU": 8, "GPU": 1}, 80, {}, 1, 0.1, 1),
        ({"CPU": 128, "GPU": 1}, 141, {}, 2, 0.05, 2),
        ({"CPU": 64, "GPU": 8}, 80, {}, 8, 0.1, 1),
        ({"CPU": 128, "GPU": 4}, 80, {}, 8, 0.05, 2),
        ({"CPU": 128, "GPU": 1}, 24, {}, 1, 0.1, 1),  # a small one has no room for more
        ({"CPU": 16, "GPU": 1}, 0, {}, 1, 0.1, 1),
        ({"CPU": 16, "GPU": 1}, 80, {"num_replicas": 3}, 3, 0.0333, 3),
        ({"CPU": 16, "GPU": 1}, 80, {"num_replicas": 1}, 1, 0.1, 1),
    ],
)
def test_on_a_large_gpu_there_are_encoders_by_the_cores_and_the_engine_leaves_them_room(
    monkeypatch: pytest.MonkeyPatch,
    there: dict[str, float],
    gpu_gib: int,
    said: dict[str, int],
    replicas: int,
    each: float,
    beside: int,
) -> None:
    clustered(monkeypatch, **there)
    monkeypatch.setattr("deployments.app.gpu_bytes", lambda: gpu_gib << 30)
    found = parts(assemble(CONFIG, {"QueryEmbedder": said} if said else {}))
    embedder, model = found["QueryEmbedder"], found["LoraModel"]
    assert (embedder.num_replicas, embedder.ray_actor_options["num_gpus"]) == (replicas, each)
    assert embedder._deployment_config.autoscaling_config is None
    assert model.ray_actor_options["num_gpus"] == pytest.approx(0.9)
    assert model.init_args[0].engine.spare_bytes == beside * (5 << 28)


def test_an_engine_leaves_room_for_encoders_on_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clustered(monkeypatch, CPU=16, GPU=2)
    config = CONFIG.model_copy(update={"engine": replace(CONFIG.engine, spare_bytes=7)})

    def spare(config: AppConfig = CONFIG, **asked: float) -> int | None:
        overrides = {name: {"ray_actor_options": {"num_gpus": gpus}} for name, gpus in asked.items()}
        engine = parts(assemble(config, overrides))["LoraModel"].init_args[0].engine
        result: int | None = engine.spare_bytes
        return result

    assert spare() == 5 << 28
    assert spare(config) == 7, "what is said is meant"
    assert spare(LoraModel=0.75, QueryEmbedder=0.25) == 5 << 28
    assert spare(LoraModel=1, QueryEmbedder=0.25) is None
    assert spare(QueryEmbedder=1) is None
    assert spare(QueryEmbedder=0) is None
    assert spare(LoraModel=0) is None


@pytest.mark.parametrize(
    ("cores", "gpus", "router", "others"),
    [
        (1, 0, (1, 4), (1, 4)),
        (2, 0, (1, 4), (1, 4)),
        (8, 0, (4, 8), (2, 4)),
        (16, 1, (8, 16), (4, 8)),
        (128, 0, (8, 16), (4, 8)),
        (128, 1, (8, 16), (4, 8)),
        (32, 2, (16, 32), (8, 16)),
        (16, 2, (8, 16), (4, 8)),
    ],
)
def test_what_a_core_bounds_has_replicas_by_the_cores_and_the_gpus_that_they_feed(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, router: tuple[int, int], others: tuple[int, int]
) -> None:
    clustered(monkeypatch, CPU=cores, GPU=gpus)
    encoders = {"QueryEmbedder": {"ray_actor_options": {"num_gpus": 0}}}  # else there are as many as GPUs have room for
    found = parts(assemble(CONFIG, encoders))
    for name, expected in (("Router", router), ("QueryEmbedder", others), ("TaskRetriever", others)):
        scaling = found[name]._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == expected, name
    said = parts(assemble(CONFIG, {"Router": {"num_replicas": 3}}))["Router"]
    assert (said.num_replicas, said._deployment_config.autoscaling_config) == (3, None)


def test_keys_bring_their_shared_counters() -> None:
    secured = CONFIG.model_copy(update={"access": AccessSettings(keys_file="/etc/keys.yaml")})
    [actor] = parts(assemble(secured, {}))["Router"]._deployment_config.deployment_actors
    assert actor.name == "limits"
    assert not parts(assemble(CONFIG, {}))["Router"]._deployment_config.deployment_actors


def test_relative_folders_are_resolved_where_the_app_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = assemble(AppConfig(adapters="./pool", catalog="./catalog"), {})
    assert parts(app)["TaskRetriever"].init_args[0].catalog == str(tmp_path / "catalog")
    assert parts(app)["Router"].init_args[0].adapters == str(tmp_path / "pool")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"LoraModels": {"num_replicas": 2}}, "unknown deployment LoraModels"),
        ({"None": {}}, "unknown deployment None"),
        ({"Router": {"replicas": 2}}, "Router.*replicas"),
        ({"Router": {"num_replicas": -1}}, "Router.*num_replicas"),
        ({"Router": {"num_replicas": "two"}}, "Router.*num_replicas"),
        ({"Router": {"num_replicas": 2, "autoscaling_config": {"min_replicas": 1}}}, "Router.*num_replicas"),
        ({"LoraModel": {"ray_actor_options": {"gpus": 1}}}, "LoraModel.*gpus"),
        ({"LoraModel": {"logging_config": {"surprise": 1}}}, "LoraModel.*surprise"),
        ({"LoraModel": 5}, "LoraModel.*mapping"),
    ],
)
def test_wrong_overrides_are_refused_by_name(overrides: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        assemble(CONFIG, overrides)
    assert "\n" not in str(caught.value)
