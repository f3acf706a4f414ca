"""QueryEmbedder: texts in, embeddings out, and, of those that the retriever is not sure of, a small instruct model's
hidden states; requests that arrive together are answered together."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from ray import serve

from deployments.devices import own_gpus_only
from deployments.logs import join_serve_logs
from deployments.metrics import RayRecorder
from deployments.remembered import Remembered
from deployments.replicas import ReplicaServer
from deployments.routing_metrics import RoutingMetrics
from deployments.startup import tells_why
from deployments.together import Together, shared_out
from deployments.tracing import span
from lorauter.catalog.whitening import States
from lorauter.defaults import load_encoder, load_states
from lorauter.encoder import Embeddings
from lorauter.errors import ConfigError, ServiceUnavailable
from lorauter.states import StateModel

_READ_TOGETHER = 8  # texts, of which each takes many times as long as to embed it, but for a GPU
_TOGETHER = 64  # texts, lest one who has hundreds keeps all others waiting
_THREADS = 4
_SWITCH_S = 0.0005  # for which who computes waits for who talks to others, and the other way round


def threads(cores: int) -> int:
    """With how many threads an encoder computes on a machine of so many cores.

    A query is little work, of which threads wait for each other more than they share: two on two cores, which the other
    deployments need too, took twice the CPU time of one, and longer. Replicas share the load of many queries.
    """
    return max(1, min(cores // 2, _THREADS))


@serve.deployment(
    max_ongoing_requests=256,
    max_queued_requests=1000,
    ray_actor_options={"num_cpus": 0.3},
    health_check_period_s=5,
    graceful_shutdown_timeout_s=10,
)
@tells_why
class QueryEmbedder:
    """Holds the sentence encoder, and the model of states from the first text on that it is to read.

    Args:
        encoder: folder, Hugging Face id, or "default".
        state_model: likewise; None reads nothing.
    """

    def __init__(self, encoder: str, state_model: str | None = None) -> None:
        import torch

        join_serve_logs()
        own_gpus_only()
        torch.set_num_threads(threads(len(os.sched_getaffinity(0))))  # else as many as Ray gives the actor CPUs
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a thread a core, for some texts
        sys.setswitchinterval(_SWITCH_S)
        self._metrics = RoutingMetrics(RayRecorder())
        self._encoder = load_encoder(encoder)
        self._encoder.encode(["warm-up"])
        self._embedded = Remembered(Together(self._encode, size=len, most=_TOGETHER).ask)
        self._state_model = state_model
        self._reader: StateModel | None = None
        self._read_together = Together(
            self._read, size=len, most=_TOGETHER if torch.cuda.is_available() else _READ_TOGETHER
        )
        self._seen = Remembered(self._read_together.ask)
        self._server = ReplicaServer(
            "QueryEmbedder", {"embed": self.embed, "states": self.states_if_loaded, "name": self.name}
        )

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Serve's hook: where the ingress calls this replica."""
        return await self._server.metadata()

    async def embed(self, texts: list[str]) -> Embeddings:
        """(n, d) float32 unit rows for n texts."""
        with self._metrics.step("embed"), span("embed"):
            return await self._embedded.ask(texts)

    async def _encode(self, requests: list[list[str]]) -> list[Embeddings]:
        vectors = await asyncio.to_thread(self._encoder.encode, [text for texts in requests for text in texts])
        return shared_out(vectors, requests)

    async def states(self, texts: list[str]) -> States:
        """See `lorauter.states.StateModel.states`. Raises ConfigError: there is no such model."""
        with self._metrics.step("read"), span("read"):
            return await self._seen.ask(texts)

    async def states_if_loaded(self, texts: list[str]) -> States:
        """The same for queries, which do not wait for the model to be loaded. Raises ServiceUnavailable: it is not."""
        if self._reader is None:
            self._read_together.tell([])  # for those that come later
            raise ServiceUnavailable("the model of states is being loaded")
        return await self.states(texts)

    async def _read(self, requests: list[list[str]]) -> list[States]:
        def read() -> States:
            if self._reader is None:
                if self._state_model is None:
                    raise ConfigError("no model of states is served; name one in state_model", setting="state_model")
                self._reader = load_states(self._state_model, threads=threads(len(os.sched_getaffinity(0))))
            return self._reader.states([text for texts in requests for text in texts])

        return shared_out(await asyncio.to_thread(read), requests)

    async def name(self) -> str:
        """What the encoder is called."""
        return self._encoder.name
