"""Chats and completions: from a request's options to its answer's choices.

Decides for each prompt which adapters answer it, has a replica answer, and puts the choices together, whole or as they
come. Knows the shapes of answers and no endpoint's own options.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

import lorauter
from deployments import observe
from deployments.access import Caller, Reservation
from deployments.answers import AnswerShape, Opening, Piece, Writer
from deployments.bodies import Json
from deployments.calls import Admitted, Choice, GenerateCall
from deployments.config import ApiSettings
from deployments.conversations import routed_text
from deployments.forms import check_constrain, held_to
from deployments.merged import Merged
from deployments.openai_answers import error_answer
from deployments.openai_types import ChatBody, CompletionBody
from deployments.options import reword
from deployments.scope import ScopedOptions, visible
from deployments.shown import suited
from deployments.streams import EventStream
from deployments.telling import Telling, likelihood
from deployments.timing import Timing
from lorauter.engine.types import Chunk, Prompt
from lorauter.errors import AdapterError, AdapterNotFound, ContextLengthExceeded, InvalidRequest, LorauterError
from lorauter.names import RULE, is_valid_name
from lorauter.routing.compose import AdapterWeight, LeftOut, RoutingDecision, cause_of
from lorauter.routing.options import RoutingOptions

logger = logging.getLogger("lorauter.api")

_HEADER_ITEMS = 16
_DECISIONS = 3  # that are tried for a request whose adapters turn out to be gone or broken
_AT_ONCE = 32  # prompts of a request that wait for an answer at the same time: other requests have room too
_CHARS_A_TOKEN = 4  # about; an answer's end settles what it was

Answer = AsyncGenerator[Admitted | Chunk]
GeneratingBody = ChatBody | CompletionBody
T = TypeVar("T")
_Ask = Callable[[RoutingDecision], Answer]


class Generating(Protocol):
    """What answers need behind them. Every method raises LorauterError."""

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        """A decision for each text."""

    def generate(self, call: GenerateCall) -> Answer:
        """`Admitted`, then the answer's chunks. Closing the iterator cancels the call."""

    def check_load(self) -> None:
        """Raise Overloaded if `generate` would."""

    async def versions(self, names: Sequence[str]) -> Mapping[str, str]:
        """Which versions of adapters are served; without those that are not."""

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""


@dataclass(frozen=True)
class _Begun:
    """A choice that is under way: its decision in the end, and what comes of it."""

    decision: RoutingDecision
    admitted: Admitted
    stream: Answer
    timing: Timing

    def told(self, body: GeneratingBody) -> dict[str, Any]:
        """The decision for its reader."""
        return self.timing.beside(self.decision) if body.lorauter.timings else self.decision.to_json()


