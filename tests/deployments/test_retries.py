"""What is sent again when a replica dies, and what is not; with replicas that are a few lines long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import RayServeException

import deployments.retries
from deployments.calls import Admitted, Begun, Choice, GenerateCall, Prompt
from deployments.retries import answered, generated
from lorauter.engine import Chunk, SamplingParams
from lorauter.errors import LorauterError, Overloaded, ServiceUnavailable
from lorauter.routing import AdapterWeight, LeftOut

GONE = [ActorDiedError(), ActorUnavailableError("away", b"0" * 16), asyncio.CancelledError()]
ANSWER = [Chunk(letter, (i,), "length" if i == 4 else None) for i, letter in enumerate("abcde")]
MIXTURE = (AdapterWeight("one", "v1", 0.75), AdapterWeight("two", "v1", 0.25))
CALL = GenerateCall(Prompt(text="?"), MIXTURE, SamplingParams(max_tokens=5))
HANG = "hang"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.retries, "_PAUSE_S", 0)


@dataclass
class Said:
    """An error that a replica says, as `LoraModel` does, and does not raise."""

    error: LorauterError


@dataclass
class Replicas:
    """Calls in turn: each outcome is an error, a value, or how many chunks come before which error."""

    outcomes: list[Any]
    calls: list[GenerateCall] = field(default_factory=list)
    cancelled: int = 0
    left_out: tuple[LeftOut, ...] = ()

    def send(self, *call: GenerateCall) -> Response:
        self.calls += call
        return Response(self, self.outcomes.pop(0), *call)


class Response:
    def __init__(self, replicas: Replicas, outcome: Any, call: GenerateCall | None = None) -> None:
        self._replicas = replicas
        self._stream = self._say(outcome, call) if call is not None else None
        self._outcome = outcome
        self._cancelled = asyncio.Event()

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if self._outcome == HANG:
            await asyncio.sleep(60)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome.error if isinstance(self._outcome, Said) else self._outcome

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
            raise asyncio.CancelledError
        if isinstance(error, Said):
            yield error.error
        elif error is not None:
            raise error

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        assert self._stream is not None
        return await anext(self._stream)

    def cancel(self) -> None:
        self._replicas.cancelled += 1
        self._cancelled.set()


def call(outcomes: Iterable[Any], timeout_s: float = 5) -> Any:
    return asyncio.run(answered(Replicas(list(outcomes)).send, timeout_s=timeout_s))


def listen(
    replicas: Replicas,
    call: GenerateCall = CALL,
    timeout_s: float = 5,
    others: Room | None = None,
) -> list[Any]:
    """All that comes, and the error that ends it."""
    heard: list[Any] = []

    async def run() -> None:
        async for item in generated(replicas.send, call, timeout_s=timeout_s, others=others):
            heard.append(item)  # noqa: PERF401 (what came before an error counts)

    try:
        asyncio.run(run())
    except Exception as error:  # noqa: BLE001
        heard.append(error)
    return heard


@pytest.mark.parametrize("error", GONE)
def test_a_call_is_sent_again_while_replicas_die_but_not_forever(error: BaseException) -> None:
    assert call([error, error, "answer"]) == "answer"
    with pytest.raises(ServiceUnavailable if isinstance(error, asyncio.CancelledError) else type(error)):
        call([error] * 3 + ["too late"])


@pytest.mark.parametrize("error", [Overloaded("full", retry_after_s=1), RayTaskError("f", "", ValueError("x"))])
def test_what_a_replica_has_said_is_not_asked_again(error: Exception) -> None:
    with pytest.raises(type(error)):
        call([error, "another answer"])
    if isinstance(error, LorauterError):
        with pytest.raises(type(error)):
            call([Said(error)])
    assert [type(item) for item in listen(Replicas([(0, error), None]))] == [type(error)]
    assert [type(item) for item in listen(Replicas([(2, error), None]))] == [Admitted, Chunk, Chunk, type(error)]
    if isinstance(error, LorauterError):
        assert listen(Replicas([(2, Said(error)), None])) == [Admitted(3), *ANSWER[:2], error]


class Room:
    """Who has refused so far, in a service of some replicas, and who had better not be waited for after a while."""

    def __init__(self, replicas: int, *, waits: Sequence[tuple[str, ...]] = ()) -> None:
        self._replicas = replicas
        self._waits = list(waits)
        self.refused: list[str | None] = []
        self.calls: set[int] = set()

    def goes_on(self, refusal: Overloaded) -> bool:
        self.refused.append(refusal.replica)
        return len(set(self.refused)) < self._replicas

    def elsewhere(self, call: GenerateCall, waited: float) -> tuple[str, ...]:
        assert 0 < waited < 1
        self.calls.add(call.number)
        return self._waits.pop(0) if self._waits else ()

    def sent(self, call: int, break_off: Callable[[], object]) -> None:
        self.break_off = break_off

    def ended(self, call: int) -> None:
        self.calls.discard(call)


def no_room(replica: str, how: str = "said") -> Exception | Said:
    refusal = Overloaded("full", retry_after_s=1, replica=replica)
    if how == "said":
        return Said(refusal)
    return refusal if how == "raised" else RayTaskError("generate", "", refusal).as_instanceof_cause()


@pytest.mark.parametrize("how", ["said", "raised", "wrapped"])
def test_a_refusal_goes_on_to_the_next_replica(how: str) -> None:
    room = Room(3)
    replicas = Replicas([(0, no_room("r0", how)), (0, no_room("r1", how)), None])
    assert listen(replicas, others=room) == [Admitted(3), *ANSWER]
    assert [tuple(sorted(sent.avoid)) for sent in replicas.calls] == [(), ("r0",), ("r0", "r1")]
    assert room.refused == ["r0", "r1"]


def test_a_refusal_is_told_once_all_have_refused() -> None:
    replicas = Replicas([(0, no_room(f"r{i}")) for i in range(9)])
    heard = listen(replicas, others=Room(4))
    assert [type(error) for error in heard] == [Overloaded]
    assert len(replicas.calls) == 4
    again = Replicas([(0, no_room("r0"))] * 9)
    heard = listen(again, others=Room(4))
    assert [type(error) for error in heard] == [Overloaded]
    assert len(again.calls) == 2, "who has refused and is asked again has nobody to go on to"


def test_who_waits_in_vain_goes_elsewhere_and_cancels_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.retries, "_LOOK_S", 0.01)
    room = Room(3, waits=[(), (), ("r0", "r1"), (), ("r2",)])
    replicas = Replicas([(0, HANG), (0, HANG), None])
    assert listen(replicas, others=room) == [Admitted(3), *ANSWER]
    assert [set(sent.avoid) for sent in replicas.calls] == [set(), {"r0", "r1"}, {"r0", "r1", "r2"}]
    assert replicas.cancelled == 2
    assert len({sent.number for sent in replicas.calls}) == 1
    assert not room.calls, "nothing is kept of a call that has ended"
    replicas = Replicas([(0, HANG), (0, HANG), None])
    *_, error = listen(replicas, others=Room(3, waits=[("r0",)]), timeout_s=0.1)
    assert isinstance(error, ServiceUnavailable), "all replicas together have no more time than one"


def test_what_is_broken_off_goes_on_elsewhere() -> None:
    """A machine that is lost ends no connection; who sees that it is gone breaks the call off."""
    replicas, room = Replicas([(2, HANG), None]), Room(3)

    async def run() -> list[Any]:
        heard = []
        async for item in generated(replicas.send, CALL, timeout_s=5, others=room):
            heard.append(item)
            if len(heard) == 3:
                threading.Timer(0.05, room.break_off).start()
        return heard

    assert asyncio.run(run()) == [Admitted(3), *ANSWER]
    assert [len(sent.choices[0].generated) for sent in replicas.calls] == [0, 2]


def test_refusals_and_deaths_on_the_way_lose_nothing() -> None:
    replicas = Replicas([(0, no_room("r0")), (2, GONE[0]), (0, no_room("r1")), (4, GONE[0]), None])
    assert listen(replicas, others=Room(3)) == [Admitted(3), *ANSWER]
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


def chain(first: Replicas, second: Replicas, timeout_s: float = 5) -> Any:
    """Two calls, of which the second takes the first's response."""
    taken = []

    def then(response: Response) -> Response:
        taken.append(response)
        return second.send()

    result = asyncio.run(answered(first.send, then, timeout_s=timeout_s))
    assert all(isinstance(response, Response) for response in taken)
    return result


