"""The app builder: the deployments bound together.

`serve run serve_config.yaml` calls `build` with the file's `args`.
"""

# No `from __future__ import annotations`: Serve reads the annotation, and validates `args` by it.
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from deployments.adapter_listing import AdapterListing
from deployments.catalog_editor import CatalogEditor
from deployments.config import AppConfig, explain
from deployments.devices import engine_gpus, gpu_bytes, resources
from deployments.embedder import QueryEmbedder
from deployments.limits import limits_actor
from deployments.model import LoraModel
from deployments.retriever import TaskRetriever
from deployments.router import Router
from lorauter.defaults import DEFAULT, resolve_adapters, resolve_catalog
from lorauter.errors import ConfigError
from lorauter.models import pinned

_ENCODER_GPUS = 0.1  # of the engine's, for all encoders: a query takes a millisecond there, and some ten of a core's
_ENCODER_BYTES = 5 << 28  # of each of them on a GPU, its model of states included
_CORES_AN_ENCODER, _ENCODERS_A_GPU = 8, 2  # where the GPU is large
_LARGE_GPU = 64 << 30
REPORTS = {"request_routing_stats_period_s": 1.0, "request_routing_stats_timeout_s": 10.0}
"""How LoraModel's replicas are asked how busy they are (`LoraModel.record_routing_stats`)."""
_CORES_EACH = {"Router": 2, "QueryEmbedder": 4, "TaskRetriever": 4}
_MOST_AT_FIRST = {"Router": 8, "QueryEmbedder": 4, "TaskRetriever": 4}  # for a GPU
_GROWS_TO = 4  # replicas, where one is enough at first
# Calls in progress for which a replica is added. QueryEmbedder's are of many queries, four of each TaskRetriever.
_ONGOING = {"Router": 100, "QueryEmbedder": 8, "TaskRetriever": 16}

Options = Mapping[str, Mapping[str, Any]]

DEPLOYMENTS = ("Router", "QueryEmbedder", "TaskRetriever", "LoraModel", "CatalogEditor")


def build(config: AppConfig) -> Application:
    """The app of a configuration; the default catalog is built first if it is named and not there."""
    return assemble(config, {})


def assemble(config: AppConfig, overrides: Options) -> Application:
    """The same with Serve options by deployment name, as `deployments:` of serve_config.yaml gives them.

    Raises:
        ConfigError: an override names an unknown deployment or option.
    """
    own = config.catalog is not None and DEFAULT not in (config.adapters, config.catalog)  # not the examples
    config = config.with_absolute_paths(Path.cwd())
    config = config.model_copy(
        update={
            "base_model": pinned(config.base_model),
            "encoder": pinned(config.encoder),
            "state_model": None if config.state_model is None else pinned(config.state_model),
            "adapters": resolve_adapters(config.adapters),
            "catalog": None if config.catalog is None else resolve_catalog(config.catalog),
        }
    )
    if unknown := sorted(set(overrides) - set(DEPLOYMENTS)):
        raise ConfigError(
            f"unknown deployment {', '.join(unknown)}; there are {', '.join(DEPLOYMENTS)}",
            setting="deployments",
        )

    overrides, beside = _with_gpus(overrides, config.engine.device)
    engine = config.engine
    if engine.device == "auto":
        on_gpu = _resources(overrides, "LoraModel").get("num_gpus")
        engine = replace(engine, device="cuda" if on_gpu else "cpu")
    if engine.spare_bytes is None and beside:
        engine = replace(engine, spare_bytes=beside * _ENCODER_BYTES)
    config = config.model_copy(update={"engine": engine})

    def deployment(target: Any, **derived: Any) -> serve.Deployment:  # Serve's decorator is typed as the class
        try:
            result: serve.Deployment = target.options(**{**derived, **overrides.get(target.name, {})})
            return result
        except (TypeError, ValueError) as error:
            cause = explain(error, "option") if isinstance(error, ValidationError) else error
            raise ConfigError(f"deployment {target.name}: {cause}", setting=f"deployments.{target.name}") from error

    embedder = deployment(QueryEmbedder, **_scaling(overrides, "QueryEmbedder")).bind(
        config.encoder, config.state_model
    )
    if config.catalog is None:
        retriever = deployment(AdapterListing).bind(config.adapters, config.catalog_refresh_s)
    else:
        retriever = deployment(TaskRetriever, **_scaling(overrides, "TaskRetriever")).bind(config, embedder)
    model = deployment(LoraModel, request_router_config=REPORTS).bind(config)
    editor = deployment(CatalogEditor).bind(config, embedder, model) if own else None
    actors = {"deployment_actors": [limits_actor()]} if config.access.closed else {}
    scaling = _scaling(overrides, "Router")
    if config.api.listen is not None and "autoscaling_config" in scaling:  # Serve does not see what it should go by
        scaling = {"num_replicas": scaling["autoscaling_config"]["min_replicas"]}
    return deployment(Router, **scaling, **actors).bind(config, embedder, retriever, model, editor)


