"""BERT encoders, of the usual make (BERT, the mean of its states, unit length), in fewer and faster operations than
sentence-transformers': others are left to it.

On a CPU the tokens of several texts go through the layers together, one text after the other, and are padded at the
end of them all, to a multiple of 64: oneDNN works out anew how to compute a product of another number of rows, which
takes longer than a query. On a GPU a batch is one launch, and not some hundreds, which a busy GPU lets wait one after
the other: a CUDA graph for each of the few shapes that batches are padded to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from numpy.typing import NDArray
from torch import Tensor

from lorauter.bert_parts import BertParts
from lorauter.cuda_graphs import GraphRecorder, Landing, Recorded
from lorauter.precision import product

_ROWS = 4, 16, 32, 64  # of the shapes on a GPU: fewer texts take as long
_LEAST_LENGTH = 32
_PASS, _GRAIN = 256, 64  # tokens of a pass on a CPU, unless a text has more; what they are a multiple of

Attend = Callable[[Tensor], Tensor]
"""Queries, keys and values (tokens, 3 d) to what each token attends to (tokens, d)."""


Apply = Callable[[Tensor], Tensor]


class _Layer(NamedTuple):
    qkv: Apply
    attended: Apply
    attended_norm: Apply
    up: Apply
    down: Apply
    norm: Apply


class MeanBert:
    """A forward pass.

    Args:
        parts: of the encoder.
        dtype: of the products; all else is in the encoder's own.
    """

    def __init__(self, parts: BertParts, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._parts = parts
        self._heads: int = parts.config["num_attention_heads"]
        self._layers = [self._layer(f"encoder.layer.{i}") for i in range(parts.config["num_hidden_layers"])]
        self._words, self._kinds, self._places = (
            parts.tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "token_type", "position")
        )
        self._norm = self._norm_of("embeddings.LayerNorm")
        self._tokenizer = parts.tokenizer
        self._tokenizer.enable_truncation(parts.longest)

    def _layer(self, name: str) -> _Layer:
        tensors, own, out = self._parts.tensors, f"{name}.attention.self", f"{name}.attention.output"

        def linear(*names: str) -> Apply:
            weight = torch.cat([tensors[f"{one}.weight"] for one in names]).to(self.dtype)
            return product(weight, torch.cat([tensors[f"{one}.bias"] for one in names]).to(self.dtype))

        return _Layer(
            linear(f"{own}.query", f"{own}.key", f"{own}.value"),
            linear(f"{out}.dense"),
            self._norm_of(f"{out}.LayerNorm"),
            linear(f"{name}.intermediate.dense"),
            linear(f"{name}.output.dense"),
            self._norm_of(f"{name}.output.LayerNorm"),
        )

    def _norm_of(self, name: str) -> Apply:
        weight, bias = (self._parts.tensors[f"{name}.{one}"] for one in ("weight", "bias"))
        return partial(
            F.layer_norm,
            normalized_shape=weight.shape,
            weight=weight,
            bias=bias,
            eps=self._parts.config["layer_norm_eps"],
        )

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts, at least one each."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def grid(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(n, d) unit rows for n texts of (n, length) token ids; each has a token, and `mask` says which are its."""
        rows, length = ids.shape
        seen = mask.bool()[:, None, None, :]

        def attend(qkv: Tensor) -> Tensor:
            q, k, v = qkv.view(rows, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            return attended.transpose(1, 2).reshape(rows * length, -1)

        states = self._states(ids.view(-1), self._positions(length).repeat(rows, 1), attend).view(rows, length, -1)
        weights = mask.to(states.dtype)[:, :, None]
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=1)

    def row(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(n, d) unit rows for n texts of token ids, at least one each, all in one row."""
        ends = np.cumsum([len(text) for text in texts]).tolist()
        ids = torch.zeros(-(-ends[-1] // _GRAIN) * _GRAIN, dtype=torch.long)
        positions = torch.zeros(len(ids), self._places.shape[1])
        spans = [slice(end - len(text), end) for text, end in zip(texts, ends, strict=True)]
        for text, span in zip(texts, spans, strict=True):
            ids[span] = torch.tensor(text)
            positions[span] = self._positions(len(text))
        attended = torch.zeros(len(ids), positions.shape[1], dtype=self.dtype)

        def attend(qkv: Tensor) -> Tensor:
            heads = qkv.view(len(ids), 3, 1, self._heads, -1)
            for span in spans:
                q, k, v = heads[span].permute(1, 2, 3, 0, 4)
                one = F.scaled_dot_product_attention(q, k, v)
                attended[span] = one[0].transpose(0, 1).reshape(len(ids[span]), -1)
            return attended

        states = self._states(ids, positions, attend)
        return F.normalize(torch.stack([states[span].mean(0) for span in spans]), dim=1)

    def _positions(self, length: int) -> Tensor:
        return self._places[:length]

    def _states(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(tokens, d): what comes out of the last layer."""
        dtype = self.dtype
        x = self._norm(F.embedding(ids, self._words) + self._kinds[0] + positions)
        for layer in self._layers:
            x = layer.attended_norm(layer.attended(attend(layer.qkv(x.to(dtype)))) + x)
            x = layer.norm(layer.down(F.gelu(layer.up(x.to(dtype)))) + x)
        return x


class PackedBert:
    """An encoder on a CPU. With AMX a text has the same vector to the last bit whatever is encoded beside it.

    Args:
        parts: of the encoder.
        dtype: of the products.
    """

    def __init__(self, parts: BertParts, dtype: torch.dtype) -> None:
        self._bert = MeanBert(parts, dtype)
        self._width: int = parts.config["hidden_size"]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d) unit rows."""
        if not texts:
            return np.empty((0, self._width), np.float32)
        return torch.cat([self._bert.row(some) for some in _passes(self._bert.tokens(texts))]).numpy()


def _passes(texts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    some: list[list[int]] = []
    total = 0
    for text in texts:
        if some and total + len(text) > _PASS:
            yield some
            some, total = [], 0
        some.append(text)
        total += len(text)
    yield some


class GraphedBert:
    """An encoder on a GPU. All graphs are captured at once: in traffic each would cost others a tenth of a second.

    Args:
        parts: of the encoder, on a GPU.
        dtype: of the products; all else is in the encoder's own.
    """

    def __init__(self, parts: BertParts, dtype: torch.dtype) -> None:
        self._bert = MeanBert(parts, dtype)
        self._device = parts.tensors["embeddings.word_embeddings.weight"].device
        self._shapes = shapes(parts.longest)
        self._recorder = GraphRecorder(self._device)
        with self._recorder.alone():  # the largest first: the others use its memory
            self._graphs = {shape: self._record(shape) for shape in reversed(self._shapes)}
        largest, inputs = self._graphs[self._shapes[-1]]
        self._here = torch.zeros(inputs.numel(), dtype=inputs.dtype, pin_memory=inputs.is_cuda)
        self._landing = Landing(largest.found)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d) unit rows. Who comes while others' are computed has its texts taken apart meanwhile."""
        tokens = self._bert.tokens(texts)
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        lots = [order[start : start + _ROWS[-1]] for start in range(0, len(order), _ROWS[-1])]
        inputs = [self._filled([tokens[i] for i in lot]) for lot in lots]
        with self._recorder.alone():
            vectors = [self._encode(one, len(lot)) for one, lot in zip(inputs, lots, strict=True)]
        result = np.empty((len(texts), vectors[0].shape[1]), np.float32)
        result[order] = np.concatenate(vectors)
        return result

    def _filled(self, texts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        return filled(texts, fitting(self._shapes, len(texts), len(texts[-1])))

    def _encode(self, texts: NDArray[np.int64], count: int) -> NDArray[np.float32]:
        recorded, inputs = self._graphs[texts.shape[1], texts.shape[2]]
        here = self._here[: texts.size].view(texts.shape)
        here.numpy()[:] = texts
        inputs.copy_(here, non_blocking=True)  # and who waits for what is computed of it waits for it too
        recorded.graph.replay()
        found: NDArray[np.float32] = self._landing.landed(recorded.found[:count]).numpy()
        return found

    @torch.inference_mode()
    def _record(self, shape: tuple[int, int]) -> tuple[Recorded, Tensor]:
        inputs = torch.ones((2, *shape), dtype=torch.long, device=self._device)
        return self._recorder.record(lambda: self._bert.grid(*inputs)), inputs


def filled(texts: Sequence[Sequence[int]], shape: tuple[int, int]) -> NDArray[np.int64]:
    """(2, *shape): token ids, and which of them are a text's. A row of no text has a token too."""
    inputs = np.zeros((2, *shape), np.int64)
    for row, text in enumerate(texts):
        inputs[0, row, : len(text)] = text
        inputs[1, row, : len(text)] = 1
    inputs[1, len(texts) :, 0] = 1
    return inputs


def shapes(longest: int) -> list[tuple[int, int]]:
    """Numbers of texts and of their tokens that have graphs of their own, ascending, for texts of so many at most."""
    lengths = [_LEAST_LENGTH]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return [(rows, min(length, longest)) for rows in _ROWS for length in lengths]


def fitting(some: Sequence[tuple[int, int]], rows: int, length: int) -> tuple[int, int]:
    """The first shape that has room for so many texts of so many tokens at most."""
    return next(shape for shape in some if shape[0] >= rows and shape[1] >= length)
