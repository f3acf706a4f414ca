"""What the ingress asks of the policy, and what it says where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

import deployments.placement
from deployments.admission import Admission
from deployments.calls import GenerateCall, Prompt
from deployments.placement import Placement, report, share
from lorauter.engine.types import SamplingParams
from lorauter.errors import Overloaded

NAMES = ["r0", "r1"]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Admission, Placement]]:
    def make() -> tuple[Admission, Placement]:
        monkeypatch.setattr(deployments.placement, "_shared", {})
        placement = Placement(batch=4, seed=0)
        placement.update({name: report([], [], [], 0.0) for name in NAMES}, time.monotonic())
        placement.look = lambda: dict.fromkeys(NAMES, 1)
        share(placement, "LoraModel of app")
        handle: Any = SimpleNamespace(deployment_id="LoraModel of app")
        return Admission(handle), placement

    return make


def refusal(replica: str | None, retry_after_s: float = 60.0) -> Overloaded:
    return Overloaded(f"{replica} is full", retry_after_s=retry_after_s, replica=replica)


def test_nothing_is_routed_only_while_every_replica_has_just_refused(known: Any) -> None:
    admission, _ = known()
    admission.check()
    assert admission.goes_on(refusal("r0"))
    admission.check()
    assert not admission.goes_on(refusal("r1"))
    with pytest.raises(Overloaded, match="r1 is full") as caught:
        admission.check()
    assert caught.value.retry_after_s == 60.0


def test_nothing_is_routed_while_every_replica_has_as_many_as_it_takes(known: Any) -> None:
    """By what they report of their limits, and what is known of their queues: nobody has to be asked."""
    admission, placement = known()
    placement.update({name: report([], [], [], 1.0, 6) for name in NAMES}, time.monotonic())
    placement.look = lambda: {"r0": 6, "r1": 5}
    admission.check()
    placement.look = lambda: {"r0": 6, "r1": 7}
    with pytest.raises(Overloaded, match="as many requests as it takes"):
        admission.check()
    placement.look = dict
    admission.check()


def test_those_who_are_being_routed_have_places_too(known: Any) -> None:
    admission, placement = known()
    placement.update({name: report([], [], [], 1.0, 6) for name in NAMES}, time.monotonic())
    placement.look = lambda: {"r0": 6, "r1": 3}
    admission.check(2)
    with pytest.raises(Overloaded, match="as many requests as it takes"):
        admission.check(3)
    placement.update({"r0": report([], [], [], 1.0, 6), "r2": {}}, time.monotonic())
    placement.look = lambda: {"r0": 6, "r2": 3}
    admission.check(99)  # nothing is known of r2 yet


def test_the_calls_of_a_dead_replica_are_broken_off(known: Any) -> None:
    admission, placement = known()
    broken: list[int] = []
    for call, where in ((1, "r0"), (2, "r1"), (3, "r0")):
        admission.sent(call, partial(broken.append, call))
        placement.took(call, where)
    admission.ended(3)
    placement.update({"r1": {}}, time.monotonic())
    assert placement.calls_of("r0") == [1]
    placement.died("r0")
    assert broken == [1]


def test_a_refusal_is_remembered_for_a_part_of_the_time_that_it_tells(known: Any) -> None:
    admission, placement = known()
    for name in NAMES:
        admission.goes_on(refusal(name, 0.5))
    assert placement.all_refuse(time.monotonic())
    time.sleep(0.05)
    admission.check()


def test_with_serves_own_router_a_refusal_is_the_last_word(known: Any) -> None:
    other: Any = SimpleNamespace(deployment_id="another")
    admission = Admission(other)
    assert not admission.goes_on(refusal("r0"))
    admission.check()
    call = GenerateCall(Prompt(text="x"), (), SamplingParams(), number=1)
    assert admission.elsewhere(call, 0.9) == ()
    admission.ended(1)
    known_admission, _ = known()
    assert not known_admission.goes_on(refusal(None)), "nobody says whose it is"


def test_a_call_that_waits_is_sent_where_a_row_is_free(known: Any) -> None:
    admission, placement = known()
    call = GenerateCall(Prompt(text="x"), (), SamplingParams(), number=7)
    placement.took(7, "r0")
    placement.look = lambda: {"r0": 9, "r1": 0}
    assert admission.elsewhere(call, 0.1) == ("r0",)
    placement.look = lambda: {"r0": 2, "r1": 2}
    assert admission.elsewhere(call, 0.4) == ()
    assert admission.elsewhere(call, 0.6) == ("r0",)
    admission.ended(7)
    assert admission.elsewhere(call, 0.6) == ()
