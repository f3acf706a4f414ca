"""Plots as SVG, which holds every text in a comment, and as PNG, whose pixels can be read."""

import numpy as np
import pytest
from matplotlib.image import imread

from lorauter.errors import ConfigError
from lorauter.evaluation.plots import heat_map, mean_scores, principal_plane, score_by_share, share_lines, task_map
from lorauter.evaluation.report import Result


def result(method, regime, score) -> Result:
    return Result(method, regime, score, (0, 1), None, 1, 0, {}, {})


RESULTS = [
    result("base", "in-domain", 0.1),
    result("base", "OOD", 0.1),
    result("oracle", "in-domain", 0.6),
    result("$ours$", "OOD", 0.3),
    result("$ours$", "semi-OOD", 0.4),
    result("$ours$", "in-domain", 0.5),
]


def texts(path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_heat_map_names_its_rows_and_columns(tmp_path) -> None:
    heat_map(np.array([[0.1, 0.9, np.nan]]), ["an_adapter"], ["t_one", "t_two", "t$3$"], tmp_path / "map.svg")
    drawn = texts(tmp_path / "map.svg")
    assert all(f"<!-- {text} -->" in drawn for text in ("an_adapter", "t_one", "t_two", "score"))


def test_mean_scores_are_blank_where_nothing_was_tried() -> None:
    scores = {"t": {"b": {0: 0.5, 3: 1.0}, "a": {0: 0.0}}, "u": {}, "v": {"b": {1: 0.25}, "a": {}}}
    matrix, adapters = mean_scores(scores)
    assert adapters == ["a", "b"]
    np.testing.assert_array_equal(matrix, [[0, np.nan, np.nan], [0.75, np.nan, 0.25]])
    assert mean_scores({"t": {}})[1] == []


def test_a_heat_map_shows_its_numbers(tmp_path) -> None:
    names = ["a", "b"]
    for name, matrix in {"x": [[1, 0], [0, 0]], "same": [[1, 0], [0, 0]], "other": [[0, 0], [0, 1]]}.items():
        heat_map(np.array(matrix, dtype=float), names, names, tmp_path / f"{name}.png")
    x, same, other = (imread(tmp_path / f"{name}.png") for name in ("x", "same", "other"))
    assert (x == same).all() and (x != other).any()


def test_a_large_heat_map_has_no_labels_and_no_giant_figure(tmp_path) -> None:
    names = [f"adapter{i}" for i in range(300)]
    heat_map(np.zeros((300, 2)), names, ["t", "u"], tmp_path / "map.png")
    assert max(imread(tmp_path / "map.png").shape) < 4000
    heat_map(np.zeros((300, 2)), names, ["t", "u"], tmp_path / "map.svg")
    assert "adapter7" not in texts(tmp_path / "map.svg")


def test_a_matrix_that_does_not_fit_its_names_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"shape \(2, 1\) does not fit 1 adapters and 2 tasks"):
        heat_map(np.zeros((2, 1)), ["a"], ["t", "u"], tmp_path / "map.svg")


def test_the_plane_keeps_what_varies_most() -> None:
    draw = np.random.default_rng(0)
    flat = draw.normal(size=(30, 2)) * [5, 2]
    turn, _ = np.linalg.qr(draw.normal(size=(6, 6)))
    plane = principal_plane(flat @ turn[:2] + 7 + 1e-9 * draw.normal(size=(30, 6)))
    assert plane.shape == (30, 2)
    assert np.abs(plane.mean(axis=0)).max() < 1e-6
    assert plane[:, 0].std() > plane[:, 1].std() and abs(plane[:, 0] @ plane[:, 1]) < 1e-6

    def distances(points):
        return np.linalg.norm(points[:, None] - points, axis=-1)

    assert distances(plane) == pytest.approx(distances(flat), abs=1e-6)


def test_a_task_map_names_tasks_and_domains(tmp_path) -> None:
    embeddings = np.random.default_rng(0).normal(size=(3, 4))
    task_map(embeddings, ["mnli", "qqp", "s$s$t"], ["pairs", "pairs", "mood"], tmp_path / "map.svg")
    drawn = texts(tmp_path / "map.svg")
    assert all(f"<!-- {text} -->" in drawn for text in ("mnli", "qqp", "pairs", "mood"))


def test_a_share_line_goes_from_ood_to_in_domain() -> None:
    assert share_lines(RESULTS) == {"base": (0.1, 0.1), "$ours$": (0.3, 0.5)}


def test_the_share_plot_has_a_line_for_each_method_of_both_regimes(tmp_path) -> None:
    score_by_share(RESULTS, tmp_path / "share.svg")
    drawn = texts(tmp_path / "share.svg")
    assert "<!-- base -->" in drawn and "ours" in drawn and "oracle" not in drawn
    with pytest.raises(ConfigError, match="evaluate both regimes"):
        score_by_share(RESULTS[2:3], tmp_path / "none.svg")
