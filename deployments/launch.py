"""Starts the whole service in the foreground, from serve_config.yaml, and stops all that it started.

What `serve run serve_config.yaml` does, plus: the file is checked for unknown keys (Serve ignores them), what can be
known to be wrong is told before Ray starts and what a replica finds as soon as it tells, and Ctrl-C leaves nothing
behind.
"""

import errno
import io
import ipaddress
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve._private.application_state import StatusOverview
from ray.serve._private.common import DeploymentStatus
from ray.serve.config import AutoscalingConfig
from ray.serve.context import _get_global_client
from ray.serve.schema import (
    ApplicationStatus,
    DeploymentSchema,
    HTTPOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
    TracingConfig,
)

from deployments.adapter_cache import CacheSpec, running_caches
from deployments.app import assemble
from deployments.cluster import LOCAL, connect
from deployments.config import AppConfig, explain
from deployments.gpu_sharing import gpus_are_shared
from deployments.preflight import check_device, preflight
from deployments.room import Watch
from deployments.startup import found_cause
from deployments.tracing import tracing_config
from lorauter.catalog import Catalog
from lorauter.defaults import BASE_MODEL, DEFAULT, resolve_adapters
from lorauter.errors import CannotStart, ConfigError
from lorauter.yaml_text import read_yaml

APP_NAME = "lorauter"
_IMPORT_PATH = "deployments.app:build"
_USED = {"applications", "http_options", "proxy_location", "logging_config", "tracing_config"}
_USED_OF_APPLICATION = {"name", "route_prefix", "import_path", "args", "deployments"}
_PORT_TAKEN = (errno.EADDRINUSE, errno.EACCES)
_POLL_S = 0.5
Phase = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class ServeFile:
    """What serve_config.yaml says: the app's settings, Serve options by deployment, HTTP, and the logs."""

    config: AppConfig
    overrides: Mapping[str, Mapping[str, Any]]
    host: str
    port: int
    http: Mapping[str, Any] = field(default_factory=dict)
    proxy_location: str | None = None
    route_prefix: str = "/"
    logs: Mapping[str, Any] = field(default_factory=dict)
    traces: Mapping[str, Any] | None = None

    @property
    def is_open_to_others(self) -> bool:
        """Whether other machines can reach a service that needs no key."""
        return not self.config.access.closed and not _is_loopback(self.host)

    @property
    def needs_no_proxy(self) -> bool:
        """Whether the ingress's replicas can listen themselves: one machine's, as many as there are, at the root."""
        router = self.overrides.get("Router", {})
        plain = self.http.keys() <= {"host", "port"} and self.route_prefix == "/" and "autoscaling_config" not in router
        return plain and self.proxy_location is None and self.config.api.listen is None

    @classmethod
    def read(cls, path: Path) -> "ServeFile":
        """Read and check the file. Raises ConfigError, naming what is wrong."""
        try:
            data = read_yaml(path.read_bytes())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        _known(data, ServeDeploySchema, str(path))
        try:
            schema = ServeDeploySchema.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{path}: {explain(error, 'setting')}") from error
        except (AttributeError, TypeError) as error:  # Serve's own checks take a row for a mapping
            raise ConfigError(f"{path} is not what Serve reads: {error}") from error
        if len(schema.applications) != 1:
            raise ConfigError(
                f"{path} has {len(schema.applications)} applications; needed is one", setting="applications"
            )
        [application] = data["applications"]
        _known(application, ServeApplicationSchema, "applications[0]")
        for keys, used in ((data, _USED), (application, _USED_OF_APPLICATION)):
            if unused := sorted(set(keys) - used):
                raise ConfigError(
                    f"{path}: 'lorauter serve' does not use {', '.join(unused)}; use 'serve run'", setting=unused[0]
                )
        if application["import_path"] != _IMPORT_PATH:
            raise ConfigError(f"import_path must be {_IMPORT_PATH!r}", setting="import_path")
        http = data.get("http_options", {})
        _known(http, HTTPOptionsSchema, "http_options")
        _known(data.get("tracing_config") or {}, TracingConfig, "tracing_config")
        if not 1 <= schema.http_options.port <= 65535:
            raise ConfigError("http_options.port must be between 1 and 65535", setting="http_options.port")
        prefix = application.get("route_prefix", "/")
        if not (prefix or "").startswith("/") or "{" in prefix or (prefix.endswith("/") and prefix != "/"):
            raise ConfigError(
                f"route_prefix is {prefix!r}; it begins with '/' and does not end with one, as in '/models'",
                setting="route_prefix",
            )
        overrides: dict[str, Mapping[str, Any]] = {}
        for i, row in enumerate(application.get("deployments", [])):
            _known(row, DeploymentSchema, f"deployments[{i}]")
            _known(row.get("autoscaling_config") or {}, AutoscalingConfig, f"deployments[{i}].autoscaling_config")
            if row["name"] in overrides:
                raise ConfigError(
                    f"deployments has {row['name']} twice; put its options into one row", setting=f"deployments[{i}]"
                )
            overrides[row["name"]] = {key: value for key, value in row.items() if key != "name"}
        return cls(
            AppConfig.parse(application.get("args", {})),
            overrides,
            http.get("host", "127.0.0.1"),  # Serve's own default listens to everybody
            schema.http_options.port,
            http,
            data.get("proxy_location"),
            application.get("route_prefix", "/"),
            data.get("logging_config") or {},
            data.get("tracing_config"),
        )


