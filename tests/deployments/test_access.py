"""Keys, roles and limits at the door, without Ray."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.requests import Request

from deployments import access as access_module
from deployments.access import Access, Caller
from deployments.config import AccessSettings
from deployments.limits import TokenBuckets
from lorauter.errors import ConfigError, PermissionDenied, RateLimited, Unauthenticated
from lorauter.keys import hash_key

KEY, OTHER, ADMIN = "lr-one", "lr-two", "lr-admin"
ROWS: list[dict[str, Any]] = [
    {"name": "one", "sha256": hash_key(KEY), "adapters": ["a-*", "shared"], "requests_per_minute": 2},
    {"name": "two", "sha256": hash_key(OTHER), "tokens_per_minute": 100},
    {"name": "admin", "sha256": hash_key(ADMIN), "roles": ["admin"]},
]


class Limits:
    """Buckets in this process, on a clock that stands."""

    def __init__(self) -> None:
        self.now = 0.0
        self._buckets = TokenBuckets(lambda: self.now)

    async def take(self, name: str, amount: float, per_minute: int) -> float:
        return self._buckets.take(name, amount, per_minute)

    async def settle(self, name: str, amount: float, per_minute: int) -> None:
        self._buckets.settle(name, amount, per_minute)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump(ROWS))
    return path


@pytest.fixture
def door(file: Path) -> Access:
    return Access(AccessSettings(keys_file=str(file)), Limits())


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at each time."""
    monkeypatch.setattr(access_module, "_RECHECK_S", 0.0)


def request(key: str | None) -> Request:
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    return Request({"type": "http", "headers": headers})


def require(door: Access, key: str | None, *roles: Any) -> Caller:
    return asyncio.run(door.require(request(key), *(roles or ("inference",))))


def test_a_key_lets_its_owner_in(door: Access) -> None:
    caller = require(door, KEY)
    assert caller.name == "one"
    assert [name for name in ("a-1", "a-", "shared", "b-1", "A-1", "shared2", "xa-1") if caller.permits(name)] == [
        "a-1",
        "a-",
        "shared",
    ]
    assert require(door, OTHER).permits("b-1")


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer é\xff"]
    + [f"Bearer {row['sha256']}" for row in ROWS],
)
def test_what_is_no_key_is_refused_and_not_repeated(door: Access, header: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        door.identify(header)
    for part in (KEY, "Basic", "é"):
        assert part not in str(caught.value)


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY} "])
def test_the_scheme_is_read_as_http_says(door: Access, header: str) -> None:
    assert door.identify(header).name == "one"


def test_roles(door: Access) -> None:
    assert require(door, ADMIN, "admin").name == "admin"
    assert require(door, ADMIN, "inference", "admin").name == "admin"
    with pytest.raises(PermissionDenied, match=r"'admin'.*inference"):
        require(door, ADMIN, "inference")
    with pytest.raises(PermissionDenied, match=r"'one'.*admin"):
        require(door, KEY, "admin")


def test_without_keys_all_but_admin_is_open(caplog: pytest.LogCaptureFixture) -> None:
    door = Access(AccessSettings())
    assert "everybody" in caplog.text
    caller = require(door, None)
    assert (caller.name, caller.permitted) == (None, None)
    assert require(door, "anything", "inference", "admin").permits("any")
    with pytest.raises(PermissionDenied, match="no keys are configured"):
        require(door, None, "admin")
    asyncio.run(asyncio.wait_for(reserve_and_settle(door, caller), 1))


async def reserve_and_settle(door: Access, caller: Caller) -> None:
    reservation = await door.reserve(caller, 10**9)
    await reservation.settle(10**9)


def test_an_empty_list_of_keys_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    with pytest.raises(Unauthenticated):
        require(Access(AccessSettings(keys_file=str(tmp_path / "keys"))), KEY)


def test_requests_are_limited_by_key(door: Access) -> None:
    for _ in range(2):
        require(door, KEY)
    with pytest.raises(RateLimited, match="'one' may use 2 requests a minute") as caught:
        require(door, KEY)
    assert caught.value.retry_after_s == pytest.approx(30)
    require(door, OTHER)


def test_a_key_without_the_role_costs_nothing(door: Access) -> None:
    for _ in range(5):
        with pytest.raises(PermissionDenied):
            require(door, KEY, "admin")
    require(door, KEY)


def test_tokens_are_reserved_and_then_settled(door: Access) -> None:
    caller = require(door, OTHER)

    async def run() -> None:
        first = await door.reserve(caller, 80)
        with pytest.raises(RateLimited, match="100 tokens") as caught:
            await door.reserve(caller, 80)
        assert caught.value.retry_after_s == pytest.approx(36)
        await first.settle(10)
        await first.settle(10)  # nothing is given back twice
        second = await door.reserve(caller, 90)
        await second.settle(190)  # more than it was thought to take: a debt
        with pytest.raises(RateLimited) as caught:
            await door.reserve(caller, 1)
        assert caught.value.retry_after_s == pytest.approx(60.6)

    asyncio.run(run())


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", yaml.safe_dump(ROWS))
    assert require(Access(AccessSettings(keys_env="SOME_KEYS"), Limits()), KEY).name == "one"
    monkeypatch.delenv("SOME_KEYS")
    with pytest.raises(ConfigError, match="SOME_KEYS is not set"):
        Access(AccessSettings(keys_env="SOME_KEYS"))


@pytest.mark.usefixtures("no_pause")
def test_a_changed_file_is_read_again(door: Access, file: Path) -> None:
    file.write_text(yaml.safe_dump(ROWS[1:]))
    with pytest.raises(Unauthenticated):
        require(door, KEY)
    require(door, OTHER)
    file.write_text(yaml.safe_dump(ROWS))
    require(door, KEY)


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_text("[{name: one"),
        lambda file: file.write_text(yaml.safe_dump([{"name": "one", "sha256": KEY}])),
        lambda file: file.write_bytes(b"\xff\xfe\x00" + KEY.encode()),
        lambda file: file.unlink(),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["half", "key-for-hash", "binary", "gone", "folder"],
)
def test_while_the_file_is_wrong_the_keys_stay_as_they_were(
    door: Access, file: Path, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(file)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert require(door, OTHER).name == "two"
    assert caplog.text.count("stay as they are") == 1
    assert KEY not in caplog.text
    if file.is_dir():
        file.rmdir()
    file.write_text(yaml.safe_dump(ROWS[:1]))
    assert require(door, KEY).name == "one"
    with pytest.raises(Unauthenticated):
        require(door, OTHER)


@pytest.mark.parametrize("content", [None, b"[", b"\xff\xfe"])
def test_a_service_does_not_start_without_its_keys(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"keys\.yaml|cannot be read"):
        Access(AccessSettings(keys_file=str(path)))


def test_a_file_swapped_by_a_link_is_seen(tmp_path: Path, no_pause: None) -> None:
    """As Kubernetes swaps a mounted secret."""
    for i, rows in enumerate((ROWS[:1], ROWS[1:2])):
        (tmp_path / f"v{i}").mkdir()
        (tmp_path / f"v{i}" / "keys").write_text(yaml.safe_dump(rows))
        os.utime(tmp_path / f"v{i}" / "keys", (1, 1))
    link = tmp_path / "current"
    link.symlink_to("v0")
    door = Access(AccessSettings(keys_file=str(link / "keys")), Limits())
    require(door, KEY)
    (tmp_path / "next").symlink_to("v1")
    (tmp_path / "next").replace(link)
    require(door, OTHER)
