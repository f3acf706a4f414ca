"""A Llama-like decoder that runs a packed batch with a mixture of adapters for every token.

Takes the weights of a transformers model (Llama, Mistral, Qwen2, Qwen3), or of what `weights` reads in its place, and
computes the same function; the configuration stays transformers', and the rotary frequencies the model's. Tokens of all
sequences are packed into one (tokens, hidden) matrix, so that every weight is read once a step. What is more than a
matrix product is the device's step, which is passed in. Knows nothing of requests, text or sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from lorauter.adapters.weights import ModelShape
from lorauter.engine.blocks import BLOCK, blocks_of
from lorauter.engine.cpu_kernels import load_kernels
from lorauter.engine.paged_cache import PagedCache
from lorauter.engine.step import Memory, Step, StepBatch
from lorauter.errors import ConfigError
from lorauter.precision import product

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class Linear:
    """A linear layer, or several of the same input as one; in the layout that is fastest where it runs.

    Args:
        plain: in PyTorch's own layout, through which gradients pass.
    """

    def __init__(self, *weights: Tensor, biases: Sequence[Tensor | None] = (), plain: bool = False) -> None:
        given = [bias.data for bias in biases if bias is not None]
        bias = torch.cat(given) if given else None
        weight = weights[0].data if len(weights) == 1 else torch.cat([weight.data for weight in weights])
        packable = weight.device.type == "cpu" and not plain
        kernels = load_kernels(weight.dtype) if packable else None
        if kernels is not None and kernels.takes_linear(weight.shape[1]):
            packed = kernels.pack_linear(weight)
            self._product: Callable[[Tensor], Tensor] = partial(
                kernels.linear, packed=packed, bias=bias, out=weight.shape[0]
            )
        else:
            self._product = partial(F.linear, weight=weight, bias=bias) if plain else product(weight, bias)

    @classmethod
    def of(cls, *linears: nn.Linear, plain: bool = False) -> Linear:
        """Of transformers' modules."""
        return cls(*[linear.weight for linear in linears], biases=[linear.bias for linear in linears], plain=plain)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)


@dataclass(frozen=True)
class Norm:
    """RMS norm (arXiv 1910.07467)."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """Of a transformers norm module."""
        return cls(module.weight.data, module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights."""

    attention_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    o: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear
    window: int | None

    @classmethod
    def of(cls, layer: Any, window: int | None, *, plain: bool = False) -> Layer:
        """Of a transformers decoder layer."""
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            attention_norm=Norm.of(layer.input_layernorm),
            qkv=Linear.of(attention.q_proj, attention.k_proj, attention.v_proj, plain=plain),
            q_norm=Norm.of(attention.q_norm) if hasattr(attention, "q_norm") else None,
            k_norm=Norm.of(attention.k_norm) if hasattr(attention, "k_norm") else None,
            o=Linear.of(attention.o_proj, plain=plain),
            mlp_norm=Norm.of(layer.post_attention_layernorm),
            gate_up=Linear.of(mlp.gate_proj, mlp.up_proj, plain=plain),
            down=Linear.of(mlp.down_proj, plain=plain),
            window=window,
        )


