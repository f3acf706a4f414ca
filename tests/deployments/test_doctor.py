"""Each thing that can be wrong with a set-up, on real parts, is found by name; what is sound is no finding."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import Cli
from local_s3 import free_port

import lorauter.adapters.s3
from deployments import doctor
from deployments.doctor import Finding, examine
from lorauter.adapters import open_store
from lorauter.adapters.store import MemoryStore
from lorauter.errors import StoreError, StoreUnavailable

Examine = Callable[..., dict[str, Finding]]
MACHINE = ["Python", "packages", "configuration", "GPU", "compiler"]
SERVICE = ["port", "adapters' store", "catalog's store", "adapter cache", "base model", "encoder", "catalog"]
FITS = ["encoder of the catalog", "base model of the catalog", "adapters of the catalog", "memory"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tests run has no GPU, and may have less free than a service needs."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("ray._private.utils.get_used_memory", lambda: 0)
    monkeypatch.setattr("ray._common.utils.get_system_memory", lambda: 16 << 30)
    monkeypatch.setattr(doctor, "_SHARED_BYTES", 0)


@pytest.fixture
def config(sound: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """`config(**settings)`: the file of a sound service with other settings."""

    def write(**settings: Any) -> Path:
        application = {"import_path": "deployments.app:build", "args": {**sound, **settings}}
        path = tmp_path / "serve_config.yaml"
        path.write_text(yaml.safe_dump({"http_options": {"port": free_port()}, "applications": [application]}))
        return path

    return write


@pytest.fixture
def found(config: Callable[..., Path]) -> Examine:
    """`found(**settings)`: the last finding of each check."""
    return lambda **settings: {finding.check: finding for finding in examine(config(**settings))}


def test_nothing_is_wrong_with_a_sound_service(found: Examine, tmp_path: Path) -> None:
    findings = found()
    assert list(findings) == MACHINE + SERVICE + FITS
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert "written, read and deleted" in findings["adapters' store"].message
    left = [path for path in tmp_path.rglob("*") if "doctor" in path.name]
    assert left == []


@pytest.mark.parametrize(
    ("settings", "check", "said"),
    [
        ({"adapters": "{tmp}/nowhere"}, "adapters' store", "there is no folder .*nowhere; correct adapters"),
        ({"catalog": "{tmp}/nowhere"}, "catalog's store", "there is no folder .*nowhere; correct catalog"),
        ({"base_model": "{tmp}/nowhere"}, "base model", "neither a folder nor a Hugging Face id"),
        ({"cache": {"directory": "{tmp}/file/below"}}, "adapter cache", r"cache\.directory"),
        ({"access": {"keys_file": "{tmp}/nowhere"}}, "keys", "nowhere"),
        ({"engine": {"device": "cuda"}}, "GPU", r"engine\.device is 'cuda'.*finds no GPU"),
        ({"encoder": "{tmp}/other"}, "encoder of the catalog", "encoder"),
        ({"base_model": "{tmp}/other-base"}, "base model of the catalog", "base_model_aliases"),
        ({"adapters": "{tmp}/empty"}, "adapters of the catalog", "holds no adapter"),
        ({"catalog": "{tmp}/empty"}, "catalog", "lorauter catalog build"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_found_and_the_rest_is_looked_at(
    found: Examine, folder: Callable[..., str], tmp_path: Path, settings: dict[str, Any], check: str, said: str
) -> None:
    (tmp_path / "file").write_text("")
    folder(tmp_path / "empty")
    folder(tmp_path / "other", modules=[])
    folder(tmp_path / "other-base", config={"model_type": "llama"})
    findings = found(**json.loads(json.dumps(settings).replace("{tmp}", str(tmp_path))))
    wrong = [finding for finding in findings.values() if finding.status == "wrong"]
    assert [finding.check for finding in wrong] == [check]  # and no cause is told twice
    assert findings[check].message and re.search(said, findings[check].message), findings[check]


def test_a_setting_that_is_wrong_leaves_the_machine_to_be_looked_at(found: Examine) -> None:
    findings = found(engine={"max_batches": 1})
    assert list(findings) == MACHINE
    assert findings["configuration"].status == "wrong"
    assert "engine.max_batches" in findings["configuration"].message


def test_a_port_that_is_taken(config: Callable[..., Path]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        findings = {finding.check: finding for finding in examine(config(), port=port)}
    assert findings["port"].status == "wrong"
    assert f"cannot listen on 127.0.0.1:{port}" in findings["port"].message


@pytest.mark.parametrize(
    ("environment", "status", "said"),
    [
        ({}, "ok", "2 adapters in s3://.*; written, read and deleted"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "wrong", "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "wrong", "AWS_ENDPOINT_URL_S3 right"),
    ],
)
def test_a_stores_credentials_are_tried(
    found: Examine, sound: dict[str, Any], bucket: str, monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str], status: str, said: str,
) -> None:  # fmt: skip
    copied, uri = open_store(f"{bucket}/adapters"), open_store(sound["adapters"])
    for key in uri.files():
        copied.write(key, uri.read(key))
    before = copied.files()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lorauter.adapters.s3, "_client", None)
    findings = found(adapters=f"{bucket}/adapters")
    finding = findings["adapters' store"]
    assert finding.status == status
    assert re.search(said, finding.message), finding.message
    assert ("catalog" in findings) == (status == "ok")  # else it would only say the same
    if not environment:
        assert open_store(f"{bucket}/adapters").files() == before


class Refusing(MemoryStore):
    """A store that refuses one kind of request."""

    def __init__(self, what: str, error: Exception) -> None:
        super().__init__()
        self.what, self.error = what, error

    def write(self, key: str, content: bytes | Path) -> None:
        if self.what == "write":
            raise self.error
        super().write(key, content)

    def delete(self, key: str) -> None:
        if self.what == "delete":
            raise self.error
        super().delete(key)

    def read(self, key: str) -> bytes:
        return b"of yesterday" if self.what == "read" else super().read(key)


def test_a_store_that_may_only_be_read_is_enough_to_serve() -> None:
    assert "not written" in doctor._round_trip(Refusing("write", StoreError("403", uri="s3://b")))


@pytest.mark.parametrize(
    ("store", "said"),
    [
        (Refusing("write", StoreUnavailable("down", uri="s3://b")), "down"),
        (Refusing("delete", StoreError("403", uri="s3://b")), "cannot be deleted"),
        (Refusing("read", StoreError("", uri="")), "reads otherwise"),
    ],
    ids=["down", "keeps", "stale"],
)
def test_a_store_that_does_otherwise_than_it_was_asked(store: MemoryStore, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        doctor._round_trip(store)


def test_packages_that_do_not_fit_are_named_with_what_is_needed(
    found: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = ["numpy<2,>=1", "lorauter-which-nobody-has>=3", "torch", "matplotlib>=99; extra == 'evaluation'"]
    about = Message()
    about["Requires-Python"] = ">=3.11"
    for line in needed:
        about["Requires-Dist"] = line
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: about)
    finding = found()["packages"]
    assert finding.status == "wrong"
    assert "numpy is 2" in finding.message
    assert "lorauter-which-nobody-has is not installed, needed is >=3" in finding.message
    assert "torch" not in finding.message
    assert "matplotlib" not in finding.message


def test_another_python_is_too_old(found: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    finding = found()["Python"]
    assert finding.status == "wrong"
    assert "3.10.4" in finding.message
    assert ">=3.11" in finding.message


@pytest.mark.parametrize(
    ("free", "status", "said"),
    [(2, "wrong", "needed are about 4.0 GiB"), (6, "warning", "adapter_bytes"), (9, "ok", "")],
)
def test_memory(found: Examine, monkeypatch: pytest.MonkeyPatch, free: int, status: str, said: str) -> None:
    monkeypatch.setattr("ray._common.utils.get_system_memory", lambda: free << 30)
    finding = found()["memory"]
    assert finding.status == status
    assert said in finding.message


def test_without_a_compiler_it_serves_more_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    finding = next(found for found in examine(Path("nowhere.yaml")) if found.check == "compiler")
    assert finding.status == "warning"
    assert "g++" in finding.message


def test_a_gpu_is_described_and_a_driver_without_pytorchs_cuda_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gpu() -> Finding:
        return next(found for found in examine(Path("nowhere.yaml")) if found.check == "GPU")

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert gpu().status == "warning"
    assert torch.__version__ in gpu().message
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpu() == Finding("GPU", "ok", "2 of H100, the first with 70.0 GiB of 80.0 GiB free")


def test_the_command_prints_a_line_each_and_its_status_is_for_scripts(
    cli: Cli, config: Callable[..., Path], tmp_path: Path
) -> None:
    sound = cli("doctor", "--config", config())
    assert sound.code == 0
    lines = sound.out.splitlines()
    assert len(lines) == len(MACHINE + SERVICE + FITS)
    assert all(line.startswith("ok      ") for line in lines)
    broken = config(adapters=str(tmp_path / "nowhere"))
    wrong = cli("doctor", "--config", broken)
    assert wrong.code == 1
    assert [line for line in wrong.out.splitlines() if line.startswith("wrong   adapters' store: there is no folder")]
    as_json = cli("doctor", "--config", broken, "--json")
    assert as_json.code == 1
    said = json.loads(as_json.out)
    assert said["ok"] is False
    assert {row["check"]: row["status"] for row in said["findings"]}["adapters' store"] == "wrong"
    assert cli("doctor", "--config", tmp_path / "none.yaml").code == 1
