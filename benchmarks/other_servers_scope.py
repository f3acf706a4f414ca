"""Which tests of other servers concern this one, and which do not, and why. For `other_servers.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Files of vLLM's tests/entrypoints, and what they are about.
VLLM: Mapping[str, str] = {
    "openai/chat_completion/test_chat.py": "chats",
    "openai/chat_completion/test_chat_completion.py": "chats",
    "openai/chat_completion/test_chat_echo.py": "chats",
    "openai/chat_completion/test_chat_logit_bias_validation.py": "chats",
    "openai/chat_completion/test_completion_with_function_calling.py": "tools",
    "openai/completion/test_completion.py": "completions",
    "openai/completion/test_prompt_validation.py": "completions",
    "openai/models/test_models.py": "models",
    "openai/test_chunked_prompt.py": "completions",
    "openai/test_return_token_ids.py": "token ids",
    "openai/test_return_tokens_as_ids.py": "token ids",
    "openai/responses/test_simple.py": "responses",
    "openai/responses/test_basic.py": "responses",
    "openai/responses/test_function_call.py": "responses",
    "openai/responses/test_structured_output.py": "responses",
    "anthropic/test_messages.py": "messages",
    "serve/tokenize/test_tokenization.py": "tokenize",
    "serve/instrumentator/test_basic.py": "health, load",
}


class Kit(NamedTuple):
    """A mixin of SGLang's tests, and what it is about."""

    mixin: str
    kind: str


# Files of SGLang's sglang/test/kits.
SGLANG: Mapping[str, Kit] = {
    "anthropic_messages_kit.py": Kit("AnthropicMessagesMixin", "messages"),
    "basic_api_contract_kit.py": Kit("BasicAPIContractMixin", "chats, completions"),
    "json_constrained_kit.py": Kit("JSONConstrainedMixin", "forms"),
    "json_mode_kit.py": Kit("JSONModeMixin", "forms"),
    "matched_stop_kit.py": Kit("MatchedStopMixin", "chats, completions"),
}

# Files of llama.cpp's tools/server/tests/unit.
LLAMA_CPP: Mapping[str, str] = {
    "test_chat_completion.py": "chats",
    "test_compat_oai_responses.py": "responses",
    "test_compat_anthropic.py": "messages",
    "test_embedding.py": "embeddings",
}

_MODEL = "what their test model says, or how many tokens it has"
_OWN = "an option, field or endpoint of that server's own"
_OTHERWISE = "decided otherwise here"
_NONE = "no images, no reasoning, nothing stored here"

