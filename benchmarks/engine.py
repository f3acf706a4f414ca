"""The engine's throughput, with its peers in the same run.

    python benchmarks/engine.py cpu     # SmolLM2-135M, the adapters of --pool (default ../shared/pool), bf16
    python benchmarks/engine.py gpu     # random weights of the 8B and 135M shapes, one GPU
    python benchmarks/engine.py moving  # requests that come and go, on real prompts; on a CPU or a GPU
    python benchmarks/engine.py held    # half of a batch held to a JSON schema; on a CPU or a GPU
    python benchmarks/engine.py check   # on a GPU: the engine's tokens against transformers with merged weights
    python benchmarks/engine.py profile # where the time of steps goes, on the host and on a GPU

Figures are tokens per second of whole requests, prompts included, where nothing else is said: the median of --repeats
runs, the cases taking turns. --json FILE keeps them. transformers and PEFT are measured beside the engine, in the same
run, and so is vLLM if --vllm names the interpreter of an environment that has it.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path

from engine_common import ROOT, SHAPES, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["cpu", "gpu", "moving", "held", "check", "profile"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="with gpu: one of them; with moving: random weights of it"
    )
    parser.add_argument("--peers", action="store_true", help="with gpu: transformers and PEFT too")
    parser.add_argument(
        "--zipf", type=int, default=0, metavar="N", help="with gpu: N adapters in host memory, kinds, and no more"
    )
    parser.add_argument("--long", type=int, default=0, metavar="N", help="with gpu: a prompt of N tokens, and no more")
    parser.add_argument("--vllm", metavar="PYTHON", help="with cpu and moving: an interpreter that has vLLM")
    parser.add_argument("--profile", action="store_true", help="with gpu: where the time goes")
    parser.add_argument("--requests", type=int, default=256, help="with moving")
    parser.add_argument("--batch", type=int, help="with moving: rows; 128 on a GPU, 16 on a CPU")
    parser.add_argument("--open-s", type=float, default=15, help="with moving: seconds of arrivals")
    parser.add_argument("--quick", action="store_true", help="with moving: the closed cases alone")
    parser.add_argument("--pool", type=Path, default=ROOT.parent / "shared" / "pool")
    parser.add_argument("--tasks", type=Path, default=ROOT.parent / "shared" / "data" / "tasks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    suite = import_module(f"engine_{args.suite}")
    getattr(suite, args.suite)(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
