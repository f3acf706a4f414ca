"""The suite on several workers of pytest-xdist: what runs together, in which order, and what has the machine alone.

What shares a service is one worker's, so that each is started once; these begin first, and the unit tests fill in. Who
is alone keeps all others waiting, and waits for what they are at: while the first service has such tests others have
short ones. It knows nothing of what tests do. Without workers (`pytest` as it is) tests only change their order.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# What starts services, by what the path of its tests begins with (the longest counts), and in the order of running; and
# among it the files of short tests that another worker has while the first service starts and its tests are alone.
BESIDE = ("tests/adapters/", "tests/catalog/", "tests/deployments/")
SERVICES = (
    "tests/integration/service/",
    *BESIDE,
    "tests/integration/faults/",
    "tests/integration/commands/test_batch.py",
    "tests/integration/commands/",
    "tests/infra/test_dev.py",
)


def scope_of(nodeid: str) -> str:
    """What one worker runs in one go, of a test: what shares its services, or else its file."""
    file = nodeid.partition("::")[0]
    service = _service_of(file)
    return file if service is None or service in BESIDE else service


def _service_of(file: str) -> str | None:
    return max((service for service in SERVICES if file.startswith(service)), key=len, default=None)


class Scopes(LoadScopeScheduling):
    """Hands scopes out in the order of the tests."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scopes:
    config.option.loadscopereorder = False  # by the number of tests
    return Scopes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Services first, each with its tests in their own order; last the other files with tests that are alone."""
    alone = {scope_of(item.nodeid) for item in items if "alone" in getattr(item, "fixturenames", ())}

    def rank(item: pytest.Item) -> int:
        scope = scope_of(item.nodeid)
        service = _service_of(scope)
        if service is not None and (scope in SERVICES or scope not in alone):
            return SERVICES.index(service)
        return len(SERVICES) + (scope in alone)

    items.sort(key=rank)


class Machine:
    """The machine, which tests of several workers share, or have alone.

    Args:
        folder: the same for all workers.
    """

    def __init__(self, folder: Path) -> None:
        # Who waits to be alone holds the gate, and keeps others from beginning.
        self._gate, self._use = (os.open(folder / name, os.O_CREAT | os.O_RDWR) for name in ("gate", "use"))

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While a test runs."""
        fcntl.flock(self._gate, fcntl.LOCK_SH)
        fcntl.flock(self._use, fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._use, fcntl.LOCK_UN)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within `shared`, from when no other test runs."""
        fcntl.flock(self._use, fcntl.LOCK_UN)
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._use, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._use, fcntl.LOCK_SH)
            fcntl.flock(self._gate, fcntl.LOCK_UN)


_MACHINE = pytest.StashKey[Machine]()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.stash[_MACHINE] = Machine(config.cache.mkdir("machine"))
        os.environ.setdefault("RAY_worker_niceness", "0")  # of Ray's 15, they wait for all that the others compute


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    machine = item.config.stash.get(_MACHINE, None)
    if machine is None:
        return (yield)
    with machine.shared():
        return (yield)


@pytest.fixture
def alone(pytestconfig: pytest.Config) -> Iterator[None]:
    """No other test runs meanwhile: of a test that compares durations, as its last fixture."""
    machine = pytestconfig.stash.get(_MACHINE, None)
    if machine is None:
        yield
    else:
        with machine.alone():
            yield
