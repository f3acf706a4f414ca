"""What is used again of prompts that begin alike, and what never is."""

from dataclasses import replace

import pytest

from lorauter.engine import GenerationRequest, SamplingParams
from lorauter.engine.blocks import BLOCK

PROMPT = tuple(range(7, 7 + 2 * BLOCK + 3))


def ask(adapters=(), prompt=PROMPT, tokens=6):
    return GenerationRequest(prompt, adapters, SamplingParams(max_tokens=tokens, ignore_eos=True))


def test_a_prompt_asked_again_is_found_and_answered_the_same(pool, start):
    engine = start(pool.decoder("llama"))
    adapters = pool.mix((("attention", 1.0), ("patterns", 0.5)))
    first, again, longer = (engine.generate([ask(adapters, p)])[0] for p in (PROMPT, PROMPT, (*PROMPT, 9, 9)))
    assert first == again
    assert longer.token_ids == pool.continued("llama", (*PROMPT, 9, 9), 6, (("attention", 1.0), ("patterns", 0.5)))
    assert engine.scheduler.reused == 4 * BLOCK


@pytest.mark.parametrize(
    "mixture",
    [
        (),
        (("attention", 0.25),),  # another weight
        (("patterns", 1.0),),
        (("attention", 1.0), ("patterns", 1.0)),
    ],
)
def test_the_same_text_under_another_mixture_is_computed_anew(pool, start, mixture):
    engine = start(pool.decoder("llama"))
    engine.generate([ask(pool.mix((("attention", 1.0),)))])
    [answer] = engine.generate([ask(pool.mix(mixture))])
    assert answer.token_ids == pool.continued("llama", PROMPT, 6, mixture)
    assert engine.scheduler.reused == 0


def test_another_version_of_an_adapter_is_another_mixture(pool, start):
    engine = start(pool.decoder("llama"))
    engine.generate([ask(pool.mix((("attention", 1.0),)))])
    other = replace(pool.adapters["patterns"], name="attention", version="2")
    [answer] = engine.generate([ask(((other, 1.0),))])
    assert answer.token_ids == pool.continued("llama", PROMPT, 6, (("patterns", 1.0),))
    assert engine.scheduler.reused == 0


def test_the_order_in_which_adapters_are_named_does_not_matter(pool, start):
    engine = start(pool.decoder("llama"))
    mixture = pool.mix((("attention", 1.0), ("patterns", 0.5)))
    assert engine.generate([ask(mixture)]) == engine.generate([ask(mixture[::-1])])
    assert engine.scheduler.reused == 2 * BLOCK


def test_tenants_share_nothing(pool, start):
    engine = start(pool.decoder("llama"))
    answers = [engine.generate([replace(ask(), tenant=tenant)])[0] for tenant in ("a", "b", None)]
    assert engine.scheduler.reused == 0
    assert engine.generate([replace(ask(), tenant="b")]) == answers[:1] == answers[1:2] == answers[2:]
    assert engine.scheduler.reused == 2 * BLOCK


def test_it_can_be_switched_off_and_is_told_in_the_first_chunk(pool, start):
    chunks = []
    engine, off = start(pool.decoder("llama")), start(pool.decoder("llama"), prefix_reuse=False)
    for one in (engine, off):
        for _ in range(2):
            one.generate([ask()])
            one.submit(ask(), chunks.append)
            one.generate([ask(prompt=(5,))])  # behind it
    assert off.scheduler.reused == 0
    firsts = [chunk.cached_tokens for chunk in chunks if chunk.cached_tokens]
    assert firsts == [2 * BLOCK] * 2


def test_what_was_not_finite_is_not_found(pool, start):
    huge = replace(
        pool.adapters["attention"],
        name="huge",
        tensors={w: (a.sign() * 1e38, b.sign()) for w, (a, b) in pool.adapters["attention"].tensors.items()},
    )
    engine = start(pool.decoder("llama"))
    for _ in range(2):
        with pytest.raises(Exception, match="not finite"):
            engine.generate([ask(((huge, 1.0),))])
    assert engine.scheduler.reused == 0
