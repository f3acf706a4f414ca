import json

import pytest

from deployments.batch.config import BatchConfig
from deployments.batch.rows import (
    SourceRow,
    decision_columns,
    described,
    kept_names,
    order_by_adapters,
    read_request,
    result_schema,
)
from lorauter.engine import SamplingParams
from lorauter.engine.types import Prompt
from lorauter.errors import AdapterNotFound, InvalidRequest
from lorauter.routing import AdapterWeight, RoutingDecision, RoutingOptions, TaskScore


def read(values, number=0, is_text=False, **settings):
    return read_request(SourceRow(number, values, is_text=is_text), BatchConfig.parse(settings))


def decision(*names):
    return RoutingDecision("v", (), tuple(AdapterWeight(name, "1", 1.0) for name in names))


def test_a_prompt_is_the_users_turn_of_a_chat_or_goes_on_as_it_is() -> None:
    chat = read({"prompt": "Hello?"}, system="Be brief.")
    assert chat.prompt.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"})
    assert (chat.text, chat.prompt.text) == ("Hello?", None)
    plain = read({"text": "Hello"}, prompts="plain", columns={"prompt": "text"})
    assert (plain.prompt, plain.text) == (Prompt(text="Hello"), "Hello")


def test_a_chat_may_hold_what_clients_send_back_and_what_arrow_fills_up() -> None:
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "W?", "image_url": None}], "tool_calls": None},
        {"role": "assistant", "content": "x", "weight": 0, "refusal": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "So?"},
    ]
    request = read({"messages": chat})
    assert [m["content"] for m in request.prompt.messages] == ["W?", "x", "", "So?"]
    assert request.text == "So?"


def openai(body, url="/v1/chat/completions", **row):
    return {"custom_id": "r-1", "method": "POST", "url": url, "body": body, **row}


HI = {"model": "lorauter", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("coded", [False, True])
def test_a_request_of_openais_batch_format_is_read_as_the_api_does(coded) -> None:
    body = {**HI, "max_tokens": 5, "stop": "[INST]", "stream": None, "lorauter": {"top_k": 2}}
    request = read(openai(json.dumps(body) if coded and body.pop("stream") is None else body), 3)
    assert (request.text, request.prompt) == ("hi", Prompt(messages=({"role": "user", "content": "hi"},)))
    assert (request.chosen, request.options.top_k) == (None, 2)
    assert (request.sampling.max_tokens, request.sampling.stop) == (5, ("[INST]",))
    plain = read(openai({"model": "poet", "prompt": "Roses", "seed": 7}, "/v1/completions"), sampling={"top_p": 0.5})
    assert (plain.prompt, plain.sampling.seed, plain.sampling.top_p) == (Prompt(text="Roses"), 7, 0.5)
    assert plain.chosen == [("poet", 1.0)]
    assert read(openai({**HI, "model": "base"})).chosen == []


def test_such_requests_draw_from_numbers_of_their_own_too() -> None:
    assert len({read(openai(HI), number).sampling.seed for number in range(3)}) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (openai(HI, method="GET"), "GET"),
        (openai(HI, "/v1/embeddings"), "/v1/embeddings"),
        (openai(HI, ["/v1/embeddings"]), "needed POST and"),
        (openai(None), "body"),
        (openai({1: {2, 3}}), "body"),
        (openai("{oh"), "body"),
        (openai({**HI, "messages": []}), "messages"),
        (openai({**HI, "n": 3}), "n: "),
        (openai({**HI, "tools": [{"type": "function", "function": {"name": "f"}}]}), "tools: "),
        (openai({"model": "base", "prompt": "x", "logprobs": 0}, "/v1/completions"), "logprobs: "),
        (openai({**HI, "max_tokens": "5"}), "max_tokens"),
        (openai({**HI, "messages": [{"role": "user", "content": ""}]}), "empty"),
        (openai({"model": "base", "prompt": ""}, "/v1/completions"), "empty"),
        (openai({**HI, "model": "../secrets"}), "no adapter's name"),
        (openai({**HI, "model": "poet", "lorauter": {"adapters": {"a": 1}}}), "lorauter.adapters"),
    ],
)
def test_what_is_wrong_with_such_a_request_is_said(row, message) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read(row)


