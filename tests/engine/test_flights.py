"""A step ahead: planned before the tokens of the last are known, with a stand-in for graphs, against the plain path."""

import asyncio
import random
import re
import threading
from functools import partial

import pytest
from engine_requests import ask

from lorauter.engine import GenerationRequest, SamplingParams
from lorauter.engine import core as core_module
from lorauter.engine.board import MaskBoard
from lorauter.engine.grammars import Grammars
from lorauter.engine.runner import Runner
from lorauter.engine.slots import AdapterSlots
from lorauter.engine.types import Grammar

MIXTURES = [
    (),
    (("attention", 1.0),),
    (("patterns", 1.0), ("attention", -0.7)),
    (("one-layer", 2.5),),
    (("mlp-rslora", 0.7), ("patterns", 0.5)),
]
FORM = Grammar("regex", "[a-h]{2,20}-([0-9]|é){3,}")


class AheadRunner(Runner):
    """Computes at once, but lets nobody see it before the next step is launched."""

    overlaps = True


@pytest.fixture
def plain(pool, start):
    """An engine that takes each step's tokens before it plans the next, and finds nothing computed."""
    return start(pool.decoder("llama"), max_batch=5, max_model_len=90, prefix_reuse=False)


@pytest.fixture
def ahead(plain, monkeypatch):
    monkeypatch.setattr(core_module, "Runner", AheadRunner)
    monkeypatch.setattr(core_module, "AdapterSlots", partial(AdapterSlots, ahead=True))


def request(draw, pool, beginnings):
    prompt = draw.choice(beginnings)[: draw.choice([1, 3, 9, 20, 40])]
    prompt = (*prompt, *(draw.randrange(256) for _ in range(draw.choice([1, 1, 7]))))
    sampling = SamplingParams(
        max_tokens=draw.choice([1, 2, 5, 17, 40]),
        temperature=draw.choice([0, 0, 0, 0.9]),
        top_p=draw.choice([1.0, 0.95]),
        top_k=draw.choice([0, 0, 20]),
        frequency_penalty=draw.choice([0.0, 0.0, 0.5]),
        logit_bias=draw.choice([(), (), ((7, 2.0),)]),
        seed=draw.randrange(99),
        ignore_eos=True,
        stop_token_ids=draw.choice([(), (), tuple(range(60, 70))]),
        min_tokens=draw.choice([0, 1]),
        bad_words=draw.choice([(), (), ("e", (101, 102))]),
        allowed_token_ids=draw.choice([(), (), tuple(range(40, 200))]),
        stop=draw.choice([(), (), ("e",), ("qz",)]),
        grammar=draw.choice([None, None, FORM]),
        logprobs=draw.choice([None, None, 2]),
    )
    return GenerationRequest(prompt, pool.mix(draw.choice(MIXTURES)), sampling)


async def one(engine, asked, cancel):
    """Tokens, text, reason and ranks; of one that is cancelled after so many tokens, what it had."""
    tokens, text, reason, ranks = (), "", None, []
    stream = engine.stream(asked)
    try:
        async for chunk in stream:
            tokens, text, reason = tokens + chunk.token_ids, text + chunk.text, chunk.finish_reason
            ranks += ranks_of(chunk)
            if cancel is not None and len(tokens) >= cancel:
                break
    finally:
        await stream.aclose()
    return tokens, text, reason, ranks


def ranks_of(answer):
    return [[one.own.rank, *(top.token_id for top in one.top)] for one in answer.logprobs]


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_the_plain_path(pool, start, plain, seed):
    """With mixtures, stops, sampling, forms, logprobs, cancellations, preemption and prompts that begin alike."""
    draw = random.Random(seed)
    beginnings = [[draw.randrange(256) for _ in range(40)] for _ in range(2)]
    asked = [request(draw, pool, beginnings) for _ in range(24)]
    cancels = [draw.choice([None, None, None, 1, 4]) for _ in asked]
    delays = [draw.random() * 0.1 for _ in asked]
    decoder = pool.decoder("llama")
    engine = start(
        decoder, max_batch=5, step_tokens=16, max_model_len=90, adapter_bytes=draw.choice([1 << 20, 90_000]),
        cache_bytes=draw.choice([12, 40]) * decoder.block_bytes(),
    )  # fmt: skip

    async def drive():
        async def late(i):
            await asyncio.sleep(delays[i])
            return await one(engine, asked[i], cancels[i])

        return await asyncio.gather(*map(late, range(len(asked))))

    found = asyncio.run(drive())
    for i, (tokens, text, reason, ranks) in enumerate(found):
        [alone] = plain.generate([asked[i]])
        if reason is not None:
            assert (tokens, text, reason) == (alone.token_ids, alone.text, alone.finish_reason)
            assert ranks == ranks_of(alone)
        else:
            assert tokens == alone.token_ids[: len(tokens)]
    assert engine.scheduler.reused


@pytest.mark.usefixtures("ahead")
def test_a_step_that_fails_leaves_nothing_behind(start, counting):
    engine = start(counting)

    def ask(text, **sampling):
        return GenerationRequest(tuple(text.encode()), sampling=SamplingParams(**sampling))

    for _ in range(3):
        with pytest.raises(RuntimeError, match="forward failed"):
            engine.generate([ask("abc", max_tokens=30), ask("x?", max_tokens=3)])
        assert engine.generate([ask("abc", max_tokens=3)])[0].text == "def"
    assert engine.load == (0, 0)


