import io

from rich.console import Console

from deployments.batch.progress import bar, described, summary
from deployments.batch.tally import Tally


def shown(*items, terminal=False):
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    for item in items:
        console.print(item)
    return console.file.getvalue()


def test_how_far_a_job_is_in_words() -> None:
    assert described(500, 2000, 3, 12_000, 60.0) == "500 of 2,000 rows, 200 tokens/s, 3 errors, 3:00 left"
    assert described(1500, 2000, 0, 600, 60.0, begun=1000) == "1,500 of 2,000 rows, 10 tokens/s, 0 errors, 1:00 left"
    assert described(0, 10, 0, 0, 0.0) == "0 of 10 rows, - tokens/s, 0 errors, - left"
    assert described(1, 36_001, 0, 0, 1.0).endswith("10:00:00 left")


def test_the_summary_has_tasks_adapters_confidence_and_errors() -> None:
    tally = Tally(
        rows=50,
        errors=1,
        tasks={f"task{i:02}": i for i in range(1, 41)},
        adapters={"a": 3},
        base=2,
        confidence=[0] * 9 + [4],
        kinds={"InvalidRequest": 1},
    )
    text = shown(*summary(tally))
    for words in ("task40", "(10 more)", "base model alone", "0.9 to 1.0", "InvalidRequest", "█" * 40):
        assert words in text
    assert "task01 " not in text
    assert summary(Tally()) == []


def test_the_bar_is_drawn_on_a_terminal_and_spares_a_log() -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
        with bar(console) as show:
            show(5, 10, "5 of 10 rows")
        assert ("5 of 10 rows" in console.file.getvalue()) == terminal
