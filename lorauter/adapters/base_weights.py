"""Whether parameters of the base model that an adapter's file holds are the base's own.

PEFT saves embeddings and the output layer along when it thinks that they may have changed, and puts them in the base's
place when it loads an adapter. Compared are fingerprints, so that nobody has to hold both. Knows nothing of adapters.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_AT_ONCE = 1 << 22  # elements

Fingerprint = tuple[tuple[int, ...], str]


def fingerprints(tensor: Tensor) -> dict[torch.dtype, Fingerprint]:
    """Shape and SHA-256 of a tensor's values, as a model in each precision would take them over."""
    return {dtype: _fingerprint(tensor, dtype) for dtype in _DTYPES}


def _fingerprint(tensor: Tensor, dtype: torch.dtype) -> Fingerprint:
    digest = hashlib.sha256()
    for piece in torch.split(tensor.reshape(-1), _AT_ONCE):
        digest.update(piece.to(dtype).contiguous().view(torch.uint8).numpy().data)
    return tuple(tensor.shape), digest.hexdigest()


@lru_cache(maxsize=256)
def base_fingerprint(model: str, parameter: str) -> tuple[torch.dtype, Fingerprint] | None:
    """A base model's own parameter as its files have it; None if it has no such parameter.

    Args:
        model: a folder, or a Hugging Face id that is in the machine's cache.

    Raises:
        LookupError: its safetensors files are not on this machine.
    """
    index = _on_disk(model, _INDEX)
    files = json.loads(index.read_bytes())["weight_map"] if index is not None else None
    names = (parameter, EMBEDDING) if parameter == HEAD else (parameter,)  # a tied output layer is not saved
    for name in names:
        path = _on_disk(model, _FILE if files is None else files.get(name, ""))
        if path is None:
            if files is None:
                raise LookupError(f"{_FILE} of {model} is not on this machine")
            continue
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(name)
                return tensor.dtype, _fingerprint(tensor, tensor.dtype)
    return None


def _on_disk(model: str, file: str) -> Path | None:
    if not file:
        return None
    folder = Path(model)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
