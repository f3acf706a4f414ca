"""Endpoints that generate nothing of a text: where it is routed, its embedding, its tokens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from deployments.anthropic_types import CountTokensBody, named
from deployments.bodies import Json, read_json
from deployments.config import ApiSettings
from deployments.generation import check_length, scoped, short, tokens_of
from deployments.openai_types import ROUTED_MODEL
from deployments.options import parse_body, reworded
from deployments.scope import visible
from deployments.text_types import DetokenizeBody, EmbeddingsBody, RouteBody, TokenizeBody
from lorauter.encoder import Embeddings, normalised
from lorauter.engine.types import Prompt
from lorauter.errors import AdapterNotFound, InvalidRequest
from lorauter.routing import check_text
from lorauter.routing.compose import RoutingDecision
from lorauter.routing.options import RoutingOptions

_EMBEDDED = 2048  # texts that are embedded at once at most, as OpenAI has it


class TextService(Protocol):
    """What these endpoints need behind them. Every method raises LorauterError."""

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        """A decision for each text."""

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """(n, d) float32 unit rows for n texts."""

    async def encoder(self) -> str:
        """What embeds is called."""

    async def tokenize(self, prompt: Prompt) -> Sequence[int]:
        """A prompt's tokens."""

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""


class Texts:
    """The endpoints.

    Args:
        service: does the work.
        settings: the API's.
        context: tokens that a prompt and its answer can take together.
    """

    def __init__(self, service: TextService, settings: ApiSettings, context: int) -> None:
        self._service = service
        self._settings = settings
        self._context = context

    async def route(self, request: Request) -> Response:
        """`POST /v1/route`."""
        body = parse_body(RouteBody, await self._read(request))
        texts = self._checked(body.texts(), self._settings.max_inputs, "routed")
        visit, tokens = request.state.visit, self._tokens(texts)
        options = scoped(body.options(), visit.caller)
        _, decisions = await visit.reserve(tokens, lambda: self._service.route(texts, options), at_least=tokens)
        permitted = visit.caller.permitted
        data = [{"index": i, **visible(decision.to_json(), permitted)} for i, decision in enumerate(decisions)]
        return Json({"object": "list", "data": data})

    async def embeddings(self, request: Request) -> Response:
        """`POST /v1/embeddings`."""
        body = parse_body(EmbeddingsBody, await self._read(request))
        texts = self._checked(body.texts(), _EMBEDDED, "embedded")
        for place, text in enumerate(texts):
            check_text(text, param="input" if isinstance(body.input, str) else f"input[{place}]")
        encoder = await self._service.encoder()
        if body.model not in (ROUTED_MODEL, encoder):
            error = AdapterNotFound(
                f"it does not embed; the model that does is {encoder!r}, or {ROUTED_MODEL!r}", adapter=short(body.model)
            )
            error.param = "model"
            raise error
        tokens = self._tokens(texts)
        _, embeddings = await request.state.visit.reserve(tokens, lambda: self._service.embed(texts), at_least=tokens)
        if (wanted := body.dimensions) is not None:
            if wanted > embeddings.shape[1]:
                raise InvalidRequest(
                    f"got dimensions {wanted}, and an embedding has {embeddings.shape[1]}", param="dimensions"
                )
            embeddings = normalised(embeddings[:, :wanted])
        data = [
            {"object": "embedding", "index": i, "embedding": _coded(row, body.encoding_format)}
            for i, row in enumerate(embeddings)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Json({"object": "list", "data": data, "model": body.model, "usage": usage})

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`."""
        ids = await self._tokenized(parse_body(TokenizeBody, await self._read(request)).prompt_given())
        return Json({"count": len(ids), "max_model_len": self._context, "tokens": ids, "token_strs": None})

    async def count_tokens(self, request: Request) -> Response:
        """`POST /v1/messages/count_tokens`."""
        body = parse_body(CountTokensBody, await self._read(request)).chat()
        with reworded(named):
            [prompt] = body.prompts()
            ids = await self._tokenized(prompt)
        return Json({"input_tokens": len(ids)})

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`."""
        body = parse_body(DetokenizeBody, await self._read(request))
        text = await self._service.detokenize(body.tokens, skip_special_tokens=body.skip_special_tokens)
        return Json({"prompt": text})

    async def _tokenized(self, prompt: Prompt) -> Sequence[int]:
        check_length(prompt.characters, self._settings, "messages" if prompt.text is None else "prompt")
        return await self._service.tokenize(prompt)

    async def _read(self, request: Request) -> bytes:
        return await read_json(request, self._settings.max_body_bytes)

    def _checked(self, texts: list[str], most: int, done: str) -> list[str]:
        if len(texts) > most:
            raise InvalidRequest(f"got {len(texts)} texts; at most {most} are {done} at once", param="input")
        check_length(max(map(len, texts)), self._settings, "input")
        return texts

    def _tokens(self, texts: Sequence[str]) -> int:
        return sum(min(tokens_of(len(text)), self._context) for text in texts)


def _coded(row: Any, encoding: str) -> Any:
    return row.tolist() if encoding == "float" else base64.b64encode(row.astype("<f4").tobytes()).decode()
