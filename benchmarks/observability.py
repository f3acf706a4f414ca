"""What metrics, the log line and the check of a key add to a request, beside the time of routing it.

    python benchmarks/observability.py [--requests 2000]

Routes in one process, without and with all that a request records, in turns; Ray runs, so that metrics go where they
go in a replica. The log line goes through Serve's JSON formatter to a file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import ray
from ray._common.formatters import JSONFormatter

from deployments import metrics
from deployments.access import Access
from deployments.config import AccessSettings
from deployments.metrics import RayRecorder
from deployments.observe import RequestRecord, logger
from deployments.routing_metrics import RoutingMetrics
from lorauter.defaults import load_encoder, resolve_catalog
from lorauter.keys import hash_key, new_key
from lorauter.routing import Router, RoutingDecision

TEXT = "Short movie review: a joy to watch.\nDid the critic think positively or negatively of the movie?"
KEYS = 1000


def record(recorder: RayRecorder, measured: RoutingMetrics, decisions: list[RoutingDecision]) -> None:
    """What the ingress records of one routed and answered request."""
    noted = RequestRecord(endpoint="/v1/chat/completions")
    for step in ("embed", "retrieve", "compose"):
        with measured.step(step):
            pass
    measured.decided(decisions)
    noted.decided("lorauter", 3, decisions[0].confidence)
    recorder.add(metrics.REQUESTS, endpoint=noted.endpoint, status="200", outcome="answered")
    recorder.observe(metrics.REQUEST_SECONDS, 0.5, endpoint=noted.endpoint)
    recorder.add(metrics.PROMPT_TOKENS, 82)
    recorder.add(metrics.COMPLETION_TOKENS, 64)
    recorder.observe(metrics.FIRST_TOKEN_SECONDS, 0.1)
    recorder.observe(metrics.TOKEN_SECONDS, 0.01)
    logger.info("request %s", "answered", extra=noted.facts(200, "answered"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    requests = parser.parse_args().requests

    router = Router.load(resolve_catalog("default"), encoder=load_encoder("default"))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    recorder = RayRecorder()
    measured = RoutingMetrics(recorder)
    with tempfile.TemporaryDirectory() as folder:
        handler = logging.FileHandler(Path(folder) / "log")
        handler.setFormatter(JSONFormatter())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        times: dict[str, list[float]] = {"bare": [], "recorded": []}
        for i in range(2 * requests + 100):
            kind = "recorded" if i % 2 else "bare"
            started = time.perf_counter()
            decisions = router.route([TEXT])
            if kind == "recorded":
                record(recorder, measured, decisions)
            if i >= 100:
                times[kind].append(time.perf_counter() - started)
        alone = []
        for _ in range(requests):
            started = time.perf_counter()
            record(recorder, measured, decisions)
            alone.append(time.perf_counter() - started)
        handler.close()
        keys = [new_key() for _ in range(KEYS)]
        os.environ["KEYS"] = json.dumps([{"name": f"k{i}", "sha256": hash_key(key)} for i, key in enumerate(keys)])
        access = Access(AccessSettings(keys_env="KEYS"))
        checks = []
        for i in range(requests):
            started = time.perf_counter()
            access.identify(f"Bearer {keys[i % KEYS]}")
            checks.append(time.perf_counter() - started)
    ray.shutdown()
    bare, recorded = (statistics.median(times[kind]) for kind in ("bare", "recorded"))
    print(f"routing in one process       {1e6 * bare:8.0f} us (median of {requests})")
    print(f"with all that is recorded    {1e6 * recorded:8.0f} us, ratio {recorded / bare:.3f}")
    print(f"  the recording alone        {1e6 * statistics.median(alone):8.0f} us")
    print(f"a key among {KEYS}            {1e6 * statistics.median(checks):8.0f} us")


if __name__ == "__main__":
    main()
