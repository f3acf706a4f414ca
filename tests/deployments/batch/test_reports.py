"""What workers report, with a dictionary for Ray's store; tests/integration/commands has the real one."""

import threading
import time

import pytest
from ray.exceptions import RaySystemError

from deployments.batch import reports as module
from deployments.batch.reports import Reports, reporting
from lorauter.engine import Completion
from lorauter.engine.feed import Outcome


@pytest.fixture
def store(monkeypatch):
    """What Ray's key-value store holds."""
    held: dict[bytes, bytes] = {}

    def delete(key, *, del_by_prefix=False, namespace=None):
        key = key.encode() if isinstance(key, str) else key
        for found in [k for k in held if (k.startswith(key) if del_by_prefix else k == key)]:
            del held[found]

    kv = module.internal_kv
    monkeypatch.setattr(kv, "_internal_kv_put", lambda key, value, **_: held.update({key.encode(): value.encode()}))
    monkeypatch.setattr(kv, "_internal_kv_get", lambda key, **_: held.get(key))
    monkeypatch.setattr(kv, "_internal_kv_list", lambda prefix, **_: [k for k in held if k.startswith(prefix.encode())])
    monkeypatch.setattr(kv, "_internal_kv_del", delete)
    return held


def test_shards_that_are_not_done_are_counted_for_each_job_apart(store) -> None:
    mine, other = Reports("mine"), Reports("other")
    mine.put(3, 5, 70, 1)
    mine.put(3, 6, 80, 1)
    mine.put(4, 1, 2, 0)
    other.put(3, 9, 9, 9)
    assert sorted(mine.running([])) == [(1, 2, 0), (6, 80, 1)]
    assert mine.running({3: "done"}) == [(1, 2, 0)]
    mine.clear()
    assert (mine.running([]), other.running([])) == ([], [(9, 9, 9)])


def test_outcomes_are_reported_while_a_shard_is_answered(store, monkeypatch) -> None:
    monkeypatch.setattr(module, "_REPORT_S", 0.01)
    reported = threading.Event()
    put = Reports.put
    failures = [RaySystemError("away")]

    def reporter(self, *counts):
        if failures:
            raise failures.pop()
        put(self, *counts)
        reported.set()

    monkeypatch.setattr(Reports, "put", reporter)
    with reporting(1, Reports("job")):
        time.sleep(0.1)
    assert failures  # nothing has ended, and nothing was said
    with reporting(2, Reports("job")) as ended:
        ended(Outcome(Completion("yes", (1, 2, 3), "stop")))
        ended(Outcome(ValueError("no")))
        reported.wait(10)
    assert Reports("job").running([]) == [(2, 3, 1)]
    assert not [thread for thread in threading.enumerate() if thread.name == "report"]


def test_nothing_is_reported_where_nobody_looks() -> None:
    with reporting(0, None) as ended:
        ended(Outcome(ValueError("no")))
    assert not [thread for thread in threading.enumerate() if thread.name == "report"]
