"""examples/clients, read as far as no client is needed; `make clients` runs them with their clients."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import yaml

from lorauter.adapters import adapter_folders

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = ROOT / "examples" / "clients"
SERVED = {"lorauter", "base"} | {folder.name for folder in adapter_folders(ROOT / "examples" / "adapters")}
URL = "http://127.0.0.1:8000/v1"


def read(name: str) -> Any:
    return yaml.safe_load((SNIPPETS / name).read_text())


def test_litellms_models_are_served() -> None:
    for model in read("litellm.yaml")["model_list"]:
        provider, name = model["litellm_params"]["model"].split("/")
        assert (provider, model["litellm_params"]["api_base"]) == ("openai", URL)
        assert name in SERVED


def test_llms_models_are_served() -> None:
    models = read("extra-openai-models.yaml")
    assert {model["model_name"] for model in models} <= SERVED
    assert len({model["model_id"] for model in models}) == len(models)
    known = {"model_id", "model_name", "api_base", "supports_schema", "supports_tools"}
    assert all(model["api_base"] == URL and model.keys() == known for model in models)


def test_continues_models_are_served_and_have_what_its_schema_asks_for() -> None:
    config = read("continue.yaml")
    assert {"name", "version", "schema"} <= config.keys()
    assert config["schema"] == "v1"
    roles = {"chat", "autocomplete", "embed", "rerank", "edit", "apply", "summarize"}
    for model in config["models"]:
        assert (model["provider"], model["apiBase"]) == ("openai", URL)
        assert model["model"] in SERVED
        assert set(model["roles"]) <= roles


def test_open_webui_asks_the_service_on_its_host() -> None:
    compose = read("open-webui/compose.yaml")["services"]["open-webui"]
    [env] = compose["env_file"]
    lines = (SNIPPETS / "open-webui" / env).read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert settings["OPENAI_API_BASE_URL"] == URL.replace("127.0.0.1", "host.docker.internal")
    assert "host.docker.internal:host-gateway" in compose["extra_hosts"]
    assert settings["DEFAULT_MODELS"] in SERVED
    assert compose["ports"][0].startswith("127.0.0.1:")


def test_langchains_script_names_what_is_served() -> None:
    tree = ast.parse((SNIPPETS / "langchain_chat.py").read_text())
    models = [
        keyword.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "model" and isinstance(keyword.value, ast.Constant)
    ]
    assert models and set(models) <= SERVED


def test_every_snippet_is_tried_and_the_page_names_them_all() -> None:
    files = {path.relative_to(SNIPPETS).as_posix() for path in SNIPPETS.rglob("*") if path.is_file()}
    tried = Path(__file__).read_text() + (ROOT / "tests" / "clients" / "newest" / "test_snippets.py").read_text()
    page = (ROOT / "docs" / "clients.md").read_text()
    for file in files:
        assert file.rpartition("/")[2] in tried, file
        assert f"examples/clients/{file}" in page or f"examples/clients/{file.partition('/')[0]}" in page, file
    assert not re.search(r"\b(?:sk|hf)-?_?\w{20,}", "".join((SNIPPETS / file).read_text() for file in files))
