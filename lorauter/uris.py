"""What the URIs of stores say by themselves. Opens nothing; `lorauter.adapters.open_store` does."""

import re

STORES = "a folder, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or hf://owner/name@revision"
"""What may name a store, for messages."""

_REVISION = re.compile(r"@(?:refs/(?:pr|convert)/[^/]+|[^/]+)")


def is_uri(place: str) -> bool:
    """Whether it is a store's URI, and not a folder, an id or "default"."""
    return "://" in place


def is_read_only(uri: str) -> bool:
    """Whether a store is of a kind that can only be read."""
    return uri.startswith("hf://")


def called(model: str) -> str:
    """What a model is called: the last part of its folder, id or URI, without a revision."""
    place = _REVISION.sub("", model, count=1) if model.startswith("hf://") else model
    return place.rstrip("/").rsplit("/", 1)[-1]
