"""The options of the HTTP API's requests: what each endpoint takes, validated, and what it asks for.

Each field is a row of the table in `docs/api.md`. Knows nothing of how requests are answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, model_validator
from pydantic_core import PydanticCustomError

from deployments.conversations import Message, turns_of
from deployments.forms import Choices, ResponseFormat, Schema, StructuredOutputs, grammars_of, one_of
from deployments.options import Body, OneOf, Only, Option
from deployments.tool_types import ToolOptions
from lorauter.engine.types import MOST_LOGPROBS, Grammar, Prompt, SamplingParams
from lorauter.errors import InvalidRequest
from lorauter.routing.options import RoutingOptions
from lorauter.tools.types import ToolUse

ROUTED_MODEL = "lorauter"
BASE_MODEL = "base"

PositiveInt = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0)]
Penalty = Annotated[FiniteFloat, Field(ge=-2, le=2)]
Bias = Annotated[FiniteFloat, Field(ge=-100, le=100)]
Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
Several = Annotated[int, Field(ge=1, le=128)]


class LorauterOptions(RoutingOptions):
    """The `lorauter` object of a request: routing options, or adapters chosen by hand."""

    adapters: Annotated[
        dict[str, FiniteFloat] | None, Field(description="adapters by name and weight, in place of routing")
    ] = None
    timings: Annotated[
        bool, Field(description="tell what the steps took, and in which tier each adapter was found")
    ] = False


class StreamOptions(Body):
    """What a stream carries beside the answer."""

    include_usage: Annotated[bool, Option("an event with the usage before the end", "answer", (False,))] = False
    continuous_usage_stats: Annotated[bool, Option("the usage so far in each event", "answer", (False,))] = False
    include_obfuscation: Annotated[bool, Option("events are never padded", "nowhere")] = False


_SAME_NAMES = {
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "ignore_eos",
    "min_tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
}


class TokenOptions(Body):
    """How tokens are chosen."""

    temperature: Annotated[
        Annotated[FiniteFloat, Field(ge=0, le=2)] | None, Option("0 takes the likeliest tokens", "sampling")
    ] = None
    top_p: Annotated[
        Annotated[FiniteFloat, Field(gt=0, le=1)] | None,
        Option("sample from the likeliest tokens of this probability", "sampling", (1,)),
    ] = None
    top_k: Annotated[
        Annotated[int, Field(ge=-1)] | None, Option("sample from so many of the likeliest", "sampling", (0, -1))
    ] = None
    min_p: Annotated[
        Annotated[FiniteFloat, Field(ge=0, le=1)] | None,
        Option("sample from tokens at least this share as likely as the likeliest", "sampling", (0,)),
    ] = None
    presence_penalty: Annotated[Penalty | None, Option("against tokens that the answer has", "sampling", (0,))] = None
    frequency_penalty: Annotated[
        Penalty | None, Option("the same, for each time that it has them", "sampling", (0,))
    ] = None
    repetition_penalty: Annotated[
        Annotated[FiniteFloat, Field(gt=0)] | None,
        Option("against tokens that prompt or answer have", "sampling", (1,)),
    ] = None
    logit_bias: Annotated[
        dict[str, Bias] | None, Option("what is added to tokens' logits, by their ids", "sampling", ({},))
    ] = None
    seed: Annotated[int | None, Option("the same answer again", "sampling")] = None
    stop: Annotated[
        Annotated[str | Annotated[list[str], Field(max_length=16)], OneOf("a text, or a list of at most 16 texts")]
        | None,
        Option("texts that end the answer", "sampling", ([],)),
    ] = None
    ignore_eos: Annotated[bool | None, Option("go on after the token that ends an answer", "sampling", (False,))] = None
    min_tokens: Annotated[
        Annotated[int, Field(ge=0)] | None, Option("nothing ends the answer before so many", "sampling", (0,))
    ] = None
    stop_token_ids: Annotated[
        list[TokenId] | None, Option("tokens that end the answer, beside the model's own", "sampling", ([],))
    ] = None
    include_stop_str_in_output: Annotated[
        bool | None, Option("what ends the answer is part of it", "sampling", (False,))
    ] = None
    skip_special_tokens: Annotated[
        bool | None, Option("the text is without the tokenizer's special tokens", "sampling", (True,))
    ] = None
    allowed_token_ids: Annotated[
        Annotated[list[TokenId], Field(min_length=1)] | None, Option("the only tokens that may come", "sampling")
    ] = None
    bad_words: Annotated[
        list[str] | None, Option("texts that may not come, at most 1024 of 16384 characters", "sampling", ([],))
    ] = None
    structured_outputs: Annotated[
        StructuredOutputs | None, Option("what the answer has to be, in vLLM's words", "sampling", ({},))
    ] = None


class SamplingOptions(TokenOptions):
    """How answers are sampled."""

    max_tokens: Annotated[PositiveInt | None, Option("tokens of an answer at most", "sampling")] = None
    response_format: Annotated[
        ResponseFormat | None, Option("what the answer has to be", "sampling", ({"type": "text"},))
    ] = None
    guided_json: Annotated[Schema | None, Option("the same, as a JSON schema", "sampling")] = None
    guided_regex: Annotated[str | None, Option("as a regular expression", "sampling")] = None
    guided_choice: Annotated[Choices | None, Option("as one of some texts", "sampling")] = None
    guided_grammar: Annotated[str | None, Option("as a grammar, in Lark's or GBNF's language", "sampling")] = None
    guided_whitespace_pattern: Annotated[
        str | None, Option("a regular expression of what may be between JSON's tokens", "sampling")
    ] = None

    @property
    def token_limit(self) -> int | None:
        """The answer's bound, if there is one."""
        return self.max_tokens

    def _grammar(self) -> Grammar | None:
        """What the answer has to be. Raises InvalidRequest: it has to be several things."""
        guided = grammars_of(
            "guided_",
            schema=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
            whitespace=self.guided_whitespace_pattern,
        )
        formats = [one.grammars() for one in (self.response_format, self.structured_outputs) if one is not None]
        return one_of([*(grammar for grammars in formats for grammar in grammars), *guided])

    def sampled(self, default: SamplingParams) -> SamplingParams:
        """The sampling asked for; what was left out is the default's. Raises InvalidRequest."""
        return replace(default, **self._asked())

    def _asked(self) -> dict[str, Any]:
        """What is asked for of the sampling. Raises InvalidRequest."""
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidRequest("seed: needed a whole number of 64 bits", param="seed")
        asked: dict[str, Any] = {name: getattr(self, name) for name in self.model_fields_set & _SAME_NAMES}
        asked |= {
            "max_tokens": self.token_limit,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "logit_bias": self.logit_bias if self.logit_bias is None else _biases(self.logit_bias),
            "stop": (self.stop,)
            if isinstance(self.stop, str)
            else self.stop
            if self.stop is None
            else tuple(self.stop),
            "grammar": self._grammar(),
        }
        for name in ("stop_token_ids", "allowed_token_ids", "bad_words"):
            asked[name] = None if (given := getattr(self, name)) is None else tuple(given)
        return {name: value for name, value in asked.items() if value is not None}


