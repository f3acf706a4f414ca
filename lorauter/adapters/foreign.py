"""What people have where an adapter's safetensors file should be: pickles, Git LFS pointers, pieces.

Says in words what it is and what to do. Knows nothing of what is in an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

WEIGHTS_FILE = "adapter_model.safetensors"

_PICKLE = (
    "a pickle, which can run any code when it is opened; load it with PEFT where you trust it, and save it anew "
    "(save_pretrained writes safetensors)"
)
_BEGINNINGS = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`",
    b"PK\x03\x04": f"it is {_PICKLE}",
    **{b"\x80" + bytes([protocol]): f"it is {_PICKLE}" for protocol in range(2, 6)},
    b"GGUF": "it is a GGUF file; save the adapter with PEFT",
    b"<!DOCTYPE": "it is a web page; fetch the file itself",
    b"<html": "it is a web page; fetch the file itself",
}


def what_is_there(path: Path) -> str | None:
    """What a file that cannot be read is instead, and what to do; None where that cannot be said."""
    try:
        with path.open("rb") as file:
            beginning = file.read(32)
    except FileNotFoundError:
        return "it is missing" if path.name != WEIGHTS_FILE else what_is_missing(p.name for p in path.parent.glob("*"))
    except OSError:
        return None
    return next((what for start, what in _BEGINNINGS.items() if beginning.startswith(start)), None)


def what_is_missing(files: Iterable[str]) -> str:
    """Why there are no weights, by the names of the files that are there."""
    files = sorted(files)
    for file in files:
        if file.startswith("adapter_model-") or file == f"{WEIGHTS_FILE}.index.json":
            return f"it is missing, and {file} is of several files; PEFT reads one, so merge them into {WEIGHTS_FILE}"
    for file in files:
        if file.endswith((".bin", ".pt", ".pth", ".ckpt")) and file != "training_args.bin":
            return f"it is missing, and {file} is {_PICKLE}"
    for file in files:
        if file.endswith((".safetensors", ".npz", ".gguf")):
            return f"it is missing, and {file} is not what PEFT reads; save the adapter with PEFT"
    return "it is missing"
