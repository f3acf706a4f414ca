"""llama-index."""

from typing import Any

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike


@pytest.fixture(scope="module")
def options(openai_url: str) -> dict[str, Any]:
    return {"model": "lorauter", "api_base": openai_url, "api_key": "none", "context_window": 2048}


def test_a_chat(options: dict[str, Any], review: str, answer: str) -> None:
    llm = OpenAILike(**options, is_chat_model=True)
    assert llm.chat([ChatMessage(role="user", content=review)]).message.content == answer
    assert "".join(piece.delta for piece in llm.stream_chat([ChatMessage(role="user", content=review)])) == answer


def test_completions(options: dict[str, Any]) -> None:
    llm = OpenAILike(**{**options, "model": "base"}, max_tokens=4)
    assert llm.complete("One, two,").text
    assert "".join(piece.delta for piece in llm.stream_complete("One, two,"))


@pytest.mark.parametrize("calls_functions", [True, False])
def test_structured_answers(options: dict[str, Any], review: str, schema: Any, calls_functions: bool) -> None:
    llm = OpenAILike(
        **options,
        is_chat_model=True,
        is_function_calling_model=calls_functions,
        should_use_structured_outputs=not calls_functions,
    )
    assert isinstance(llm.structured_predict(schema, PromptTemplate("{text}"), text=review), schema)


def test_embeddings(openai_url: str, review: str) -> None:
    embeddings = OpenAILikeEmbedding(model_name="lorauter", api_base=openai_url, api_key="none")
    assert len(embeddings.get_text_embedding(review)) == 384
    assert [len(row) for row in embeddings.get_text_embedding_batch([review, "Rain."])] == [384, 384]
