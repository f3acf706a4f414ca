"""What a batch job shows: a bar while it runs, tables in the end. Knows no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from deployments.batch.tally import BINS, Tally

_LINE_S = 10.0  # between two lines where there is no terminal
_SHOWN = 30  # tasks, and adapters, in the summary
_WIDTH = 40  # of the longest bar of the histogram


def described(rows: int, total: int, errors: int, tokens: int, seconds: float, *, begun: int = 0) -> str:
    """How far a job is, in words. `begun` rows were done before this run, of which `seconds` have passed."""
    speed = (rows - begun) / seconds if seconds > 0 and rows > begun else 0.0
    left = _duration((total - rows) / speed) if speed else "-"
    made = f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else "- tokens/s"
    return f"{rows:,} of {total:,} rows, {made}, {errors:,} errors, {left} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def bar(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, else a line now and then. Yields what is to be called with (rows, total, words)."""
    if not console.is_terminal:
        shown = time.monotonic()

        def line(rows: int, total: int, words: str) -> None:
            nonlocal shown
            if time.monotonic() - shown >= _LINE_S:
                shown = time.monotonic()
                console.print(words, markup=False, soft_wrap=True)

        yield line
        return
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, redirect_stderr=False) as progress:
        task = progress.add_task("starting the workers", total=None)
        yield lambda rows, total, words: progress.update(task, completed=rows, total=total, description=words)


def summary(tally: Tally) -> list[Table]:
    """Rows per task, rows per adapter, the histogram of their confidence, and errors by kind."""
    adapters = {**tally.adapters, **({"(base model alone)": tally.base} if tally.base else {})}
    tables = [_counts("rows by first task", tally.tasks), _counts("rows by adapter", adapters)]
    if any(tally.confidence):
        histogram = Table("confidence", "rows", "", title="confidence")
        most = max(tally.confidence)
        for i, count in enumerate(tally.confidence):
            histogram.add_row(
                f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}", f"{count:,}", "█" * round(_WIDTH * count / most)
            )
        tables.append(histogram)
    if tally.kinds:
        tables.append(_counts("errors by kind", tally.kinds))
    return [table for table in tables if table.row_count]


def _counts(title: str, counts: Mapping[str, int]) -> Table:
    table = Table(title.split(" by ")[1], "rows", title=title)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    for name, count in ordered[:_SHOWN]:
        table.add_row(name, f"{count:,}")
    if rest := ordered[_SHOWN:]:
        table.add_row(f"({len(rest)} more)", f"{sum(count for _, count in rest):,}")
    return table
