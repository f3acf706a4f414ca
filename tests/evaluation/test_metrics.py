import builtins

import numpy as np
import pytest

from lorauter.errors import ConfigError
from lorauter.evaluation import metrics
from lorauter.evaluation.metrics import bootstrap_interval, metric_of, score


@pytest.mark.parametrize(
    ("answer", "target", "equal"),
    [
        ("Yes", "yes", 1),
        (" yes.\n", "Yes", 1),
        ("yes", "yes.", 1),
        ("yes..", "yes", 0),
        ("3.5", "35", 0),
        ("yes it is", "yes", 0),
        ("", "", 1),
        ("", "yes", 0),
    ],
)
def test_exact_match_looks_past_space_case_and_one_full_stop(answer, target, equal) -> None:
    assert score("em", answer, target) == equal


def test_rouge_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # In common "the cat mat", 3 words: precision 3/4, recall 3/6.
    assert score("rouge", "the cat mat running", "the black cat on the mat") == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert score("rouge", "running", "run") == 0, "no stemming"
    assert score("rouge", "", "run") == 0


def test_bleu_is_of_effective_order() -> None:
    assert score("bleu", "Two dogs", "Two dogs") == 1, "there are no three words to match"
    # Precisions 3/4, 2/3, 1/2 and, smoothed, 1/2 of 1/1; no brevity penalty.
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert score("bleu", "two dogs play snow", "two dogs play together") == pytest.approx(expected)
    assert score("bleu", "", "two dogs") == 0


def test_a_metric_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="'f1' is not one of em, rouge, bleu"):
        score("f1", "a", "a")


@pytest.mark.parametrize(("metric", "package"), [("rouge", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, metric, package) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith(package):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    metrics._rouge_scorer.cache_clear()
    metrics._sentence_bleu.cache_clear()
    with pytest.raises(ConfigError, match=rf"{package}.* is not installed; run: pip install 'lorauter\[evaluation\]'"):
        score(metric, "a", "a")


def test_rouge_stands_in_for_bleu_alone() -> None:
    assert [metric_of(m, rouge_for_bleu=True) for m in ("em", "rouge", "bleu")] == ["em", "rouge", "rouge"]
    assert [metric_of(m, rouge_for_bleu=False) for m in ("em", "rouge", "bleu")] == ["em", "rouge", "bleu"]


def test_the_interval_is_that_of_the_mean_of_task_means() -> None:
    draw = np.random.default_rng(1)
    tasks = [draw.normal(0.2, 0.1, 400).tolist(), draw.normal(0.8, 0.3, 100).tolist()]
    mean = np.mean([np.mean(task) for task in tasks])
    error = np.sqrt(sum(np.var(task) / len(task) for task in tasks)) / 2  # of a mean of two independent means
    low, high = bootstrap_interval(tasks, repeats=4000)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.003)


def test_the_interval_is_repeatable_and_its_seed_counts() -> None:
    tasks = [[0.0, 1.0, 0.25, 0.5, 0.7], [0.3, 0.9, 0.1]]
    assert bootstrap_interval(tasks) == bootstrap_interval(tasks, seed=0)
    assert bootstrap_interval(tasks, repeats=99) != bootstrap_interval(tasks, repeats=99, seed=1)


def test_tasks_are_not_resampled() -> None:
    assert bootstrap_interval([[0.0] * 5, [1.0] * 3]) == (0.5, 0.5)
