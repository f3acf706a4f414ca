"""What scores are made of: the base model, the tasks' examples, the adapters' versions. Knows nothing of scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorauter.defaults import resolve_model
from lorauter.errors import ConfigError
from lorauter.tasks import Task


@dataclass(frozen=True)
class Provenance:
    """What scores are of; for anything else they are worth nothing. What is not known is left out.

    Attributes:
        model: the base model's digest.
        by: how it was scored: "metric", "likelihood".
        tasks: of each task the digest of its metric and validation examples.
        adapters: of each adapter the version.
    """

    model: str | None = None
    by: str | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"model": self.model, "by": self.by, "tasks": dict(self.tasks), "adapters": dict(self.adapters)}

    @classmethod
    def from_json(cls, data: Any) -> Provenance:
        """Raises KeyError, TypeError or ValueError where it is none."""
        return cls(data["model"], data["by"], dict(data["tasks"]), dict(data["adapters"]))

    def joined(self, other: Provenance) -> Provenance:
        """Both together; where both know, the other is right."""
        return Provenance(
            other.model or self.model,
            other.by or self.by,
            {**self.tasks, **other.tasks},
            {**self.adapters, **other.adapters},
        )

    def differing(self, now: Provenance, tasks: Collection[str], adapters: Collection[str]) -> list[str]:
        """In words, how `now` is not what scores of these tasks and adapters were made of."""
        pairs: list[tuple[str, str | None, str | None]] = [
            ("the base model", self.model, now.model),
            ("the way of scoring", self.by, now.by),
            *((f"task {name!r}", self.tasks.get(name), now.tasks.get(name)) for name in sorted(tasks)),
            *((f"adapter {name!r}", self.adapters.get(name), now.adapters.get(name)) for name in sorted(adapters)),
        ]
        return [
            f"{what} was {was or 'not noted'} and is {is_now}"
            for what, was, is_now in pairs
            if is_now is not None and was != is_now
        ]


def task_digests(tasks: Iterable[Task]) -> dict[str, str]:
    """Of each task the digest of what scores depend on: its metric, and its validation examples in their order."""
    return {
        task.name: _digest(json.dumps([task.metric, [[e.input, e.target] for e in task.validation]]).encode())
        for task in tasks
    }


def model_digest(model: str) -> str:
    """Tells base models apart by content: of a folder by all its files, of a Hugging Face id by its commit.

    Raises:
        ConfigError: the model is not there.
    """
    found = resolve_model(model)
    folder = Path(found).expanduser()
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return f"{found}@{Path(hf_hub_download(found, 'config.json')).parent.name}"
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigError(f"base model {model!r} cannot be found: {error}", setting="base_model") from error
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    stamp = []
    for path in files:
        with path.open("rb") as file:
            stamp.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return _digest(json.dumps(stamp).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
