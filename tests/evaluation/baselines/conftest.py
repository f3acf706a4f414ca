"""A tiny Llama, a pool of mixed ranks and targets, and token-wise routing over it done naively: dense and uncached."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
import transformers

from lorauter.adapters.weights import TARGETS, LoraWeights
from lorauter.engine.model import Decoder

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "eos_token_id": None,
    "bos_token_id": None,
}
POOL: dict[str, tuple[int, Sequence[str], Sequence[int]]] = {  # rank, targets, layers
    "qv-4": (4, ["q_proj", "v_proj"], [0, 1]),
    "qv-8": (8, ["q_proj", "v_proj"], [0, 1]),
    "attention": (5, TARGETS[:4], [0, 1]),
    "all-linear": (3, TARGETS, [0, 1]),
    "last-layer": (2, TARGETS, [1]),
}
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (out, in) s B A and (in,) x to an adapter's score


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are far too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        # Large enough that every part shows in the logits.
        torch.nn.init.normal_(parameter, 1 if "norm" in name else 0, 0.3)
    return model


@pytest.fixture(scope="session")
def decoder(base) -> Decoder:
    return Decoder(base)


@pytest.fixture(scope="session")
def adapters(decoder) -> list[LoraWeights]:
    draw = torch.Generator().manual_seed(1)
    pool = []
    for name, (rank, targets, layers) in POOL.items():
        tensors = {}
        for layer in layers:
            for target in targets:
                inputs, outputs = decoder.shape.linears[target]
                a, b = (torch.randn(size, generator=draw) * 0.2 for size in ((rank, inputs), (outputs, rank)))
                tensors[layer, target] = a, b
        pool.append(LoraWeights(name, "1", "", tensors))
    return pool


@dataclass
class Naive:
    """The definition, token by token and adapter by adapter, in hooks on transformers' own linear layers.

    Attributes:
        used: names of the adapters that got a weight, in any token, layer and target.
    """

    base: transformers.LlamaForCausalLM
    pool: Mapping[str, LoraWeights]
    used: set[str] = field(default_factory=set)

    def weights(
        self, layer: int, target: str, x: torch.Tensor, names: Sequence[str], score: Score, top_k: int
    ) -> dict[str, torch.Tensor]:
        """Of one token, x (in,)."""
        scores = {
            name: score(b @ a, x)
            for name in names
            for a, b in [self.pool[name].tensors.get((layer, target), (None, None))]
            if a is not None
        }
        best = sorted(scores, key=lambda name: -scores[name])[:top_k]
        return dict(zip(best, torch.softmax(torch.tensor([scores[name] for name in best]), 0), strict=True))

    def continued(
        self, prompt: Sequence[int], tokens: int, names: Sequence[str], score: Score, top_k: int
    ) -> list[int]:
        """The greedy continuation, every token from a forward pass over all before it."""
        model = copy.deepcopy(self.base)
        for layer, block in enumerate(model.model.layers):
            for name, module in block.named_modules():
                if (target := name.rsplit(".", 1)[-1]) in TARGETS:

                    def hook(_, inputs, output, layer=layer, target=target):
                        changed = output.clone()
                        for i, x in enumerate(inputs[0][0]):
                            for name, weight in self.weights(layer, target, x, names, score, top_k).items():
                                a, b = self.pool[name].tensors[layer, target]
                                changed[0, i] += weight * (b @ a @ x)
                                self.used.add(name)
                        return changed

                    module.register_forward_hook(hook)
        ids = list(prompt)
        for _ in range(tokens):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture
def naive(base, adapters) -> Naive:
    return Naive(base, {weights.name: weights for weights in adapters})


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(64, (length,), generator=draw).tolist() for length in (3, 7, 5)]