def test_a_response_is_passed_on_and_not_waited_for() -> None:
    assert chain(Replicas([HANG]), Replicas(["answer"])) == "answer"


@pytest.mark.parametrize("error", GONE)
@pytest.mark.parametrize("where", [0, 1])
def test_of_two_calls_in_one_trip_both_are_sent_again_where_a_replica_of_either_dies(
    error: BaseException, where: int
) -> None:
    upstream = RayTaskError("f", "", error) if isinstance(error, Exception) else RayServeException("upstream died")
    outcomes = ([error, "one"], [upstream, "answer"]) if where == 0 else (["one", "one"], [error, "answer"])
    assert chain(*map(Replicas, outcomes)) == "answer"


def test_of_two_calls_the_first_that_failed_tells_why() -> None:
    full = Overloaded("full", retry_after_s=1)
    with pytest.raises(Overloaded):
        chain(Replicas([full]), Replicas([RayServeException("the argument could not be had")]))
    with pytest.raises(ValueError, match="second"):
        chain(Replicas(["one"]), Replicas([ValueError("second")]))


def test_whoever_waits_too_long_for_two_calls_gives_up_both() -> None:
    first, second = Replicas([HANG]), Replicas([HANG])
    with pytest.raises(ServiceUnavailable, match=r"0\.01 s"):
        chain(first, second, timeout_s=0.01)
    assert (first.cancelled, second.cancelled) == (1, 1)


