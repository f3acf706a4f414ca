"""Prometheus' text of lorauter's metrics, as Ray's agent serves it on each node: of one node, or of several as one.

Knows Ray's nodes; knows nothing of which metrics there are.
"""

from __future__ import annotations

import asyncio
import logging
import urllib.request
from collections.abc import Iterable

import ray

logger = logging.getLogger("lorauter.metrics")

PREFIX = "ray_lorauter_"
_TIMEOUT_S = 5.0


async def read_metrics(*, all_nodes: bool) -> str:
    """The metrics of this node, or of all: those of a node whose agent does not answer are missing."""
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in nodes
        if all_nodes or node["NodeID"] == here
    ]
    return joined(await asyncio.gather(*[asyncio.to_thread(_get, url) for url in urls]))


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:  # noqa: S310 (it is made of a node's address)
            return str(response.read().decode())
    except OSError as error:
        logger.warning("no metrics from %s: %s", url, error)
        return ""


def joined(texts: Iterable[str]) -> str:
    """Several agents' texts as one: each of lorauter's metrics once, with the samples of all."""
    heads: dict[str, dict[str, str]] = {}  # by metric, its HELP and TYPE
    samples: dict[str, list[str]] = {}
    for text in texts:
        metric = ""
        for line in text.splitlines():
            mark, kind, name, *_ = (*line.split(maxsplit=3), "", "", "")
            if mark == "#" and kind in ("HELP", "TYPE"):
                metric = name
                if name.startswith(PREFIX):
                    heads.setdefault(name, {}).setdefault(kind, line)
            elif line and not line.startswith("#") and metric.startswith(PREFIX):
                samples.setdefault(metric, []).append(line)
    lines = [line for name, found in samples.items() for line in (*heads[name].values(), *found)]
    return "".join(f"{line}\n" for line in lines)
