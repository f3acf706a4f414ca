"""How workers say how far their shards are, for people to look at: in the key-value store of Ray's own controller.

An actor would do the same, but costs a process that wakes two hundred times a second, beside the engine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ray.exceptions import RayError
from ray.experimental import internal_kv

from lorauter.engine import Completion
from lorauter.engine.feed import Outcome

_REPORT_S = 0.5
_NAMESPACE = "lorauter"


@dataclass(frozen=True)
class Reports:
    """Where the workers of one job report; travels to them.

    Attributes:
        job: what tells it from others of the cluster.
    """

    job: str

    def put(self, shard: int, rows: int, tokens: int, errors: int) -> None:
        """Say of a shard how many rows have ended, the tokens made, and the errors so far."""
        internal_kv._internal_kv_put(
            f"{self._prefix}{shard}", json.dumps([rows, tokens, errors]), overwrite=True, namespace=_NAMESPACE
        )

    def running(self, done: Collection[int]) -> list[tuple[int, int, int]]:
        """Rows, tokens and errors of the shards that are not done."""
        found = []
        for key in internal_kv._internal_kv_list(self._prefix, namespace=_NAMESPACE):
            if int(key.decode().removeprefix(self._prefix)) in done:
                internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
            elif value := internal_kv._internal_kv_get(key, namespace=_NAMESPACE):
                rows, tokens, errors = json.loads(value)
                found.append((rows, tokens, errors))
        return found

    def clear(self) -> None:
        """Forget the job."""
        internal_kv._internal_kv_del(self._prefix, del_by_prefix=True, namespace=_NAMESPACE)

    @property
    def _prefix(self) -> str:
        return f"batch/{self.job}/"


@contextmanager
def reporting(shard: int, reports: Reports | None) -> Iterator[Callable[[Outcome], None]]:
    """Gives what is to be told each outcome of a shard; reports what is new, twice a second, by a thread of its own."""
    counts = [0, 0, 0]  # rows, tokens, errors; changed by one thread
    ended = threading.Event()

    def count(outcome: Outcome) -> None:
        counts[0] += 1
        if isinstance(outcome.result, Completion):
            counts[1] += len(outcome.result.token_ids)
        else:
            counts[2] += 1

    if reports is None:
        yield count
        return

    def report() -> None:
        reported = [0, 0, 0]  # a shard that waits for its turn has nothing to say
        while not ended.wait(_REPORT_S):
            if (now := list(counts)) != reported:
                with suppress(RayError):  # said again the next time
                    reports.put(shard, *now)
                    reported = now

    thread = threading.Thread(target=report, name="report", daemon=True)
    thread.start()
    try:
        yield count
    finally:
        ended.set()
        thread.join()
