"""A step ahead: planned before the tokens of the last are known, with a stand-in for graphs, against the plain path."""

import asyncio
import random
from functools import partial

import pytest

from lorauter.engine import GenerationRequest, SamplingParams
from lorauter.engine import core as core_module
from lorauter.engine.runner import Runner
from lorauter.engine.slots import AdapterSlots

MIXTURES = [
    (),
    (("attention", 1.0),),
    (("patterns", 1.0), ("attention", -0.7)),
    (("one-layer", 2.5),),
    (("mlp-rslora", 0.7), ("patterns", 0.5)),
]


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
    )
    return GenerationRequest(prompt, pool.mix(draw.choice(MIXTURES)), sampling)


async def one(engine, asked, cancel):
    """Tokens, text and reason; of one that is cancelled after so many tokens, what it had."""
    tokens, text, reason = (), "", None
    stream = engine.stream(asked)
    try:
        async for chunk in stream:
            tokens, text, reason = tokens + chunk.token_ids, text + chunk.text, chunk.finish_reason
            if cancel is not None and len(tokens) >= cancel:
                break
    finally:
        await stream.aclose()
    return tokens, text, reason


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_the_plain_path(pool, start, plain, seed):
    """With mixtures, stops, sampling, cancellations, preemption and prompts that begin alike."""
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
    for i, (tokens, text, reason) in enumerate(found):
        [alone] = plain.generate([asked[i]])
        if reason is not None:
            assert (tokens, text, reason) == (alone.token_ids, alone.text, alone.finish_reason)
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
