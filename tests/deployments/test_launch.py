from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.application_state import ApplicationStatusInfo, StatusOverview
from ray.serve._private.common import DeploymentStatusInfo, DeploymentStatusTrigger
from ray.serve.schema import ApplicationStatus, DeploymentStatus, ServeDeploySchema

from deployments.app import DEPLOYMENTS, build
from deployments.config import AppConfig
from deployments.launch import ServeFile, _described, _host, _wait_until_running, check_port, serve_forever
from deployments.room import Watch
from lorauter.catalog import build_catalog
from lorauter.defaults import BASE_MODEL
from lorauter.encoder import HashingEncoder
from lorauter.errors import CannotStart, ConfigError
from lorauter.tasks import Task

SHIPPED = Path(__file__).resolve().parents[2] / "serve_config.yaml"


@pytest.fixture
def read(tmp_path: Path) -> Callable[[object], ServeFile]:
    """`read(content)`: a file of these bytes, or of this value as YAML, read."""

    def read(content: object) -> ServeFile:
        path = tmp_path / "serve_config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        return ServeFile.read(path)

    return read


def shipped() -> Any:
    return deepcopy(yaml.safe_load(SHIPPED.read_text()))


def test_the_shipped_file_is_what_serve_reads() -> None:
    file = ServeFile.read(SHIPPED)
    schema = ServeDeploySchema.model_validate(shipped())
    [application] = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert isinstance(application.args, dict)
    assert AppConfig.model_validate(application.args) == file.config
    assert (schema.http_options.host, schema.http_options.port) == (file.host, file.port)
    rows = {row.name: row.model_dump(exclude_unset=True, exclude={"name"}) for row in application.deployments}
    assert rows == file.overrides
    assert set(rows) == set(DEPLOYMENTS) - {"CatalogEditor"}  # which there is none of over the examples


def test_the_shipped_file_spells_the_defaults_out() -> None:
    assert ServeFile.read(SHIPPED).config == AppConfig()
    assert ServeFile.read(SHIPPED).host == "127.0.0.1"


def test_a_file_says_what_it_says(read: Callable[[object], ServeFile]) -> None:
    file = read(
        {
            "http_options": {"port": 81},
            "applications": [
                {
                    "import_path": "deployments.app:build",
                    "args": {"catalog": "s3://b/c", "engine": {"max_batch": 3}},
                    "deployments": [{"name": "LoraModel", "num_replicas": 2}],
                }
            ],
        }
    )
    assert file.config == AppConfig.parse({"catalog": "s3://b/c", "engine": {"max_batch": 3}})
    assert file.overrides == {"LoraModel": {"num_replicas": 2}}
    assert (file.host, file.port) == ("127.0.0.1", 81)
    assert read({"applications": [{"import_path": "deployments.app:build"}]}).config == AppConfig()


APPLICATION = ("applications", 0)
DEPLOYMENT = (*APPLICATION, "deployments", 1)


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ((), "serve_config.yaml"),
        (("http_options",), "http_options"),
        (APPLICATION, "applications[0]"),
        (DEPLOYMENT, "deployments[1]"),
        (("applications", 0, "deployments", 2, "autoscaling_config"), "deployments[2].autoscaling_config"),
        ((*APPLICATION, "args"), "setting"),
        ((*APPLICATION, "args", "engine"), "setting engine.surprise"),
    ],
)
def test_an_unknown_key_is_refused_by_name(
    read: Callable[[object], ServeFile], where: tuple[Any, ...], named: str
) -> None:
    data = shipped()
    place = data
    for key in where:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    place["surprise"] = 1
    with pytest.raises(ConfigError, match=r"unknown.*surprise") as caught:
        read(data)
    assert named in str(caught.value)