class Generation:
    """Answers requests.

    Args:
        service: does the work.
        settings: the API's.
        context: tokens that a prompt and its answer can take together.
        base_model: the model's name.
    """

    def __init__(self, service: Generating, settings: ApiSettings, context: int, base_model: str) -> None:
        self._service = service
        self._settings = settings
        self._context = context
        self._base_model = base_model
        self.running = 0  # choices that are being made

    async def answer(self, request: Request, body: GeneratingBody, shape: AnswerShape) -> Response:
        """The answer to a request. Raises LorauterError, whose `param` is the client's own word for the option."""
        try:
            return await self._answer(request, body, shape)
        except InvalidRequest as error:
            own = error.param or ("prompt" if isinstance(error, ContextLengthExceeded) else "")
            if own == "tokens" or own.startswith("input"):  # the words of those below
                own = "prompt"
            error.param = own or None
            reword(error, shape.named)
            raise
        except AdapterNotFound as error:
            if body.chosen() is not None:
                error.param = "lorauter.adapters" if body.lorauter.adapters else "model"
            raise

    async def _answer(self, request: Request, body: GeneratingBody, shape: AnswerShape) -> Response:
        settings, caller = self._settings, request.state.caller
        prompts = body.prompts()
        if len(prompts) > settings.max_inputs:
            raise InvalidRequest(
                f"got {len(prompts)} prompts; at most {settings.max_inputs} are answered at once", param="prompt"
            )
        check_length(max(prompt.characters for prompt in prompts), settings, "prompt")
        default = settings.default_max_tokens, settings.default_temperature
        sampling = body.sampling(max_tokens=default[0], temperature=default[1])
        check_constrain(body.lorauter, sampling, routed=body.chosen() is None)
        texts = [await self._routed_text(prompt) for prompt in prompts] if body.chosen() is None else []
        self._service.check_load()
        sizes = [min(_size(prompt), self._context) for prompt in prompts]
        answers = max(body.n or 1, body.best_of or 1)  # to each prompt
        reservation, decisions = await request.state.visit.reserve(
            sum(size + answers * min(sampling.max_tokens, self._context - size) for size in sizes),
            lambda: self._decide(body, texts, len(prompts), caller),
            at_least=sum(sizes),
        )
        meter = _Meter(reservation, len(prompts), self)
        tenant = caller.name if body.cache_salt is None else f"{caller.name}\n{body.cache_salt}"

        room = asyncio.Semaphore(_AT_ONCE)

        async def begin(place: int) -> _Begun:
            def ask(decision: RoutingDecision) -> Answer:
                call = GenerateCall(
                    prompts[place],
                    decision.adapters,
                    held_to(sampling, decision),
                    routed=decision.routed,
                    choices=tuple(map(Choice, range(answers))),
                    tenant=tenant,
                    whole=not body.stream,
                    tells_prompt=Telling.wants_prompt(body),
                    tells_tiers=body.lorauter.timings,
                    examples=decision.examples,
                    unshown=decision.unshown,
                )
                return meter.metered(self._service.generate(call), sizes[place])

            async with room:
                suits = partial(suited, prompt=prompts[place], sampling=sampling)
                return await self._admit(body, texts[place : place + 1], caller, decisions[place], suits, ask)

        try:
            begun = await _all([begin(place) for place in range(len(prompts))])
        except BaseException as error:
            await meter.drop(error)
            raise
        return await self._told(body, shape, prompts, begun, caller)

    async def _told(
        self,
        body: GeneratingBody,
        shape: AnswerShape,
        prompts: Sequence[Prompt],
        begun: Sequence[_Begun],
        caller: Caller,
    ) -> Response:
        """What is said of answers that are under way."""
        n, timed = body.n or 1, body.lorauter.timings
        tellings = [
            Telling(body, one.admitted, prompt.text)
            for one, prompt in zip(begun, prompts, strict=True)
            for _ in range(n)
        ]
        first = begun[0].decision
        observe.current().decided(body.model, len(first.adapters), first.confidence)
        shown = [visible(choice.told(body), caller.permitted) for choice in begun]
        writer = shape.open(
            Opening(
                body,
                shown,
                self._fingerprint([choice.decision for choice in begun], caller),
                prompt_tokens=sum(choice.admitted.prompt_tokens for choice in begun),
                cached_tokens=sum(choice.admitted.cached_tokens for choice in begun),
                prompts=[[token for token, _ in choice.admitted.prompt] for choice in begun]
                if body.return_token_ids
                else (),
            )
        )
        headers = _headers(first) if len(begun) == 1 else {}
        if body.stream:
            streams = Merged([choice.stream for choice in begun])
            events = _events(streams, begun, tellings, writer, shown if timed else None, caller)
            return EventStream(events, streams, headers, self._settings.ping_s, shape.ping)
        answers = await _all([_whole(choice) for choice in begun])
        if timed:
            for decision, choice in zip(shown, begun, strict=True):
                decision["timings"] = choice.timing.told()
        pieces: list[Piece] = []
        for chunks in answers:
            of_prompt = chunks[0].prompt_logprobs
            if len(chunks) > n:  # `best_of`
                chunks = sorted(chunks, key=likelihood, reverse=True)[:n]
            for chunk in chunks:
                pieces.append(tellings[len(pieces)].tell(chunk, of_prompt))
        tokens = sum(tellings[0].counted(chunk) for chunks in answers for chunk in chunks)
        return Json(writer.whole(pieces, tokens), headers=headers)

    async def _routed_text(self, prompt: Prompt) -> str:
        """The text that a prompt is routed by. Raises InvalidRequest: there is none."""
        if prompt.token_ids is not None:
            text = await self._service.detokenize(prompt.token_ids, skip_special_tokens=True)
        elif prompt.text is not None:
            text = prompt.text
        else:
            text = routed_text(prompt.messages, self._settings.route_on)
        if not text.strip():
            raise InvalidRequest("the text to route by is empty", param="prompt")
        return text

    async def _decide(
        self, body: GeneratingBody, texts: Sequence[str], prompts: int, caller: Caller
    ) -> list[RoutingDecision]:
        """The adapters for each prompt: by hand, by the model's name, or routed; all such as the caller may use."""
        chosen = body.chosen()
        if chosen is None:
            decisions = await self._service.route(texts, scoped(body.lorauter, caller))
            named = (adapter.name for d in decisions for adapter in (*d.adapters, *d.unshown))
            if not all(map(caller.permits, named)):
                raise LorauterError("the router chose an adapter that the key may not use")
            return decisions
        if len(chosen) > self._settings.max_adapters:
            raise InvalidRequest(
                f"got {len(chosen)} adapters; at most {self._settings.max_adapters} can be mixed",
                param="lorauter.adapters",
            )
        for name in chosen:
            if not is_valid_name(name):
                raise AdapterNotFound(f"no such adapter; a name is {RULE}", adapter=short(name))
            if not caller.permits(name):  # whether it exists or not
                raise AdapterNotFound("no such adapter; see GET /v1/models", adapter=name)
        versions = await self._service.versions(list(chosen)) if chosen else {}
        for name in chosen:
            if name not in versions:
                raise AdapterNotFound("no such adapter; see GET /v1/models", adapter=name)
        mixture = tuple(AdapterWeight(name, versions[name], weight) for name, weight in chosen.items() if weight)
        return [RoutingDecision(None, (), mixture)] * prompts

    async def _admit(
        self,
        body: GeneratingBody,
        text: Sequence[str],
        caller: Caller,
        decision: RoutingDecision,
        suits: Callable[[RoutingDecision], RoutingDecision],
        ask: _Ask,
    ) -> _Begun:
        """The decision in the end, and the answer as it comes; until it is admitted an error can still have its own
        status.

        Adapters that are gone or broken are no fault of a request that named none. A replica goes on without them, as
        long as one is left; where none is, the request is routed anew without them, and in the end answered by the
        base model, unless they may be back soon.
        """
        left_out: list[LeftOut] = []
        for attempt in range(_DECISIONS + 1):
            if left_out:
                gone = {adapter.name for adapter in left_out}
                routed = body.lorauter.model_copy(update={"exclude_adapters": body.lorauter.exclude_adapters | gone})
                [decision] = await self._decide(body.model_copy(update={"lorauter": routed}), text, 1, caller)
                decision = replace(decision, left_out=tuple(left_out))
            if attempt == _DECISIONS:
                decision = replace(decision, adapters=(), unshown=())
            decision = suits(decision)
            stream = ask(decision)
            try:
                admitted = await anext(stream)
            except AdapterError as error:
                cause = cause_of(error)
                last = attempt == _DECISIONS or (attempt == _DECISIONS - 1 and cause == "unavailable")
                if last or not decision.routed:
                    raise
                logger.warning("routed anew: %s", error)
                left_out += [LeftOut(adapter.name, adapter.version, cause) for adapter in decision.adapters]
                continue
            assert isinstance(admitted, Admitted)
            decision = decision.with_examples(admitted.examples, "no_room").without(admitted.left_out)
            return _Begun(decision, admitted, stream, Timing(decision.seconds, admitted))
        raise AssertionError("unreachable: the base model alone lacks no adapter")

    def _fingerprint(self, decisions: Sequence[RoutingDecision], caller: Caller) -> str:
        """What changes with the model, the code, and the catalog, or the adapters' versions where that is not told."""
        parts = [self._base_model, lorauter.__version__]
        for decision in decisions:
            if decision.routed and caller.permitted is None:
                parts.append(str(decision.catalog_version))
            else:
                parts += [adapter.version for adapter in decision.adapters]
        return f"fp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


