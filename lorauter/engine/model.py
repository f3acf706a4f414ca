"""A Llama-like decoder that runs a packed batch with a mixture of adapters for every token.

Takes the weights of a transformers model (Llama, Mistral, Qwen2, Qwen3) and computes the same function; the
loading, the configuration and the rotary frequencies stay transformers'. Tokens of all sequences are packed
into one (tokens, hidden) matrix, decoding rows first, so that every weight is read once a step. Knows nothing
of requests, text or sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from lorauter.adapters.weights import ModelShape
from lorauter.engine.kv_cache import KVCache
from lorauter.engine.slots import LoraBatch
from lorauter.errors import ConfigError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class PrefillSpan:
    """The next tokens of one sequence's prompt: its cache row, and the positions from `start` on."""

    row: int
    start: int
    length: int


@dataclass(frozen=True)
class StepBatch:
    """One forward pass.

    The packed tokens are one for each cache row 0..decoding-1, then those of each span in turn.

    Attributes:
        tokens: (n,) int64 ids.
        positions: (n,) int64 places in their sequences.
        decoding: how many rows decode.
        spans: prompt pieces.
        outputs: (m,) int64 indices of the tokens whose logits are wanted.
        lora: the mixture of every token, or None for the base model.
    """

    tokens: Tensor
    positions: Tensor
    decoding: int
    spans: Sequence[PrefillSpan]
    outputs: Tensor
    lora: LoraBatch | None


