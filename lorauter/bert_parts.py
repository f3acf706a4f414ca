"""What a BERT encoder of the usual make is made of, out of its folder, or of sentence-transformers' model of it.

From the folder it is there in a fraction of the time that importing sentence-transformers takes. Knows which makes are
usual (BERT, the mean of its states, unit length); knows not how they are computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

_MODULES = ["Transformer", "Pooling", "Normalize"]
_WEIGHTS = "model.safetensors"
_NORMALIZER = {
    "lowercase": "do_lower_case",
    "strip_accents": "strip_accents",
    "handle_chinese_chars": "tokenize_chinese_chars",
}


@dataclass(frozen=True)
class BertParts:
    """An encoder's parts.

    Attributes:
        tensors: by the names of transformers' BertModel.
        config: the settings that its config.json has.
        tokenizer: which neither pads nor cuts.
        longest: tokens of a text, of which more are cut off.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    longest: int

    @staticmethod
    def fit(model: Any) -> bool:
        """Whether a sentence-transformers model is of the usual make."""
        if [type(module).__name__ for module in model] != _MODULES:
            return False
        bert: Any = getattr(model[0], "model", None)
        plain = model.default_prompt_name is None and model.truncate_dim is None
        if not plain or type(bert).__name__ != "BertModel" or model[1].pooling_mode != "mean":
            return False
        as_it_is = hasattr(model.tokenizer, "backend_tokenizer") and not getattr(model[0], "do_lower_case", False)
        return as_it_is and _usual(vars(bert.config))

    @classmethod
    def of(cls, model: Any) -> BertParts:
        """Of a sentence-transformers model, which fits."""
        bert = model[0].model
        tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        return cls(bert.state_dict(), bert.config.to_dict(), _bare(tokenizer), model.max_seq_length)

    @classmethod
    def read(cls, folder: Path) -> BertParts | None:
        """Of a folder as sentence-transformers writes them; None if it is of another make, or has not all of it."""
        try:
            return cls._read(folder)
        except (OSError, ValueError, KeyError):  # it is told by sentence-transformers what is wrong
            return None

    @classmethod
    def _read(cls, folder: Path) -> BertParts | None:
        def read(name: str) -> Any:
            return json.loads((folder / name).read_text())

        modules = read("modules.json")
        if [module["type"].rpartition(".")[2] for module in modules] != _MODULES or modules[0]["path"]:
            return None
        whole, bert, config = (
            read("config_sentence_transformers.json"),
            read("sentence_bert_config.json"),
            read("config.json"),
        )
        pooling = read(f"{modules[1]['path']}/config.json")
        modes = {name for name, value in pooling.items() if name.startswith("pooling_mode_") and value}
        of_mean = modes == {"pooling_mode_mean_tokens"} and "pooling_mode" not in pooling
        plain = whole.get("default_prompt_name") is None and whole.get("truncate_dim") is None
        known = bert.keys() == {"max_seq_length", "do_lower_case"} and not bert["do_lower_case"]
        if not (of_mean and plain and known) or config["model_type"] != "bert" or not _usual(config):
            return None
        # What transformers makes of the settings has to be what the tokenizer's own file says.
        told, text = read("tokenizer_config.json"), (folder / "tokenizer.json").read_text()
        normalizer = json.loads(text)["normalizer"]
        if (
            told["tokenizer_class"] not in ("BertTokenizer", "BertTokenizerFast")
            or normalizer["type"] != "BertNormalizer"
        ):
            return None
        if any(normalizer[name] != told[setting] for name, setting in _NORMALIZER.items()):
            return None
        tensors = load_file(folder / _WEIGHTS)
        tensors.pop("embeddings.position_ids", None)
        of_larger = "embeddings.word_embeddings.weight" not in tensors
        if of_larger or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
            return None
        return cls(tensors, config, _bare(Tokenizer.from_str(text)), int(bert["max_seq_length"]))


def _usual(config: Mapping[str, Any]) -> bool:
    absolute = config.get("position_embedding_type", "absolute") == "absolute"
    return absolute and config["hidden_act"] == "gelu" and not config.get("is_decoder", False)


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