async def _all(beginning: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return, at the same time; if one fails, none goes on."""
    if len(beginning) == 1:
        return [await beginning[0]]
    tasks = [asyncio.ensure_future(one) for one in beginning]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for done in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(done, _Begun):
                await done.stream.aclose()
        raise


async def _whole(begun: _Begun) -> list[Chunk]:
    """All answers to a prompt, each as one chunk, in the order of their indices."""
    chunks: dict[int, list[Chunk]] = {}
    async for item in begun.stream:
        if isinstance(item, Chunk):
            begun.timing.note(item)
            chunks.setdefault(item.index, []).append(item)
    return [Chunk.joined(chunks[index]) for index in sorted(chunks)]


class _Meter:
    """What the streams of a request took, counted in place of what was reserved, once all of them have ended.

    Args:
        reservation: what was reserved.
        streams: how many there are.
        generation: whose answers they are.
    """

    def __init__(self, reservation: Reservation, streams: int, generation: Generation) -> None:
        self._reservation = reservation
        self._generation = generation
        self._left = streams
        self._used = 0

    async def metered(self, stream: Answer, at_least: int) -> Answer:
        """The same stream, counted.

        Where it is refused before it is admitted, the reservation stands for another attempt. If the client leaves
        before that, nobody knows what it took, and the prompt is counted.
        """
        used: int | None = None
        refused = False
        self._generation.running += 1
        try:
            async for item in stream:
                used = (used or 0) + (item.prompt_tokens if isinstance(item, Admitted) else len(item.token_ids))
                yield item
        except Exception:
            refused = used is None
            raise
        finally:
            self._generation.running -= 1
            await stream.aclose()
            if not refused:
                self._used += at_least if used is None else used
                self._left -= 1
                if not self._left:
                    await self._reservation.settle(self._used)

    async def drop(self, error: BaseException) -> None:
        """Count what streams took of which one was not admitted."""
        await self._reservation.drop(error, self._used)


async def _events(
    streams: Merged[Admitted | Chunk],
    begun: Sequence[_Begun],
    tellings: Sequence[Telling],
    writer: Writer,
    timed: Sequence[dict[str, Any]] | None,
    caller: Caller,
) -> AsyncGenerator[bytes]:
    """A stream's events: what goes before the answers, then the answers as they come, then the end. Decisions that are
    `timed` have their times brought up to date."""
    # What is known at the same time is one message on its way to the client: the first token, or the end.
    said = writer.first()
    tokens, running, n = 0, len(tellings), len(tellings) // len(begun)
    try:
        async for place, item in streams:
            if isinstance(item, Chunk):
                timing = begun[place].timing
                timing.note(item)
                choice = place * n + item.index
                tokens += tellings[choice].counted(item)
                piece = tellings[choice].tell(item)
                if timed is not None and piece.finish_reason:
                    timed[place]["timings"] = timing.told()
                    piece = replace(piece, ending={"lorauter": {"timings": timing.told()}})
                said += writer.piece(choice, piece, tokens)
                if item.finish_reason:
                    running -= 1
                if said and running:
                    yield said
                    said = b""
    except Exception as error:  # noqa: BLE001 (the status is sent; the error has to go into the stream)
        status, told = error_answer(error, caller.audience)
        observe.current().broken = status
        yield said + writer.error(status, told)
        return
    yield said + writer.end(tokens)


def scoped(options: RoutingOptions, caller: Caller) -> RoutingOptions:
    """A request's routing options within what its caller may use."""
    return options if caller.permitted is None else ScopedOptions.of(options, caller.permitted)


def check_length(characters: int, settings: ApiSettings, param: str) -> None:
    """Raise InvalidRequest for a text that is not even to be tokenised."""
    if characters > settings.max_prompt_chars:
        raise InvalidRequest(f"got {characters} characters; at most {settings.max_prompt_chars} are taken", param=param)


def tokens_of(characters: int) -> int:
    """About how many tokens a text has."""
    return math.ceil(characters / _CHARS_A_TOKEN)


def short(name: str) -> str:
    """A name fit for a message, whatever the client called a name."""
    return name if len(name) <= 128 else name[:125] + "..."


def _size(prompt: Prompt) -> int:
    return tokens_of(prompt.characters) if prompt.token_ids is None else len(prompt.token_ids)


def _headers(decision: RoutingDecision) -> dict[str, str]:
    """`name=0.1234,...`, no longer than proxies take; the body has them all."""
    return {
        "x-lorauter-tasks": ",".join([f"{task.name}={task.score:.4f}" for task in decision.tasks[:_HEADER_ITEMS]]),
        "x-lorauter-adapters": ",".join([f"{one.name}={one.weight:.4f}" for one in decision.adapters[:_HEADER_ITEMS]]),
    }
