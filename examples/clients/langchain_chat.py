"""LangChain with lorauter: an answer, a stream, and an answer of a schema.

pip install langchain-openai; python examples/clients/langchain_chat.py
"""

import os

from langchain_openai import ChatOpenAI
from pydantic import BaseModel

URL = os.environ.get("LORAUTER_URL", "http://127.0.0.1:8000") + "/v1"
KEY = os.environ.get("LORAUTER_KEY", "none")


class Review(BaseModel):
    """What a critic thinks."""

    positive: bool


chat = ChatOpenAI(model="lorauter", base_url=URL, api_key=KEY)
QUESTION = "Short movie review: a joy to watch.\nDid the critic think positively or negatively of the movie?"

print(chat.invoke(QUESTION).content)
print("".join(piece.content for piece in chat.stream(QUESTION)))
print(chat.with_structured_output(Review).invoke(QUESTION))

# What a request wants of its routing goes along as `lorauter` in the body (docs/api.md).
told = chat.bind(extra_body={"lorauter": {"top_k": 1}}).invoke(QUESTION)
print(told.content)
