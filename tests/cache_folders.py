"""What lies in the folder of a node's adapter cache, for its tests."""

from pathlib import Path

from lorauter.adapters.disk_cache import AdapterDiskCache
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE

NAMES = ("a", "b", "c", "d", "e", "f")


def on_disk(cache_root: Path) -> set[str]:
    """Every file below a cache's folder, `name/version/file` shortened to `name/file`."""
    return {f"{p.relative_to(cache_root).parts[0]}/{p.name}" for p in cache_root.rglob("*") if p.is_file()}


def whole(*names: str) -> set[str]:
    return {f"{name}/{file}" for name in names for file in (CONFIG_FILE, WEIGHTS_FILE, "entry.json")}


def names(cache: AdapterDiskCache) -> list[str]:
    return [name for name, _ in cache.resident()]
