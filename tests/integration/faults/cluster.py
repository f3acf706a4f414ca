"""A Ray cluster of three nodes with the service on it, as a process of its own, so that it may lose any part.

    python cluster.py CONFIG.json PORT

The head has everything but the LoraModel replicas, of which the two other nodes have one each. Says "ready" once
requests are answered; then answers each line of its input: "add" starts another node, "status" counts the running
replicas.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from deployments.app import assemble
from deployments.cluster import settle
from deployments.config import AppConfig

NODE = {"num_cpus": 1, "resources": {"model": 1}}
ON_HEAD = {"num_cpus": 0.1, "resources": {"head": 0.01}}


def main() -> None:
    said, sys.stdout = sys.stdout, sys.stderr  # Ray prints what it thinks of all that dies
    config, port = AppConfig.parse(json.loads(Path(sys.argv[1]).read_text())), int(sys.argv[2])
    settle()
    head = {"num_cpus": 2, "resources": {"head": 1}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(**NODE)
    ray.init(cluster.address, log_to_driver=False)
    serve.start(
        proxy_location="HeadOnly",  # on one machine all proxies share the port, and the clients with it
        http_options={"host": "127.0.0.1", "port": port},
        logging_config={"log_level": "WARNING"},
    )
    overrides: dict[str, dict[str, Any]] = {
        name: {"ray_actor_options": ON_HEAD} for name in ("Router", "QueryEmbedder", "TaskRetriever")
    }
    overrides["Router"]["num_replicas"] = 1  # or one for each two of the nodes' CPUs
    overrides["LoraModel"] = {"num_replicas": 2, "ray_actor_options": NODE}
    serve.run(assemble(config, overrides), name="lorauter")
    print("ready", file=said, flush=True)
    for line in sys.stdin:
        if line.strip() == "add":
            cluster.add_node(**NODE)
            print("added", file=said, flush=True)
        else:
            deployments = serve.status().applications["lorauter"].deployments
            running = {name: d.replica_states.get("RUNNING", 0) for name, d in deployments.items()}
            print(json.dumps(running), file=said, flush=True)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
