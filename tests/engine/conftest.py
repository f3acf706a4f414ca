"""Tiny random models, real PEFT adapters for them, a byte tokenizer, and a decoder that only counts."""

import copy
import random
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import transformers
from counting import VOCABULARY, CountingDecoder, byte_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from lorauter.adapters.weights import LoraWeights, ModelShape
from lorauter.engine import EngineConfig, MultiLoraEngine, SamplingParams
from lorauter.engine.blocks import BLOCK, blocks_of
from lorauter.engine.model import Decoder
from lorauter.engine.plan import Decoding, Piece, RowStart, StepPlan
from lorauter.engine.runner import Runner
from lorauter.engine.sequences import ActiveSequence
from lorauter.engine.slots import AdapterSlots
from lorauter.engine.step import Step, StepBatch
from lorauter.engine.text import TextCodec

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "eos_token_id": None,
    "bos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
BASES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-yarn-bias": ("Llama", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "attention": {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION},
    "mlp-rslora": {"r": 8, "lora_alpha": 4, "target_modules": MLP, "use_rslora": True},
    "patterns": {
        "r": 5,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"model.layers.0.self_attn.v_proj": 9, r"layers\.[12]\..*\.q_proj": 1},
    },
    "one-layer": {"r": 3, "lora_alpha": 3, "target_modules": ATTENTION + MLP, "layers_to_transform": [1]},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are far too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """A request that is never answered is a failure, not a hang. A module that takes longer names its own `LIMIT_S`."""

    def fail(*_) -> None:
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(getattr(request.module, "LIMIT_S", 120))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, the byte's value its id; then the special tokens."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def codec(tokenizer) -> TextCodec:
    return TextCodec(tokenizer)


# --- models and adapters, with transformers and PEFT as the references


@contextmanager
def _old_names() -> Iterator[None]:
    """PEFT uses names that transformers has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@dataclass
class Pool:
    """Base models, adapters, and what transformers and PEFT make of them."""

    folder: Path
    adapters: dict[str, LoraWeights] = field(default_factory=dict)
    _bases: dict[str, transformers.PreTrainedModel] = field(default_factory=dict)
    _merged: dict[object, transformers.PreTrainedModel] = field(default_factory=dict)

    def base(self, kind: str) -> transformers.PreTrainedModel:
        if kind not in self._bases:
            name, extra = BASES[kind]
            config = getattr(transformers, f"{name}Config")(**SIZES, **extra)
            torch.manual_seed(len(kind))
            model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            for key, parameter in model.named_parameters():
                # Large enough that position, attention, biases and norms all show in the logits.
                centre, spread = (1, 0.3) if "norm" in key else (0, 0.15)
                torch.nn.init.normal_(parameter, centre, spread)
            self._bases[kind] = model
        return self._bases[kind]

    def decoder(self, kind: str) -> Decoder:
        return Decoder(self.base(kind), names=("tiny",))

    def add(self, name: str, **config) -> LoraWeights:
        """Make an adapter with PEFT, save it, and read it back."""
        torch.manual_seed(len(self.adapters))
        with _old_names():
            model = get_peft_model(copy.deepcopy(self.base("llama")), LoraConfig(task_type="CAUSAL_LM", **config))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, 0, 0.15)
        model.peft_config["default"].base_model_name_or_path = "hub/Tiny"
        model.save_pretrained(self.folder / name, save_embedding_layers=False)
        self.adapters[name] = LoraWeights.load(self.folder / name, name=name, version="1")
        return self.adapters[name]

    def peft(self, kind: str, *names: str) -> PeftModel:
        """The base model with adapters loaded by PEFT, the first one active."""
        with _old_names():
            model = PeftModel.from_pretrained(copy.deepcopy(self.base(kind)), self.folder / names[0], names[0])
        for name in names[1:]:
            model.load_adapter(self.folder / name, name)
        return model.eval()

    def merged(self, kind: str, mixture: tuple[tuple[str, float], ...] = ()) -> transformers.PreTrainedModel:
        """The base model with W + sum_k w_k s_k B_k A_k in place of W, the s_k B_k A_k as PEFT computes them."""
        if (kind, mixture) not in self._merged:
            model = copy.deepcopy(self.base(kind))
            for name, weight in mixture:
                for key, module in self.peft(kind, name).get_base_model().named_modules():
                    if isinstance(module, LoraLayer):
                        with torch.no_grad():
                            model.get_submodule(key).weight += weight * module.get_delta_weight(name)
            self._merged[kind, mixture] = model
        return self._merged[kind, mixture]

    def mix(self, mixture: tuple[tuple[str, float], ...]) -> tuple[tuple[LoraWeights, float], ...]:
        return tuple((self.adapters[name], weight) for name, weight in mixture)

    def continued(self, kind: str, prompt, tokens: int, mixture: tuple[tuple[str, float], ...] = ()):
        """The greedy continuation by transformers' `generate`."""
        ids = self.merged(kind, mixture).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=tokens, do_sample=False
        )
        return tuple(ids[0, len(prompt) :].tolist())


