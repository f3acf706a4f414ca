"""Adapters: PEFT weights, the stores they live in, and the cache on a node's disk."""

from lorauter.adapters.disk_cache import AdapterDiskCache, CacheCounters, LocalAdapter
from lorauter.adapters.repository import AdapterManifest, AdapterRepository, adapter_folders
from lorauter.adapters.store import DirectoryStore, MemoryStore, ObjectStore, open_store
from lorauter.adapters.weights import LoraWeights, ModelShape

__all__ = [
    "AdapterDiskCache",
    "AdapterManifest",
    "AdapterRepository",
    "CacheCounters",
    "DirectoryStore",
    "LocalAdapter",
    "LoraWeights",
    "MemoryStore",
    "ModelShape",
    "ObjectStore",
    "adapter_folders",
    "open_store",
]
