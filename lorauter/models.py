"""Models and encoders by a store's URI: copied once to this machine, below LORAUTER_HOME, and loaded from there.

What is copied is what a model is loaded from, weights as safetensors and no pickles. A model of the hub is linked from
the hub's own cache, so that it is on the disk once. While the store does not answer, what was copied last serves.
Knows nothing of what is done with a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from filelock import FileLock

from lorauter.adapters.store import ObjectStore, Versioned, open_store
from lorauter.errors import ConfigError, ObjectNotFound, StoreUnavailable
from lorauter.uris import called

_KINDS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")
_ELSEWHERE = ("original/", "onnx/", "openvino/", "consolidated")  # the same weights in other forms


def pinned(model: str) -> str:
    """The same model, by its commit where the hub has it, so that whoever loads it loads the same.

    Raises:
        ConfigError, StoreError: it is not there.
    """
    if not model.startswith("hf://"):
        return model
    with suppress(StoreUnavailable):  # what was copied last serves
        store = open_store(model)
        assert isinstance(store, Versioned)
        return store.at().uri
    return model


def copy_model(
    uri: str,
    home: Path,
    notify: Callable[[str], None],
    *,
    setting: str,
    needed: tuple[str, ...] = ("config.json",),
    weights: bool = True,
) -> Path:
    """The folder on this machine with a model's files, which are brought here unless they are there.

    Args:
        home: LORAUTER_HOME.
        notify: is told what is brought.
        setting: names the model in errors.
        needed: one of these files tells that it is a model.
        weights: whether weights are needed; without, it is what describes it.

    Raises:
        ConfigError: the URI is wrong, or holds no model.
        StoreError: the store fails, and no copy is here.
    """
    kept = home / "models" / _stamp(uri, "whole" if weights else "description")
    try:
        store = open_store(uri)
        if isinstance(store, Versioned):
            store = store.at()
        tags = store.fingerprints(lambda key: _is_wanted(key) and (weights or not key.endswith(".safetensors")))
    except StoreUnavailable:
        copies = sorted(kept.glob(f"*/{called(uri)}"), key=lambda path: path.parent.stat().st_mtime)
        if not copies:
            raise
        notify(f"{uri} does not answer; the copy of it that is here serves")
        return copies[-1]
    except ObjectNotFound as error:
        raise ConfigError(f"{setting.replace('_', ' ')} {uri!r}: {error}", setting=setting) from error
    if not any(file in tags for file in needed):
        what = ", ".join(sorted(tags)[:5]) or "no file that a model is loaded from"
        raise ConfigError(
            f"{setting.replace('_', ' ')} {uri!r} holds no {' or '.join(needed)}, so no model: got {what}",
            setting=setting,
        )
    folder = kept / _stamp(json.dumps(sorted(tags.items()))) / called(uri)
    try:
        if not folder.is_dir():
            kept.mkdir(parents=True, exist_ok=True)
            with FileLock(kept / ".lock"):
                if not folder.is_dir():
                    notify(f"fetching {uri} (once, {sum(size for size, _ in tags.values()) / 1e6:,.0f} MB)")
                    _fetch(store, list(tags), folder)
        os.utime(folder.parent)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error}; LORAUTER_HOME names another place") from error
    return folder


def _fetch(store: ObjectStore, keys: list[str], folder: Path) -> None:
    """Bring files to a folder that is then there whole, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
        whole = Path(making) / folder.name
        for key in keys:
            target = whole / key
            target.parent.mkdir(parents=True, exist_ok=True)
            _bring(store, key, target)
        whole.rename(folder)


def _bring(store: ObjectStore, key: str, target: Path) -> None:
    cached = getattr(store, "cached", None)
    if cached is None:
        store.download(key, target)
        return
    found = cached(key).resolve()
    try:
        target.hardlink_to(found)
    except OSError:  # the hub's cache is on another file system
        shutil.copyfile(found, target)


def _is_wanted(key: str) -> bool:
    hidden = any(part.startswith(".") or part == ".." for part in key.split("/"))
    return not hidden and not key.startswith(_ELSEWHERE) and PurePosixPath(key).suffix in _KINDS


def _stamp(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
