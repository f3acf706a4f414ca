import json

import pytest

from deployments.batch.config import BatchConfig
from deployments.batch.rows import SourceRow, decision_columns, described, order_by_adapters, read_request
from lorauter.engine import SamplingParams
from lorauter.errors import AdapterNotFound, InvalidRequest
from lorauter.routing import AdapterWeight, RoutingDecision, RoutingOptions


def read(values, number=0, **settings):
    return read_request(SourceRow(number, values), BatchConfig.parse(settings))


def decision(*names):
    return RoutingDecision("v", (), tuple(AdapterWeight(name, 1.0) for name in names))


def test_a_prompt_is_the_users_turn_of_a_chat_or_goes_on_as_it_is() -> None:
    chat = read({"prompt": "Hello?"}, system="Be brief.")
    assert chat.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"})
    assert (chat.text, chat.prompt) == ("Hello?", None)
    plain = read({"text": "Hello"}, prompts="plain", columns={"prompt": "text"})
    assert (plain.prompt, plain.text, plain.messages) == ("Hello", "Hello", ())


@pytest.mark.parametrize("coded", [False, True])
def test_a_chat_goes_before_the_prompt_and_may_be_json(coded) -> None:
    chat = [
        {"role": "developer", "content": "Be brief.", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    row = {"messages": json.dumps(chat) if coded else chat, "prompt": "not this"}
    request = read(row)
    assert [m["role"] for m in request.messages] == ["system", "user", "assistant", "user"]
    assert request.text == "Two?"
    assert read(row, route_on="conversation").text == "Be brief.\nOne?\n1\nTwo?"


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({}, {"max_tokens": 9, "temperature": 0.5, "top_p": 1.0}),
        ({"max_tokens": 3, "temperature": 0, "top_p": 0.5, "stop": "\n"}, {"stop": ("\n",), "top_p": 0.5}),
        ({"max_tokens": "3", "temperature": "0", "stop": '["a", "b"]'}, {"max_tokens": 3, "stop": ("a", "b")}),
        ({"max_tokens": "", "temperature": float("nan"), "seed": None}, {"max_tokens": 9, "temperature": 0.5}),
        ({"seed": 7}, {"seed": 7}),
    ],
)
def test_a_rows_own_sampling_goes_before_the_jobs(given, sampling) -> None:
    got = read({"prompt": "x", **given}, sampling={"max_tokens": 9, "temperature": 0.5}).sampling
    assert {name: getattr(got, name) for name in sampling} == sampling


def test_every_row_draws_from_numbers_of_its_own_that_the_jobs_seed_decides() -> None:
    def seeds(seed):
        return [read({"prompt": "x"}, number, sampling={"seed": seed}).sampling.seed for number in range(3)]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 6


@pytest.mark.parametrize(
    ("given", "mixture"),
    [
        ("sst2", [("sst2", 1.0)]),
        ({"sst2": 0.5, "rte": 2, "boolq": None}, [("sst2", 0.5), ("rte", 2.0)]),
        ([{"name": "sst2", "weight": 0.25}], [("sst2", 0.25)]),
        ('{"sst2": 0.5}', [("sst2", 0.5)]),
        ({}, []),
        ([], []),
    ],
)
def test_adapters_may_be_chosen_by_hand(given, mixture) -> None:
    request = read({"prompt": "x", "adapters": given})
    assert request.decision is not None
    assert [(a.name, a.weight) for a in request.decision.adapters] == mixture
    assert request.decision.confidence is None


def test_where_none_are_chosen_the_row_is_routed_with_its_options() -> None:
    request = read({"prompt": "x", "adapters": None, "lorauter": {"top_k": 2, "exclude_tasks": ["sst2"]}})
    assert request.decision is None
    assert request.options == RoutingOptions(top_k=2, exclude_tasks=frozenset(["sst2"]))


def test_a_column_that_is_not_to_be_read_is_not() -> None:
    row = {"prompt": "x", "temperature": "sunny", "adapters": "a name"}
    assert read(row, columns={"temperature": None, "adapters": None}).sampling.temperature == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no column 'prompt'"),
        ({"prompt": ""}, "empty"),
        ({"prompt": " \n"}, "empty"),
        ({"prompt": None}, "NoneType"),
        ({"prompt": 17}, "int"),
        ({"prompt": ["x"]}, "list"),
        ({"prompt": "half \ud800"}, "half a character"),
        ({"messages": []}, "messages"),
        ({"messages": "[oh"}, "no JSON"),
        ({"messages": [{"role": "king", "content": "x"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no user message"),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, "half a character"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": "sunny"}, "temperature"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "adapters": 3}, "adapters"),
        ({"prompt": "x", "adapters": {"sst2": "much"}}, "adapters"),
        ({"prompt": "x", "adapters": {"sst2": float("nan")}}, "adapters"),
        ({"prompt": "x", "adapters": {"../secrets": 1}}, "no adapter's name"),
        ({"prompt": "x", "adapters": {f"a{i}": 1 for i in range(65)}}, "at most 64"),
        ({"prompt": "x", "lorauter": {"top_kk": 1}}, "top_kk"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, message) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read(row)


def test_a_row_that_could_not_be_read_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no JSON"):
        read_request(SourceRow(0, {}, "the line is no JSON"), BatchConfig())


def test_rows_with_the_same_adapters_come_together() -> None:
    mixed = [decision("b"), decision("a", "b"), InvalidRequest("x"), decision("b"), decision(), decision("a", "b")]
    assert order_by_adapters(mixed) == [2, 4, 1, 5, 0, 3]


def test_an_error_says_its_kind_and_leaves_the_other_columns_empty() -> None:
    error = AdapterNotFound("not\nfound", adapter="x")
    assert described(error) == "AdapterNotFound: adapter 'x': not found"
    assert described(KeyError("x")).startswith("internal KeyError")
    assert decision_columns(error) == {"tasks": None, "adapters": None, "confidence": None, "error": described(error)}


def test_route_only_reads_no_sampling() -> None:
    assert read({"prompt": "x", "temperature": "sunny"}, route_only=True).sampling == SamplingParams()
