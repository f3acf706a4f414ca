"""Patterns of an adapter's file: matched as PEFT does, and never for long."""

import re
import time
import warnings

import pytest
from peft.utils.other import get_pattern_key, match_target_against_key

from lorauter.adapters.patterns import MAX_CHARACTERS, PatternError, first_matches
from lorauter.adapters.weights import LoraWeights
from lorauter.errors import AdapterRejected

MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 10, 31)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
SUFFIX = r"(.*\.)?({})$"

PATTERNS = [
    ["q_proj"],
    ["model.layers.0.self_attn.q_proj", "self_attn.v_proj"],
    ["^q_proj", "proj", "_proj", "x|v_proj"],
    [r"^model\.layers\.0\.", r"layers\.1\.self_attn\.q_proj"],
    [r"layers\.\d\..*", r"layers\.\d+\..*"],
    [r".*\.(q|v)_proj", ".*"],
    [r"layers\.[0-9]\..*_proj", r"layers\.(1|3)\d\.mlp\.\w+"],
    [r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.self_attn\.v_proj)"],
    [r"^(model(?=\.).*\.(q_proj|v_proj))$"],
    [r"^(?!.*mlp).*(?:q_proj|down_proj|v_proj)"],
    [r"^(model)(?!.*(lm_head|self_attn)).*"],
    ["q_proj)|(model"],
    [r"model\.layers\.(?P<i>\d+)\..*"],
    [""],
]
EVIL = [
    "([a-z_.0-9]+)+!",
    "(.*)*!",
    "((.+)+)+!",
    "(.*.*.*.*.*.*.*.*)!",
    "[a-z]*" * 300 + "!",
    "((?:.|.)*(?:.|.)*)*!",
    r"((?:.+)+)\3!",
    "(?=(.+)+!)m",
    "(?:(?:(?:(?:.?){50}){50}){50}){50}!",
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_as_peft_matches(patterns: list[str]) -> None:
    found = first_matches(patterns, MODULES, template=SUFFIX)
    for module, first in zip(MODULES, found, strict=True):
        key = get_pattern_key(patterns, module)
        assert (module if first is None else patterns[first.pattern]) == key


@pytest.mark.parametrize("pattern", [row[0] for row in PATTERNS if ")|(" not in row[0]])
def test_whole_names_as_peft_matches(pattern: str) -> None:
    for module, first in zip(MODULES, first_matches([pattern], MODULES, whole=True), strict=True):
        assert (first is not None) == bool(match_target_against_key(pattern, module))


@pytest.mark.parametrize("pattern", ["layers", "(?:layers|blocks)"])
def test_groups_are_told(pattern: str) -> None:
    found = first_matches(["h", pattern], MODULES, template=r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
    assert [first and (first.pattern, first.groups) for first in found] == [
        (1, {"idx": module.split(".")[2]}) for module in MODULES
    ]


@pytest.mark.parametrize("pattern", EVIL)
def test_a_pattern_that_takes_for_ever_is_refused_soon(pattern: str) -> None:
    used = time.process_time()
    with pytest.raises(PatternError, match="takes more than 1 s"):
        first_matches([pattern], MODULES, template=SUFFIX)
    assert time.process_time() - used < 0.5  # of this process, whose lock others wait for


@pytest.mark.parametrize("pattern", ["(a|a)*" * 500 + "b!", "a{1000000000}", "(x+x+)+y", "(?:a|b)" * 5000])
def test_a_pattern_that_only_looks_bad_is_matched(pattern: str) -> None:
    assert first_matches([pattern], ["q_proj"], template=SUFFIX) == [None]


@pytest.mark.parametrize(
    "pattern",
    ["q_proj(", "[", "(" * 3000 + ")" * 3000, "a{99999999999999999999}", "(?<=a+)b", "(?i)q_proj", r"\q", "*", "(?R)"],
)
def test_what_is_no_regular_expression_is_refused(pattern: str) -> None:
    with warnings.catch_warnings(), pytest.raises((re.error, OverflowError, RecursionError)):
        re.compile(SUFFIX.replace("{}", pattern))
    with pytest.raises(PatternError, match="no regular expression"):
        first_matches([pattern], ["q_proj"], template=SUFFIX)


def test_a_warning_of_re_is_no_error() -> None:
    assert first_matches(["[[a-z]_proj"], ["q_proj"]) == [(0, {})]


def test_too_many_patterns_are_refused() -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(MAX_CHARACTERS // 32)]
    with pytest.raises(PatternError, match="at most"):
        first_matches(names, MODULES)
    with pytest.raises(PatternError, match="at most"):
        first_matches([""] * (MAX_CHARACTERS + 1), MODULES)
    started = time.monotonic()
    assert first_matches(names[: len(names) // 2], MODULES, template=SUFFIX)[0] == (0, {})
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_an_adapter_with_such_a_pattern_is_refused_by_the_settings_name(tmp_path, make_adapter, setting) -> None:
    folder = make_adapter(tmp_path, "x", **{setting: {"(.*)*!": 8}})
    with pytest.raises(AdapterRejected, match=rf"'x': {setting}: '\(\.\*\)\*!' takes more than 1 s"):
        LoraWeights.load(folder, name="x", version="1")


def test_many_plain_patterns_of_many_names_take_no_longer() -> None:
    patterns = [f"model.layers.{i}.x" for i in range(3000)]
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(20_000)]
    used = time.process_time()
    with pytest.raises(PatternError, match="takes more than 1 s to match with 20000 names"):
        first_matches(patterns, names, template=SUFFIX)
    assert time.process_time() - used < 1


def test_a_name_for_every_module_of_the_largest_models_is_matched() -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(126) for part in "abcdefg"]
    found = first_matches(names, names, template=SUFFIX)
    assert [first and first.pattern for first in found] == list(range(len(names)))


def test_a_long_name_of_a_tensor_takes_no_time(tmp_path, make_adapter) -> None:
    def rename(tensors) -> None:
        tensors["base_model.model." + "x" + ".lora_a" * 50_000 + "\n"] = tensors.popitem()[1]

    folder = make_adapter(tmp_path, "x", change=rename)
    used = time.process_time()
    with pytest.raises(AdapterRejected):
        LoraWeights.load(folder, name="x", version="1")
    assert time.process_time() - used < 2


def test_a_machine_that_is_busy_or_broken_is_no_fault_of_the_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lorauter.apart._WALL_S", 0.001)
        with pytest.raises(TimeoutError, match="were not matched"):
            first_matches(["(zz)+busy"], ["a"])
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/bin/false")
        with pytest.raises(OSError, match="has ended with 1"):
            first_matches(["(zz)+busy"], ["a"])
    assert first_matches(["(zz)+busy"], ["zzbusy"])[0] is not None
