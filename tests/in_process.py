"""OpenAI's and Anthropic's own clients against the HTTP API in process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import httpx
import httpx2
import openai
from fake_service import FakeService, transport

from deployments.api import build_api
from deployments.config import ApiSettings


def with_openai(service: FakeService, use: Callable[[openai.AsyncOpenAI], Awaitable[Any]], **settings: Any) -> None:
    """Use a client of a service whose streams get pings soon."""

    async def talk() -> None:
        app = build_api(service, ApiSettings(**{"ping_s": 0.02, **settings}))
        http = httpx.AsyncClient(transport=transport(app))
        url = "http://lorauter/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, http_client=http) as client:
            await use(client)

    asyncio.run(talk())


def with_anthropic(service: FakeService, use: Callable[[anthropic.AsyncAnthropic], Awaitable[Any]]) -> None:
    """The same of Anthropic's."""

    async def talk() -> None:
        app: Any = build_api(service, ApiSettings(ping_s=0.02))
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False))
        url = "http://lorauter"
        async with anthropic.AsyncAnthropic(base_url=url, api_key="unused", max_retries=0, http_client=http) as client:
            await use(client)

    asyncio.run(talk())