def test_columns_of_the_added_names_are_kept_by_others() -> None:
    added = result_schema(route_only=False).names
    assert kept_names(["prompt", "id"], added) == {}
    assert kept_names(["answer", "error", "input_answer", "input_input_answer"], added) == {
        "answer": "input_input_input_answer",
        "error": "input_error",
    }


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
    assert [m["role"] for m in request.prompt.messages] == ["system", "user", "assistant", "user"]
    assert request.text == "Two?"
    assert read(row, route_on="conversation").text == "Be brief.\nOne?\n1\nTwo?"


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({}, {"max_tokens": 9, "temperature": 0.5, "top_p": 1.0}),
        ({"max_tokens": 3, "temperature": 0, "top_p": 0.5, "stop": "\n"}, {"stop": ("\n",), "top_p": 0.5}),
        ({"max_tokens": "3", "temperature": "0", "stop": ["a", "b"]}, {"max_tokens": 3, "stop": ("a", "b")}),
        ({"max_tokens": "", "temperature": float("nan"), "seed": None}, {"max_tokens": 9, "temperature": 0.5}),
        ({"seed": 7}, {"seed": 7}),
        ({"top_k": "5", "min_p": "0.1", "ignore_eos": "true"}, {"top_k": 5, "min_p": 0.1, "ignore_eos": True}),
        ({"top_k": -1, "repetition_penalty": 1.5}, {"top_k": 0, "repetition_penalty": 1.5}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1, "frequency_penalty": -1}),
        ({"logit_bias": {"7": 1.5}}, {"logit_bias": ((7, 1.5),)}),
        ({"logit_bias": '{"7": -100}'}, {"logit_bias": ((7, -100),)}),
    ],
)
def test_a_rows_own_sampling_goes_before_the_jobs(given, sampling) -> None:
    got = read({"prompt": "x", **given}, sampling={"max_tokens": 9, "temperature": 0.5}).sampling
    assert {name: getattr(got, name) for name in sampling} == sampling


@pytest.mark.parametrize(
    ("stop", "of_json", "of_csv"),
    [
        ("[INST]", ("[INST]",), ("[INST]",)),
        ("[", ("[",), ("[",)),
        ("[1]", ("[1]",), ("[1]",)),
        ('{"a": 1}', ('{"a": 1}',), ('{"a": 1}',)),
        ('["a", "b"]', ('["a", "b"]',), ("a", "b")),
        ("[]", ("[]",), ()),
    ],
)
def test_a_text_is_a_stop_string_and_a_list_in_csv_is_many(stop, of_json, of_csv) -> None:
    assert read({"prompt": "x", "stop": stop}).sampling.stop == of_json
    assert read({"prompt": "x", "stop": stop}, is_text=True).sampling.stop == of_csv


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
    assert request.chosen == mixture


def test_where_none_are_chosen_the_row_is_routed_with_its_options() -> None:
    request = read({"prompt": "x", "adapters": None, "lorauter": {"top_k": 2, "exclude_tasks": ["sst2"]}})
    assert request.chosen is None
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
        ({"prompt": "x", "adapters": {"sst2": 10**400}}, "adapters"),
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
    assert described(InvalidRequest("half \ud800")) == "InvalidRequest: half ?"
    columns = decision_columns(error)
    assert columns.pop("error") == described(error)
    assert columns == dict.fromkeys(["tasks", "adapters", "confidence", "constrained", "shown"])


def test_route_only_reads_no_sampling() -> None:
    assert read({"prompt": "x", "temperature": "sunny"}, route_only=True).sampling == SamplingParams()


def test_a_request_of_openais_format_takes_the_apis_options() -> None:
    body = {**HI, "chat_template_kwargs": {"a": 1}, "continue_final_message": True, "top_k": 3, "tools": []}
    request = read(openai(body), sampling={"min_p": 0.2, "top_k": 9})
    assert request.prompt == Prompt(
        messages=({"role": "user", "content": "hi"},),
        add_generation_prompt=False,
        continue_final_message=True,
        template_kwargs={"a": 1},
    )
    assert (request.sampling.top_k, request.sampling.min_p) == (3, 0.2)
    tokens = read(openai({"model": "base", "prompt": [1, 2]}, "/v1/completions"))
    assert tokens.prompt == Prompt(token_ids=(1, 2))
    for prompt, message in (([1, 2], "no text to route by"), (["a", "b"], "got 2 prompts")):
        with pytest.raises(InvalidRequest, match=message):
            read(openai({"model": "lorauter", "prompt": prompt}, "/v1/completions"))


def test_a_row_may_ask_to_be_held_to_its_tasks_answers() -> None:
    for row in ({"prompt": "x", "lorauter": {"constrain": True}}, openai({**HI, "lorauter": {"constrain": True}})):
        assert read(row).options.constrain
    for row in (
        {"prompt": "x", "lorauter": {"constrain": True}, "guided_regex": "a+"},
        openai({**HI, "lorauter": {"constrain": True}, "guided_regex": "a+"}),
        openai({**HI, "lorauter": {"constrain": True}, "model": "base"}),
    ):
        with pytest.raises(InvalidRequest, match=r"lorauter\.constrain"):
            read(row)
    held = RoutingDecision("v", (TaskScore("t", 1.0, 1.0),), (), 1.0, constrain=True, answers=("a", "b"))
    assert decision_columns(held)["constrained"] == "t"
