"""What the commands show while they work: on stderr, live on a terminal, else in plain lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False)


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Show a step while it runs: a spinner with the time on a terminal, else one line."""
    if not console.is_terminal:
        console.print(f"{what} ...", markup=False)
        yield
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def counting(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far a step is: a bar on a terminal, else one line. Yields what is to be called with (done, left)."""
    if not console.is_terminal:
        console.print(f"{what} ...", markup=False)
        yield lambda done, left: None
        return
    counts = TextColumn(f"{{task.completed:,.0f}} {unit} done, {{task.fields[left]:,}} left in this round")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), counts, TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(what, total=None, left=0)
        yield lambda done, left: progress.update(bar, completed=done, total=done + left, left=left)


def notify(what: str) -> None:
    """Print a line as it is."""
    console.print(what, markup=False, soft_wrap=True)


def warn(what: str) -> None:
    """Print a line in red."""
    console.print(what, style="red", markup=False, soft_wrap=True)