def _known(data: object, schema: type[BaseModel], where: str) -> None:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a mapping, got {type(data).__name__}", setting=where)
    if unknown := sorted(set(map(str, data)) - set(schema.model_fields)):
        raise ConfigError(f"{where} has unknown keys: {', '.join(unknown)}", setting=unknown[0])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve_forever(
    file: ServeFile,
    *,
    address: str | None,
    phase: Phase,
    notify: Callable[[str], None],
    ready: Callable[[str, str], None],
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        file: what to serve.
        address: a running Ray cluster's address; None starts a local one, and stops it in the end.
        phase: wraps each step that may take long, given what it is.
        notify: is told what is prepared.
        ready: is told the URL, and what is served there, once requests are answered.

    Raises:
        ConfigError: a setting is wrong, the port is taken, or there is no such cluster.
        CatalogError, StoreError: what the settings name is not there.
        CannotStart: a part of the service does not come up.
    """
    check_port(file.host, file.port)
    traces = dict(file.traces) if file.traces else tracing_config(os.environ)
    if file.is_open_to_others:
        notify(f"warning: no API keys are configured, and {file.host} lets others in; see docs/access.md")
    config = file.config.with_absolute_paths(Path.cwd())
    catalog = None
    if address is None:
        what = "checking the configuration, and preparing what it names"
        with phase(what), ThreadPoolExecutor(1) as beside:  # the compiler, which runs on a core of its own
            device = beside.submit(check_device, config.engine.device, config.engine.dtype)
            catalog = preflight(config, lambda text: notify(f"warning: {text}"), notify)
            device.result()
    runs = False
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    os.environ.setdefault("OTEL_SERVICE_NAME", "lorauter")
    last = ExitStack()
    try:
        with phase("starting Ray"):
            if address is None and config.mps and not config.engine.device.startswith("cpu"):
                last.enter_context(gpus_are_shared(lambda text: notify(f"warning: {text}")))
            connect(address or LOCAL)
        for number in previous:
            signal.signal(number, _interrupt)  # Ray's own handlers would end it beneath the service
        with phase("starting the deployments"):
            proxies = file.proxy_location
            if address is None and file.needs_no_proxy:
                api = config.api.model_copy(update={"listen": f"{_bracketed(file.host)}:{file.port}"})
                config, proxies = config.model_copy(update={"api": api}), "Disabled"
            app = assemble(config, file.overrides)
            serve.start(
                proxy_location=proxies,
                http_options={**file.http, "host": file.host, "port": file.port},
                logging_config=dict(file.logs),
                tracing_config=traces,
            )
            target = serve.RunTarget(app, APP_NAME, file.route_prefix, dict(file.logs))
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            _wait_until_running(notify, is_own=address is None)
        runs = True
        ready(f"http://{_host(file.host)}:{file.port}{file.route_prefix.rstrip('/')}", _described(file.config, catalog))
        while True:
            signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        with phase("stopping"):
            _shut_down(config, gently=runs or address is not None)
            last.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _host(listening: str) -> str:
    """What a browser on this machine calls the host that the service listens on."""
    try:
        address = ipaddress.ip_address(listening)
    except ValueError:
        return listening
    if address.is_unspecified:
        return "127.0.0.1"
    return _bracketed(listening)


def _bracketed(host: str) -> str:
    """A host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def _described(config: AppConfig, catalog: Catalog | None) -> str:
    """What a service serves, in a line; the catalog is what it starts with, if that is known."""
    model = BASE_MODEL if config.base_model == DEFAULT else config.base_model
    if config.catalog is None:
        return f"{model} with the adapters in {config.adapters}, by name"
    what = f"{model} with the catalog {config.catalog}"
    if catalog is None:
        return what
    return f"{what}: {len(catalog.tasks)} tasks, {len(catalog.adapters)} adapters, version {catalog.version}"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _wait_until_running(notify: Callable[[str], None], *, is_own: bool) -> None:
    """Wait for the app, and say what it waits for.

    Args:
        is_own: no nodes join the cluster: what they have no room for is an error at once.

    Raises:
        CannotStart: a part of it does not come up.
    """
    room = Watch(lambda actor: actor.name.startswith(f"SERVE_REPLICA::{APP_NAME}#"), notify)
    told: set[str] = set()
    while True:
        said = _status()
        if said.app_status.status == ApplicationStatus.RUNNING:
            return
        failed = said.app_status.status == ApplicationStatus.DEPLOY_FAILED
        for part in said.deployment_statuses:
            cause = found_cause(part.message, part.name)
            if cause is None:
                continue
            text, for_good = cause
            if for_good or (failed and part.status == DeploymentStatus.DEPLOY_FAILED):
                raise CannotStart(text, part=part.name)
            if text not in told:
                told.add(text)
                notify(f"{text}; trying again")
        if failed:
            raise CannotStart(f"the service cannot start: {' '.join(said.app_status.message.split())}", part=APP_NAME)
        room.check()
        if is_own and room.hopeless and room.line:
            raise CannotStart(room.line, part=APP_NAME)
        time.sleep(_POLL_S)


def _status() -> StatusOverview:
    """The app's. Not by `serve.status`, for which each deployment's request router is pickled, here and in Serve's
    controller: a tenth of a second of CPU time."""
    client: Any = _get_global_client()
    said: StatusOverview = client.get_serve_status(APP_NAME)
    return said


def _shut_down(config: AppConfig, *, gently: bool) -> None:
    """End the service; what never ran, in a Ray of our own, needs no gentleness, which may take half a minute."""
    if not ray.is_initialized():
        return
    with redirect_stdout(io.StringIO()):  # Ray reports the actors that we end here as failures
        if gently:
            serve.shutdown()  # type: ignore[no-untyped-call]
            for cache in running_caches(CacheSpec(resolve_adapters(config.adapters), config.cache)):
                ray.kill(cache)
        ray.shutdown()


def check_port(host: str, port: int) -> None:
    """Raise ConfigError where one cannot listen there."""
    if not host:
        raise ConfigError(
            "http_options.host is empty; give 127.0.0.1 for this machine alone, 0.0.0.0 for all", setting="host"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, TypeError, UnicodeError) as error:  # the last two of what is no name
            instead = "another --port" if getattr(error, "errno", None) in _PORT_TAKEN else "http_options.host anew"
            raise ConfigError(
                f"cannot listen on {_bracketed(host)}:{port} ({error}); choose {instead}", setting="port"
            ) from error
