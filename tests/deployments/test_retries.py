"""What is sent again when a replica dies, and what is not; with replicas that are a few lines long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import deployments.retries
from deployments.calls import Admitted, Begun, Choice, GenerateCall, Prompt
from deployments.retries import answered, generated
from deployments.rpc_connection import ConnectionLost
from lorauter.engine import Chunk, SamplingParams
from lorauter.errors import InvalidRequest, Overloaded, ServiceUnavailable
from lorauter.routing import AdapterWeight, LeftOut

GONE = ConnectionLost("the connection is lost")
ANSWER = [Chunk(letter, (i,), "length" if i == 4 else None) for i, letter in enumerate("abcde")]
MIXTURE = (AdapterWeight("one", "v1", 0.75), AdapterWeight("two", "v1", 0.25))
CALL = GenerateCall(Prompt(text="?"), MIXTURE, SamplingParams(max_tokens=5))
HANG, NOBODY = "hang", "nobody"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.retries, "_PAUSE_S", 0)


@dataclass
class Replicas:
    """Calls in turn: each outcome is an error, a value, or how many chunks come before which error.

    Where there are `several`, a refusal is the last word once all of them have refused. `waits` is who had better not
    be waited for, look by look.
    """

    outcomes: list[Any]
    several: int = 1
    waits: Sequence[tuple[str, ...]] = ()
    left_out: tuple[LeftOut, ...] = ()
    calls: list[GenerateCall] = field(default_factory=list)
    cancelled: int = 0
    refused: list[str | None] = field(default_factory=list)
    looked_at: set[int] = field(default_factory=set)

    async def send(self, *call: GenerateCall) -> Any:
        self.calls += call
        if self.outcomes[0] == NOBODY:
            await asyncio.sleep(60)
        return Response(self, self.outcomes.pop(0), *call)

    def goes_on(self, refusal: Overloaded) -> bool:
        self.refused.append(refusal.replica)
        return len(set(self.refused)) < self.several

    def elsewhere(self, call: GenerateCall, waited: float) -> tuple[str, ...]:
        assert 0 < waited < 1
        self.looked_at.add(call.number)
        looks, self.waits = self.waits[:1], self.waits[1:]
        return looks[0] if looks else ()

    def ended(self, call: GenerateCall) -> None:
        self.looked_at.discard(call.number)


class Response:
    def __init__(self, replicas: Replicas, outcome: Any, call: GenerateCall | None = None) -> None:
        self._replicas = replicas
        self._stream = self._say(outcome, call) if call is not None else None
        self._outcome = outcome
        self._cancelled = asyncio.Event()
        self._ended = False
        self._next: asyncio.Future[Any] | None = None

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if self._outcome == HANG:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancel()
                raise
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    async def _say(self, outcome: Any, call: GenerateCall) -> AsyncGenerator[Any]:
        chunks, error = outcome if isinstance(outcome, tuple) else (5, outcome)
        said = [
            replace(ANSWER[place], index=index)
            for place in range(chunks)
            for index, generated in call.choices
            if place >= len(generated)
        ]
        for i, chunk in enumerate(said):
            yield chunk if i else Begun(Admitted(3, self._replicas.left_out), chunk)
        if error == HANG:
            await asyncio.wait_for(self._cancelled.wait(), 60)
        elif error is not None:
            raise error

    def __aiter__(self) -> Any:
        return self

    async def has_said(self, within: float) -> bool:
        assert self._stream is not None
        self._next = self._next or asyncio.ensure_future(anext(self._stream))
        await asyncio.wait([self._next], timeout=within)
        return self._next.done()

    async def __anext__(self) -> Any:
        assert self._stream is not None
        said, self._next = self._next, None
        try:
            return await (anext(self._stream) if said is None else said)
        except (Exception, StopAsyncIteration):
            self._ended = True
            raise

    def cancel(self) -> None:
        if not self._ended:
            self._replicas.cancelled += 1
        self._cancelled.set()
        if self._next is not None:
            self._next.cancel()


def call(outcomes: Iterable[Any], timeout_s: float = 5) -> Any:
    return asyncio.run(answered(Replicas(list(outcomes)).send, timeout_s=timeout_s))


def listen(
    replicas: Replicas,
    call: GenerateCall = CALL,
    timeout_s: float = 5,
) -> list[Any]:
    """All that comes, and the error that ends it."""
    heard: list[Any] = []

    async def run() -> None:
        async for item in generated(replicas, call, timeout_s=timeout_s):
            heard.append(item)  # noqa: PERF401 (what came before an error counts)

    try:
        asyncio.run(run())
    except Exception as error:  # noqa: BLE001
        heard.append(error)
    return heard


def test_a_call_is_sent_again_while_replicas_die_but_not_forever() -> None:
    assert call([GONE, GONE, "answer"]) == "answer"
    with pytest.raises(ServiceUnavailable, match="no replica has lived"):
        call([GONE] * 3 + ["too late"])


@pytest.mark.parametrize("error", [Overloaded("full", retry_after_s=1), ValueError("x"), InvalidRequest("no")])
def test_what_a_replica_has_said_is_not_asked_again(error: Exception) -> None:
    with pytest.raises(type(error)):
        call([error, "another answer"])
    assert listen(Replicas([(0, error), None])) == [error]
    assert listen(Replicas([(2, error), None])) == [Admitted(3), *ANSWER[:2], error]


def no_room(replica: str) -> Overloaded:
    return Overloaded("full", retry_after_s=1, replica=replica)


def test_a_refusal_goes_on_to_the_next_replica() -> None:
    replicas = Replicas([(0, no_room("r0")), (0, no_room("r1")), None], several=3)
    assert listen(replicas) == [Admitted(3), *ANSWER]
    assert [tuple(sorted(sent.avoid)) for sent in replicas.calls] == [(), ("r0",), ("r0", "r1")]
    assert replicas.refused == ["r0", "r1"]


def test_a_refusal_is_told_once_all_have_refused() -> None:
    replicas = Replicas([(0, no_room(f"r{i}")) for i in range(9)], several=4)
    heard = listen(replicas)
    assert [type(error) for error in heard] == [Overloaded]
    assert len(replicas.calls) == 4
    again = Replicas([(0, no_room("r0"))] * 9, several=4)
    heard = listen(again)
    assert [type(error) for error in heard] == [Overloaded]
    assert len(again.calls) == 2, "who has refused and is asked again has nobody to go on to"


def test_who_waits_in_vain_goes_elsewhere_and_cancels_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.retries, "_LOOK_S", 0.01)
    replicas = Replicas([(0, HANG), (0, HANG), None], 3, [(), (), ("r0", "r1"), (), ("r2",)])
    assert listen(replicas) == [Admitted(3), *ANSWER]
    assert [set(sent.avoid) for sent in replicas.calls] == [set(), {"r0", "r1"}, {"r0", "r1", "r2"}]
    assert replicas.cancelled == 2
    assert len({sent.number for sent in replicas.calls}) == 1
    assert not replicas.looked_at, "nothing is kept of a call that has ended"
    replicas = Replicas([(0, HANG), (0, HANG), None], 3, [("r0",)])
    *_, error = listen(replicas, timeout_s=0.1)
    assert isinstance(error, ServiceUnavailable), "all replicas together have no more time than one"


def test_refusals_and_deaths_on_the_way_lose_nothing() -> None:
    replicas = Replicas([(0, no_room("r0")), (2, GONE), (0, no_room("r1")), (4, GONE), None], several=3)
    assert listen(replicas) == [Admitted(3), *ANSWER]
    assert [len(sent.choices[0].generated) for sent in replicas.calls if sent.choices] == [0, 0, 2, 2, 4]


def test_nobody_waits_longer_than_said() -> None:
    replicas = Replicas([HANG])
    with pytest.raises(ServiceUnavailable, match=r"0\.01 s"):
        asyncio.run(answered(replicas.send, timeout_s=0.01))
    assert replicas.cancelled == 1
    replicas = Replicas([(0, HANG)])
    [error] = listen(replicas, timeout_s=0.01)
    assert isinstance(error, ServiceUnavailable)
    assert replicas.cancelled == 1
    [error] = listen(Replicas([NOBODY]), timeout_s=0.01)
    assert isinstance(error, ServiceUnavailable)
    with pytest.raises(ServiceUnavailable, match=r"0\.01 s"):
        call([NOBODY], timeout_s=0.01)


@pytest.mark.parametrize("deaths", [[0], [1], [3], [1, 4], [0, 0], [2, 2], [5]])
def test_an_answer_goes_on_from_its_last_token(deaths: list[int]) -> None:
    replicas = Replicas([*((said, GONE) for said in deaths), None])
    assert listen(replicas) == [Admitted(3), *ANSWER]
    said = [0] + [death for death in deaths if death < 5]
    assert [len(sent.choices[0].generated) for sent in replicas.calls if sent.choices] == said


@pytest.mark.parametrize("deaths", [[0], [2, 4], [3, 5], [5]])
def test_each_of_several_answers_goes_on_from_its_own_last_token(deaths: list[int]) -> None:
    replicas = Replicas([*((said, GONE) for said in deaths), None])
    heard = listen(replicas, replace(CALL, choices=(Choice(0), Choice(1, (0, 1)), Choice(2))))
    assert heard[0] == Admitted(3)
    for index, known in ((0, 0), (1, 2), (2, 0)):
        assert [replace(chunk, index=0) for chunk in heard[1:] if chunk.index == index] == ANSWER[known:]


def test_an_answer_survives_few_deaths_only() -> None:
    heard = listen(Replicas([(1, GONE), (2, GONE), (3, GONE), None]))
    assert heard[:-1] == [Admitted(3), *ANSWER[:3]]
    assert isinstance(heard[-1], ServiceUnavailable)


def test_an_answer_goes_on_under_the_mixture_that_it_began_with() -> None:
    replicas = Replicas([(0, GONE), (2, GONE), None], left_out=(LeftOut("two", "v1", "unavailable"),))
    heard = listen(replicas, replace(CALL, routed=True))
    assert heard == [Admitted(3, replicas.left_out), *ANSWER]
    whole, again, rest = replicas.calls
    assert (whole.adapters, whole.routed) == (again.adapters, again.routed) == (MIXTURE, True)
    assert (rest.adapters, rest.routed) == ((AdapterWeight("one", "v1", 1.0),), False), "to leave out more is no option"


def test_sampling_gets_a_seed_that_all_replicas_share() -> None:
    replicas = Replicas([(2, GONE), None])
    listen(replicas, GenerateCall(CALL.prompt, CALL.adapters, SamplingParams(max_tokens=5, temperature=1.0)))
    first, second = (sent.sampling.seed for sent in replicas.calls)
    assert first is not None
    assert first == second
    replicas = Replicas([None])
    listen(replicas, GenerateCall(CALL.prompt, CALL.adapters, SamplingParams(max_tokens=5, temperature=1.0, seed=3)))
    assert replicas.calls[0].sampling.seed == 3


def test_who_stops_listening_cancels_the_call() -> None:
    replicas = Replicas([(2, HANG)])

    async def run() -> None:
        stream = generated(replicas, CALL, timeout_s=5)
        await anext(stream)
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert replicas.cancelled == 1