@pytest.fixture(scope="session")
def pool(tmp_path_factory) -> Pool:
    pool = Pool(tmp_path_factory.mktemp("adapters"))
    for name, config in ADAPTERS.items():
        pool.add(name, **config)
    return pool


# --- a decoder driven step by step


@dataclass
class Forced:
    """A sequence whose every token is given."""

    tokens: list[int]
    prompt: int  # how many of them are prefilled
    adapters: tuple[tuple[LoraWeights, float], ...] = ()
    logits: list[torch.Tensor] = field(default_factory=list)
    row: int = -1
    blocks: list[int] = field(default_factory=list)


@pytest.fixture(scope="session")
def forced():
    """Random forced sequences: `forced([(prompt, length), ...], [adapters, ...])`."""

    def make(lengths, adapters=None, seed=0) -> list[Forced]:
        draw = torch.Generator().manual_seed(seed)
        adapters = adapters or [()] * len(lengths)
        return [
            Forced(torch.randint(VOCABULARY, (length,), generator=draw).tolist(), prompt, mixture)
            for (prompt, length), mixture in zip(lengths, adapters, strict=True)
        ]

    return make


def holder(slots: AdapterSlots, adapters) -> ActiveSequence:
    """A sequence for slots to hold (weights, weight) pairs for."""
    mixture = tuple((weights.key, weight) for weights, weight in adapters)
    return ActiveSequence([1], 1, 2, mixture, adapters=[slots.pack(weights) for weights, _ in adapters])


@pytest.fixture(scope="session")
def hold():
    return holder


