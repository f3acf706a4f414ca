"""Answers held to grammars: what may come, what is refused, and what it costs others."""

import json
import random
import re
import threading
import time
from dataclasses import replace

import jsonschema
import pytest
import torch
from counting import byte_tokenizer
from llguidance import LLExecutor
from tokenizers import Tokenizer

from lorauter.engine import GenerationRequest, SamplingParams
from lorauter.engine import core as core_module
from lorauter.engine import grammars as grammars_module
from lorauter.engine.grammars import Grammars
from lorauter.engine.runner import Runner
from lorauter.engine.scheduler import Scheduler
from lorauter.engine.types import Grammar
from lorauter.errors import InvalidRequest

EOS = 256


class AheadRunner(Runner):
    overlaps = True


@pytest.fixture
def grammars(codec):
    found = Grammars(codec.backend, codec.eos_ids, 259)
    yield found
    found.close()


def of_schema(schema):
    return Grammar("json", json.dumps(schema))


def allowed(held):
    mask = held.mask().tolist()
    return [token for token in range(259) if mask[token // 32] >> (token % 32) & 1]


def walk(grammars, grammar, draw, most=3000):
    """A random answer of a grammar, one byte after another."""
    held, answer = grammars.begin(grammar), bytearray()
    while True:
        token = draw.choice(allowed(held))
        if token == EOS:
            return answer.decode(errors="replace")
        answer.append(token)
        assert len(answer) < most
        grammars.advance([(held, token)])


def schema(draw, depth=3):
    """A random JSON schema of the kinds that clients make."""
    leaves = [
        lambda: {"type": "string", "maxLength": draw.randrange(9)},
        lambda: {"type": "string", "pattern": draw.choice(["^[a-f]{2,4}$", "^(yes|no)$", r"^\d{3}-\d{4}$"])},
        lambda: {"type": "string", "format": draw.choice(["date", "uuid", "ipv4", "ipv6"])},
        lambda: {"type": "integer", "minimum": -5, "maximum": draw.randrange(100)},
        lambda: {"type": "number", "minimum": 0, "exclusiveMaximum": 10},
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"enum": draw.sample(["a", "bc", 1, 2.5, None, True, "ü"], 3)},
        lambda: {"const": draw.choice(["x y", 7, False])},
        lambda: {"type": ["string", "null"], "maxLength": 4},
        lambda: {"$ref": "#/$defs/word"},
    ]
    if not depth:
        return draw.choice(leaves)()
    kind = draw.choice(["object", "object", "array", "anyOf", "leaf"])
    if kind == "object":
        names = draw.sample(["name", "age", "tags", "a b", "größe", 'q"'], draw.randrange(1, 4))
        made = {"type": "object", "properties": {name: schema(draw, depth - 1) for name in names}}
        return made | {"required": draw.sample(names, draw.randrange(len(names) + 1)), "additionalProperties": False}
    if kind == "array":
        least = draw.randrange(3)
        return {"type": "array", "items": schema(draw, depth - 1), "minItems": least, "maxItems": least + 2}
    if kind == "anyOf":
        return {"anyOf": [schema(draw, depth - 1) for _ in range(2)]}
    return draw.choice(leaves)()


@pytest.mark.parametrize("part", range(4))
def test_every_answer_validates(grammars, part):
    """1,000 random schemas, and a random answer of each."""
    draw = random.Random(part)
    for _ in range(250):
        made = {**schema(draw), "$defs": {"word": {"type": "string", "pattern": "^[a-z]{1,5}$"}}}
        answer = json.loads(walk(grammars, of_schema(made), draw))
        jsonschema.validate(answer, made, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", r"[ab]{2,3}-[0-9]"), r"[ab]{2,3}-[0-9]"),
        (Grammar("choice", json.dumps(["yes", "no", 'a "b"\n', "é", "\\n", "(x)"])), r'yes|no|a "b"\n|é|\\n|\(x\)'),
        (Grammar("grammar", 'start: "a"~2 end\nend: "b" | "c"'), "aa[bc]"),
        (Grammar("grammar", 'root ::= "x" [0-9]{1,2} tail\ntail ::= "y" | "z"'), r"x\d{1,2}[yz]"),
    ],
)
def test_other_grammars(grammars, grammar, pattern):
    draw = random.Random(0)
    assert all(re.fullmatch(pattern, walk(grammars, grammar, draw)) for _ in range(30))