def changed(*path: Any, value: Any) -> Any:
    data = place = shipped()
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "mapping"),
        (b"just words", "mapping"),
        (b"a: [1", "cannot be read"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"a: \x00", "cannot be read"),
        (b"!!python/object:os.system {}", "cannot be read"),
        ({}, "applications"),
        ({"applications": []}, "0 applications"),
        (
            {"applications": [{"name": name, "import_path": "a:b", "route_prefix": f"/{name}"} for name in "ab"]},
            "2 app",
        ),
        ({"applications": [{}]}, "import_path"),
        ({"applications": {"name": "x"}}, "applications"),
        ({"applications": "x"}, "applications"),
        ({"applications": ["x"]}, "applications.0"),
        (changed("http_options", value=[1]), "http_options"),
        (changed("http_options", "port", value="http"), "http_options.port"),
        (changed("http_options", "port", value=0), "http_options.port"),
        (changed("http_options", "port", value=99_999), "http_options.port"),
        (changed("http_options", "port", value=None), "http_options.port"),
        (changed("http_options", "host", value=5), "http_options.host"),
        (changed("applications", 0, "args", value="x"), "dictionary"),
        (changed("applications", 0, "args", "routing", "top_k", value="many"), "routing.top_k"),
        (changed("applications", 0, "deployments", value="x"), "deployments"),
        (changed("applications", 0, "deployments", value={"name": "Router"}), "deployments"),
        (changed("applications", 0, "deployments", 0, value="Router"), "not what Serve reads"),
        (changed("applications", 0, "deployments", 0, value={"num_replicas": 1}), "name"),
        (changed("applications", 0, "deployments", 1, "autoscaling_config", value=[1]), "autoscaling_config"),
        (changed("applications", 0, "deployments", value=[{"name": "Router"}, {"name": "Router"}]), "Router twice"),
        *[
            (changed("applications", 0, "route_prefix", value=prefix), "route_prefix is")
            for prefix in (None, "", "models", "/models/", "//", "/{name}")
        ],
        (b"http_options: {port: 1, port: 2}", "'port' is there twice"),
        (b"applications: " + b"[" * 5000, "nested too deeply"),
    ],
)
def test_a_wrong_file_is_a_config_error(read: Callable[[object], ServeFile], content: object, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(content)
    assert named in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere.yaml", ".", "nowhere/at.yaml"])
def test_a_missing_file(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ServeFile.read(tmp_path / path)


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        ("", "is empty"),
        ("2001:db8::1", r"\[2001:db8::1\]:8000 .*http_options.host"),
        ("\x00", "null"),
        ("ü..x", "encoding"),
    ],
)
def test_a_host_that_is_none_is_told(host: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_port(host, 8000)


@pytest.mark.skipif(not socket.has_ipv6, reason="the machine has no IPv6")
def test_one_can_listen_at_an_address_of_ipv6() -> None:
    with socket.socket(socket.AF_INET6) as other:
        try:
            other.bind(("::1", 0))
        except OSError:
            pytest.skip("the machine has no IPv6")
        port = other.getsockname()[1]
    check_port("::1", port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", None), ("192.0.2.1", 8000)])
def test_where_one_cannot_listen_nothing_is_started(host: str, port: int | None) -> None:
    def phase(what: str) -> AbstractContextManager[object]:
        raise AssertionError(what)

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        file = replace(ServeFile.read(SHIPPED), host=host, port=port or other.getsockname()[1])
        with pytest.raises(ConfigError, match=f"cannot listen on {host}:{file.port}"):
            serve_forever(file, address=None, phase=phase, notify=print, ready=print)


def started(monkeypatch: pytest.MonkeyPatch, *statuses: StatusOverview, lines: list[str], is_own: bool = True) -> None:
    """Wait for an app of which Serve says these things, one after the other."""
    said = iter(statuses)
    monkeypatch.setattr("deployments.launch._status", lambda: next(said))
    monkeypatch.setattr("deployments.launch.time.sleep", lambda _: None)
    monkeypatch.setattr("deployments.launch.Watch.check", lambda self: 0.0)
    _wait_until_running(lines.append, is_own=is_own)


def app(status: str, message: str = "", **deployments: tuple[str, str]) -> StatusOverview:
    parts = [
        DeploymentStatusInfo(name, DeploymentStatus(state), DeploymentStatusTrigger.UNSPECIFIED, said)
        for name, (state, said) in deployments.items()
    ]
    return StatusOverview(ApplicationStatusInfo(ApplicationStatus(status), message), "lorauter", parts)


def test_what_may_pass_is_told_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    down = "A replica failed to start. Error:\nx.CannotStart: TaskRetriever cannot start now: the store is down"
    lines: list[str] = []
    trying = app("DEPLOYING", TaskRetriever=("UPDATING", down), LoraModel=("UPDATING", ""))
    started(monkeypatch, app("NOT_STARTED"), app("DEPLOYING"), trying, trying, app("RUNNING"), lines=lines)
    assert lines == ["TaskRetriever cannot start: the store is down; trying again"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            app("DEPLOYING", LoraModel=("UPDATING", "It failed.\nCannotStart: LoraModel cannot start: no model")),
            "LoraModel cannot start: no model",
        ),
        (
            app(
                "DEPLOY_FAILED",
                TaskRetriever=("UPDATING", "A replica failed.\nTaskRetriever cannot start now: the encoder is away"),
                QueryEmbedder=("DEPLOY_FAILED", "The deployment failed to start.\nKilled by a signal"),
            ),
            "QueryEmbedder cannot start: Killed by a signal",
        ),
        (app("DEPLOY_FAILED", "Something\nelse."), "the service cannot start: Something else."),
    ],
)
def test_what_will_not_pass_ends_the_start_with_the_cause(
    monkeypatch: pytest.MonkeyPatch, status: StatusOverview, said: str
) -> None:
    with pytest.raises(CannotStart) as caught:
        started(monkeypatch, status, lines=[])
    assert str(caught.value) == said


