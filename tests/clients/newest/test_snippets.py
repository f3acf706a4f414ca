"""The files of examples/clients, loaded and run as their clients do; tests/test_client_snippets.py reads the others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm

SNIPPETS = Path(__file__).resolve().parents[3] / "examples" / "clients"
WRITTEN = "http://127.0.0.1:8000"


def snippet(name: str, url: str) -> str:
    """A file, whose service is the one under test."""
    text = (SNIPPETS / name).read_text()
    assert WRITTEN in text
    return text.replace(WRITTEN, url)


def test_litellms_models_answer(url: str, review: str, answer: str) -> None:
    config = yaml.safe_load(snippet("litellm.yaml", url))
    litellm.drop_params = config["litellm_settings"]["drop_params"]
    router = litellm.Router(model_list=config["model_list"], num_retries=0)  # what the proxy makes of them
    asked: list[Any] = [{"role": "user", "content": review}]
    assert router.completion("lorauter", asked).choices[0].message.content == answer
    assert router.completion("base", asked, max_tokens=4).choices[0].message.content
    assert len(router.embedding("lorauter-embeddings", input=[review]).data[0]["embedding"]) == 384


def test_llm_asks_the_models_of_its_file(url: str, review: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(snippet("extra-openai-models.yaml", url))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    models = llm("models")
    assert "lorauter" in models
    assert "lorauter-base" in models
    assert llm("-m", "lorauter", review).strip() == answer
    assert llm("-m", "lorauter", "--no-stream", review).strip() == answer
    good = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}
    schema = {**good, "additionalProperties": False}  # else there may be more in it
    assert json.loads(llm("-m", "lorauter", "--schema", json.dumps(schema), review)).keys() == {"good"}


def test_langchains_script_prints_its_answers(url: str, answer: str) -> None:
    environment = {**os.environ, "LORAUTER_URL": url}
    command = [sys.executable, str(SNIPPETS / "langchain_chat.py")]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr
    whole, streamed, structured, told = ran.stdout.splitlines()
    assert whole == streamed == told == answer
    assert structured in ("positive=True", "positive=False")


@pytest.mark.parametrize("role", ["chat", "embed"])
def test_continues_models_answer_where_it_asks(url: str, review: str, answer: str, role: str) -> None:
    """Continue's `openai` provider asks `chat/completions` and `embeddings` below `apiBase`."""
    openai = pytest.importorskip("openai")
    config = yaml.safe_load(snippet("continue.yaml", url))
    [model] = [model for model in config["models"] if role in model["roles"]]
    client = openai.OpenAI(base_url=model["apiBase"], api_key=model["apiKey"], max_retries=0)
    if role == "embed":
        assert len(client.embeddings.create(model=model["model"], input=[review]).data[0].embedding) == 384
        return
    asked = [{"role": "user", "content": review}]
    pieces = client.chat.completions.create(model=model["model"], messages=asked, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == answer


def test_open_webui_finds_its_models_and_they_answer(url: str, review: str, answer: str) -> None:
    """Open WebUI lists `models` below its base URL, and streams `chat/completions` with usage."""
    openai = pytest.importorskip("openai")
    lines = (SNIPPETS / "open-webui" / "open-webui.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    base = settings["OPENAI_API_BASE_URL"].replace("http://host.docker.internal:8000", url)
    client = openai.OpenAI(base_url=base, api_key=settings["OPENAI_API_KEY"], max_retries=0)
    assert settings["DEFAULT_MODELS"] in {model.id for model in client.models.list()}
    pieces = client.chat.completions.create(
        model=settings["DEFAULT_MODELS"],
        messages=[{"role": "user", "content": review}],
        stream=True,
        stream_options={"include_usage": True},
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == answer