StoredNowhere = Annotated[bool | None, Option("nothing is stored", "nowhere")]
Ignored = Annotated[str | None, Option("", "nowhere")]
IgnoredObject = Annotated[dict[str, Any] | None, Option("", "nowhere")]
Model = Annotated[str, Option(f"`{ROUTED_MODEL}` (routed), `{BASE_MODEL}`, or an adapter's name", "model")]
Routing = Annotated[LorauterOptions, Option("how to route, or the adapters by hand; an object", "routing", ({},))]
Streamed = Annotated[bool, Option("the answer as it comes, by server-sent events", "answer", (False,))]
CacheSalt = Annotated[
    Annotated[str, Field(min_length=1, max_length=1024)] | None,
    Option("share what is computed of prompts only with requests of the same salt", "prompt"),
]


class GenerationBody(SamplingOptions):
    """What chats and plain completions have in common."""

    model: Model
    lorauter: Routing = LorauterOptions()

    stream: Streamed = False
    stream_options: Annotated[
        StreamOptions | None,
        Option("what a stream carries beside the answer", "answer", ({},)),
    ] = None
    cache_salt: CacheSalt = None

    user: Ignored = None
    metadata: IgnoredObject = None
    request_id: Annotated[str | None, Option("the header `x-request-id` goes into logs", "nowhere")] = None
    session_id: Ignored = None
    stream_interval: Annotated[PositiveInt | None, Option("", "nowhere")] = None
    spaces_between_special_tokens: Annotated[bool, Option("", "nowhere")] = True
    return_token_offsets: Annotated[bool, Option("", "nowhere")] = False
    return_mm_kwargs: Annotated[bool, Option("", "nowhere")] = True
    guided_decoding_backend: Ignored = None
    truncation_side: Annotated[Literal["left", "right"] | None, Option("", "nowhere")] = None

    n: Annotated[Several | None, Option("so many answers to each prompt", "answer", (1,))] = None
    prompt_logprobs: Annotated[
        Logprobs | None, Option("the prompt's tokens, each with so many of the likeliest in its place", "answer")
    ] = None
    return_token_ids: Annotated[
        bool | None, Option("the tokens of prompt and answer, `prompt_token_ids` and `token_ids`", "answer", (False,))
    ] = None
    use_beam_search: Annotated[None, Only(False)] = None
    length_penalty: Annotated[None, Only(1, because="it is of beam search")] = None
    logprob_token_ids: Annotated[None, Only()] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, Option("logprobs name tokens `token_id:N`, and not by their texts", "answer", (False,))
    ] = None
    return_prompt_text: Annotated[None, Only(False)] = None
    truncate_prompt_tokens: Annotated[None, Only(because="a prompt is never cut in silence")] = None
    thinking_token_budget: Annotated[None, Only(-1)] = None
    repetition_detection: Annotated[None, Only()] = None
    watermarking: Annotated[None, Only(False)] = None
    priority: Annotated[None, Only(0)] = None
    logits_processors: Annotated[None, Only([])] = None
    routed_experts_prompt_start: Annotated[None, Only(0)] = None
    kv_transfer_params: Annotated[None, Only({})] = None
    ec_transfer_params: Annotated[None, Only({})] = None
    vllm_xargs: Annotated[None, Only({})] = None

    def chosen(self) -> Mapping[str, float] | None:
        """The adapters that a request asks for, by hand or as its model; None where it is to be routed.

        Raises InvalidRequest.
        """
        by_hand = self.lorauter.adapters
        if self.model == ROUTED_MODEL:
            return by_hand
        if by_hand is not None:
            raise InvalidRequest(f"lorauter.adapters goes with model {ROUTED_MODEL!r} alone", param="lorauter.adapters")
        return {} if self.model == BASE_MODEL else {self.model: 1.0}

    def sampling(self, *, max_tokens: int, temperature: float) -> SamplingParams:
        """The sampling asked for, with defaults for what was left out. Raises InvalidRequest."""
        return SamplingParams(**{"max_tokens": max_tokens, "temperature": temperature, **self._asked()})

    def _asked(self) -> dict[str, Any]:
        return {**super()._asked(), "logprobs": self.ranks, "prompt_logprobs": self.prompt_logprobs}

    @property
    def ranks(self) -> int | None:
        """How many of the likeliest tokens are told with each of the answer's, if any are."""
        return None

    @property
    def names_a_tool(self) -> bool:
        """Whether the answer has to call a certain tool."""
        return False

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """What the answer may call, or has to. Raises InvalidRequest."""
        return None

    @property
    def unlike_a_row(self) -> str | None:
        """The option, if there is one, by which the answer has more than a text: a batch's rows have no room for it."""
        for name in ("n", "best_of"):
            if getattr(self, name) not in (None, 1):
                return name
        names = ("tools", "functions", "logprobs", "echo", "prompt_logprobs", "return_token_ids")
        given = {name: getattr(self, name, None) for name in names}
        return next(
            (name for name, value in given.items() if value is not None and value is not False and value != []),
            None,
        )


