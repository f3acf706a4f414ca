"""GPUs are for who asks for them; on a machine without any, by what a process would see of one."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import ray

import deployments.batch.stages
import deployments.embedder
import deployments.model
import deployments.preflight
import deployments.retriever
from deployments.app import assemble
from deployments.batch.config import BatchConfig
from deployments.batch.stages import AnswerStage, RouteStage
from deployments.config import AppConfig
from deployments.devices import engine_gpus, gpu_bytes, own_gpus_only
from deployments.embedder import QueryEmbedder
from lorauter.encoder import HashingEncoder
from lorauter.errors import ConfigError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(given, there)`: a process to which Ray has given these GPUs, in a cluster that has as many."""

    def make(given: list[str], there: float = 2) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(given) or "0,1")  # Ray leaves it alone for no GPU
        context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": given, "TPU": []})
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": there})

    return make


def test_what_ray_has_not_given_is_hidden(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(given=[])
    own_gpus_only()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    machine(given=["1"])
    own_gpus_only()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    own_gpus_only()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1", "outside of Ray a process has what it is started with"


class Found(Exception):
    """What was visible when something was loaded that takes the first GPU it sees."""


def look(*_: Any, **__: Any) -> Any:
    raise Found(f"visible: {os.environ['CUDA_VISIBLE_DEVICES']}.")


@pytest.mark.parametrize(("given", "visible"), [([], ""), (["1"], "1")])
@pytest.mark.parametrize("part", ["QueryEmbedder", "RouteStage", "AnswerStage"])
def test_who_could_take_a_gpu_takes_its_own_alone(
    part: str, given: list[str], visible: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(given)
    monkeypatch.setattr(deployments.embedder, "load_encoder", look)
    monkeypatch.setattr(deployments.embedder, "join_serve_logs", lambda: None)
    monkeypatch.setattr("sys.setswitchinterval", lambda _: None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for name in ("load_encoder", "start_engine"):
        monkeypatch.setattr(deployments.batch.stages, name, look)
    monkeypatch.setattr(deployments.batch.stages, "NodeCache", lambda spec: None)
    monkeypatch.setattr(deployments.batch.stages.Catalog, "load", lambda uri, version: SimpleNamespace(states=None))
    start: dict[str, Any] = {
        "QueryEmbedder": lambda: QueryEmbedder.func_or_class("default"),
        "RouteStage": lambda: RouteStage(BatchConfig(), "v1"),
        "AnswerStage": lambda: AnswerStage(BatchConfig()),
    }
    with pytest.raises(Exception) as caught:
        start[part]()
    assert str(caught.value).endswith(f"visible: {visible}.")


def test_the_start_looks_at_an_encoder_on_the_cpu(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process that starts the service, which would keep its GPU memory as long as it serves."""
    devices = []

    def load(encoder: str, *, device: str | None = None) -> HashingEncoder:
        devices.append(device)
        return HashingEncoder()

    monkeypatch.setattr(deployments.preflight, "load_encoder", load)
    for name in ("_check_base_model", "_check_writable", "check_base_model", "check_adapters"):
        monkeypatch.setattr(deployments.preflight, name, lambda *_: None)
    catalog = SimpleNamespace(encoder="another", states=None, check_encoder=lambda encoder: None)
    monkeypatch.setattr(deployments.preflight, "_read_catalog", lambda *_: catalog)
    deployments.preflight.preflight(AppConfig(adapters="s3://b/a", catalog="s3://b/c"), lambda _: None)
    assert devices == ["cpu"]


@pytest.mark.parametrize(
    ("device", "asked", "there", "engines", "gpus"),
    [
        ("auto", None, 0, 1, 0),
        ("auto", None, 2, 1, 1),
        ("auto", None, 2, 2, 1),
        ("auto", None, 2, 3, 0),
        ("auto", 0, 2, 1, 0),
        ("auto", 0.5, 2, 1, 0.5),
        ("cpu", None, 2, 1, 0),
        ("cuda", None, 0, 1, 1),
        ("cuda:0", None, 2, 1, 1),
        ("cuda", 2, 2, 1, 2),
    ],
)
def test_an_engine_asks_ray_for_the_gpu_that_it_computes_on(
    device: str, asked: float | None, there: float, engines: int, gpus: float, machine: Any
) -> None:
    machine([], there)
    assert engine_gpus(device, asked, engines=engines, setting="some.gpus") == gpus


def test_an_engine_on_a_gpu_that_asks_for_none_is_refused(machine: Any) -> None:
    machine([])
    with pytest.raises(ConfigError, match=r"engine\.device is 'cuda', but some\.gpus is 0; give it 1"):
        engine_gpus("cuda", 0, setting="some.gpus")
    config = AppConfig.parse({"adapters": "s3://b/a", "engine": {"device": "cuda"}})
    with pytest.raises(ConfigError, match="num_gpus"):
        assemble(config, {"LoraModel": {"ray_actor_options": {"num_gpus": 0}}})


def test_no_deployment_but_the_model_and_the_encoder_takes_a_gpu_unasked(machine: Any) -> None:
    machine([])
    config = AppConfig.parse({"adapters": "s3://b/a", "catalog": "s3://b/c"})

    def gpus(**overrides: Any) -> dict[str, float]:
        app = assemble(config, overrides)
        found = {}
        waiting = [app._bound_deployment]
        while waiting:
            part = waiting.pop()
            found[part.name] = (part.ray_actor_options or {}).get("num_gpus") or 0
            waiting += [arg._bound_deployment for arg in part.init_args if hasattr(arg, "_bound_deployment")]
        return found

    assert {name: number for name, number in gpus().items() if number} == {"LoraModel": 0.9, "QueryEmbedder": 0.1}
    given = gpus(
        QueryEmbedder={"ray_actor_options": {"num_gpus": 0.1}}, LoraModel={"ray_actor_options": {"num_gpus": 0}}
    )
    assert {name: number for name, number in given.items() if number} == {"QueryEmbedder": 0.1}


class Nvml:
    """GPUs of so many GiB, of which some are in parts."""

    class NVMLError(Exception):
        """As there is no driver, say."""

    def __init__(self, *sizes: int, parts: tuple[int, ...] = ()) -> None:
        self._sizes, self._parts = sizes, parts

    def nvmlInit(self) -> None:  # noqa: N802 (its name)
        if not self._sizes:
            raise self.NVMLError

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._sizes)

    def nvmlDeviceGetHandleByIndex(self, i: int) -> int:  # noqa: N802
        return i

    def nvmlDeviceGetMigMode(self, i: int) -> tuple[int, int]:  # noqa: N802
        if not self._parts:
            raise self.NVMLError
        return int(i in self._parts), 0

    def nvmlDeviceGetMemoryInfo(self, i: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=self._sizes[i] << 30)


@pytest.mark.parametrize(
    ("nvml", "gib"), [(Nvml(), 0), (Nvml(80), 80), (Nvml(80, 24), 24), (Nvml(80, 80, parts=(1,)), 0)]
)
def test_how_large_gpus_are(monkeypatch: pytest.MonkeyPatch, nvml: Nvml, gib: int) -> None:
    monkeypatch.setattr("deployments.devices.pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_bytes() == gib << 30
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-4711")
    assert gpu_bytes() == 0
