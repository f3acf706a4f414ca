from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from deployments.config import AccessSettings, ApiSettings, AppConfig, CacheSettings, HostSettings
from lorauter.engine import EngineConfig
from lorauter.errors import ConfigError
from lorauter.routing import RoutingConfig

SECTIONS = ["routing", "engine", "host", "cache", "compose", "api", "access"]


def refusal(args: object) -> str:
    with pytest.raises(ConfigError) as caught:
        AppConfig.parse(args)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"adaptors": "x"}, "unknown setting adaptors"),
        *[({section: {"surprise": 1}}, f"unknown setting {section}.surprise") for section in SECTIONS],
        *[({section: 5}, f"setting {section}: ") for section in SECTIONS],
        *[
            ({"api": {"listen": at}}, "setting api.listen")
            for at in ("", "x", "1", ":1", "a:b", "::1:80", "h:1/a", "h :1")
        ],
        ({"base_model": 5}, "setting base_model: "),
        ({"base_model_aliases": "one"}, "setting base_model_aliases: "),
        ({"routing": {"top_k": 0}}, "setting routing.top_k: "),
        ({"routing": {"temperature": float("nan")}}, "setting routing.temperature: "),
        *[
            ({"engine": {name: 0}}, f"setting engine.{name}: ")
            for name in (field.name for field in fields(EngineConfig))
            if name not in ("device", "dtype", "prefix_reuse", "spare_bytes")
        ],
        ({"engine": {"spare_bytes": -1}}, "setting engine.spare_bytes: "),
        ({"engine": {"max_model_len": 1}}, "setting engine.max_model_len: "),
        ({"engine": {"max_batch": 2.5}}, "setting engine.max_batch: "),
        ({"engine": {"max_slowdown": 1}}, "setting engine.max_slowdown"),
        ({"host": {"wait_s": float("inf")}}, "setting host.wait_s"),
        ({"host": {"adapter_bytes": 0}}, "setting host.adapter_bytes"),
        ({"engine": {"step_timeout_s": float("nan")}}, "setting engine.step_timeout_s"),
        ({"api": {"first_token_s": float("nan")}}, "setting api.first_token_s: "),
        ({"engine": {"dtype": "int8"}}, "setting engine.dtype: "),
        ({"cache": {"disk_bytes": "many"}}, "setting cache.disk_bytes: "),
        ({"cache": {"downloads": 0}}, "setting cache.downloads: "),
        ({"catalog_refresh_s": float("nan")}, "setting catalog_refresh_s: "),
        ({"cache": {"downloads": 65}}, "setting cache.downloads: "),
        ({"catalog_refresh_s": 0}, "setting catalog_refresh_s: "),
        ({"catalog_refresh_s": float("inf")}, "setting catalog_refresh_s: "),
        ({"api": {"max_adapter_bytes": 0}}, "setting api.max_adapter_bytes: "),
        ({"api": {"route_on": "all"}}, "setting api.route_on: "),
        ({"api": {"default_temperature": 3}}, "setting api.default_temperature: "),
        ({"api": {"max_adapters": 0}}, "setting api.max_adapters: "),
        ({"access": {"keys_file": "a", "keys_env": "B"}}, "give keys_file or keys_env, not both"),
        ([], "dictionary"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(args: object, named: str) -> None:
    assert named in refusal(args)


def test_every_wrong_setting_is_named_with_what_it_got() -> None:
    message = refusal({"surprise": 1, "engine": {"max_batch": 0, "max_queue": "x"}, "api": {"max_adapters": -3}})
    assert message.count(";") == 3
    for part in ("surprise", "engine.max_batch", "(got 0)", "engine.max_queue", '(got "x")', "(got -3)"):
        assert part in message


def test_a_message_stays_short() -> None:
    long = "words " * 10_000
    assert len(refusal({"api": {"route_on": long, "max_adapters": [long], long: 1}, long: {}})) < 1000
    for count in (100, 100_000):
        flood = refusal({f"setting-{i}": i for i in range(count)})
        assert len(flood) < 1000
        assert "settings are wrong" in flood


def test_defaults_and_documentation() -> None:
    config = AppConfig.parse({})
    assert config == AppConfig()
    assert {config.base_model, config.encoder, config.adapters, config.catalog} == {"default"}
    assert config.routing == RoutingConfig()
    assert (config.api.route_on, config.api.default_temperature) == ("last_user_message", 0.0)
    for settings in (EngineConfig, HostSettings, CacheSettings, ApiSettings, AccessSettings, AppConfig):
        documented = settings.__doc__ or ""
        names = settings.model_fields if issubclass(settings, BaseModel) else [f.name for f in fields(settings)]
        missing = [name for name in names if f"{name}:" not in documented]
        assert [name for name in missing if name not in SECTIONS] == []


def test_settings_are_frozen_and_survive_json() -> None:
    config = AppConfig.parse({"engine": {"threads": 2}, "base_model_aliases": ["a", "b"]})
    for settings in [config, *(getattr(config, section) for section in SECTIONS)]:
        name = next(iter(type(settings).model_fields if isinstance(settings, BaseModel) else vars(settings)))
        with pytest.raises((ValidationError, FrozenInstanceError)):
            setattr(settings, name, getattr(settings, name))
    assert AppConfig.parse(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ("pool", "{root}/pool"),
        ("./pool", "{root}/pool"),
        ("./not-yet", "{root}/not-yet"),
        ("../beside", "{root.parent}/beside"),
        ("/somewhere/else", "/somewhere/else"),
        ("default", "default"),
        ("s3://bucket/pool", "s3://bucket/pool"),
        ("file:///pool", "file:///pool"),
        ("org/model", "org/model"),
    ],
)
def test_relative_folders_become_absolute(tmp_path: Path, given: str, resolved: str) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "default").mkdir()  # the word keeps its meaning all the same
    config = AppConfig(base_model=given, encoder=given, adapters=given, catalog=given, routing={"top_k": 7})  # type: ignore[arg-type]
    absolute = config.with_absolute_paths(tmp_path)
    expected = resolved.format(root=tmp_path)
    for name in ("base_model", "encoder", "adapters", "catalog"):
        assert getattr(absolute, name) == expected
        assert getattr(config, name) == given
    assert absolute.routing.top_k == 7
    assert absolute.with_absolute_paths(Path("/")) == absolute


def test_the_file_of_keys_is_found_from_any_folder(tmp_path: Path) -> None:
    config = AppConfig(access=AccessSettings(keys_file="keys.yaml")).with_absolute_paths(tmp_path)
    assert config.access.keys_file == str(tmp_path / "keys.yaml")
    assert config.access.closed
    assert AppConfig(access=AccessSettings(keys_env="KEYS")).with_absolute_paths(tmp_path).access.closed
    assert not AppConfig().access.closed


@pytest.mark.parametrize("path", ["~nobody-has-this-home/x", "./\x00"])
@pytest.mark.parametrize("setting", ["adapters", "cache", "access"])
def test_a_path_that_no_file_has_is_told(tmp_path: Path, setting: str, path: str) -> None:
    args = {"adapters": path, "cache": {"directory": path}, "access": {"keys_file": path}}
    with pytest.raises(ConfigError, match="can be no file or folder"):
        AppConfig.parse({setting: args[setting]}).with_absolute_paths(tmp_path)


@pytest.mark.parametrize("at", ["127.0.0.1:8000", "[::1]:80", "localhost:1", "a-host.example:65535"])
def test_where_the_ingress_may_listen(at: str) -> None:
    assert ApiSettings(listen=at).listen == at