# --- answers that are held to forms beside free ones


def told(engine, request):
    """What becomes of a request, in a list, and an event once it has ended."""
    chunks, ended = [], threading.Event()

    def sink(item):
        chunks.append(item)
        if isinstance(item, BaseException) or item.finish_reason is not None:
            ended.set()

    engine.submit(request, sink)
    return chunks, ended


@pytest.mark.parametrize("runner", [Runner, AheadRunner])
def test_free_answers_do_not_wait_until_it_is_known_what_may_come_in_others(start, counting, monkeypatch, runner):
    monkeypatch.setattr(core_module, "Runner", runner)
    known, find = threading.Event(), Grammars._find

    def finding(self, executor, idle, answers):
        if any(held.reached + len(held.coming) > 2 for held in answers):  # else it is the first of its answer
            known.wait()
        return find(self, executor, idle, answers)

    monkeypatch.setattr(Grammars, "_find", finding)
    engine = start(counting, max_batch=4)
    held, ended = told(engine, ask("ab", max_tokens=6, grammar=Grammar("regex", "c[x-z]{4}")))
    answers = engine.generate([ask("a", max_tokens=30), ask("m", max_tokens=20)])
    assert [len(answer.token_ids) for answer in answers] == [30, 20]
    assert ("".join(chunk.text for chunk in held), ended.is_set(), engine.load) == ("c", False, (1, 0))
    known.set()
    assert ended.wait(20)
    assert re.fullmatch("c[x-z]{4}", "".join(chunk.text for chunk in held))


@pytest.mark.parametrize("runner", [Runner, AheadRunner])
def test_where_nobody_is_held_nothing_is_done_for_it(start, counting, monkeypatch, runner):
    monkeypatch.setattr(core_module, "Runner", runner)
    engine = start(counting, max_batch=4)
    held = ask("ab", max_tokens=6, grammar=Grammar("regex", "[a-z]{6}"))
    assert len(engine.generate([held] * 4)[0].token_ids) == 6
    engine._core._grammars.close()  # what would have been found for these is of no interest

    def fail(*_, **__):
        raise AssertionError("it is")

    for owner, name in (
        (MaskBoard, "has"), (MaskBoard, "post"), (MaskBoard, "_write"), (Grammars, "_find"), (Grammars, "wait"),
        (core_module.EngineCore, "_check"), (core_module.EngineCore, "_choose"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, fail)
    answers = engine.generate([ask("a", max_tokens=9), ask("m", max_tokens=5, temperature=1.0, seed=1)] * 4)
    assert [len(answer.token_ids) for answer in answers] == [9, 5] * 4
    assert not engine._core._runner._masked


def test_who_is_cancelled_while_it_is_not_known_what_may_come_is_gone(start, counting, monkeypatch):
    known, find = threading.Event(), Grammars._find
    monkeypatch.setattr(Grammars, "_find", lambda *given: known.wait() and find(*given))
    engine = start(counting, max_batch=2)

    async def drive():
        stream = engine.stream(ask("ab", max_tokens=6, grammar=FORM))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await stream.aclose()
        while engine.load != (0, 0):
            await asyncio.sleep(0.001)

    asyncio.run(drive())
    known.set()
    assert engine.generate([ask("a", max_tokens=3)])[0].text == "bcd"


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_steps_with_held_rows_are_launched_before_the_last_ones_tokens_are_taken(
    start, counting, monkeypatch, temperature
):
    """The host is never what a step waits for: each is launched while the one before it is on its way. What is sampled
    is chosen between two."""
    monkeypatch.setattr(core_module, "_PATIENCE_S", 30.0)  # whatever else the machine does
    happened = []

    class Noting(AheadRunner):
        def launch(self, plan):
            number = sum(what == "launch" for what, _ in happened)
            happened.append(("launch", number))
            rows.append(len(plan.decoding))
            return self._noting(super().launch(plan), "step", number)

        def choose(self, choices, masks):
            number = sum(what == "choose" for what, _ in happened)
            happened.append(("choose", number))
            return self._noting(super().choose(choices, masks), "choice", number)

        def _noting(self, flight, kind, number):
            taking = flight.wait
            flight.wait = lambda: happened.append((kind, number)) or taking()
            return flight

    rows = []
    monkeypatch.setattr(core_module, "Runner", Noting)
    engine = start(counting, max_batch=4)
    form = {"grammar": Grammar("regex", "[a-z]{40}"), "temperature": temperature}
    asked = [ask("ab", max_tokens=20, **(form if i % 2 else {})) for i in range(4)]
    assert [len(answer.token_ids) for answer in engine.generate(asked)] == [20] * 4
    assert rows == [0] + [4] * 19  # the held rows are in every step
    assert any(what == "choose" for what, _ in happened) == bool(temperature)
    for step in range(19):
        assert happened.index(("launch", step + 1)) < happened.index(("step", step))
        if temperature:
            assert happened.index(("choose", step)) < happened.index(("launch", step + 1))
            assert happened.index(("launch", step + 1)) < happened.index(("choice", step))
