"""What gateways and dashboards read under vLLM's names: each series' name, type and labels, and the sums."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments import metrics
from deployments.vllm_metrics import Loras, as_vllm

LORAS = Loras(["rte", "sst2"], 16, 1700000000.5)
EVERY = {"model_name", "engine"}
# name in a scrape: type, labels beside `le`; as vLLM's v1/metrics/loggers.py and the model server protocol have them
EXPECTED = {
    "vllm:num_requests_running": ("gauge", EVERY),
    "vllm:num_requests_waiting": ("gauge", EVERY),
    "vllm:kv_cache_usage_perc": ("gauge", EVERY),
    "vllm:gpu_cache_usage_perc": ("gauge", EVERY),
    "vllm:prefix_cache_queries_total": ("counter", EVERY),
    "vllm:prefix_cache_hits_total": ("counter", EVERY),
    "vllm:num_preemptions_total": ("counter", EVERY),
    "vllm:prompt_tokens_total": ("counter", EVERY),
    "vllm:generation_tokens_total": ("counter", EVERY),
    "vllm:request_success_total": ("counter", EVERY | {"finished_reason"}),
    "vllm:time_to_first_token_seconds": ("histogram", EVERY),
    "vllm:time_per_output_token_seconds": ("histogram", EVERY),
    "vllm:request_time_per_output_token_seconds": ("histogram", EVERY),
    "vllm:e2e_request_latency_seconds": ("histogram", EVERY),
    "vllm:lora_requests_info": ("gauge", {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}),
}
TWO_REPLICAS = """\
# HELP ray_lorauter_requests_running x
# TYPE ray_lorauter_requests_running gauge
ray_lorauter_requests_running{deployment="LoraModel",replica="a"} 3.0
ray_lorauter_requests_running{deployment="LoraModel",replica="b"} 4.0
# TYPE ray_lorauter_cache_used gauge
ray_lorauter_cache_used{replica="a"} 0.5
ray_lorauter_cache_used{replica="b"} 0.25
# TYPE ray_lorauter_prompt_tokens_total counter
ray_lorauter_prompt_tokens_total{replica="r"} 70.0
ray_lorauter_prompt_tokens_total{replica="s"} 30.0
# TYPE ray_lorauter_prompt_tokens_reused_total counter
ray_lorauter_prompt_tokens_reused_total{replica="a"} 25.0
# TYPE ray_lorauter_answers_total counter
ray_lorauter_answers_total{reason="stop",replica="r"} 5.0
ray_lorauter_answers_total{reason="stop",replica="s"} 1.0
ray_lorauter_answers_total{reason="abort",replica="s"} 2.0
# TYPE ray_lorauter_time_to_first_token_seconds histogram
ray_lorauter_time_to_first_token_seconds_bucket{le="0.01",replica="r"} 1.0
ray_lorauter_time_to_first_token_seconds_bucket{le="1.0",replica="r"} 3.0
ray_lorauter_time_to_first_token_seconds_bucket{le="+Inf",replica="r"} 4.0
ray_lorauter_time_to_first_token_seconds_bucket{le="+Inf",replica="s"} 2.0
ray_lorauter_time_to_first_token_seconds_sum{replica="r"} 9.5
ray_lorauter_time_to_first_token_seconds_count{replica="r"} 4.0
# TYPE ray_lorauter_request_seconds histogram
ray_lorauter_request_seconds_bucket{le="+Inf",endpoint="/v1/chat/completions"} 4.0
ray_lorauter_request_seconds_bucket{le="+Inf",endpoint="/v1/messages"} 1.0
ray_lorauter_request_seconds_bucket{le="+Inf",endpoint="/v1/models"} 100.0
ray_lorauter_request_seconds_sum{endpoint="/v1/models"} 100.0
ray_lorauter_request_seconds_sum{endpoint="/v1/messages"} 2.5
"""


def read(text: str) -> dict[tuple[str, ...], float]:
    """Each sample's value by its name and its labels' values, but for the model's and the engine's."""
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name not in EVERY)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("text", ["", TWO_REPLICAS], ids=["before any request", "after some"])
def test_each_series_is_there_under_its_name_with_its_type_and_labels(text: str) -> None:
    families = list(text_string_to_metric_families(shown := as_vllm(text, "Tiny-1B", LORAS)))
    found = {
        line.split()[2]: (line.split()[3], labels)
        for family in families
        for line in shown.splitlines()
        if line.startswith("# TYPE ") and line.split()[2].removesuffix("_total") == family.name.removesuffix("_total")
        for labels in [set(family.samples[0].labels) - {"le"}]
    }
    assert found == EXPECTED
    for family in families:
        for sample in family.samples:
            assert sample.labels.get("model_name", "Tiny-1B") == "Tiny-1B"
            assert sample.labels.get("engine", "0") == "0"


def test_replicas_are_summed_and_the_share_of_the_cache_is_their_mean() -> None:
    values = read(as_vllm(TWO_REPLICAS, "m", LORAS))
    assert values["vllm:num_requests_running",] == 7
    assert values["vllm:num_requests_waiting",] == 0
    assert values["vllm:kv_cache_usage_perc",] == values["vllm:gpu_cache_usage_perc",] == 0.375
    assert values["vllm:prompt_tokens_total",] == values["vllm:prefix_cache_queries_total",] == 100
    assert values["vllm:prefix_cache_hits_total",] == 25
    assert [values["vllm:request_success_total", reason] for reason in ("stop", "length", "abort")] == [6, 0, 2]


def test_histograms_keep_their_buckets_and_requests_that_no_model_answers_are_not_counted() -> None:
    values = read(as_vllm(TWO_REPLICAS, "m", LORAS))
    first = "vllm:time_to_first_token_seconds"
    assert [values[f"{first}_bucket", bound] for bound in ("0.01", "1.0", "120.0", "+Inf")] == [1, 3, 0, 6]
    assert (values[f"{first}_sum",], values[f"{first}_count",]) == (9.5, 6)
    assert values["vllm:e2e_request_latency_seconds_count",] == 5
    assert values["vllm:e2e_request_latency_seconds_sum",] == 2.5


def test_the_adapters_on_devices_are_listed_with_the_time_as_the_value() -> None:
    text = as_vllm("", "m", LORAS)
    assert read(text)["vllm:lora_requests_info", "16", "rte,sst2", ""] == 1700000000.5
    assert 'running_lora_adapters=""' in as_vllm("", "m", Loras([], 16, 1.0))


def test_every_source_is_a_metric_of_ours() -> None:
    from deployments.vllm_metrics import SERIES

    assert {series.of for series in SERIES} <= set(metrics.ALL)
