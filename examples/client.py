"""The official OpenAI client against a running server: `make serve`, then `.venv/bin/python examples/client.py`."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
question = {"role": "user", "content": "Translate to English: Zwei Hunde spielen im Schnee."}

answer = client.chat.completions.create(model="lorauter", messages=[question])
print(answer.choices[0].message.content)
print([adapter["name"] for adapter in answer.lorauter["adapters"]])

# Adapters by hand, and streamed.
stream = client.chat.completions.create(
    model="lorauter",
    messages=[question],
    stream=True,
    extra_body={"lorauter": {"adapters": {"multi30k_deen": 1.0}}},
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