# Patterns of file::test.
NOT_CONCERNED: Mapping[str, str] = {
    # vLLM
    "test_chat.py::test_more_than_one_prompt_logprobs_chat*": f"{_MODEL}: whether a prompt's token is the likeliest",
    "test_chat.py::test_single_chat_session*": _MODEL,
    "test_chat.py::test_structured_outputs_json_chat": f"{_MODEL}: its answer is cut",
    "test_chat.py::test_response_format_json*": f"{_MODEL}: its answer is cut",
    "test_chat.py::test_structured_outputs_choice_chat": f"{_MODEL}: another answer the second time",
    "test_chat.py::test_structured_outputs_regex_chat": f"{_MODEL}: another answer the second time",
    "test_chat.py::test_long_seed": f"{_OWN}: an error's words",
    "test_chat.py::test_complex_message_content": _MODEL,
    "test_chat.py::test_chat_streaming*": f"{_OTHERWISE}: the last text goes before the event that ends an answer",
    "test_chat.py::test_chat_completion_stream_options*": f"{_OTHERWISE}: null, without a stream too, asks for nothing",
    "test_chat.py::test_custom_role": f"{_OTHERWISE}: roles are OpenAI's",
    "test_chat.py::test_invocations": _OWN,
    "test_chat_completion.py::test_kv_transfer*": _OWN,
    "test_chat_completion.py::test_per_request_metrics*": _OWN,
    "test_chat_echo.py::test_chat_session_with_echo*": f"{_OWN}: echo in chats",
    "test_chat_echo.py::test_prompt_logprobs": f"{_OWN}: -1 for all of the vocabulary",
    "test_chat_echo.py::test_top_logprobs": f"{_OWN}: -1 for all of the vocabulary",
    "test_completion.py::test_completion_truncation_side*": f"{_OTHERWISE}: a prompt is never cut",
    "test_completion.py::test_logprob_token_ids*": _OWN,
    "test_completion.py::test_batch_completions*": f"{_OWN}: beam search",
    "test_completion.py::test_parallel_streaming*": f"{_OTHERWISE}: more events than tokens",
    "test_completion.py::test_completion_stream_options*": f"{_OTHERWISE}: the first event has no text",
    "test_completion_with_function_calling.py::test_named_tool_use": f"{_MODEL}: its arguments are cut",
    "test_completion.py::test_completion_streaming*": f"{_MODEL}: where it ends",
    "test_models.py::test_check_models": f"{_OTHERWISE}: an adapter's place is not told",
    "test_chunked_prompt.py::test_completion*": f"{_OTHERWISE}: the first event has no text",
    "test_return_token_ids.py::test_chat_completion_with_tool_use": f"{_MODEL}: whether it calls a tool",
    "test_return_token_ids.py::test_comparison*": f"{_MODEL}: where it ends",
    "test_simple.py::test_streaming_output_consistency*": f"{_MODEL}: its answer is cut",
    "test_function_call.py::test_function_tool_use?required*": f"{_NONE}: it reasons",
    "test_function_call.py::test_function_calling_with_streaming_expected_arguments*": f"{_MODEL}: whether it calls",
    "test_function_call.py::test_function_calling_with_streaming_types?True-auto*": f"{_MODEL}: whether it calls",
    "test_function_call.py::test_function_calling_with_streaming_forced_tool_choice?auto*": _MODEL,
    "test_structured_output.py::test_structured_output": _MODEL,
    "test_messages.py::test_anthropic_tool_call": f"{_MODEL}: whether it calls a tool",
    "test_simple.py::test_enable_response_messages*": _OWN,
    "test_simple.py::test_*reasoning*": _NONE,
    "test_simple.py::test_max_tokens*": _NONE,
    "test_simple.py::test_streaming_types*": _NONE,
    "test_basic.py::test_simple_input": f"{_MODEL}; it reasons",
    "test_basic.py::test_instructions": _MODEL,
    "test_basic.py::test_chat": _MODEL,
    "test_basic.py::test_chat_with_input_type": _MODEL,
    "test_basic.py::test_streaming": _NONE,
    "test_basic.py::test_show_version": f"{_OWN}: its version",
    "test_messages.py::test_anthropic_streaming_cache_usage": f"{_OTHERWISE}: cached tokens are counted apart",
    "test_messages.py::test_anthropic_streaming": f"{_OTHERWISE}: cached tokens are counted apart",
    "test_tokenization.py::test_tokenizer_info*": _OWN,
    "test_tokenization.py::test_tokenize_with_return_token_strs*": _OWN,
    "test_tokenization.py::test_tokenize_chat_with_tools*": f"{_MODEL}: its template shows no tools",
    # SGLang
    "test_anthropic_messages_kit.py::test_count_tokens_with_system": f"{_MODEL}: it adds a system prompt",
    "test_anthropic_messages_kit.py::test_tool_result_image_content_conversion": "asks no server",
    "test_basic_api_contract_kit.py::test_get_*_info": _OWN,
    "test_basic_api_contract_kit.py::test_health_generate": _OWN,
    "test_json_constrained_kit.py::test_json_generate": f"{_OWN}: /generate",
    "test_json_constrained_kit.py::test_mix_json_and_other": f"{_OWN}: /generate",
    "test_json_mode_kit.py::*": f"{_MODEL}: its answer is cut",
    "test_matched_stop_kit.py::*": f"{_OWN}: matched_stop",
    # llama.cpp
    "test_chat_completion.py::test_chat_completion?None*": _MODEL,
    "test_chat_completion.py::test_chat_completion?codellama*": _MODEL,
    "test_chat_completion.py::test_chat_completion_cached_tokens": _MODEL,
    "test_chat_completion.py::test_chat_completion_stream*": _MODEL,
    "test_chat_completion.py::test_chat_completion_with_openai_library": _MODEL,
    "test_chat_completion.py::test_chat_template": f"{_OWN}: __verbose",
    "test_chat_completion.py::test_chat_template_assistant_prefill*": f"{_OWN}: __verbose",
    "test_chat_completion.py::test_chat_template_continue_final_message_vllm_compat": f"{_OWN}: __verbose",
    "test_chat_completion.py::test_apply_chat_template": _OWN,
    "test_chat_completion.py::test_completion_with_response_format?response_format[01]*": _OWN,
    "test_chat_completion.py::test_completion_with_json_schema*": _OWN,
    "test_chat_completion.py::test_completion_with_grammar*": f"{_OWN}: grammar",
    "test_chat_completion.py::test_invalid_chat_completion_req?messages7*": f"{_OTHERWISE}: two answers in turn",
    "test_chat_completion.py::test_chat_completion_with_timings_per_token": _OWN,
    "test_chat_completion.py::test_logprobs_stream": f"{_OTHERWISE}: a first delta's content is empty, as OpenAI's",
    "test_chat_completion.py::test_logit_bias": f"{_OWN}: the body of its /tokenize",
    "test_chat_completion.py::test_context_size_exceeded*": f"{_OWN}: the context that its server is started with",
    "test_chat_completion.py::test_return_progress*": _OWN,
    "test_chat_completion.py::test_chat_completions_multiple_choices": f"{_OWN}: id_slot",
    "test_chat_completion.py::test_chat_completions_token_count": _OWN,
    "test_chat_completion.py::test_verbose_debug": _OWN,
    "test_compat_oai_responses.py::test_responses_with_openai_library": _MODEL,
    "test_compat_oai_responses.py::test_responses_stream_with_openai_library": _MODEL,
    "test_compat_oai_responses.py::test_responses_stream_with_llama_telemetry": _OWN,
    "test_compat_anthropic.py::*image*": _NONE,
    "test_compat_anthropic.py::*vision*": _NONE,
    "test_compat_anthropic.py::*thinking*": _NONE,
    "test_compat_anthropic.py::test_anthropic_empty_messages": f"{_OTHERWISE}: no messages are an error",
    "test_embedding.py::test_embedding_mixed_input?-*": f"{_OTHERWISE}: an empty text is an error, as OpenAI's",
    "test_embedding.py::test_embedding_mixed_input?input[3578]-*": f"{_OWN}: texts and tokens in one list, objects",
    "test_embedding.py::test_embedding_mixed_input?input9-*": f"{_OWN}: objects",
    "test_embedding.py::test_embedding_mixed_input?input10-*": f"{_OWN}: objects",
    "test_embedding.py::test_embedding_content_text_same_as_string": f"{_OWN}: objects",
    "test_embedding.py::test_embedding_pooling_none*": _OWN,
    "test_embedding.py::test_embedding_error_prompt_too_long": f"{_OTHERWISE}: the encoder reads a text's beginning",
}
