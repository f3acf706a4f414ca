"""Metrics: how good an answer is, and how sure a mean of such scores is.

Knows texts and numbers; knows nothing of tasks, methods or files. Its packages are loaded on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from lorauter.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 100  # resamples held at once: thousands of queries a task must not take gigabytes


def score(metric: str, answer: str, target: str) -> float:
    """How well an answer matches the target, in [0, 1].

    Args:
        metric: "em" (equal but for space around, case and one final full stop), "rouge" (ROUGE-L's F-measure, no
            stemming) or "bleu" (sentence BLEU, of effective order, so that short targets can reach 1).

    Raises:
        ConfigError: another metric, or its package is not installed.
    """
    if metric == "em":
        return float(_normalised(answer) == _normalised(target))
    if metric == "rouge":
        return float(_rouge_scorer().score(target, answer)["rougeL"].fmeasure)
    if metric == "bleu":
        bleu = _sentence_bleu()(answer, [target], use_effective_order=True).score / 100
        return min(float(bleu), 1.0)  # a perfect match comes out a rounding error above
    raise ConfigError(f"metric {metric!r} is not one of em, rouge, bleu", setting="metric")


def metric_of(task_metric: str, *, rouge_for_bleu: bool) -> str:
    """The metric to score a task by: its own, or ROUGE-L in place of BLEU, which says little of single sentences."""
    return "rouge" if rouge_for_bleu and task_metric == "bleu" else task_metric


def bootstrap_interval(scores: Sequence[Sequence[float]], *, repeats: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of per-task means, queries resampled within each task (percentile bootstrap).

    Args:
        scores: for each task, its queries' scores; no task may be empty.
        repeats: resamples to draw.
        seed: makes the interval repeatable.

    Returns:
        Its ends, the lower first.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    total = np.zeros(repeats)
    for task in scores:
        total += _resampled_means(np.asarray(task, dtype=np.float64), repeats, random)
    low, high = np.quantile(total / len(scores), [0.025, 0.975])
    return float(low), float(high)


def _resampled_means(values: np.ndarray[Any, Any], repeats: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    import numpy as np

    sizes = [min(_CHUNK, repeats - done) for done in range(0, repeats, _CHUNK)]
    return np.concatenate([values[random.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in sizes])


def _normalised(text: str) -> str:
    return text.strip().lower().removesuffix(".")


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_package(error) from error
    return RougeScorer(["rougeL"], use_stemmer=False)


@cache
def _sentence_bleu() -> Any:
    try:
        from sacrebleu import sentence_bleu
    except ImportError as error:
        raise missing_package(error) from error
    return sentence_bleu


def missing_package(error: ImportError) -> ConfigError:
    """What to say when a package that only the evaluation uses is not installed."""
    return ConfigError(f"{error.name} is not installed; run: pip install 'lorauter[evaluation]'")
