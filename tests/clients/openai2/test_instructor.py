"""instructor."""

from typing import Any

import instructor
import openai
import pytest
from pydantic import BaseModel, ConfigDict


class Anything(BaseModel):
    """Any JSON object: in the mode JSON nothing holds an answer to more, and the small model knows no schema."""

    model_config = ConfigDict(extra="allow")


def ask(openai_url: str, mode: instructor.Mode, text: str, kind: type[BaseModel]) -> BaseModel:
    client = instructor.from_openai(openai.OpenAI(base_url=openai_url, api_key="none"), mode=mode)
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="lorauter", messages=messages, response_model=kind, max_retries=0)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_structured_answers(openai_url: str, review: str, schema: Any, mode: instructor.Mode) -> None:
    assert isinstance(ask(openai_url, mode, review, schema), schema)


def test_any_json(openai_url: str, review: str) -> None:
    assert isinstance(ask(openai_url, instructor.Mode.JSON, review, Anything), Anything)