@pytest.fixture(scope="session")
def run_forced():
    """Run forced sequences packed together; returns the logits (length, vocabulary) of each.

    One joins every other step, prompts go through in pieces of `piece` tokens, and a sequence that has ended leaves its
    row, its blocks and its adapters' room to those after it. Blocks come in no order.
    """

    def run(decoder: Decoder, sequences: list[Forced], *, slots: AdapterSlots | None = None, piece: int = 5):
        slots = slots or AdapterSlots(
            decoder.shape, budget_bytes=0, max_rank=1, dtype=decoder.dtype, device=decoder.device
        )
        length = decoder.max_positions
        blocks = sum(blocks_of(len(sequence.tokens)) for sequence in sequences)
        runner = Runner(decoder, slots, rows=len(sequences), blocks=blocks, length=length)
        free_blocks, free_rows = list(range(1, blocks + 1)), list(range(len(sequences)))
        random.Random(0).shuffle(free_blocks)
        runner.memory.cache.keys.fill_(torch.nan)  # what nobody has written must not matter
        runner.memory.cache.values.fill_(torch.nan)
        waiting, running, holders, step = deque(sequences), [], {}, 0
        while waiting or running:
            starts = []
            if waiting and step % 2 == 0:
                sequence = waiting.popleft()
                sequence.row = free_rows.pop(0)
                holders[sequence.row] = holder(slots, sequence.adapters)
                assert slots.acquire(holders[sequence.row])
                starts = [RowStart(sequence.row, holders[sequence.row].mixture, SamplingParams(), 0, 0, ())]
                running.append(sequence)
            step += 1
            budget, decoding, prompts, taken = piece, [], [], []
            for sequence in running:
                done = len(sequence.logits)
                count = 1 if done >= sequence.prompt else min(budget, sequence.prompt - done)
                budget -= count if done < sequence.prompt else 0
                if count:
                    tokens = sequence.tokens[done : done + count]
                    one = Piece(sequence.row, done, tokens, samples=False)
                    (decoding if count == 1 else prompts).append((sequence, one))
                    while len(sequence.blocks) * BLOCK < done + count:
                        taken.append((sequence.row, len(sequence.blocks), free_blocks[:1]))
                        sequence.blocks.append(free_blocks.pop(0))
            pieces = [*decoding, *prompts]
            plan = StepPlan((), starts, taken, Decoding(others=[p for _, p in decoding]), [p for _, p in prompts])
            logits = iter(runner.logits(plan, range(sum(one.size for _, one in pieces))))
            for sequence, one in pieces:
                sequence.logits += [next(logits) for _ in range(one.size)]
            for sequence in [s for s in running if len(s.logits) == len(s.tokens)]:
                slots.release(holders.pop(sequence.row))
                runner.mixtures.assign(sequence.row, ())
                free_rows.append(sequence.row)
                free_blocks += sequence.blocks
                running.remove(sequence)
        return [torch.stack(sequence.logits) for sequence in sequences]

    return run


# --- engines


class PacedDecoder:
    """A decoder whose every step waits for a permit."""

    def __init__(self, decoder) -> None:
        self._decoder = decoder
        self.permits = threading.Semaphore(0)
        self.arrived = 0  # steps that have begun, the last of which may still be waiting

    def __getattr__(self, name: str):
        return getattr(self._decoder, name)

    def forward(self, step: Step, batch: StepBatch) -> torch.Tensor:
        self.arrived += 1
        self.permits.acquire()
        return self._decoder.forward(step, batch)


@pytest.fixture
def start(codec) -> Iterator[Callable[..., MultiLoraEngine]]:
    """Start an engine; closed at the end."""
    started = []

    def make(decoder, codec=codec, **config) -> MultiLoraEngine:
        engine = MultiLoraEngine(decoder, codec, EngineConfig(**{"max_batch": 4, "adapter_bytes": 1 << 20} | config))
        started.append((engine, decoder))
        return engine

    yield make
    for engine, decoder in started:
        if isinstance(decoder, PacedDecoder):
            decoder.permits.release(1000)
        engine.close()


@pytest.fixture
def counting() -> CountingDecoder:
    return CountingDecoder()


@pytest.fixture(scope="session")
def paced() -> Callable[..., PacedDecoder]:
    return PacedDecoder


@pytest.fixture(scope="session")
def made():
    """An adapter made by hand, of given ranks: `made(shape, "name", q_proj=2)`."""

    def make(shape: ModelShape, name: str, *, base: str = "", layers: Sequence[int] = (), **ranks: int) -> LoraWeights:
        draw = torch.Generator().manual_seed(sum(name.encode()))
        tensors = {}
        for layer in layers or range(shape.layers):
            for target, rank in ranks.items():
                inputs, outputs = shape.linears[target]
                a, b = (torch.randn(size, generator=draw) for size in ((rank, inputs), (outputs, rank)))
                tensors[layer, target] = a, b
        return LoraWeights(name, "1", base, tensors)

    return make


@pytest.fixture
def huge(pool):
    """An adapter of finite numbers under which the model's are not."""
    weights = pool.adapters["attention"]
    tensors = {where: (a.sign() * 1e38, b.sign()) for where, (a, b) in weights.tensors.items()}
    return replace(weights, name="huge", tensors=tensors)
