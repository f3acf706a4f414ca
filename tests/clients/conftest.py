"""What the clients' tests ask: a service at LORAUTER_URL, which `run.py` starts, answers on the example pool."""

import os
from typing import Any, Literal

import pytest
from pydantic import BaseModel

REVIEW = "Short movie review: a joy to watch.\nDid the critic think positively or negatively of the movie?"
ANSWER = "positive"


class Review(BaseModel):
    """What a critic thinks."""

    sentiment: Literal["negative", "positive"]
    stars: Literal[1, 2, 3, 4, 5]


@pytest.fixture(scope="session")
def url() -> str:
    return os.environ["LORAUTER_URL"].rstrip("/")


@pytest.fixture(scope="session")
def openai_url(url: str) -> str:
    return f"{url}/v1"


@pytest.fixture(scope="session")
def tokenizer() -> str:
    """The folder of the base model's tokenizer."""
    return os.environ["LORAUTER_TOKENIZER"]


@pytest.fixture(scope="session")
def review() -> str:
    """A question that the pool's adapter of the task sst2 answers by ANSWER."""
    return REVIEW


@pytest.fixture(scope="session")
def answer() -> str:
    return ANSWER


@pytest.fixture(scope="session")
def schema() -> type[BaseModel]:
    """What a structured answer is to be."""
    return Review


@pytest.fixture(scope="session")
def tool() -> dict[str, Any]:
    """A function, as OpenAI's chats have it."""
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    function = {"name": "forecast", "description": "The weather of a city for some days.", "parameters": parameters}
    return {"type": "function", "function": function}