@pytest.mark.parametrize("error", GONE)
@pytest.mark.parametrize("deaths", [[0], [1], [3], [1, 4], [0, 0], [2, 2], [5]])
def test_an_answer_goes_on_from_its_last_token(deaths: list[int], error: BaseException) -> None:
    replicas = Replicas([*((said, error) for said in deaths), None])
    assert listen(replicas) == [Admitted(3), *ANSWER]
    said = [0] + [death for death in deaths if death < 5]
    assert [len(sent.choices[0].generated) for sent in replicas.calls if sent.choices] == said


@pytest.mark.parametrize("deaths", [[0], [2, 4], [3, 5], [5]])
def test_each_of_several_answers_goes_on_from_its_own_last_token(deaths: list[int]) -> None:
    replicas = Replicas([*((said, GONE[0]) for said in deaths), None])
    heard = listen(replicas, replace(CALL, choices=(Choice(0), Choice(1, (0, 1)), Choice(2))))
    assert heard[0] == Admitted(3)
    for index, known in ((0, 0), (1, 2), (2, 0)):
        assert [replace(chunk, index=0) for chunk in heard[1:] if chunk.index == index] == ANSWER[known:]


def test_an_answer_survives_few_deaths_only() -> None:
    heard = listen(Replicas([(1, GONE[0]), (2, GONE[0]), (3, GONE[0]), None]))
    assert heard[:-1] == [Admitted(3), *ANSWER[:3]]
    assert heard[-1] is GONE[0]


def test_an_answer_goes_on_under_the_mixture_that_it_began_with() -> None:
    replicas = Replicas([(0, GONE[0]), (2, GONE[0]), None], left_out=(LeftOut("two", "v1", "unavailable"),))
    heard = listen(replicas, replace(CALL, routed=True))
    assert heard == [Admitted(3, replicas.left_out), *ANSWER]
    whole, again, rest = replicas.calls
    assert (whole.adapters, whole.routed) == (again.adapters, again.routed) == (MIXTURE, True)
    assert (rest.adapters, rest.routed) == ((AdapterWeight("one", "v1", 1.0),), False), "to leave out more is no option"


def test_sampling_gets_a_seed_that_all_replicas_share() -> None:
    replicas = Replicas([(2, GONE[0]), None])
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
        stream = generated(replicas.send, CALL, timeout_s=5)
        await anext(stream)
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert replicas.cancelled == 1
