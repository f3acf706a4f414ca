"""The sentence-encoder seam: texts in, unit vectors out.

`SentenceEncoder` is a sentence-transformers model; `HashingEncoder` is the fake, and needs no model. Neither knows
what the texts are for.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lorauter.errors import ConfigError
from lorauter.uris import called

if TYPE_CHECKING:
    from lorauter.bert import GraphedBert, PackedBert

logger = logging.getLogger("lorauter.encoder")
_SAME = 1e-3  # of single precision, by other kernels

Embeddings = NDArray[np.float32]


class Encoder(Protocol):
    """Turns texts into vectors whose inner product is their similarity."""

    @property
    def name(self) -> str:
        """What the encoder is called, for messages and records."""

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Embed n texts: an (n, d) float32 array with rows of unit length."""


class SentenceEncoder:
    """A sentence-transformers model, by folder or Hugging Face id; on a CPU one of the usual make without that library.

    On a CPU that computes in bfloat16 its linear layers do, and all else stays in float32: vectors keep a cosine of
    0.9999 with those of float32, in less than half the time. On a GPU they compute in float16, as long as vectors keep
    three decimals.

    Raises:
        ConfigError: it cannot be loaded.
    """

    def __init__(self, model: str, *, device: str | None = None) -> None:
        import torch

        from lorauter.bert import PackedBert
        from lorauter.bert_parts import BertParts
        from lorauter.precision import native_dtype

        self.name = called(model)
        self._model: Any = None
        self._fast: GraphedBert | PackedBert | None = None
        on_cpu = device == "cpu" or (device is None and not torch.accelerator.is_available())
        if on_cpu and (parts := BertParts.read(Path(model))) is not None:
            self._fast = PackedBert(parts, native_dtype(torch.device("cpu")))
        else:
            self._load(model, device)

    def _load(self, model: str, device: str | None) -> None:
        from sentence_transformers import SentenceTransformer  # seconds to import

        from lorauter.precision import compute_linear_layers_in, native_dtype

        try:
            self._model = SentenceTransformer(model, device=device)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"encoder {model!r} cannot be loaded: {error}", setting="encoder") from error
        on_cpu = self._model.device.type == "cpu"
        # Texts are sorted by length, and padded to the longest of so many: where a CPU's time goes.
        self._padded_together = 8 if on_cpu else 64
        self._fast = _fast(self._model)
        if on_cpu and self._fast is None:
            compute_linear_layers_in(native_dtype(self._model.device), self._model)

    def encode(self, texts: Sequence[str]) -> Embeddings:
        if self._fast is not None and (texts or self._model is None):
            try:
                return self._fast.encode(texts)
            except RuntimeError as error:
                if self._model is None or self._model.device.type != "cuda":
                    raise
                logger.warning("the encoder goes on without CUDA graphs: %s", error)
                self._fast = None
        vectors = self._model.encode(
            list(texts),
            batch_size=self._padded_together,
            normalize_embeddings=True,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def _fast(model: Any) -> GraphedBert | PackedBert | None:
    """A model in fewer operations, if these are written for its make, and on a GPU if they say what it does."""
    from lorauter.bert import GraphedBert, PackedBert
    from lorauter.bert_parts import BertParts
    from lorauter.precision import native_dtype

    if not BertParts.fit(model):
        return None
    parts = BertParts.of(model.eval())
    if model.device.type == "cpu":
        return PackedBert(parts, native_dtype(model.device))
    if model.device.type != "cuda":
        return None
    import torch

    probe = ["a text", "another one, which is longer", *(f"{n} " * n for n in range(40))]
    expected = model.encode(probe, normalize_embeddings=True)
    try:
        for dtype in (torch.float16, torch.float32):
            graphed = GraphedBert(parts, dtype)
            if np.abs(graphed.encode(probe) - expected).max() < _SAME:
                return graphed
    except RuntimeError as error:
        logger.warning("the encoder runs without CUDA graphs: %s", error)
        return None
    logger.warning("the encoder runs without CUDA graphs, whose vectors differ")
    return None


class HashingEncoder:
    """The fake: a bag of hashed words. Texts that share words are similar; nothing is learned."""

    def __init__(self, dimension: int = 256) -> None:
        self.name = f"hashing-{dimension}"
        self._dimension = dimension

    def encode(self, texts: Sequence[str]) -> Embeddings:
        vectors = np.zeros((len(texts), self._dimension), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()) or [""]:
                row[zlib.crc32(word.encode()) % self._dimension] += 1
        return normalised(vectors)


class RememberingEncoder:
    """An encoder that embeds what comes again once: a change that is made anew costs no second embedding."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[tuple[str, ...], Embeddings] = {}
        self.name = encoder.name

    def encode(self, texts: Sequence[str]) -> Embeddings:
        key = tuple(texts)
        if key not in self._known:
            self._known[key] = self._encoder.encode(texts)
        return self._known[key]


def normalised(vectors: Embeddings) -> Embeddings:
    """Rows scaled to unit length; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)