class Decoder:
    """The base model's weights and its forward pass.

    Args:
        model: a transformers causal model of one of ARCHITECTURES, or its parts by the same names, on its device and
            in its dtype. Its linear weights are copied; let it go afterwards.
        names: what adapters may call this base model.
        plain: keep the weights in PyTorch's own layout, so that gradients pass through `run`.

    Raises:
        ConfigError: another architecture, or a variant of one that is not served.
    """

    def __init__(self, model: Any, *, names: tuple[str, ...] = (), plain: bool = False) -> None:
        config = model.config
        architecture = type(model).__name__
        if architecture not in ARCHITECTURES:
            raise ConfigError(
                f"base model is a {architecture}; served are {', '.join(ARCHITECTURES)}", setting="base_model"
            )
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope in _LENGTH_DEPENDENT_ROPE or config.hidden_act != "silu":
            raise ConfigError(
                f"base model uses rope type {rope!r} and activation {config.hidden_act!r}; served are silu and rope "
                f"types other than {', '.join(_LENGTH_DEPENDENT_ROPE)}",
                setting="base_model",
            )
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.hidden: int = config.hidden_size
        self.intermediate: int = config.intermediate_size
        self.max_positions: int = config.max_position_embeddings
        self.layers = [Layer.of(layer, _window(config, i), plain=plain) for i, layer in enumerate(model.model.layers)]
        self._embedding: Tensor = model.model.embed_tokens.weight.data
        self._norm = Norm.of(model.model.norm)
        self._rotary = model.model.rotary_emb
        self._head = Linear(model.lm_head.weight, plain=plain)
        self._rotary_tables: dict[int, tuple[Tensor, Tensor]] = {}
        first = model.model.layers[0]
        modules = {**dict(first.self_attn.named_children()), **dict(first.mlp.named_children())}
        self.shape = ModelShape(
            names,
            len(self.layers),
            {n: (m.in_features, m.out_features) for n, m in modules.items() if isinstance(m, nn.Linear)},
        )

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self._embedding.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and activations."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    @torch.inference_mode()
    def rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding for `length` positions: (length, head_dim) each."""
        if length not in self._rotary_tables:
            positions = torch.arange(length, device=self.device)[None]
            cos, sin = self._rotary(torch.empty(0, dtype=self.dtype, device=self.device), positions)
            self._rotary_tables[length] = cos[0].contiguous(), sin[0].contiguous()
        return self._rotary_tables[length]

    def block_bytes(self) -> int:
        """Bytes of a cache block."""
        return PagedCache.block_bytes(self.shape.layers, self.kv_heads, self.head_dim, self.dtype)

    def check_blocks(self, blocks: int, length: int) -> None:
        """Raise ConfigError unless so many blocks have room for a sequence of `length` positions."""
        if blocks < blocks_of(length):
            blocks, size = max(blocks, 0), self.block_bytes()
            raise ConfigError(
                f"the key-value cache has room for {blocks * BLOCK} positions ({blocks * size} bytes), but a sequence "
                f"may have {length} ({blocks_of(length) * size} bytes); lower engine.max_model_len or "
                "engine.adapter_bytes, or raise engine.cache_bytes",
                setting="engine.cache_bytes",
            )

    def memory(self, *, blocks: int, rows: int, length: int, shared: bool = False) -> Memory:
        """A cache of so many blocks, for so many rows of at most `length` positions and one for padding.

        Args:
            shared: see `PagedCache`.
        """
        cache = PagedCache(
            layers=self.shape.layers,
            blocks=blocks,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            shared=shared,
        )
        table = torch.zeros(rows + 1, blocks_of(length), dtype=torch.int32, device=self.device)
        return Memory(cache, table, *self.rotary_table(length), self.heads, self.kv_heads, self.head_dim)

    @torch.inference_mode()
    def forward(self, step: Step, batch: StepBatch) -> Tensor:
        """Run the tokens, write their keys and values, and return (m, vocabulary) logits in the model's dtype."""
        return self.run(step, batch)

    def run(self, step: Step, batch: StepBatch) -> Tensor:
        """The same, and whether gradients are kept is for the caller to say."""
        for x, delta in self._through(step, batch):  # noqa: B007 (the last ones are wanted)
            pass
        if batch.outputs is not None:
            x, delta = x[batch.outputs], delta[batch.outputs]
        return self._head(step.add_norm(x, delta, self._norm)[1])

    @torch.inference_mode()
    def states(self, step: Step, batch: StepBatch, layers: Sequence[int]) -> Tensor:
        """The hidden states of `batch.outputs` after some of the layers, counted from 1: (m, len(layers), hidden)."""
        found = []
        for done, (x, delta) in enumerate(self._through(step, batch), start=1):
            if done in layers:
                found.append(x[batch.outputs] + delta[batch.outputs])
            if done == max(layers):
                break
        return torch.stack(found, dim=1)

    def _through(self, step: Step, batch: StepBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """What comes out of each layer in turn, as two summands."""
        x, delta = self._embedding[batch.tokens], None
        for i, layer in enumerate(self.layers):
            x, h = step.add_norm(x, delta, layer.attention_norm, (i, "q_proj"))
            step.begin_lora(i, "q_proj", h)
            qkv = layer.qkv(h)
            step.add_lora(i, "q_proj", h, qkv)
            h = step.attention(i, qkv, layer.q_norm, layer.k_norm, layer.window)
            step.begin_lora(i, "o_proj", h)
            delta = layer.o(h)
            step.add_lora(i, "o_proj", h, delta)
            x, h = step.add_norm(x, delta, layer.mlp_norm, (i, "gate_proj"))
            step.begin_lora(i, "gate_proj", h)
            gate_up = layer.gate_up(h)
            step.add_lora(i, "gate_proj", h, gate_up)
            h = step.silu_mul(gate_up)
            step.begin_lora(i, "down_proj", h)
            delta = layer.down(h)
            step.add_lora(i, "down_proj", h, delta)
            yield x, delta


def _window(config: Any, layer: int) -> int | None:
    """The sliding window of a layer, in positions, or None."""
    types: Mapping[int, str] | Sequence[str] | None = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)
