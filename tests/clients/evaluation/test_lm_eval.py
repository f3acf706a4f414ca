"""lm-eval: a multiple-choice task by /v1/completions, with `echo` and logprobs."""

import datasets
import lm_eval

DOCS = [
    ("The capital of France is", [" Paris", " banana"], 0),
    ("Monday, Tuesday,", [" purple", " Wednesday"], 1),
    ("One, two, three,", [" four", " table"], 0),
    ("The opposite of hot is", [" paper", " cold"], 1),
]


def test_a_multiple_choice_task(url: str, tokenizer: str) -> None:
    rows = [{"text": text, "choices": choices, "right": right} for text, choices, right in DOCS]
    task = {
        "task": "tiny",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    model = {
        "model": "base",
        "base_url": f"{url}/v1/completions",
        "tokenizer": tokenizer,
        "num_concurrent": 2,
        "max_retries": 1,
        "max_length": 512,
    }
    found = lm_eval.simple_evaluate("local-completions", model_args=model, tasks=[task], bootstrap_iters=0)
    assert found["results"]["tiny"]["acc,none"] == 1.0
