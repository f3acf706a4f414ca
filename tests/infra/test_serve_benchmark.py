"""benchmarks/serve.py: what it serves, what it asks, and how its figures are told."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import serve
import yaml
from aiohttp import web
from clients import Clients

from deployments.launch import ServeFile


def test_it_serves_what_is_shipped_with_as_many_rows_as_there_are_clients(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(serve.configuration(8123, 24, {"base_model": "elsewhere"})))
    served, shipped = ServeFile.read(file), ServeFile.read(serve.ROOT / "serve_config.yaml")
    assert served.port == 8123
    assert served.config.engine.max_batch == 24
    assert served.config.base_model == "elsewhere"
    assert served.overrides == shipped.overrides
    assert served.config.model_copy(update={"engine": shipped.config.engine, "base_model": "default"}) == shipped.config


def test_no_prompt_is_asked_twice() -> None:
    prompts = serve.Prompts()
    taken = [text for count in (32, 400, 5, 363) for text in prompts.take(count)]
    assert len(set(taken)) == len(taken) == 800
    assert all(map(str.strip, taken))


def test_answers_first_tokens_and_errors_are_noted() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        text = body["messages"][0]["content"]
        if text == "fails":
            return web.Response(status=503, text="down")
        if not body["stream"]:
            timed = {"lorauter": {"timings": {"embed_s": 0.25}}} if text == "b" else {}
            return web.json_response({"choices": [{"message": {"content": text.upper()}}], **timed})
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": []}\n\n')
        await response.write(b"data: [DONE]\n\n" if text != "breaks" else b"data: {}\n\n")
        return response

    def load(texts: list[str], *, stream: bool) -> list[dict[str, Any]]:
        return [{"messages": [{"role": "user", "content": text}], "stream": stream} for text in texts]

    async def run() -> tuple[Any, Any]:
        app = web.Application()
        app.router.add_post(serve.CHAT, answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}{serve.CHAT}"
        try:
            with Clients(2) as clients:
                whole = await asyncio.to_thread(clients.ask, url, load(["a", "b", "fails"], stream=False), 3)
                return whole, await asyncio.to_thread(clients.ask, url, load(["a", "breaks"], stream=True), 2)
        finally:
            await runner.cleanup()

    whole, streamed = asyncio.run(run())
    assert whole.texts == {0: "A", 1: "B"}
    assert whole.timings == [{"embed_s": 0.25}]
    assert whole.errors == {"503 down": 1}
    assert len(streamed.firsts) == 1
    assert [error[:19] for error in streamed.errors] == ["a stream ended with"]
    assert min(whole.seconds, streamed.seconds) > 0


def test_the_last_lines_are_one_figure_each(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["routed_streamed", "routed_whole", "base_streamed", "base_whole"]
    cells = {name: [serve.Cell(2.0, errors=Counter({"x": 1}))] for name in names}
    alone = {name: {"seconds": 1.0, "cpu": 2.0, "tokens": 30, "texts": []} for name in names}
    lone, crowd = serve.Cell(1.0, [0.1, 0.1]), serve.Cell(1.0, [0.2, 0.2, 0.6])
    serve.report(cells, (alone, alone), 10, lone, crowd, {"streamed": 10.0})
    lines = capsys.readouterr().out.splitlines()
    figures = dict(line.split() for line in lines if re.fullmatch(r"\w+ [\d.]+", line))
    assert [figures[name] for name in names] == ["0.500"] * 4
    assert figures["first_token_32_of_alone"] == "2.000"
    assert figures["base_streamed_of_vllm"] == "0.500"
    assert lines[-1] == "errors 4"
