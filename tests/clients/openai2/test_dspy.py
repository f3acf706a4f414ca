"""dspy's Predict. It knows of no model but the famous ones that they can be held to a schema, and is told so."""

import os
from typing import Any, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import dspy

OUTPUT = {
    "type": "object",
    "properties": {"sentiment": {"enum": ["negative", "positive"]}},
    "required": ["sentiment"],
    "additionalProperties": False,
}


def test_predict(openai_url: str, review: str) -> None:
    class Judge(dspy.Signature):
        """Judge a review."""

        review: str = dspy.InputField()
        sentiment: Literal["negative", "positive"] = dspy.OutputField()

    form: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "output", "schema": OUTPUT}}
    lm = dspy.LM("openai/lorauter", api_base=openai_url, api_key="none", cache=False, response_format=form)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        assert dspy.Predict(Judge)(review=review).sentiment in ("negative", "positive")
