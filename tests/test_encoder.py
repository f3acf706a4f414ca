from collections.abc import Sequence

import numpy as np
import pytest
import torch

from lorauter.bert import PackedBert
from lorauter.defaults import load_encoder
from lorauter.encoder import Embeddings, HashingEncoder, RememberingEncoder, SentenceEncoder, normalised
from lorauter.errors import ConfigError


def test_the_fake_gives_unit_rows_of_its_dimension() -> None:
    vectors = HashingEncoder(32).encode(["one two", "", "!?", "one one two"])
    assert (vectors.shape, vectors.dtype) == ((4, 32), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert HashingEncoder(32).encode([]).shape == (0, 32)


def test_the_fake_finds_texts_that_share_words_similar() -> None:
    one, same, near, far = HashingEncoder().encode(["A good film", "film good a!", "a bad film", "tax law"])
    assert one @ same == pytest.approx(1)
    assert one @ near == pytest.approx(2 / 3)
    assert one @ far == 0


def test_encoders_of_different_size_have_different_names() -> None:
    assert HashingEncoder(32).name != HashingEncoder(64).name


def test_what_comes_again_is_embedded_once() -> None:
    class Counting(HashingEncoder):
        calls = 0

        def encode(self, texts: Sequence[str]) -> Embeddings:
            self.calls += 1
            return super().encode(texts)

    inner = Counting(32)
    encoder = RememberingEncoder(inner)
    for texts in (["a b", "c"], ["c"], ["a b", "c"]):
        np.testing.assert_array_equal(encoder.encode(texts), HashingEncoder(32).encode(texts))
    assert (inner.calls, encoder.name) == (2, inner.name)


def test_normalised_keeps_a_zero_row() -> None:
    rows = normalised(np.array([[3, 4], [0, 0]], np.float32))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]])


def test_an_encoder_that_is_not_there_is_a_config_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        SentenceEncoder(str(tmp_path))
    assert caught.value.setting == "encoder"


def test_half_precision_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["Two dogs play in the snow.", "Is the sky blue?", "a " * 300, ""]
    vectors = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("lorauter.precision.native_dtype", lambda device, dtype=dtype: dtype)
        vectors[dtype] = load_encoder("default", device="cpu").encode(texts)
    whole, half = vectors.values()
    assert (half.shape, half.dtype) == (whole.shape, np.float32)
    np.testing.assert_allclose((whole * half).sum(axis=1), 1, atol=2e-4)
    assert not np.array_equal(whole, half)


def test_a_long_text_costs_the_short_ones_beside_it_little(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder("default", device="cpu")
    assert isinstance(encoder, SentenceEncoder)
    computed = []
    assert isinstance(encoder._fast, PackedBert)
    bert = encoder._fast._bert
    states = bert._states
    monkeypatch.setattr(bert, "_states", lambda ids, *others: computed.append(len(ids)) or states(ids, *others))
    texts = ["a dog", *["a dog " * 120] * 2] * 21
    together = encoder.encode(texts)
    short, long = 4, 242
    assert sum(computed) < 1.2 * (21 * short + 42 * long)
    np.testing.assert_allclose(together[:2], encoder.encode(texts[:2]), atol=2e-2)
