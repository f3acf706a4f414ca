"""Plots, as files whose format the path's suffix says, drawn by matplotlib without a screen.

Knows numbers, names and results; knows nothing of how they came to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorauter.errors import ConfigError
from lorauter.evaluation.metrics import missing_package

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorauter.evaluation.report import Result

_MAX_LABELS = 100  # more would cover each other


def mean_scores(
    scores: Mapping[str, Mapping[str, Mapping[int, float]]],
) -> tuple[NDArray[np.floating[Any]], list[str]]:
    """The means of `{task: {adapter: {example: score}}}`: (adapters, tasks), NaN for none; and the adapters' names."""
    import numpy as np

    adapters = sorted({name for task in scores.values() for name in task})
    matrix = np.full((len(adapters), len(scores)), np.nan)
    for column, task in enumerate(scores.values()):
        for row, name in enumerate(adapters):
            if task.get(name):
                matrix[row, column] = np.mean(list(task[name].values()))
    return matrix, adapters


def heat_map(matrix: NDArray[np.floating[Any]], adapters: Sequence[str], tasks: Sequence[str], path: Path) -> None:
    """Draw the score of every adapter on every task.

    Args:
        matrix: (adapters, tasks); NaN, where nothing was measured, stays blank.
    """
    if matrix.shape != (len(adapters), len(tasks)):
        raise ConfigError(
            f"a matrix of shape {matrix.shape} does not fit {len(adapters)} adapters and {len(tasks)} tasks"
        )
    figure = _figure(*(3 + 0.2 * min(max(len(names), 10), _MAX_LABELS) for names in (tasks, adapters)))
    axes = figure.subplots()
    image = axes.imshow(matrix, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="score")
    axes.set(xlabel="task", ylabel="adapter")
    for axis, names, angle in ((axes.xaxis, tasks, 90), (axes.yaxis, adapters, 0)):
        if len(names) <= _MAX_LABELS:
            axis.set_ticks(range(len(names)), _literal(names), rotation=angle, fontsize=7)
    figure.savefig(path)


def task_map(embeddings: NDArray[np.floating[Any]], names: Sequence[str], domains: Sequence[str], path: Path) -> None:
    """Draw tasks in the plane of their embeddings' two first principal components, coloured by domain.

    Args:
        embeddings: (tasks, d).
        domains: each task's.
    """
    places = principal_plane(embeddings)
    figure = _figure(10, 8)
    from matplotlib.colors import hsv_to_rgb

    axes = figure.subplots()
    kinds = sorted(set(domains))
    for kind, domain in enumerate(kinds):
        chosen = [i for i, other in enumerate(domains) if other == domain]
        colour = hsv_to_rgb((kind / len(kinds), 0.8, 0.8))  # one each, however many there are
        axes.scatter(*places[chosen].T, color=colour, label=_literal([domain])[0])
    for name, place in zip(_literal(names), places, strict=True):
        axes.annotate(name, place, xytext=(4, 2), textcoords="offset points", fontsize=7)
    axes.set(xlabel="first principal component", ylabel="second principal component")
    figure.legend(loc="outside right upper")
    figure.savefig(path)


def principal_plane(embeddings: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """The (n, 2) coordinates of (n, d) rows along their first two principal components, n and d at least 2."""
    import numpy as np

    centred = embeddings - embeddings.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    plane: NDArray[np.floating[Any]] = centred @ directions[:2].T
    return plane


def score_by_share(results: Sequence[Result], path: Path) -> None:
    """Draw each method's score against the share of queries that are in-domain, the others being OOD.

    Methods without results in both regimes are left out.

    Raises:
        ConfigError: that leaves none.
    """
    lines = share_lines(results)
    if not lines:
        raise ConfigError("no method has results in-domain and OOD; evaluate both regimes")
    figure = _figure(7, 5)
    axes = figure.subplots()
    for method, (unseen, seen) in lines.items():
        axes.plot([0, 1], [unseen, seen], marker="o", label=_literal([method])[0])
    axes.set(xlabel="share of in-domain queries", ylabel="score", xlim=(0, 1))
    figure.legend(loc="outside right upper")
    figure.savefig(path)


def share_lines(results: Sequence[Result]) -> dict[str, tuple[float, float]]:
    """For each method with both, its scores OOD and in-domain: a score is linear in the share between them."""
    of = {(result.method, result.regime): result.score for result in results}
    methods = dict.fromkeys(result.method for result in results)
    return {
        method: (of[method, "OOD"], of[method, "in-domain"])
        for method in methods
        if (method, "OOD") in of and (method, "in-domain") in of
    }


def _literal(names: Sequence[str]) -> list[str]:
    """Names as matplotlib takes them: between two dollars it would set formulae."""
    return [name.replace("$", r"\$") for name in names]


def _figure(width: float, height: float) -> Any:
    """A figure of inches, free of pyplot's global state and of any screen: it is drawn by Agg, or as vectors."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package(error) from error
    return Figure(figsize=(width, height), layout="constrained", dpi=120)