def test_what_an_own_cluster_has_no_room_for_is_an_error_and_on_others_may_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Never(Watch):
        def __init__(self, *args: Any) -> None:
            self.hopeless, self.line = True, "waiting for 64 CPUs"

    monkeypatch.setattr("deployments.launch.Watch", Never)
    with pytest.raises(CannotStart, match="waiting for 64 CPUs"):
        started(monkeypatch, app("DEPLOYING"), lines=[])
    started(monkeypatch, app("DEPLOYING"), app("RUNNING"), lines=[], is_own=False)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"grpc_options": {"port": 9000}}, "grpc_options"),
        ({"applications": [{"import_path": "deployments.app:build", "runtime_env": {}}]}, "runtime_env"),
        ({"applications": [{"import_path": "somewhere:else"}]}, "import_path"),
    ],
)
def test_what_it_would_not_do_is_refused(
    read: Callable[[object], ServeFile], extra: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        read({"applications": [{"import_path": "deployments.app:build"}], **extra})
    assert caught.value.setting == named


@pytest.mark.parametrize(
    ("host", "access", "warned"),
    [
        ("0.0.0.0", {}, True),
        ("192.0.2.1", {}, True),
        ("::", {}, True),
        ("some.machine", {}, True),
        ("127.0.0.1", {}, False),
        ("127.1.2.3", {}, False),
        ("::1", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {"keys_file": "keys.yaml"}, False),
        ("0.0.0.0", {"keys_env": "KEYS"}, False),
    ],
)
def test_a_service_that_others_reach_wants_keys(host: str, access: dict[str, str], warned: bool) -> None:
    config = AppConfig.parse({"access": access})
    assert replace(ServeFile.read(SHIPPED), config=config, host=host).is_open_to_others == warned


def test_the_logs_are_as_the_file_says(read: Callable[[object], ServeFile]) -> None:
    assert ServeFile.read(SHIPPED).logs["encoding"] == "JSON"
    application = {"import_path": "deployments.app:build"}
    assert read({"applications": [application]}).logs == {}
    logs = read({"applications": [application], "logging_config": {"log_level": "ERROR"}}).logs
    assert logs == {"log_level": "ERROR"}
    traces = {"enabled": True, "exporter_import_path": "deployments.tracing:otlp"}
    assert read({"applications": [application], "tracing_config": traces}).traces == traces
    with pytest.raises(ConfigError, match="surprise"):
        read({"applications": [application], "tracing_config": {"surprise": 1}})
    for wrong in ({"surprise": 1}, {"log_level": "LOUD"}, {"encoding": "XML"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            read({"applications": [application], "logging_config": wrong})


@pytest.mark.parametrize(
    ("listening", "called"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "[::1]"), ("here", "here")],
)
def test_the_address_that_is_told_is_one_to_open(listening: str, called: str) -> None:
    assert _host(listening) == called


def test_what_is_served_is_told_by_name(make_task: Callable[..., Task]) -> None:
    catalog = build_catalog([make_task("poems"), make_task("sums")], HashingEncoder())
    default = _described(AppConfig(), catalog)
    assert default == f"{BASE_MODEL} with the catalog default: 2 tasks, 0 adapters, version {catalog.version}"
    assert _described(AppConfig(catalog="s3://b/c"), None).endswith("with the catalog s3://b/c")
    own = AppConfig(base_model="org/model", adapters="s3://b/a")
    assert _described(own, None) == "org/model with the adapters in s3://b/a, by name"