@dataclass(frozen=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def fused(cls, *linears: nn.Linear) -> _Linear:
        """Several linear layers of the same input as one."""
        biases = [linear.bias for linear in linears if linear.bias is not None]
        return cls(
            torch.cat([linear.weight.data for linear in linears]),
            torch.cat([bias.data for bias in biases]) if biases else None,
        )

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> _Norm:
        return cls(module.weight.data, module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class _Layer:
    attention_norm: _Norm
    qkv: _Linear
    q_norm: _Norm | None
    k_norm: _Norm | None
    o: _Linear
    mlp_norm: _Norm
    gate_up: _Linear
    down: _Linear
    window: int | None


class Decoder:
    """The base model's weights and its forward pass.

    Args:
        model: a transformers causal model of one of ARCHITECTURES, on its device and in its dtype. Its linear
            weights are copied; let it go afterwards.
        names: what adapters may call this base model.

    Raises:
        ConfigError: another architecture, or a variant of one that is not served.
    """

    def __init__(self, model: Any, *, names: tuple[str, ...] = ()) -> None:
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
        self._qkv_widths = [self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2]
        self.max_positions: int = config.max_position_embeddings
        self.layers = [_layer(layer, _window(config, i)) for i, layer in enumerate(model.model.layers)]
        self._embedding: Tensor = model.model.embed_tokens.weight.data
        self._norm = _Norm.of(model.model.norm)
        self._rotary = model.model.rotary_emb
        self._head = _Linear(model.lm_head.weight.data, None)
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
    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Run the tokens, write their keys and values, and return (m, vocabulary) float32 logits."""
        x = self._embedding[batch.tokens]
        cos, sin = self._rotary(x[None], batch.positions[None])
        rotation = cos[0, :, None], sin[0, :, None]
        masks = _Masks(batch)
        for i, layer in enumerate(self.layers):
            h = layer.attention_norm(x)
            qkv = layer.qkv(h)
            q, k, v = torch.split(qkv, self._qkv_widths, dim=-1)
            if batch.lora is not None:
                batch.lora.add("q_proj", i, h, q)
                batch.lora.add("k_proj", i, h, k)
                batch.lora.add("v_proj", i, h, v)
            a = self._attention(i, layer, q, k, v, rotation, batch, masks, cache)
            o = layer.o(a)
            if batch.lora is not None:
                batch.lora.add("o_proj", i, a, o)
            x = x + o
            h = layer.mlp_norm(x)
            gate, up = layer.gate_up(h).chunk(2, dim=-1)
            if batch.lora is not None:
                batch.lora.add("gate_proj", i, h, gate)
                batch.lora.add("up_proj", i, h, up)
            h = F.silu(gate) * up
            d = layer.down(h)
            if batch.lora is not None:
                batch.lora.add("down_proj", i, h, d)
            x = x + d
        return self._head(self._norm(x[batch.outputs])).float()

    def _attention(
        self,
        i: int,
        layer: _Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: tuple[Tensor, Tensor],
        batch: StepBatch,
        masks: _Masks,
        cache: KVCache,
    ) -> Tensor:
        n, d = q.shape[0], batch.decoding
        q, k, v = (t.view(n, -1, self.head_dim) for t in (q, k, v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        keys, values = cache.keys[i], cache.values[i]
        out = torch.empty_like(q)
        if d:
            rows = masks.rows
            keys[rows, :, batch.positions[:d]] = k[:d]
            values[rows, :, batch.positions[:d]] = v[:d]
            mask = masks.decode(layer.window)
            length = mask.shape[-1]
            # Grouped queries as extra query positions: exact, and no key is copied.
            grouped = q[:d].view(d, self.kv_heads, -1, self.head_dim)
            attended = F.scaled_dot_product_attention(
                grouped, keys[:d, :, :length], values[:d, :, :length], attn_mask=mask
            )
            out[:d] = attended.reshape(d, self.heads, self.head_dim)
        offset = d
        for span in batch.spans:
            end = span.start + span.length
            here = slice(offset, offset + span.length)
            keys[span.row, :, span.start : end] = k[here].transpose(0, 1)
            values[span.row, :, span.start : end] = v[here].transpose(0, 1)
            group = self.heads // self.kv_heads
            grouped = q[here].view(span.length, self.kv_heads, group, self.head_dim).permute(1, 2, 0, 3)
            attended = F.scaled_dot_product_attention(
                grouped.reshape(1, self.kv_heads, group * span.length, self.head_dim),
                keys[None, span.row, :, :end],
                values[None, span.row, :, :end],
                attn_mask=masks.prefill(span, layer.window, group),
            )
            attended = attended.view(self.kv_heads, group, span.length, self.head_dim).permute(2, 0, 1, 3)
            out[here] = attended.reshape(span.length, self.heads, self.head_dim)
            offset += span.length
        return out.view(n, -1)


class _Masks:
    """The attention masks of one step, made once for all layers with the same window. True attends."""

    def __init__(self, batch: StepBatch) -> None:
        self.rows = torch.arange(batch.decoding, device=batch.positions.device)
        self._positions = batch.positions[: batch.decoding]
        self._length = int(self._positions.max()) + 1 if batch.decoding else 0
        self._decode: dict[int | None, Tensor] = {}
        self._prefill: dict[tuple[PrefillSpan, int | None], Tensor] = {}

    def decode(self, window: int | None) -> Tensor:
        """(decoding, 1, 1, length)"""
        if window not in self._decode:
            self._decode[window] = _mask(self._positions, self._length, window)[:, None, None]
        return self._decode[window]

    def prefill(self, span: PrefillSpan, window: int | None, group: int) -> Tensor:
        """(group * span length, end): the span's mask for each query head of a group."""
        if (span, window) not in self._prefill:
            end = span.start + span.length
            positions = torch.arange(span.start, end, device=self._positions.device)
            self._prefill[span, window] = _mask(positions, end, window).repeat(group, 1)
        return self._prefill[span, window]


def _mask(positions: Tensor, length: int, window: int | None) -> Tensor:
    keys = torch.arange(length, device=positions.device)
    mask = keys <= positions[:, None]
    return mask if window is None else mask & (keys > positions[:, None] - window)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), halves as transformers lays them out."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _window(config: Any, layer: int) -> int | None:
    """The sliding window of a layer, in positions, or None."""
    types: Mapping[int, str] | Sequence[str] | None = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


def _layer(layer: Any, window: int | None) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=_Norm.of(layer.input_layernorm),
        qkv=_Linear.fused(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=_Norm.of(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_Norm.of(attention.k_norm) if hasattr(attention, "k_norm") else None,
        o=_Linear.fused(attention.o_proj),
        mlp_norm=_Norm.of(layer.post_attention_layernorm),
        gate_up=_Linear.fused(mlp.gate_proj, mlp.up_proj),
        down=_Linear.fused(mlp.down_proj),
        window=window,
    )