def _biases(by_token: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    wrong = [token for token in by_token if not (token.isascii() and token.isdigit() and len(token) < 10)]
    if wrong:
        named = ", ".join(repr(token[:40]) for token in wrong[:5])
        raise InvalidRequest(f"logit_bias: got {named}, needed the ids of tokens", param="logit_bias")
    return tuple((int(token), bias) for token, bias in by_token.items())


AddGenerationPrompt = Annotated[
    bool | None,
    Option("begin the assistant's message; unless the last message goes on, it is begun", "prompt", (True,)),
]
ContinueFinalMessage = Annotated[bool, Option("the answer goes on with the last message", "prompt", (False,))]
TemplateKwargs = Annotated[dict[str, Any] | None, Option("variables of the chat template", "prompt", ({},))]
AddSpecialTokens = Annotated[bool, Option("put before a text what the tokenizer puts there", "prompt", (True,))]
ParseSpecial = Annotated[
    bool, Option("what looks like a control token is one: for chats that a client renders", "prompt", (False,))
]


def check_end(add_generation_prompt: bool | None, continue_final_message: bool) -> None:
    """Raise what pydantic takes for an error where a chat is to end in two ways."""
    if continue_final_message and add_generation_prompt:
        raise PydanticCustomError(
            "continue_final_message", "add_generation_prompt and continue_final_message exclude each other"
        )


def chat_prompt(
    messages: list[Message],
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    template_kwargs: dict[str, Any] | None,
    tools: tuple[Mapping[str, Any], ...],
) -> Prompt:
    """A conversation as a prompt."""
    return Prompt(
        messages=turns_of(messages),
        add_generation_prompt=not continue_final_message and add_generation_prompt is not False,
        continue_final_message=continue_final_message,
        template_kwargs=template_kwargs or {},
        tools=tools,
    )


class ChatBody(ToolOptions, GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[
        Annotated[list[Message], Field(min_length=1)],
        Option(
            "the conversation: `role`, `content` (a text, or parts of text), `tool_calls`, `tool_call_id`, or by older "
            "names `function_call`, `name`",
            "prompt",
        ),
    ]
    max_completion_tokens: Annotated[PositiveInt | None, Option("goes before `max_tokens`", "sampling")] = None
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = False
    chat_template_kwargs: TemplateKwargs = None

    store: StoredNowhere = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: IgnoredObject = None
    safety_identifier: Ignored = None
    prediction: IgnoredObject = None
    include_reasoning: Annotated[bool | None, Option("", "nowhere")] = None

    logprobs: Annotated[bool | None, Option("tell how probable each token was", "answer", (False,))] = None
    top_logprobs: Annotated[
        Logprobs | None, Option("so many of the likeliest in its place; needs `logprobs`", "answer", (0,))
    ] = None
    best_of: Annotated[None, Only(1)] = None
    modalities: Annotated[None, Only(["text"])] = None
    audio: Annotated[None, Only()] = None
    reasoning_effort: Annotated[None, Only("none")] = None
    verbosity: Annotated[None, Only("medium")] = None
    web_search_options: Annotated[None, Only()] = None
    moderation: Annotated[None, Only()] = None
    echo: Annotated[None, Only(False)] = None
    add_special_tokens: Annotated[None, Only(False, because="the chat template writes them")] = None
    documents: Annotated[None, Only([])] = None
    chat_template: Annotated[None, Only(because="the model's own is used")] = None
    media_io_kwargs: Annotated[None, Only({})] = None
    mm_processor_kwargs: Annotated[None, Only({})] = None

    @model_validator(mode="after")
    def _ends_in_one_way(self) -> ChatBody:
        check_end(self.add_generation_prompt, self.continue_final_message)
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def ranks(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None

    def prompts(self) -> list[Prompt]:
        """The conversation as a prompt."""
        end = self.add_generation_prompt, self.continue_final_message
        return [chat_prompt(self.messages, *end, self.chat_template_kwargs, self.shown_tools())]

    def _asked(self) -> dict[str, Any]:
        return {**super()._asked(), "calls": self.tool_use}


Prompts = Annotated[
    str | list[str] | list[TokenId] | list[list[TokenId]],
    OneOf("a text, a list of texts, a list of token ids, or a list of such lists"),
]


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[Prompts, Option("each is answered by a choice", "prompt")]
    add_special_tokens: AddSpecialTokens = True
    parse_special: ParseSpecial = False

    suffix: Annotated[None, Only("")] = None
    max_tokens: Annotated[
        Annotated[int, Field(ge=0)] | None, Option("tokens of an answer at most; 0 goes with `echo`", "sampling")
    ] = None
    logprobs: Annotated[
        Logprobs | None, Option("tell how probable each token was, and so many of the likeliest in its place", "answer")
    ] = None
    echo: Annotated[bool | None, Option("the answer's text begins with the prompt", "answer", (False,))] = None
    best_of: Annotated[
        Several | None, Option("of so many answers the `n` that are the likeliest, token by token", "answer", (1,))
    ] = None
    prompt_embeds: Annotated[None, Only()] = None

    @property
    def token_limit(self) -> int | None:
        return 1 if self.max_tokens == 0 else self.max_tokens  # what is computed for the prompt's sake

    @property
    def ranks(self) -> int | None:
        return self.logprobs

    def _asked(self) -> dict[str, Any]:
        n, best_of = self.n or 1, self.best_of or 1
        if self.best_of is not None and (best_of < n or (self.stream and best_of > n)):
            raise InvalidRequest("best_of has to be at least n, and n itself where stream is true", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens: 0 needs echo: true", param="max_tokens")
        if self.stream and self.echo and self.logprobs is not None and n > 1:
            raise InvalidRequest("echo with logprobs and n above 1 is not streamed; give stream: false", param="echo")
        asked = super()._asked()
        if self.echo and self.logprobs is not None:
            asked["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        if best_of > n and self.logprobs is None:
            asked["logprobs"] = 0
        return asked

    def prompts(self) -> list[Prompt]:
        """The prompts. Raises InvalidRequest: there is none."""
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not given:
            raise InvalidRequest("prompt is empty; give a text, or a list", param="prompt")
        if isinstance(given[0], int):
            given = [given]
        return [self._prompt(one) for one in given]

    def _prompt(self, given: Any) -> Prompt:
        if not isinstance(given, str):
            return Prompt(token_ids=tuple(given))
        return Prompt(text=given, add_special_tokens=self.add_special_tokens, parse_special=self.parse_special)