@pytest.mark.parametrize(
    ("grammar", "needles"),
    [
        (
            of_schema({"type": "object", "properties": {"a": {"items": {"type": "strng"}}}}),
            ["at properties.a.items ", "strng"],
        ),
        (of_schema({"anyOf": [{"type": "null"}, {"not": {"type": "null"}}]}), ["at anyOf.1 ", "not"]),
        (of_schema({"$defs": {"x": {"type": "y"}}, "properties": {"a": {"$ref": "#/$defs/x"}}}), ["x", "y"]),
        (of_schema({"$ref": "#/nowhere"}), ["/nowhere"]),
        (of_schema({"uniqueItems": True, "type": "array"}), ["uniqueItems"]),
        (of_schema([]), ["object"]),
        (Grammar("json", '{"type":'), []),
        (Grammar("json", json.dumps({"type": "string", "pattern": "(?=x)"})), ["look-ahead"]),
        (Grammar("regex", "a(b"), ["unclosed"]),
        (Grammar("choice", "[]"), []),
        (Grammar("grammar", 'start: "a" b'), ["b"]),
        (Grammar("grammar", "nonsense ::="), []),
        (Grammar("regex", "a" * (1 << 21)), ["characters"]),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_says_where(grammars, grammar, needles):
    with pytest.raises(InvalidRequest) as caught:
        grammars.begin(grammar)
    assert caught.value.param == "grammar"
    assert all(needle in str(caught.value) for needle in needles)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_what_is_compiled_is_kept_within_bounds(grammars, monkeypatch):
    monkeypatch.setattr(grammars_module, "_KEPT", 3)
    compiled = []
    compile_one = grammars._compile

    def compiling(grammar, *others):
        compiled.append(grammar.text)
        return compile_one(grammar, *others)

    monkeypatch.setattr(grammars, "_compile", compiling)
    for text in ("a", "b", "a", "c", "d", "a", "b"):
        grammars.begin(Grammar("regex", text, param=f"given {len(compiled)}"))
    assert compiled == ["a", "b", "c", "d", "b"]


def test_what_is_compiled_is_kept_within_bounds_of_its_size_too(grammars, monkeypatch):
    monkeypatch.setattr(grammars_module, "_KEPT_CHARACTERS", 10)
    compiled = []
    compile_one = grammars._compile

    def compiling(grammar, *others):
        compiled.append(grammar.text[0])
        return compile_one(grammar, *others)

    monkeypatch.setattr(grammars, "_compile", compiling)
    for text in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb", "d" * 20, "d" * 20, "aaaa", "bbbb", "aaaa"):
        grammars.begin(Grammar("regex", text))
    assert "".join(compiled) == "abcbdab"


def test_answers_side_by_side_share_no_matcher_as_far_as_there_are_threads(codec, monkeypatch):
    """Copies of one have a lock in common: their masks would be found one after the other."""
    grammars = Grammars(codec.backend, codec.eos_ids, 259)
    grammars._parallel = 3
    monkeypatch.setattr(grammars_module, "_DEAR_S", 10.0)
    grammar = Grammar("regex", "[ab]+")
    answers = [grammars.begin(grammar) for _ in range(7)]
    (form,) = grammars._compiled.values()
    lanes = form.lanes
    assert sorted(len(lane.answers) for lane in lanes) == [2, 2, 3]
    del answers[3:]
    until = time.monotonic() + 20  # the last one's mask may just have been found
    while sum(len(lane.answers) for lane in lanes) > 3 and time.monotonic() < until:
        time.sleep(0.001)
    assert sum(len(lane.answers) for lane in lanes) == 3
    assert [allowed(one) for one in answers] == [[ord("a"), ord("b")]] * 3
    monkeypatch.setattr(grammars_module, "_DEAR_S", 0.0)
    dear = [grammars.begin(Grammar("regex", "c+")) for _ in range(4)]
    assert [len(lane.answers) for lane in [*grammars._compiled.values()][-1].lanes] == [len(dear)]
    grammars.close()


def test_answers_are_alone_with_what_they_have(grammars):
    grammar = Grammar("regex", "abc|axd")
    one, two = grammars.begin(grammar), grammars.begin(grammar, b"a")
    grammars.advance([(one, ord("a")), (two, ord("x"))])
    assert (allowed(one), allowed(two)) == ([ord("b"), ord("x")], [ord("d")])
    assert allowed(grammars.begin(grammar)) == [ord("a")]
    with pytest.raises(InvalidRequest, match="does not fit"):
        grammars.begin(grammar, b"b")


FORMS = [
    of_schema({"type": "object", "properties": {"s": {"type": "string", "maxLength": 9}}, "required": ["s"]}),
    of_schema({"type": "array", "items": {"type": "string"}, "minItems": 3}),
    Grammar("choice", '["red apple", "red green", "yellow"]'),
    Grammar("regex", "abc(def)+[0-9]{1,3}x?"),
]


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("limit", [0.0, 10.0])
def test_what_is_found_is_the_same_whoever_finds_it_and_when(codec, monkeypatch, parallel, limit):
    """Many answers side by side, which go on whether or not it has been found, by what is told without."""
    monkeypatch.setattr(grammars_module, "_LONG_S", limit)
    monkeypatch.setattr(grammars_module, "_SLOW_S", 60.0)
    grammars = Grammars(codec.backend, codec.eos_ids, 259)
    grammars._parallel = parallel
    draw = random.Random(parallel)
    answers = [(form, grammars.begin(form, greedy=True), []) for form in FORMS for _ in range(5)]
    until = time.monotonic() + 60
    told_early = 0
    while going := [one for one in answers if one[2][-1:] != [EOS] and len(one[2]) < 40]:
        came = []
        for form, held, tokens in draw.sample(going, draw.randrange(1, len(going) + 1)):
            if draw.random() < 0.2:
                grammars.wait([held])
            known = held.known
            expected = allowed(grammars.begin(form, tokens)) if draw.random() < 0.1 else None
            for token in draw.sample(range(259), 259):
                if held.takes(token):
                    assert expected is None or token in expected
                    tokens.append(token)
                    came.append((held, token))
                    told_early += not known
                    break
                assert expected is None or token not in expected or held.known != known
        grammars.advance(came)
        assert time.monotonic() < until
    assert told_early
    for form, held, tokens in answers:
        if tokens[-1] != EOS:
            grammars.wait([held])
            assert allowed(held) == allowed(grammars.begin(form, tokens))
    grammars.close()


def test_where_cores_are_few_free_text_is_looked_at_as_far_as_it_is_of_use(grammars):
    grammars._parallel = 1
    held, other = grammars.begin(Grammar("regex", ".{50}"), greedy=True), grammars.begin(Grammar("regex", "[ab]{50}"))
    assert len(allowed(held)) > 100  # at the beginning it is
    assert held.takes(ord("x"))
    grammars.advance([(held, ord("x")), (other, ord("a"))])
    assert allowed(other) == [ord("a"), ord("b")]
    time.sleep(0.05)
    assert not held.known
    assert held.takes(ord("y"))  # by what is told without
    grammars.advance([(held, ord("y"))])
    assert len(allowed(held)) > 100  # whoever waits for it wants it


def test_where_a_text_is_given_it_has_the_tokens_that_masks_have():
    """Not any that it could be made of: an answer must not depend on when it is known what may come."""
    tokenizer = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    tokenizer["model"]["vocab"] |= {"na": 259, "nam": 260, "name": 261}
    tokenizer["model"]["merges"] = [["n", "a"], ["na", "m"], ["nam", "e"]]
    grammars = Grammars(Tokenizer.from_str(json.dumps(tokenizer)), [EOS], 262)
    for text, fitting in (("name", [261]), ("na[a-m]e", [259])):
        held = grammars.begin(Grammar("regex", f"<{text}>"), b"<", greedy=True)
        mask = held.mask().tolist()
        held.found = None  # as if it was not there yet
        assert [token for token in range(262) if mask[token // 32] >> (token % 32) & 1] == fitting
        assert [token for token in (ord("n"), 259, 260, 261) if held.takes(token)] == fitting
    grammars.close()


def test_no_token_keeps_the_interpreter_while_it_is_taken_in(codec, monkeypatch):
    """Of some grammars one takes seconds; llguidance lets others run only where it is given several at once."""
    sizes = []

    class Executor:
        def __init__(self, threads):
            self._inner = LLExecutor(threads)

        def consume_token_par(self, tokens):
            sizes.append(len(tokens))
            return self._inner.consume_token_par(tokens)

        def __getattr__(self, name):
            return getattr(self._inner, name)

    monkeypatch.setattr(grammars_module, "LLExecutor", Executor)
    grammars = Grammars(codec.backend, codec.eos_ids, 259)
    held = grammars.begin(Grammar("grammar", 'start: s\ns: s s | "a" | "b"'))
    for token in b"abba":
        grammars.advance([(held, token)])
        assert held.mask().tolist()[97 // 32] >> (97 % 32) & 1
    grammars.close()
    assert sum(sizes) - len(sizes) == 4
    assert min(sizes) > 1


# --- in the engine

SCHEMA = of_schema(
    {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"type": "string", "maxLength": 5}},
        "required": ["n", "s"],
        "additionalProperties": False,
    }
)
MIXTURES = [(), (("attention", 1.0),), (("patterns", 1.0), ("attention", -0.7)), (("one-layer", 2.5),)]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("cache", [None, 24])
def test_held_and_free_answers_under_any_mixture(pool, start, monkeypatch, ahead, cache):
    if ahead:
        monkeypatch.setattr(core_module, "Runner", AheadRunner)
    decoder = pool.decoder("llama")
    config = {"cache_bytes": cache * decoder.block_bytes()} if cache else {}
    engine = start(decoder, max_batch=6, step_tokens=16, **config)
    draw = random.Random(5)
    asked = []
    for i in range(24):
        prompt = tuple(draw.randrange(256) for _ in range(draw.choice([2, 9, 20])))
        grammar = draw.choice([None, SCHEMA, Grammar("choice", '["red", "green"]'), Grammar("regex", "[0-9]{3,5}")])
        sampling = SamplingParams(
            70, draw.choice([0.0, 1.0]), seed=i, grammar=grammar, ignore_eos=draw.choice([True, False]),
            frequency_penalty=draw.choice([0.0, 0.5]), min_tokens=draw.choice([0, 2]), logprobs=draw.choice([None, 1]),
        )  # fmt: skip
        asked.append(GenerationRequest(prompt, pool.mix(MIXTURES[i % 4]), sampling))
    answers = engine.generate(asked)
    held = 0
    for request, answer in zip(asked, answers, strict=True):
        grammar = request.sampling.grammar
        if grammar is None:
            assert answer == engine.generate([request])[0]
            continue
        held += 1
        text = bytes(token for token in answer.token_ids if token < 256).decode(errors="replace")
        if grammar is SCHEMA and answer.finish_reason == "stop":
            jsonschema.validate(json.loads(text), json.loads(grammar.text))
        elif grammar is not SCHEMA:
            assert re.fullmatch("red|green" if grammar.kind == "choice" else grammar.text, text)
            assert answer.finish_reason == "stop"
            assert answer.token_ids[-1] == EOS
    assert held > 10
    assert not engine._core._held


FREE = of_schema(
    {
        "type": "array",
        "items": {"type": "object", "properties": {"s": {"type": "string"}, "n": {"enum": ["one", "two"]}}},
        "minItems": 9,
    }
)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("cache", [None, 24])
def test_the_likeliest_tokens_are_those_of_masks_first(pool, start, monkeypatch, ahead, cache):
    """Whether a step knew what may come, or took the likeliest of all, which was refused or not."""
    if ahead:
        monkeypatch.setattr(core_module, "Runner", AheadRunner)
    decoder = pool.decoder("llama")
    config = {"cache_bytes": cache * decoder.block_bytes()} if cache else {}
    engine = start(decoder, max_batch=6, step_tokens=16, **config)
    draw = random.Random(9)
    refused, refuse = [], Scheduler._refuse
    monkeypatch.setattr(Scheduler, "_refuse", lambda self, sequence: refused.append(1) or refuse(self, sequence))
    forms = [FREE, SCHEMA, Grammar("regex", "[a-z]{4,}[0-9]{3}"), Grammar("regex", ".{5,}x")]
    asked = []
    for i in range(20):
        prompt = tuple(draw.randrange(256) for _ in range(draw.choice([1, 9, 20])))
        sampling = SamplingParams(60, grammar=forms[i % 4], logprobs=draw.choice([None, 1]))
        asked.append(GenerationRequest(prompt, pool.mix(MIXTURES[i % 3]), sampling))

    found = engine.generate(asked)
    assert len(refused) > 20
    # That which names the tokens that may come beside is chosen by masks.
    every = tuple(range(259))
    masked = [replace(one, sampling=replace(one.sampling, allowed_token_ids=every)) for one in asked]
    refused.clear()
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in engine.generate(masked)]
    assert not refused


def test_the_free_answers_beside_held_ones_are_unchanged(pool, start):
    engine = start(pool.decoder("llama"), max_batch=8, prefix_reuse=False)
    free = [GenerationRequest((i, 5, 9), sampling=SamplingParams(30, ignore_eos=True)) for i in range(4)]
    held = [GenerationRequest((i, 7), sampling=SamplingParams(30, grammar=SCHEMA)) for i in range(4)]
    assert engine.generate([*free, *held])[:4] == engine.generate(free)


def test_a_grammar_that_cannot_be_compiled_is_its_own_requests_trouble(start, counting):
    engine = start(counting)
    broken = SamplingParams(grammar=Grammar("regex", "a(b", param="guided_regex"))
    with pytest.raises(InvalidRequest, match="unclosed") as caught:
        engine.generate([GenerationRequest((97,), sampling=broken)])
    assert caught.value.param == "guided_regex"
    assert engine.generate([GenerationRequest((97,), sampling=SamplingParams(2))])[0].text == "bc"
    assert engine.load == (0, 0)


def test_an_answer_goes_on_where_another_engine_left_it(start, counting):
    grammar = Grammar("regex", "[b-d]{6}")
    request = GenerationRequest((97,), sampling=SamplingParams(9, grammar=grammar), generated=tuple(b"bcd"))
    [rest] = start(counting).generate([request])
    assert re.fullmatch("[b-d]{3}", rest.text)
    assert rest.finish_reason == "stop"


def test_what_becomes_too_complex_ends_its_own_request(start, counting, monkeypatch):
    engine = start(counting, max_batch=2)
    real, calls = grammars_module.Held.check, []

    def failing(self):
        calls.append(1)
        if len(calls) == 3:
            raise InvalidRequest("the answer cannot be held to its grammar: too complex")
        return real(self)

    monkeypatch.setattr(grammars_module.Held, "check", failing)
    with pytest.raises(InvalidRequest, match="too complex"):
        engine.generate([GenerationRequest((97,), sampling=SamplingParams(9, grammar=Grammar("regex", "[a-z]{20}")))])
    assert engine.generate([GenerationRequest((97,), sampling=SamplingParams(2))])[0].text == "bc"


def test_what_no_answer_can_be_is_told_without_the_parsers_state(start, counting):
    request = GenerationRequest((97,), sampling=SamplingParams(9, grammar=of_schema({"$ref": "#"})))
    with pytest.raises(InvalidRequest, match=r"cannot be held to its grammar: NoExtensionBias$"):
        start(counting).generate([request])


def test_masks_are_not_made_by_the_thread_that_feeds_the_device(start, counting, monkeypatch):
    threads = set()
    real = Grammars._find
    monkeypatch.setattr(Grammars, "_find", lambda *given: threads.add(threading.current_thread().name) or real(*given))
    start(counting).generate(
        [GenerationRequest((97,), sampling=SamplingParams(9, grammar=Grammar("regex", "[a-z]{5}")))]
    )
    assert threads
    assert not any("lorauter-engine" in name for name in threads)


def test_masks_have_no_more_and_no_fewer_than_the_models_tokens(codec):
    """Models have more tokens than their tokenizers, for the sake of round numbers."""
    grammars = Grammars(codec.backend, codec.eos_ids, 320)
    mask = grammars.begin(Grammar("regex", "[ab]")).mask()
    assert mask.shape == (10,)
    assert mask.dtype == torch.int32
    assert [token for token in range(320) if mask[token // 32] >> (token % 32) & 1] == [97, 98]
    grammars.close()