def _with_gpus(overrides: Options, device: str) -> tuple[Options, int]:
    """The options with the GPUs that the engine computes on, and the encoders beside it, unless they say otherwise; and
    how many encoders are on a GPU beside an engine.

    Raises:
        ConfigError: as `engine_gpus`.
    """
    model, encoder = _resources(overrides, "LoraModel"), _resources(overrides, "QueryEmbedder")
    gpus = engine_gpus(device, model.get("num_gpus"), setting="LoraModel's ray_actor_options.num_gpus")
    count = _encoders(overrides)
    each_gpu = -(-count // max(1, int(resources().get("GPU", 1))))
    shared = each_gpu * encoder["num_gpus"] if _is_number(encoder.get("num_gpus")) else _ENCODER_GPUS
    if "num_gpus" not in encoder and ("num_gpus" in model or not gpus):
        shared = 0
    beside = 0 < shared < gpus
    if "num_gpus" in model:
        beside = beside and shared + gpus <= 1
    elif beside:
        gpus -= shared
    wanted: Options = {"LoraModel": {"num_cpus": 1, **model, "num_gpus": gpus}}
    if shared and "num_gpus" not in encoder:
        share = int(1e4 * shared / each_gpu) / 1e4  # Ray counts in ten-thousandths
        wanted = {**wanted, "QueryEmbedder": {"num_cpus": 0.3, **encoder, "num_gpus": share}}
    result = dict(overrides)
    for name, asked in wanted.items():
        options = overrides.get(name, {})
        if isinstance(options, Mapping) and isinstance(options.get("ray_actor_options", {}), Mapping):
            result[name] = {**options, "ray_actor_options": asked}  # else Serve says what it should be
    if shared and isinstance(result.get("QueryEmbedder"), Mapping) and not _said(overrides, "QueryEmbedder"):
        result["QueryEmbedder"] = {**result["QueryEmbedder"], "num_replicas": count}
    return result, each_gpu * beside


def _encoders(overrides: Options) -> int:
    """How many encoders there are at most, where they compute on GPUs."""
    options = _options(overrides, "QueryEmbedder")
    scaling = options.get("autoscaling_config")
    said = options.get("num_replicas", scaling.get("max_replicas") if isinstance(scaling, Mapping) else None)
    if isinstance(said, int) and said > 0:
        return said
    if _said(overrides, "QueryEmbedder") or gpu_bytes() < _LARGE_GPU:
        return 1
    there = resources()
    return max(1, min(int(there.get("CPU", 1)) // _CORES_AN_ENCODER, _ENCODERS_A_GPU * int(there.get("GPU", 1))))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _said(overrides: Options, name: str) -> bool:
    """Whether it is said how many replicas there are."""
    return bool({"num_replicas", "autoscaling_config"} & _options(overrides, name).keys())


def _options(overrides: Options, name: str) -> Mapping[str, Any]:
    options = overrides.get(name, {})
    return options if isinstance(options, Mapping) else {}


def _resources(overrides: Options, name: str) -> Mapping[str, Any]:
    asked = _options(overrides, name).get("ray_actor_options", {})
    return asked if isinstance(asked, Mapping) else {}


def _scaling(overrides: Options, name: str) -> dict[str, Any]:
    """How a deployment of which each replica has one core's worth of Python scales, unless it is said: by the cores."""
    if _said(overrides, name) or _resources(overrides, name).get("num_gpus"):
        return {}
    there = resources()
    most = _MOST_AT_FIRST[name] * max(1, int(there.get("GPU", 1)))
    least = min(most, max(1, int(there.get("CPU", 1)) // _CORES_EACH[name]))
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": 2 * least if least > 1 else _GROWS_TO,
            "target_ongoing_requests": _ONGOING[name],
        }
    }
