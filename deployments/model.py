"""LoraModel: the replicas that hold the base model and answer under mixtures of adapters."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from deployments.adapter_cache import CacheSpec, NodeCache
from deployments.calls import Admitted, Begun, GenerateCall
from deployments.choices import side_by_side
from deployments.config import AppConfig
from deployments.devices import own_gpus_only
from deployments.engines import Reading, start_engine
from deployments.host_adapters import HostAdapters
from deployments.logs import join_serve_logs
from deployments.merged import Stream
from deployments.metrics import RayRecorder
from deployments.placement import report
from deployments.replicas import ReplicaServer, by_name
from deployments.samplers import Sampling, model_sampler
from deployments.startup import tells_why
from deployments.tokenizing import packed
from deployments.tracing import span
from deployments.warmup import most_wanted, warm_up
from lorauter.adapters import ModelShape
from lorauter.engine import Chunk, GenerationRequest, SamplingParams
from lorauter.engine.engine import warm_up as warm_up_engine
from lorauter.engine.messages import Adapter
from lorauter.errors import AdapterError, AdapterUnavailable, InvalidRequest, Overloaded
from lorauter.names import AdapterKey
from lorauter.routing.compose import LeftOut, cause_of, without

logger = logging.getLogger("lorauter.model")

_ASK_S = 0.5
_PATIENT = 2 / 3  # of the time that a request waits for its first token: what the pace says is about right
# Items of streams a second, but for first and last ones: each takes a third of a millisecond of CPU time on its way to
# the client.
_ITEMS_S = min(2000.0, 125.0 * len(os.sched_getaffinity(0)))
_WHOLE_S = 30.0
# For which the beginning of an answer that nobody reads as it comes waits for its end, so that a short one is one
# message. Who has asked moves a call that has not begun after a second.
_KEPT_S = 0.25

Mixture = tuple[tuple[Adapter, float], ...]


@serve.deployment(ray_actor_options={"num_cpus": 1}, health_check_period_s=5, graceful_shutdown_timeout_s=600)
@tells_why
class LoraModel:
    """One replica: an engine, and its tiers of adapters.

    It is ready once the adapters in demand are on its device (see `deployments.warmup`). When it is to go, it takes
    no new requests, and ends when those it has are answered, however long their streams are (up to Serve's
    `graceful_shutdown_timeout_s`).

    Args:
        config: the app's configuration.
    """

    async def __init__(self, config: AppConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        join_serve_logs()
        own_gpus_only()
        self._engine = await asyncio.to_thread(
            start_engine, config.base_model, config.base_model_aliases, config.engine
        )
        await asyncio.to_thread(warm_up_engine, self._engine)
        spec = CacheSpec(config.adapters, config.cache)
        self._node_cache = NodeCache(spec)
        self._on_disk = await self._node_cache.holdings()  # raises why the cache cannot start, if it cannot
        self._adapter_wait_s = config.host.wait_s
        self._first_token_s = config.api.first_token_s
        self._streams = 0  # that are read as they come
        self._server = ReplicaServer("LoraModel", by_name(self.generate, self.tokenizer))
        self._adapters = HostAdapters(
            self._node_cache,
            Reading(self._engine),
            budget_bytes=config.host.adapter_bytes,
        )
        self._sampling = Sampling(model_sampler(self._engine, self._adapters, RayRecorder()))
        try:
            await warm_up(
                await most_wanted(spec),
                self._adapters.get,
                self._place,
                room_bytes=min(self._engine.facts.adapter_bytes, config.host.adapter_bytes),
                at_once=min(config.engine.rows, config.cache.downloads),
            )
        except Exception:  # a cold replica is better than none
            logger.exception("the replica starts without the adapters in demand")

    async def _place(self, packed: Adapter) -> None:
        """Bring an adapter to the device as any request does: by a token under it."""
        request = GenerationRequest((0,), ((packed, 1.0),), SamplingParams(max_tokens=1))
        async for _ in self._engine.stream(request):
            pass

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Serve's hook: where the ingress calls this replica."""
        return await self._server.metadata()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Begun | Chunk]:
        """Answer a call; closing the stream cancels it.

        Each item costs Python's time here and wherever it passes: the first token leaves at once, and the end, and what
        comes between them together, the more the more answers there are. A short answer that is wanted whole is one
        item, unless its speed is wanted too.

        Raises:
            InvalidRequest, AdapterNotFound, AdapterRejected, AdapterUnavailable, Overloaded: before anything else,
                unless the engine fails later.
        """
        prompt = self._engine.codec.encode(call.prompt)  # the ingress's tokens
        before, started = self._tiers(call), time.monotonic()
        mixture, left_out = await self._mixture(call)
        fetched_s = time.monotonic() - started
        tokens, begun, streamed = 0, False, not call.whole
        try:
            stream = self._begin(call, prompt, mixture)
            with span("generate", current=False) as traced:
                self._streams += streamed
                try:
                    async for chunk in stream:
                        tokens += len(chunk.token_ids)
                        if begun:
                            yield chunk
                        else:
                            begun = True
                            yield Begun(self._admitted(call, prompt, left_out, before, fetched_s, chunk), chunk)
                finally:
                    self._streams -= streamed
                    if traced is not None:
                        traced.set_attributes(
                            {"prompt_tokens": len(prompt), "completion_tokens": tokens, "adapters": len(mixture)}
                        )
                    await stream.aclose()
        except Overloaded as error:
            error.replica = serve.get_replica_context().replica_id.unique_id
            raise

    def _begin(self, call: GenerateCall, prompt: Sequence[int], mixture: Mixture) -> Stream[Chunk]:
        """Ask the engine for a call's answers. Raises InvalidRequest, Overloaded."""
        if not call.resumed:  # what has begun elsewhere is to end
            self._check_wait()
        most = self._engine.config.rows + self._engine.config.max_queue
        if len(call.choices) > most:
            raise InvalidRequest(f"got n = {len(call.choices)}; at most {most} answers are made at once", param="n")
        gap, keep_s = (self._whole_gap, self._keep_s) if call.whole else (self._gap, 0.0)
        if call.tells_tiers:
            keep_s = 0.0
        return side_by_side(
            {
                index: self._engine.stream(
                    GenerationRequest(prompt, mixture, call.sampling.of_choice(index), generated, call.tenant),
                    gap=gap,
                    keep_s=keep_s,
                )
                for index, generated in call.choices
            }
        )

    def _admitted(
        self,
        call: GenerateCall,
        prompt: Sequence[int],
        left_out: tuple[LeftOut, ...],
        before: Mapping[AdapterKey, str | None],
        fetched_s: float,
        first: Chunk,
    ) -> Admitted:
        """What is known with the first of an answer."""
        codec = self._engine.codec
        format = codec.tool_format if call.prompt.tools else None
        return Admitted(
            len(prompt),
            left_out,
            first.cached_tokens,
            tuple((token, codec.bytes_of(token)) for token in prompt) if call.tells_prompt else (),
            None if format is None else format.name,
            tuple([(key.name, tier or self._adapters.source(key)) for key, tier in before.items()]),
            fetched_s,
            first.waited_s,
        )

    async def tokenizer(self) -> bytes:
        """The base model's, for those who make tokens of prompts and text of answers (`deployments.tokenizing`)."""
        return await asyncio.to_thread(packed, self._engine.codec, self._engine.max_model_len)

    def _gap(self) -> float:
        """Seconds between two items of a stream: none where it is alone."""
        return (self._streams - 1) / _ITEMS_S

    @property
    def _keep_s(self) -> float:
        """Seconds from its call for which the first token of an answer is kept that nobody reads as it comes."""
        return min(_KEPT_S, self._first_token_s / 4)

    def _whole_gap(self) -> float:
        """The same where nobody reads them: now and then, so that it is known to go on."""
        return min(_WHOLE_S, self._engine.config.token_timeout_s / 2)

    def _tiers(self, call: GenerateCall) -> dict[AdapterKey, str | None]:
        """Where a call's adapters are, if it wants to know; None where they are not in this process."""
        if not call.tells_tiers:
            return {}
        tiers: dict[tuple[str, str], str] = dict.fromkeys(self._adapters.resident, "host")
        tiers |= dict.fromkeys(self._engine.counters.resident, "device")
        return {adapter.key: tiers.get(adapter.key) for adapter in call.adapters}

    async def _mixture(self, call: GenerateCall) -> tuple[Mixture, tuple[LeftOut, ...]]:
        """A call's adapters with their weights, and those left out. Raises AdapterError."""
        ready = self._adapters.ready([adapter.key for adapter in call.adapters])
        if ready is not None:
            return tuple([(packed, a.weight) for packed, a in zip(ready, call.adapters, strict=True)]), ()
        patient = not call.routed  # who can do without an adapter that is broken need not try it every time
        found = await asyncio.gather(*[self._get(adapter.key, patient=patient) for adapter in call.adapters])
        failed = {a.key: got for a, got in zip(call.adapters, found, strict=True) if isinstance(got, AdapterError)}
        if failed and (not call.routed or len(failed) == len(call.adapters)):
            raise next(iter(failed.values()))
        for key, error in failed.items():
            logger.warning("an answer goes on without adapter %s: %s", key, error)
        here = {packed.key: packed for packed in found if not isinstance(packed, AdapterError)}
        kept = without(call.adapters, set(failed))
        left_out = tuple(LeftOut(*key, cause_of(error)) for key, error in failed.items())
        return tuple((here[adapter.key], adapter.weight) for adapter in kept), left_out

    async def _get(self, key: AdapterKey, *, patient: bool) -> Adapter | AdapterError:
        try:
            async with asyncio.timeout(self._adapter_wait_s):
                return await self._adapters.get(key, patient=patient)
        except TimeoutError:
            problem = f"not here within {self._adapter_wait_s:g} s; try again later"
            return AdapterUnavailable(problem, adapter=key.name)
        except AdapterError as error:
            return error

    async def shape(self) -> tuple[ModelShape, int]:
        """What an adapter has to fit, and the largest rank served."""
        return self._engine.facts.shape, self._engine.config.max_rank

    async def stats(self) -> dict[str, Any]:
        """Who this is, what runs and waits, what a request takes beside how many, and hits, misses and load times of
        the replica's tiers of adapters."""
        running, waiting = self._engine.load
        counters = self._engine.counters
        return {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "node": ray.get_runtime_context().get_node_id(),
            "running": running,
            "waiting": waiting,
            "seconds": [round(self._engine.pace.seconds(n), 3) for n in range(1, self._engine.config.rows + 1)],
            "resident": counters.resident,
            "resident_bytes": counters.resident_bytes,
            "device": asdict(counters.adapters),
            "host": asdict(self._adapters.counters),
        }

    async def record_routing_stats(self) -> dict[str, Any]:
        """Serve's hook: what the routers are told of this replica (see `deployments.placement`)."""
        try:
            async with asyncio.timeout(_ASK_S):
                self._on_disk = await self._node_cache.holdings()
        except (RayError, TimeoutError):
            pass  # the node's cache is down or busy: what it had will mostly be there
        return report(
            [str(AdapterKey(*key)) for key in self._engine.counters.resident],
            [str(key) for key in self._adapters.resident],
            self._on_disk,
            time.monotonic(),
            self._limit(),
            self._engine.pace.seconds(self._engine.config.rows),
            self._server.ongoing_by,
        )

    def _check_wait(self) -> None:
        """Raise Overloaded if so many wait that a further request would be given up before it begins."""
        here = sum(self._engine.load)
        if here >= self._longest_queue():
            raise Overloaded(
                f"{here} requests run and wait, and one more would hardly begin within {self._first_token_s:g} s; "
                "try again later",
                retry_after_s=self._engine.pace.seconds(self._engine.config.rows),
            )

    def _longest_queue(self) -> int:
        """Requests, running and waiting, of which the last begins before it is given up, by the pace."""
        config = self._engine.config
        most, each_s = config.rows + config.max_queue, self._engine.pace.turnover_s
        return min(most, config.rows + int(_PATIENT * self._first_token_s / each_s)) if each_s else most

    def _limit(self) -> int:
        """Requests that the replica takes at once before it refuses more."""
        config, pace = self._engine.config, self._engine.pace
        most = self._longest_queue()
        if config.max_slowdown is None or not pace.seconds_alone:
            return most
        longest = config.max_slowdown * pace.seconds_alone
        return 1 + bisect_left(range(1, most), True, key=lambda n: pace.seconds(n + 1) > longest)

    def check_health(self) -> None:
        """Serve's health check."""
        self._engine.check_health()

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve's hook, which waits for it: the answers in progress come to their end."""
        server: ReplicaServer | None = getattr(self, "_server", None)
        if server is not None and server.ongoing:
            return self._end(server)
        self._close()
        return None

    async def _end(self, server: ReplicaServer) -> None:
        await server.drained()
        self._close()

    def _close(self) -> None:
        if engine := getattr(self, "_engine", None):
            engine.close()
