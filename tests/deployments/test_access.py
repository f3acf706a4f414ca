"""Keys, roles and limits at the door, without Ray."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.requests import Request

from deployments import access as access_module
from deployments.access import Access, Caller, Reservation, Visit
from deployments.calls import Refused, Taken, Want
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
        self.asked: list[list[str]] = []
        self._buckets = TokenBuckets(lambda: self.now)

    async def take(self, wants: Sequence[Want]) -> Taken | Refused:
        self.asked.append([want.name for want in wants])
        await asyncio.sleep(0)
        return self._buckets.take(wants)

    async def settle(self, want: Want) -> None:
        self._buckets.settle(want)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump(ROWS))
    return path


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def door(file: Path, limits: Limits) -> Access:
    return Access(AccessSettings(keys_file=str(file)), limits)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at each time."""
    monkeypatch.setattr(access_module, "_RECHECK_S", 0.0)


def request(key: str | None) -> Request:
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    return Request({"type": "http", "headers": headers})


def require(door: Access, key: str | None, *roles: Any) -> Caller:
    async def enter() -> Caller:
        visit = door.require(request(key), *(roles or ("inference",)))
        await visit.count()
        return visit.caller

    return asyncio.run(enter())


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


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Basic eDp5", f"Bearer {KEY}"])
def test_anthropics_header_holds_a_key_where_authorization_holds_none(door: Access, authorization: str | None) -> None:
    def headers(key: str) -> list[tuple[bytes, bytes]]:
        given = [] if authorization is None else [(b"authorization", authorization.encode())]
        return [*given, (b"x-api-key", key.encode())]

    is_key = authorization == f"Bearer {KEY}"
    visit = door.require(Request({"type": "http", "headers": headers(OTHER)}), "inference")
    assert visit.caller == door.identify(f"Bearer {KEY if is_key else OTHER}")
    if not is_key:
        with pytest.raises(Unauthenticated):
            door.require(Request({"type": "http", "headers": headers(f"{OTHER}x")}), "inference")


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
    assert asyncio.run(asyncio.wait_for(reserve_and_settle(Visit(caller, door)), 1)) == "done"


async def work() -> str:
    await asyncio.sleep(0)
    return "done"


async def reserve_and_settle(visit: Visit) -> str:
    reservation, done = await visit.reserve(10**9, work, at_least=0)
    await reservation.settle(10**9)
    return done


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

    async def reserve(tokens: int) -> Reservation:
        reservation, _ = await Visit(caller, door).reserve(tokens, work, at_least=0)
        return reservation

    async def run() -> None:
        first = await reserve(80)
        with pytest.raises(RateLimited, match="100 tokens") as caught:
            await reserve(80)
        assert caught.value.retry_after_s == pytest.approx(36)
        await first.settle(10)
        await first.settle(10)  # nothing is given back twice
        second = await reserve(90)
        await second.settle(190)  # more than it was thought to take: a debt
        with pytest.raises(RateLimited) as caught:
            await reserve(1)
        assert caught.value.retry_after_s == pytest.approx(60.6)

    asyncio.run(run())


BOTH = "lr-both"
LIMITED = {"name": "both", "sha256": hash_key(BOTH), "requests_per_minute": 3, "tokens_per_minute": 100}


@pytest.fixture
def limited(file: Path, limits: Limits) -> Access:
    file.write_text(yaml.safe_dump([LIMITED]))
    return Access(AccessSettings(keys_file=str(file)), limits)


def test_a_request_and_its_tokens_are_one_question_and_the_work_does_not_wait_for_it(
    limited: Access, limits: Limits
) -> None:
    async def run() -> None:
        visit = limited.require(request(BOTH), "inference")
        began = []

        async def meanwhile() -> int:
            began.append(len(limits.asked))
            return await asyncio.sleep(0, 7)

        _, done = await visit.reserve(10, meanwhile, at_least=0)
        assert done == 7
        assert limits.asked == [["both requests", "both tokens"]]
        assert began[0] <= 1
        await visit.count()  # it is counted
        assert len(limits.asked) == 1

    asyncio.run(run())


def test_what_is_done_meanwhile_is_given_up_with_a_refusal_and_not_begun_after_one(door: Access) -> None:
    begun: list[str] = []
    ended: list[str] = []

    async def slow() -> None:
        begun.append("slow")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("slow")

    async def fails() -> None:
        raise ValueError("told to nobody")

    async def run(meanwhile: Any) -> None:
        visit = door.require(request(OTHER), "inference")
        spent, _ = await visit.reserve(1, work, at_least=0)
        await spent.settle(200)
        for _ in range(2):
            with pytest.raises(RateLimited, match="100 tokens"):
                await door.require(request(OTHER), "inference").reserve(10, meanwhile, at_least=0)
            await asyncio.sleep(0)
        await spent.settle(0)

    asyncio.run(run(slow))
    assert begun == ended == ["slow"]
    door._refused.clear()
    asyncio.run(run(fails))


def test_work_that_fails_gives_its_tokens_back_and_who_leaves_pays_the_least(limited: Access, limits: Limits) -> None:
    async def fails() -> None:
        raise ValueError("broken")

    async def run() -> None:
        caller = limited.identify(f"Bearer {BOTH}")
        with pytest.raises(ValueError, match="broken"):
            await Visit(caller, limited).reserve(90, fails, at_least=40)
        leaving = asyncio.create_task(Visit(caller, limited).reserve(100, lambda: asyncio.sleep(60), at_least=40))
        await asyncio.sleep(0.01)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await limits.take([Want("both tokens", 61, 100)]) == Refused(0, pytest.approx(0.6))
        assert await limits.take([Want("both tokens", 60, 100)]) == Taken((0.0,))

    asyncio.run(run())


def test_a_refused_request_is_refused_again_without_asking(
    limited: Access, limits: Limits, file: Path, no_pause: None
) -> None:
    for _ in range(3):
        require(limited, BOTH)
    waits = []
    for _ in range(5):
        with pytest.raises(RateLimited) as caught:
            require(limited, BOTH)
        waits.append(caught.value.retry_after_s)
    assert len(limits.asked) == 4
    assert waits == sorted(waits, reverse=True)
    assert 19 < waits[-1] < waits[0] == pytest.approx(20)
    file.write_text(yaml.safe_dump([{**LIMITED, "requests_per_minute": 4}]))
    with pytest.raises(RateLimited):
        require(limited, BOTH)
    assert len(limits.asked) == 5, "under another limit the word of before is none"


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
