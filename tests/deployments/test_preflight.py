"""What is wrong is told before anything starts, with what to do; the causes one by one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorauter.adapters.s3
from deployments.config import AppConfig
from deployments.live_catalog import kept_folder
from deployments.preflight import check_device, preflight
from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import Catalog, with_shown
from lorauter.catalog.shown import Help, ShownExamples
from lorauter.engine import cpu_kernels
from lorauter.errors import LorauterError

Check = Callable[..., list[str]]


@pytest.fixture
def check(sound: dict[str, Any]) -> Check:
    """`check(**settings)`: what is warned of in a sound service with other settings."""

    def check(**settings: Any) -> list[str]:
        warned: list[str] = []
        preflight(AppConfig.parse({**sound, **settings}), warned.append)
        return warned

    return check


def test_a_sound_service_passes_without_a_word(check: Check) -> None:
    assert check() == []


# What is wrong, by setting; {tmp} is the test's folder.
CAUSES: list[tuple[dict[str, Any], str]] = [
    ({"access": {"keys_file": "{tmp}/nowhere.yaml"}}, "nowhere.yaml"),
    ({"access": {"keys_file": "{tmp}/broken.yaml"}}, "keys by their place from 0: 0.sha256"),
    ({"access": {"keys_file": "{tmp}/text"}}, "text"),
    ({"access": {"keys_env": "NO_SUCH_VARIABLE"}}, "NO_SUCH_VARIABLE is not set"),
    ({"cache": {"directory": "{tmp}/text"}}, "cache.directory"),
    ({"cache": {"directory": "{tmp}/text/below"}}, "cache.directory"),
    ({"base_model": "{tmp}/nowhere"}, "neither a folder nor a Hugging Face id"),
    ({"base_model": "{tmp}/empty"}, "no config.json"),
    ({"base_model": "{tmp}/malformed"}, "cannot be loaded"),
    ({"base_model": "{tmp}/gpt2"}, "served are LlamaForCausalLM"),
    ({"base_model": "org/no-such-model"}, "mind the spelling"),
    ({"encoder": "{tmp}/nowhere"}, "neither a folder nor a Hugging Face id"),
    ({"encoder": "{tmp}/empty"}, "no modules.json or config.json"),
    ({"encoder": "no-such-encoder"}, "mind the spelling"),
    ({"encoder": "{tmp}/other"}, "use that encoder or build the catalog anew"),
    ({"catalog": "{tmp}/nowhere"}, "lorauter catalog build"),
    ({"catalog": "{tmp}/text"}, "lorauter catalog build"),
    ({"catalog": "ftp://host"}, "unknown scheme"),
    ({"catalog": "{tmp}/damaged"}, "publish it again"),
    ({"adapters": "{tmp}/nowhere"}, "holds no adapter"),
    ({"adapters": "{tmp}/others"}, "which holds films"),
    ({"base_model": "{tmp}/another-base"}, "base_model_aliases"),
]


@pytest.mark.parametrize(("settings", "said"), CAUSES, ids=[said for _, said in CAUSES])
def test_a_cause_is_told(
    check: Check,
    tmp_path: Path,
    folder: Callable[..., str],
    make_adapter: Callable[..., Path],
    settings: dict[str, Any],
    said: str,
) -> None:
    (tmp_path / "broken.yaml").write_text("- {name: a, sha256: no-hash}")
    (tmp_path / "text").write_text("- [")
    folder(tmp_path / "empty")
    folder(tmp_path / "malformed", config="{")
    folder(tmp_path / "gpt2", config={"model_type": "gpt2"})
    folder(tmp_path / "another-base", config={"model_type": "llama"})
    folder(tmp_path / "other", modules=[])
    make_adapter(tmp_path / "others", "films")
    version = (tmp_path / "catalog" / "CURRENT").read_text()
    folder(tmp_path / "damaged" / version, catalog={})
    (tmp_path / "damaged" / "CURRENT").write_text(version)
    settings = json.loads(json.dumps(settings).replace("{tmp}", str(tmp_path)))
    with pytest.raises(LorauterError) as caught:
        check(**settings)
    assert said in str(caught.value)


@pytest.mark.parametrize("place", ["catalog", "adapters"])
@pytest.mark.parametrize(
    ("environment", "uri", "said"),
    [
        ({}, "s3://no-such-bucket", "there is no bucket 'no-such-bucket'; create it, or correct the URI"),
        ({}, "s3://not a bucket", "Invalid bucket name"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, None, "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": None}, None, "no credentials were found"),
    ],
)
def test_what_a_store_refuses_is_told(
    check: Check,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: str,
    environment: dict[str, str | None],
    uri: str | None,
    said: str,
) -> None:
    nowhere = {name: str(tmp_path / "none") for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")}
    for name, value in {**nowhere, "AWS_EC2_METADATA_DISABLED": "true", **environment}.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(lorauter.adapters.s3, "_client", None)
    with pytest.raises(LorauterError) as caught:
        check(**{place: f"{uri or bucket}/{place}"})
    assert said in str(caught.value)


def test_a_store_that_is_down_stops_a_first_start_and_not_another(
    check: Check, s3: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{bucket}/catalog"
    for key in open_store(tmp_path / "catalog").files():
        open_store(uri).write(key, tmp_path / "catalog" / key)
    assert check(catalog=uri) == []
    s3.stop()
    try:
        assert "does not answer" in check(adapters=f"{bucket}/adapters")[0]  # caches may have them
        with pytest.raises(LorauterError, match="AWS_ENDPOINT_URL_S3"):
            check(catalog=uri)
        kept_folder(uri).parent.mkdir(parents=True)
        (tmp_path / "catalog").rename(kept_folder(uri))  # as a replica leaves it
        [warned] = check(catalog=uri)
        assert "which was in use here last, serves until that is mended" in warned
    finally:
        s3.start()


def test_some_missing_adapters_are_told_and_can_be_lived_with(check: Check, tmp_path: Path) -> None:
    AdapterRepository(open_store(tmp_path / "adapters")).remove("sums")
    [warned] = check()
    assert warned.endswith("though the catalog serves them: sums")


def test_examples_that_nobody_has_asked_for_are_told(check: Check, tmp_path: Path) -> None:
    [said] = check(routing={"examples": 3})
    assert "lorauter catalog build --examples" in said
    catalog = Catalog.load(tmp_path / "catalog")
    no = Help(None, 0.0, 1.0)
    with_shown(catalog, {"sums": ShownExamples(3, no, no, (9, 9))}).save(tmp_path / "catalog")
    assert check(routing={"examples": 3}) == []


def test_a_base_model_of_another_name_is_the_catalogs_by_an_alias(
    check: Check, folder: Callable[..., str], tmp_path: Path
) -> None:
    other = folder(tmp_path / "renamed", config={"model_type": "llama"})
    assert check(base_model=other, base_model_aliases=["tiny-base"]) == []


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LorauterError, match=r"engine\.device is 'cuda'.*finds no GPU"):
        check_device("cuda", "auto")


def test_without_a_compiler_there_is_a_warning_of_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cpu_kernels.load_kernels.cache_clear()
    try:
        check_device("auto", "float32")
    finally:
        cpu_kernels.load_kernels.cache_clear()
    [record] = caplog.records
    assert "install a C++ compiler, or name one in CXX" in record.getMessage()
