"""Loads an engine, or its model alone, from a folder or id. Knows where weights come from, not how they run."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lorauter.engine.config import DType, EngineConfig
from lorauter.engine.local import MultiLoraEngine
from lorauter.engine.model import Decoder
from lorauter.engine.model_config import known_to_tokenizer
from lorauter.engine.process import loading
from lorauter.engine.text import TextCodec
from lorauter.engine.weights import read_model
from lorauter.errors import ConfigError
from lorauter.precision import native_dtype
from lorauter.tools.formats import FormatSetting


def load_engine(model: str, config: EngineConfig | None = None, *, aliases: Sequence[str] = ()) -> MultiLoraEngine:
    """Load a model and its tokenizer, and start an engine on it.

    Args:
        model, aliases: as for `load_decoder`.
        config: settings, those of where and how it runs among them.

    Raises:
        ConfigError: as `load_decoder`.
    """
    config = config or EngineConfig()
    config = replace(config, device=str(_place(config.device)))
    decoder, codec = loading(model, config, aliases)()
    return MultiLoraEngine(decoder, codec, config)


def _place(device: str) -> torch.device:
    """What a setting means here."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def load_decoder(
    model: str,
    *,
    device: str = "auto",
    dtype: DType = "auto",
    threads: int | None = None,
    aliases: Sequence[str] = (),
    tool_format: FormatSetting = "auto",
    plain: bool = False,
) -> tuple[Decoder, TextCodec]:
    """Load a model and its tokenizer.

    Args:
        model: a folder, or a Hugging Face id.
        device: "auto" is the GPU if there is one, else the CPU.
        dtype: "auto" is bfloat16 where the device computes in it, else float32.
        threads: CPU threads; None takes one for each CPU that the process may use, whatever OMP_NUM_THREADS says
            (Ray sets it to 1).
        aliases: further names that adapters may give as their base model.
        tool_format: how it calls tools; see `EngineConfig`.
        plain: see `Decoder`.

    Raises:
        ConfigError: the model cannot be loaded or is not served.
    """
    from transformers import AutoTokenizer  # seconds to import, for those who have their engine's process load one, too

    place = _place(device)
    if place.type == "cpu":
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    kind = native_dtype(place) if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, config=known_to_tokenizer(model))
        source = read_model(model, kind, place)
        if source is None:
            from transformers import AutoModelForCausalLM

            loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=kind)
            source = loaded.to(place).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"base model {model!r} cannot be loaded: {error}", setting="base_model") from error
    decoder = Decoder(source, names=(model, *aliases), plain=plain)
    codec = TextCodec(tokenizer, eos_ids=_eos_ids(source.generation_config), tool_format=tool_format)
    del source
    gc.collect()
    return decoder, codec


def _eos_ids(config: Any) -> list[int]:
    ids = getattr(config, "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
