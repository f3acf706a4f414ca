"""TaskRetriever: the task catalog as a service. Texts in, decisions out: nearest tasks, adapters and weights.

It has the texts embedded that it is asked about, those together that come while others are, so that a query is one call
for the ingress and less than one for QueryEmbedder; and decides on them together (`deployments.deciding`).
A catalog that is published while it serves takes over without a request being lost; see `deployments.live_catalog`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.calls import CatalogDescription
from deployments.config import AppConfig
from deployments.deciding import Decided, Deciding, Query
from deployments.devices import own_gpus_only
from deployments.fits import check_adapters, check_base_model
from deployments.live_catalog import LiveCatalog, kept_folder
from deployments.logs import join_serve_logs
from deployments.metrics import RayRecorder
from deployments.replicas import Replica, Replicas, ReplicaServer, by_name
from deployments.retries import answered
from deployments.routing_metrics import RoutingMetrics
from deployments.scope import Permitted, is_hidden, visible_places
from deployments.startup import tells_why
from deployments.together import Together, shared_out
from lorauter.adapters import open_store
from lorauter.catalog.catalog import CURRENT_FILE, PROBE_TEXT, Catalog
from lorauter.catalog.history import History
from lorauter.catalog.layout import Layout
from lorauter.catalog.whitening import States, StatesOf
from lorauter.encoder import Embeddings
from lorauter.errors import ServiceUnavailable
from lorauter.routing import RoutingDecision, RoutingOptions
from lorauter.uris import called

logger = logging.getLogger("lorauter.catalog")

_PROBE_S = 600.0  # an encoder may have to be downloaded first
_STATES_S = 5.0  # for which a query waits for its states
_TOGETHER = 64  # texts that are embedded in a call
_CALLS = 4  # to have some embedded, at once: they wait for those before them at QueryEmbedder, who takes them together
_TELL_S = 60.0  # between two warnings that there are none


@serve.deployment(
    max_ongoing_requests=256, max_queued_requests=1000, ray_actor_options={"num_cpus": 0.1}, health_check_period_s=5
)
@tells_why
class TaskRetriever:
    """Holds the catalog.

    Args:
        config: the app's configuration; a catalog of another base model is refused.
        embedder: handle of QueryEmbedder; a catalog of another encoder is refused.
    """

    def __init__(self, config: AppConfig, embedder: DeploymentHandle[Any]) -> None:
        join_serve_logs()
        own_gpus_only()
        self._metrics = RoutingMetrics(RayRecorder())
        assert config.catalog is not None  # else AdapterListing is in this one's place
        self._embedder = Replicas(embedder)
        self._embed_s = config.api.first_token_s
        self._embedding = Together(self._embed, size=lambda query: len(query.texts), most=_TOGETHER, at_once=_CALLS)
        self._deciding = Deciding(self._metrics, None if config.state_model is None else self._states)
        self._told = -_TELL_S
        self._history = History(open_store(config.catalog))
        self._layouts: WeakKeyDictionary[Catalog, dict[Permitted, Layout]] = WeakKeyDictionary()

        def probe() -> tuple[Embeddings, str]:
            [vector] = embedder.embed.remote([PROBE_TEXT]).result(timeout_s=_PROBE_S)
            return vector, embedder.name.remote().result(timeout_s=_PROBE_S)

        def check(catalog: Catalog) -> None:
            check_base_model(catalog, config)
            if catalog.states is not None and config.state_model is not None:
                try:
                    [states] = embedder.states.remote([PROBE_TEXT]).result(timeout_s=_PROBE_S)
                except Exception as error:
                    raise ServiceUnavailable(f"the model of states does not answer: {error!r}") from error
                catalog.check_states(StatesOf(called(config.state_model), states))

        def load() -> LiveCatalog:
            assert config.catalog is not None
            store, keep = open_store(config.catalog), kept_folder(config.catalog)
            if not (keep / CURRENT_FILE).exists():  # else it has served here before, and caches may hold what it needs
                check_adapters(Catalog.load(store), config, logger.warning)
            return LiveCatalog(
                store,
                config.routing,
                probe,
                check=check,
                refresh_s=config.catalog_refresh_s,
                keep=keep,
            )

        with ThreadPoolExecutor(1) as other_thread:  # in this one, a loop runs, and handles cannot be waited for
            self._live = other_thread.submit(load).result()
        self._live.start()
        self._met: set[str] = set()
        if config.state_model is not None:
            self._embedder.listen(self._meet)
        asked = (self.decide, self.versions, self.check_probe, self.describe, self.examples, self.layout, self.history)
        self._server = ReplicaServer("TaskRetriever", by_name(*asked))

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Serve's hook: where the ingress calls this replica."""
        return await self._server.metadata()

    async def decide(self, texts: list[str], options: list[RoutingOptions]) -> list[RoutingDecision]:
        """Which adapters answer n texts; one catalog decides on all of them. Raises InvalidRequest, ServiceUnavailable,
        Overloaded."""
        decided = await (await self._embedding.ask(Query(texts, options)))
        if isinstance(decided, Exception):
            raise decided
        return decided

    async def _embed(self, queries: list[Query]) -> list[asyncio.Future[Decided]]:
        texts = [text for query in queries for text in query.texts]
        vectors = await answered(lambda: self._embedder.call("embed", texts), timeout_s=self._embed_s)
        return self._deciding.begin(self._live.retriever, queries, shared_out(vectors, [q.texts for q in queries]))

    async def _states(self, texts: list[str]) -> States | None:
        """What the model of states makes of texts; None where it does not answer: they are routed without."""
        try:
            states: States = await answered(lambda: self._embedder.call("states", texts), timeout_s=_STATES_S)
            return states
        except Exception as error:  # noqa: BLE001 (whatever it is, the texts are to be answered)
            if time.monotonic() - self._told >= _TELL_S:
                self._told = time.monotonic()
                logger.warning("queries are routed without their states, which do not come: %r", error)
            return None

    def _meet(self, replicas: Sequence[Replica]) -> None:
        """Whoever is to read queries loads the model for it before the first one comes."""
        new = {replica.name for replica in replicas} - self._met
        if self._live.retriever.catalog.states is not None:
            self._met |= new
            for name in new:
                self._embedder.call_of(name, "states", [])  # nobody waits for it

    async def versions(self, names: list[str]) -> dict[str, str]:
        """Which versions of adapters are served; without those that the catalog does not know."""
        versions = self._live.retriever.catalog.adapters
        return {name: versions[name] for name in names if name in versions}

    async def check_probe(self, probe: Embeddings, encoder: str) -> None:
        """See `Catalog.check_probe`."""
        self._live.retriever.catalog.check_probe(probe, encoder)

    async def describe(self) -> CatalogDescription:
        """What the catalog holds, and what is published in vain."""
        catalog = self._live.retriever.catalog
        stale = catalog.stale
        marks = {
            name: {"score": of.score, "composed": True, "stale": name in stale} for name, of in catalog.composed.items()
        }
        tasks = [
            {
                "id": entry.name,
                "object": "task",
                "domain": entry.domain,
                "metric": entry.metric,
                "description": entry.description,
                "validation_examples": entry.examples,
                "answers": entry.answers,
                **({} if entry.shown is None else {"shown": entry.shown.helps()}),
                "adapters": [{**vars(adapter), **marks.get(adapter.name, {})} for adapter in entry.adapters],
            }
            for entry in catalog.entries
        ]
        return CatalogDescription(catalog.version, tasks, sorted(catalog.adapters), self._live.refused)

    async def examples(self, names: list[str], most: int, permitted: Permitted) -> dict[str, list[dict[str, str]]]:
        """The first validation examples of tasks; without those that the catalog does not know, or that a caller has
        no adapter for that was made for it: one that was merely tried on it tells nothing of what is in them."""
        return await asyncio.to_thread(self._examples, names, most, permitted)

    def _examples(self, names: list[str], most: int, permitted: Permitted) -> dict[str, list[dict[str, str]]]:
        catalog = self._live.retriever.catalog
        places = {name: place for name in names if (place := catalog.place(name)) is not None}
        return {
            name: [vars(example) for example in catalog.tasks[place].task.validation[:most]]
            for name, place in places.items()
            if not is_hidden(catalog.entries[place].declared or (name,), permitted)
        }

    async def layout(self, permitted: Permitted, named: list[str]) -> dict[str, Any]:
        """The tasks in two dimensions (see `lorauter.catalog.layout`), of those that a caller may see."""
        return await asyncio.to_thread(self._layout, permitted, frozenset(named))

    def _layout(self, permitted: Permitted, named: frozenset[str]) -> dict[str, Any]:
        catalog = self._live.retriever.catalog
        known = self._layouts.setdefault(catalog, {})
        if permitted not in known:
            visible = np.flatnonzero(visible_places(catalog, permitted)).tolist()
            known[permitted] = Layout.of(catalog, visible)
        return known[permitted].to_json(catalog, named)

    async def history(self, limit: int, after: str | None) -> dict[str, Any]:
        """The versions in the store (see `lorauter.catalog.history`). Raises as `History.page`."""
        return await asyncio.to_thread(self._history.page, limit, after)

    def __del__(self) -> None:
        if live := getattr(self, "_live", None):
            live.close()
