"""The written-out forward pass against sentence-transformers' own, with random weights; graphs need a GPU."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from graph_stand_in import stand_in_for_graphs

from lorauter.bert import GraphedBert, MeanBert, PackedBert, filled, fitting, shapes
from lorauter.bert_parts import BertParts
from lorauter.cuda_graphs import GraphRecorder
from lorauter.encoder import SentenceEncoder

TEXTS = ["Is this review good?", "a", "Which of these is it, " * 30, "Translate this sentence to French.", "b c"]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder(_default(), device="cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    """The encoder as sentence-transformers has it."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(_default(), device="cpu").eval()


@pytest.fixture(scope="module")
def parts() -> BertParts:
    read = BertParts.read(Path(_default()))
    assert read is not None
    return read


def _default() -> str:
    from lorauter.defaults import resolve_encoder

    return resolve_encoder("default")


def test_the_forward_pass_is_the_models_whatever_it_is_padded_to(model: Any) -> None:
    expected = model.encode(TEXTS, normalize_embeddings=True)
    features = model.preprocess(TEXTS)
    ids, mask = features["input_ids"], features["attention_mask"]
    for wider in (0, 3):
        pad = torch.nn.functional.pad
        with torch.inference_mode():
            found = MeanBert(BertParts.of(model)).grid(pad(ids, (0, wider)), pad(mask, (0, wider)))
        assert np.abs(found.numpy() - expected).max() < 5e-3  # linear layers may be of half precision


def test_texts_are_taken_apart_as_the_model_does(model: Any) -> None:
    odd = ["", " ", "  a\tb\n", "東京 É e\u0301 🙂", "[SEP] [CLS] ##a", "a" * 5000, "don't \x00 “quote”", "of " * 900]
    texts = [*TEXTS, *odd]
    features = model.preprocess(texts)
    rows = zip(features["input_ids"], features["attention_mask"].bool(), strict=True)
    expected = [ids[mask].tolist() for ids, mask in rows]
    read = BertParts.read(Path(_default()))
    assert read is not None
    assert MeanBert(BertParts.of(model)).tokens(texts) == MeanBert(read).tokens(texts) == expected


def test_a_pass_on_a_cpu_says_what_the_model_says_in_whatever_company(encoder: SentenceEncoder, model: Any) -> None:
    assert isinstance(encoder._fast, PackedBert)
    assert encoder._model is None, "it came without sentence-transformers"
    texts = [TEXTS[i % len(TEXTS)] + " word" * (7 * i % 61) for i in range(9)] + ["", "long " * 400]
    together = encoder.encode(texts)
    expected = model.encode(texts, normalize_embeddings=True)
    assert (together * expected).sum(axis=1).min() > 0.9999
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(alone, together, atol=2e-3)
    if torch.cpu.get_capabilities().get("amx_bf16"):
        np.testing.assert_array_equal(alone, together)
        np.testing.assert_array_equal(encoder.encode(texts[::-1])[::-1], together)


def test_other_makes_are_left_to_sentence_transformers() -> None:
    def made(modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"), **config: Any) -> Any:
        pooling = config.pop("pooling", "mean")
        bert = type(
            "BertModel", (), {"config": SimpleNamespace(**{"hidden_act": "gelu", "is_decoder": False, **config})}
        )
        parts = {"Transformer": {"model": bert()}, "Pooling": {"pooling_mode": pooling}, "Normalize": {}}

        class Model(list[Any]):
            default_prompt_name = None
            truncate_dim = None
            tokenizer = SimpleNamespace(backend_tokenizer=None)

        return Model(type(name, (SimpleNamespace,), {})(**parts[name]) for name in modules)

    assert BertParts.fit(made())
    assert not BertParts.fit(made(pooling="cls"))
    assert not BertParts.fit(made(modules=("Transformer", "Pooling")))
    assert not BertParts.fit(made(hidden_act="relu"))
    prompted = made()
    prompted.default_prompt_name = "query"
    assert not BertParts.fit(prompted)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
        ("config.json", {"hidden_act": "relu"}),
        ("config.json", {"model_type": "mpnet"}),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("tokenizer_config.json", {"do_lower_case": False}),
        ("model.safetensors", None),
    ],
)
def test_folders_of_other_makes_are_left_to_sentence_transformers(
    file: str, changes: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(_default(), folder, copy_function=os.symlink)
    assert BertParts.read(folder)
    there = (folder / file).resolve()
    (folder / file).unlink()
    if changes is not None:
        (folder / file).write_text(json.dumps({**json.loads(there.read_text()), **changes}))
    assert BertParts.read(folder) is None


def test_shapes_are_few() -> None:
    assert shapes(32) == [(4, 32), (16, 32), (32, 32), (64, 32)]
    assert len(shapes(512)) == 20
    assert [fitting(shapes(200), *each) for each in ((1, 3), (5, 33), (64, 200), (2, 130), (17, 32))] == [
        (4, 32),
        (16, 64),
        (64, 200),
        (4, 200),
        (32, 32),
    ]


def test_a_batch_is_filled_up() -> None:
    ids, mask = filled([[5, 6], [7]], (4, 3))
    assert ids.tolist() == [[5, 6, 0], [7, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]], "a row of no text has a token too"


def test_all_graphs_are_recorded_before_the_first_text(parts: BertParts, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_graphs(monkeypatch, compute=True)
    monkeypatch.setattr("lorauter.bert.shapes", lambda _: [(4, 32), (16, 32), (64, 32)])
    graphed = GraphedBert(parts, torch.float32)
    record = MagicMock()
    monkeypatch.setattr(GraphRecorder, "record", record)
    for count in (3, 4, 70):
        texts = [f"{'text ' * (7 * i % 23)} {i}" for i in range(count)]
        expected = np.concatenate([MeanBert(parts).row([ids]).numpy() for ids in MeanBert(parts).tokens(texts)])
        np.testing.assert_allclose(graphed.encode(texts), expected, atol=1e-4)
    record.assert_not_called()


def test_products_of_half_precision_keep_three_decimals(parts: BertParts) -> None:
    half, full = MeanBert(parts, torch.float16), MeanBert(parts)
    with torch.inference_mode():
        for ids in full.tokens(TEXTS):
            given = torch.tensor([ids])
            there = torch.ones_like(given)
            assert (half.grid(given, there) - full.grid(given, there)).abs().max() < 5e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_say_what_the_model_says() -> None:
    encoder = SentenceEncoder(_default(), device="cuda")
    assert isinstance(encoder._fast, GraphedBert)
    for count in (1, 3, 150):
        texts = [TEXTS[i % len(TEXTS)] + "!" * (i % 7) for i in range(count)]
        expected = encoder._model.encode(texts, normalize_embeddings=True)
        assert np.abs(encoder.encode(texts) - expected).max() < 1e-3
