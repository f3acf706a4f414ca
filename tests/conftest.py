"""Fixtures that every test may use: a real S3 server, tiny PEFT adapters, tiny tasks."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import boto3
import obstore.store
import pytest
import torch
import typer.main
from command_line import Cli, Ran
from fake_states import HashingStates
from hub_server import HubServer
from local_s3 import LocalS3
from safetensors.torch import save_file

import lorauter.adapters.s3
from lorauter.adapters.clouds import CloudStore
from lorauter.adapters.store import MemoryStore, ObjectStore, open_store
from lorauter.adapters.weights import CONFIG_FILE, TARGETS, WEIGHTS_FILE
from lorauter.encoder import HashingEncoder
from lorauter.errors import StoreUnavailable
from lorauter.tasks import Example, Task
from lorauter_cli.main import main

pytest_plugins = ["side_by_side"]
HIDDEN = 8
_command = cache(typer.main.get_command)  # made once: it takes longer than most commands
torch.set_num_threads(1)  # of this process: workers share the cores, and small tensors gain nothing


class S3Server(LocalS3):
    """The server, in which tests make buckets as they need them."""

    def bucket(self, name: str) -> str:
        """Make an empty bucket; returns its URI. The server must run."""
        self._client.create_bucket(Bucket=name)
        return f"s3://{name}"

    @cached_property
    def _client(self) -> Any:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.env["AWS_REGION"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
        )


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli(*arguments)`: run `lorauter` in this process to its end, with encoder and states that need no model."""
    monkeypatch.setattr("lorauter.defaults.load_encoder", lambda name: HashingEncoder())
    monkeypatch.setattr("lorauter.defaults.load_states", lambda name: HashingStates())
    monkeypatch.setattr("typer.main.get_command", _command)

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["lorauter", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return Ran(caught.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The one server of the session, running. A test that stops it starts it again."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    lorauter.adapters.s3._client = None  # the next one, for this process, takes its address from `env`
    yield server
    server.stop()
    lorauter.adapters.s3._client = None


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, running, with this process's AWS settings pointing at it."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    s3_server.start()
    return s3_server


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path) -> str:
    """The URI of an empty bucket."""
    return s3.bucket(tmp_path.name.replace("_", "-").lower().strip("-") + "-bucket")


@pytest.fixture
def hub_server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hugging Face hub, empty, that this process and those it starts ask; with an empty cache, and no token."""
    from huggingface_hub import constants

    server, home = HubServer(), tmp_path_factory.mktemp("hub")
    server.start()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    yield server
    server.stop()


@pytest.fixture(params=["memory", "directory", "s3", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of every kind in turn."""
    if request.param == "memory":
        return MemoryStore()
    if request.param == "gs":  # which az:// is too, but for what talks to it
        objects = obstore.store.MemoryStore()
        return CloudStore("gs://bucket/below", (objects, objects))
    return open_store(
        tmp_path / "store" if request.param == "directory" else request.getfixturevalue("bucket") + "/below"
    )


@pytest.fixture
def break_writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[ObjectStore, int], None]:
    """`break_writes(store, n)`: the store takes n more writes and refuses the others."""

    def break_after(store: ObjectStore, allowed: int) -> None:
        left = [None] * allowed

        def write(key: str, content: bytes | Path) -> None:
            if not left:
                raise StoreUnavailable("no more writes", uri=store.uri)
            left.pop()
            type(store).write(store, key, content)

        monkeypatch.setattr(store, "write", write)

    return break_after


def _make_adapter(
    directory: Path,
    name: str,
    *,
    rank: int = 2,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    layers: int = 1,
    base: str = "org/tiny-base",
    fill: float | None = None,
    dtype: torch.dtype = torch.float32,
    change: Callable[[dict[str, torch.Tensor]], object] | None = None,
    **config: object,
) -> Path:
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    noise = torch.Generator().manual_seed(zlib.crc32(f"{name} {rank}".encode()))
    tensors = {}
    for layer in range(layers):
        for target in targets:
            block = "self_attn" if target in TARGETS[:4] else "mlp"
            for side, shape in (("A", (rank, HIDDEN)), ("B", (HIDDEN, rank))):
                tensor = torch.randn(shape, generator=noise) if fill is None else torch.full(shape, fill)
                key = f"base_model.model.model.layers.{layer}.{block}.{target}.lora_{side}.weight"
                tensors[key] = tensor.to(dtype)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        **config,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    return folder


@pytest.fixture
def make_adapter() -> Callable[..., Path]:
    """`make_adapter(directory, name, *, rank, targets, layers, base, fill, dtype, change, **config)`.

    Writes a PEFT folder of square (8, 8) layers with scaling 2 and returns it. `fill` makes every tensor
    constant; `change` edits the dictionary of tensors; `config` adds to adapter_config.json.
    """
    return _make_adapter


@pytest.fixture
def make_task() -> Callable[..., Task]:
    """`make_task(name, *inputs, domain="tests")`: a task with these validation inputs, or a few of its own words."""

    def make(name: str, *inputs: str, domain: str = "tests") -> Task:
        inputs = inputs or (f"{name} first question", f"another {name} question")
        return Task(name, domain, "em", tuple(Example(text, f"{name} answer") for text in inputs))

    return make
