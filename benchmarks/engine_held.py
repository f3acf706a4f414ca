"""A batch of 32 of which 16 answers are held to a JSON schema, beside the same batch with all answers free.

By an engine in a process of its own, as a replica has it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from engine_common import ROOT, measure, report, run

from lorauter.defaults import resolve_model
from lorauter.engine import EngineConfig, GenerationRequest, SamplingParams
from lorauter.engine.engine import warm_up
from lorauter.engine.process import load_in_process
from lorauter.engine.types import Grammar
from lorauter.tasks import read_tasks

ROWS = 32
SCHEMA = {
    "type": "array",
    "minItems": 40,  # more than the answers' tokens
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "kind": {"enum": ["person", "place", "thing"]},
            "count": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        },
        "required": ["name", "kind", "count", "tags"],
        "additionalProperties": False,
    },
}


def held(args: argparse.Namespace) -> None:
    """Print tokens per second of both, and of how many free answers the other half makes another one."""
    config = EngineConfig(max_batch=ROWS, max_model_len=1024, prefix_reuse=False)
    engine = load_in_process(resolve_model("default"), config)
    warm_up(engine)
    texts = [example.input for task in read_tasks(ROOT / "examples" / "tasks") for example in task.test][:ROWS]
    grammar = Grammar("json", json.dumps(SCHEMA), "response_format")
    free = [
        GenerationRequest(
            tuple(engine.codec.chat([{"role": "user", "content": text}])),
            sampling=SamplingParams(max_tokens=64, ignore_eos=True),
        )
        for text in texts
    ]
    half = [
        replace(one, sampling=replace(one.sampling, grammar=grammar)) if i % 2 else one for i, one in enumerate(free)
    ]
    results = measure({"all free": lambda: run(engine, free), "half held": lambda: run(engine, half)}, args.repeats)
    alone, beside = engine.generate(free), engine.generate(half)
    changed = sum(alone[i].token_ids != beside[i].token_ids for i in range(0, ROWS, 2))
    report("half held of all free", results["half held"] / results["all free"], "")
    report("free answers that are another one beside held ones", changed, "")
    engine.close()
