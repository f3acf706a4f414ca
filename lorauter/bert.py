"""BERT encoders on a GPU: a batch is one launch, and not some hundreds, which a busy GPU lets wait one after the other.

The forward pass is written out for encoders of the usual make (BERT, the mean of its states, unit length), and captured
in a CUDA graph for each shape that comes, padded to few of them. Others are left to sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from lorauter.cuda_graphs import GraphRecorder, Recorded

_MOST_ROWS = 64
_LEAST_LENGTH = 16


class MeanBert:
    """The parts of a sentence-transformers model.

    Args:
        model: for which `fits` holds.
    """

    def __init__(self, model: Any) -> None:
        self._bert = model[0].model
        self._heads = self._bert.config.num_attention_heads

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether a sentence-transformers model is of the usual make."""
        if [type(module).__name__ for module in model] != ["Transformer", "Pooling", "Normalize"]:
            return False
        bert: Any = getattr(model[0], "model", None)
        plain = model.default_prompt_name is None and model.truncate_dim is None
        if not plain or type(bert).__name__ != "BertModel" or model[1].pooling_mode != "mean":
            return False
        config = bert.config
        absolute = getattr(config, "position_embedding_type", "absolute") == "absolute"
        return absolute and config.hidden_act == "gelu" and not config.is_decoder

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(n, d) unit rows for n texts of (n, length) token ids; each has a token, and `mask` says which are its."""
        embeddings = self._bert.embeddings
        rows, length = ids.shape
        x = embeddings.word_embeddings(ids) + embeddings.token_type_embeddings.weight[0]
        x = embeddings.LayerNorm(x + embeddings.position_embeddings.weight[:length])
        seen = mask.bool()[:, None, None, :]
        for layer in self._bert.encoder.layer:
            own, out = layer.attention.self, layer.attention.output
            q, k, v = (
                part(x).view(rows, length, self._heads, -1).transpose(1, 2) for part in (own.query, own.key, own.value)
            )
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            x = out.LayerNorm(out.dense(attended.transpose(1, 2).reshape(rows, length, -1)) + x)
            x = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)
        weights = mask.to(x.dtype)[:, :, None]
        return F.normalize((x * weights).sum(1) / weights.sum(1), dim=1)


class GraphedBert:
    """The same by CUDA graphs.

    Args:
        model: a sentence-transformers model on a GPU for which `MeanBert.fits` holds.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._forward = MeanBert(model.eval())
        self._device = model.device
        self._graphs: dict[tuple[int, int], tuple[Recorded, Tensor, Tensor]] = {}
        self._recorder = GraphRecorder(self._device)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """(n, d) float32 unit rows, on the CPU."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        lots = [order[start : start + _MOST_ROWS] for start in range(0, len(order), _MOST_ROWS)]
        with self._recorder.alone():
            vectors = torch.cat([self._encode([texts[i] for i in lot]) for lot in lots])
        result = torch.empty_like(vectors)
        result[torch.tensor(order)] = vectors
        return result

    def _encode(self, texts: Sequence[str]) -> Tensor:
        features: Mapping[str, Tensor] = self._model.preprocess(list(texts))
        ids, mask = features["input_ids"], features["attention_mask"]
        rows, length = ids.shape
        shape = padded_shape(rows, length, self._model.max_seq_length)
        recorded, all_ids, all_mask = self._graphs.get(shape) or self._record(shape)
        wide = F.pad(torch.stack([ids, mask]), (0, shape[1] - length, 0, shape[0] - rows))
        wide[1, rows:, 0] = 1  # a row of no text has a token too
        wide = wide.to(self._device)
        all_ids.copy_(wide[0])
        all_mask.copy_(wide[1])
        recorded.graph.replay()
        return recorded.found[:rows].float().cpu()

    def _record(self, shape: tuple[int, int]) -> tuple[Recorded, Tensor, Tensor]:
        ids = torch.zeros(shape, dtype=torch.long, device=self._device)
        mask = torch.ones(shape, dtype=torch.long, device=self._device)
        self._graphs[shape] = self._recorder.record(lambda: self._forward(ids, mask)), ids, mask
        return self._graphs[shape]


def padded_shape(rows: int, length: int, longest: int) -> tuple[int, int]:
    """The shape that a batch is padded to: powers of two, no longer than the model takes."""
    wide = max(_LEAST_LENGTH, 1 << (length - 1).bit_length())
    return 1 << (rows - 1).bit_length(), max(length, min(wide, longest))
