"""The app builder: the deployments bound together.

`serve run serve_config.yaml` calls `build` with the file's `args`.
"""

# No `from __future__ import annotations`: Serve reads the annotation, and validates `args` by it.
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from deployments.adapter_cache import CacheSpec
from deployments.adapter_listing import AdapterListing
from deployments.catalog_editor import CatalogEditor
from deployments.config import AppConfig, explain
from deployments.devices import engine_gpus
from deployments.embedder import QueryEmbedder
from deployments.limits import limits_actor
from deployments.model import LoraModel
from deployments.residency_router import residency_routing
from deployments.retriever import TaskRetriever
from deployments.router import Router
from lorauter.defaults import DEFAULT, resolve_adapters, resolve_catalog
from lorauter.errors import ConfigError
from lorauter.models import pinned

DEPLOYMENTS = ("Router", "QueryEmbedder", "TaskRetriever", "LoraModel", "CatalogEditor")


def build(config: AppConfig) -> Application:
    """The app of a configuration; the default catalog is built first if it is named and not there."""
    return assemble(config, {})


def assemble(config: AppConfig, overrides: Mapping[str, Mapping[str, Any]]) -> Application:
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
            "adapters": resolve_adapters(config.adapters),
            "catalog": None if config.catalog is None else resolve_catalog(config.catalog),
        }
    )
    if unknown := sorted(set(overrides) - set(DEPLOYMENTS)):
        raise ConfigError(
            f"unknown deployment {', '.join(unknown)}; there are {', '.join(DEPLOYMENTS)}",
            setting="deployments",
        )

    if "LoraModel" not in overrides or isinstance(overrides["LoraModel"], Mapping):
        overrides = {**overrides, "LoraModel": _with_gpus(overrides.get("LoraModel", {}), config.engine.device)}

    def deployment(target: Any, **derived: Any) -> serve.Deployment:  # Serve's decorator is typed as the class
        try:
            result: serve.Deployment = target.options(**{**derived, **overrides.get(target.name, {})})
            return result
        except (TypeError, ValueError) as error:
            cause = explain(error, "option") if isinstance(error, ValidationError) else error
            raise ConfigError(f"deployment {target.name}: {cause}", setting=f"deployments.{target.name}") from error

    embedder = deployment(QueryEmbedder).bind(config.encoder)
    if config.catalog is None:
        retriever = deployment(AdapterListing).bind(config.adapters, config.catalog_refresh_s)
    else:
        retriever = deployment(TaskRetriever).bind(config, embedder)
    model = deployment(
        LoraModel,
        # The engine refuses what is too much, and lets in what has begun elsewhere: it has to be asked for that.
        max_ongoing_requests=2 * (config.engine.max_batch + config.engine.max_queue),
        request_router_config=residency_routing(
            CacheSpec(config.adapters, config.cache), batch=config.engine.max_batch
        ),
    ).bind(config)
    editor = deployment(CatalogEditor).bind(config, embedder, model) if own else None
    actors = {"deployment_actors": [limits_actor()]} if config.access.closed else {}
    return deployment(Router, **actors).bind(config, embedder, retriever, model, editor)


def _with_gpus(options: Mapping[str, Any], device: str) -> Mapping[str, Any]:
    """LoraModel's options, with the GPU that it computes on. Raises ConfigError."""
    resources = options.get("ray_actor_options", {})
    if not isinstance(resources, Mapping):  # Serve says what it should be
        return options
    gpus = engine_gpus(device, resources.get("num_gpus"), setting="LoraModel's ray_actor_options.num_gpus")
    return {**options, "ray_actor_options": {"num_cpus": 1, **resources, "num_gpus": gpus}}
