"""Compositions that somebody asked for while the service runs: what is known of each, kept beside the catalog.

A composition takes minutes, and whoever makes it, or asks for it, may die meanwhile: so each is an object of the
catalog's store, `compositions/<id>.json`, which is changed under its lock. Whoever makes one says so every few seconds;
one of which nothing is heard any more is lost. Knows nothing of how compositions are made, nor of HTTP.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from deployments.access import Caller
from deployments.told import Audience
from lorauter.adapters.store import ObjectStore
from lorauter.errors import CompositionNotFound, ObjectNotFound
from lorauter.keys import ApiKey

Status = Literal["queued", "running", "publishing", "done", "failed", "cancelled"]
UNDER_WAY: tuple[Status, ...] = ("queued", "running", "publishing")
HEARD_S = 60.0
"""Seconds without a word from whoever makes a composition, after which it is lost."""

_FOLDER = "compositions"
_ID = re.compile(r"[0-9a-f]{16}")
_KEPT = 50  # that ended, the newest
_AT_ONCE = 16
_LOST = "whoever made it has ended, or nothing is heard of it; its log may say why (memory?). Ask again"
_OTHERWISE = "the service has other adapters, or another base model, than when it was asked for; ask again"
_NO_KEY = "0" * 64  # the hash of no key


@dataclass(frozen=True)
class CompositionJob:
    """A composition, made or to be made.

    Attributes:
        id: 16 hexadecimal digits, later ones larger.
        adapter: that is to come of it.
        setup: what the service composes from and for; one that was set up otherwise leaves it alone.
        by: the key's name; None without keys.
        permitted: patterns of the adapters that it may be made of; None is all.
        asked, began, ended: when, in seconds since the epoch.
        heard: when whoever makes it last said so.
        progress: from 0 to 1.
        result: what came of it.
        error: why nothing did, as the API tells it, by who reads it.
    """

    id: str
    task: str
    adapter: str
    setup: str
    by: str | None = None
    permitted: tuple[str, ...] | None = None
    status: Status = "queued"
    asked: float = 0.0
    began: float | None = None
    ended: float | None = None
    heard: float = 0.0
    progress: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    error: dict[str, dict[str, Any]] | None = None

    @classmethod
    def of(cls, caller: Caller, task: str, adapter: str, setup: str) -> CompositionJob:
        """A new one."""
        now = time.time()
        by, permitted = caller.name, caller.permitted
        return cls(f"{int(now * 1000):012x}{secrets.token_hex(2)}", task, adapter, setup, by, permitted, asked=now)

    @property
    def caller(self) -> Caller:
        """Who asked for it, with no more of the key than its rights."""
        if self.by is None:
            return Caller()
        return Caller(ApiKey(name=self.by, sha256=_NO_KEY, roles=frozenset({"admin"}), adapters=self.permitted))

    def is_lost(self, setup: str) -> bool:
        """Whether nobody makes it any more, though it has not ended."""
        if self.status == "queued":
            return self.setup != setup
        return self.status in UNDER_WAY and time.time() - self.heard > HEARD_S

    def shown(self, audience: Audience, setup: str, ahead: int) -> dict[str, Any]:
        """As a caller sees it.

        Args:
            setup: of the service that is asked.
            ahead: how many are made before it.
        """
        lost = self.is_lost(setup)
        shown: dict[str, Any] = {
            "id": self.id,
            "object": "composition",
            "task": self.task,
            "adapter": self.adapter,
            "status": "lost" if lost else self.status,
            "asked_by": self.by,
            "created_at": int(self.asked),
            "started_at": self.began and int(self.began),
            "ended_at": self.ended and int(self.ended),
            "progress": self.progress,
            **self.result,
        }
        if lost:
            shown["reason"] = _LOST if self.status != "queued" else _OTHERWISE
        elif self.status == "queued":
            shown["ahead"] = ahead
        if self.error is not None:
            shown["error"] = self.error[audience]
        if audience == "limited" and "catalog_version" in shown:  # it changes with what is not theirs, too
            shown["catalog_version"] = None
        return shown

    def ending(self, status: Status, **beside: Any) -> CompositionJob:
        """The same, ended now."""
        return replace(self, status=status, ended=time.time(), **beside)


class CompositionJobs:
    """All of them. Every method may raise StoreError.

    Args:
        store: the catalog's.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def add(self, job: CompositionJob) -> None:
        """Keep a new one, and forget the oldest of many that ended."""
        self._store.write(_key(job.id), _encoded(job))
        over = [old for old in self.all() if old.ended is not None or old.is_lost(job.setup)]
        for old in over[:-_KEPT]:
            self._store.delete(_key(old.id))

    def all(self) -> list[CompositionJob]:
        """In the order in which they were asked for."""
        try:
            keys = [key for key in self._store.files(_FOLDER) if _ID.fullmatch(_id(key))]
        except ObjectNotFound:
            return []
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            found = threads.map(self._read, keys)
            return sorted((job for job in found if job is not None), key=lambda job: job.id)

    def get(self, id: str) -> CompositionJob:
        """One of them. Raises CompositionNotFound."""
        job = self._read(_key(id)) if _ID.fullmatch(id) else None
        if job is None:
            raise CompositionNotFound(id[:128])
        return job

    def change(self, id: str, edit: Callable[[CompositionJob], CompositionJob]) -> CompositionJob:
        """Put what an edit makes of one in its place; nobody else changes it meanwhile.

        Raises:
            CompositionNotFound, Conflict.
            Exception: whatever the edit raises.
        """
        if not _ID.fullmatch(id):
            raise CompositionNotFound(id[:128])
        with self._store.locked(_key(id)) as held:
            before = _decoded(held.content)
            if before is None:
                raise CompositionNotFound(id)
            after = edit(before)
            if after != before:
                held.write(_encoded(after))
            return after

    def _read(self, key: str) -> CompositionJob | None:
        try:
            return _decoded(self._store.read(key))
        except ObjectNotFound:  # somebody else forgot it
            return None


def waiting(jobs: Sequence[CompositionJob], setup: str) -> list[CompositionJob]:
    """Those that wait to be made by a service of this setup."""
    return [job for job in jobs if job.status == "queued" and job.setup == setup]


def _key(id: str) -> str:
    return f"{_FOLDER}/{id}.json"


def _id(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")


def _encoded(job: CompositionJob) -> bytes:
    return json.dumps(asdict(job), ensure_ascii=False).encode()


def _decoded(content: bytes | None) -> CompositionJob | None:
    """None of what is none, which a later version may have written."""
    with suppress(ValueError, TypeError):
        job = CompositionJob(**json.loads(content or b""))
        return replace(job, permitted=None if job.permitted is None else tuple(job.permitted))
    return None
