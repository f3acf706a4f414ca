"""What the commands show while they work: on stderr, live on a terminal, else in plain lines.

What libraries and Ray print meanwhile, which nobody can act on, goes to a file instead; warnings of lorauter's own
loggers are shown.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand

from lorauter.defaults import home
from lorauter.errors import LorauterError

_LINE_S = 10.0  # between two lines where there is no terminal
_LOG_BYTES = 4 << 20  # of the log file, beyond which a new one is begun

console = Console(stderr=True, highlight=False)


class App(typer.Typer):
    """A group of commands, during which only what is lorauter's own goes to the console."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=_Command, **options)


class _Command(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        with _others_in_log():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                warn("stopped by Ctrl-C")
                raise typer.Exit(128 + signal.SIGINT) from None


class _ToConsole(logging.Handler):
    """Shows the warnings of lorauter's own loggers, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}", style="yellow")


_handler = _ToConsole(logging.WARNING)
_log: TextIO | None = None


def log_path() -> Path:
    """The file that what libraries print goes to."""
    return home() / "logs" / "commands.log"


def _open_log() -> TextIO | None:
    """The log of this process, which stays open: libraries keep it as their stderr. None where it cannot be written."""
    global _log
    if _log is None or _log.closed:
        path = log_path()
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > _LOG_BYTES:
                path.replace(path.with_suffix(".old.log"))
            _log = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            atexit.register(_log.close)
    return _log


@contextmanager
def _others_in_log() -> Iterator[None]:
    """Have all that is written to stderr, by whatever means, go to the log file; but not what this module shows."""
    ours = logging.getLogger("lorauter")
    ours.addHandler(_handler)
    log, stderr = _open_log(), sys.stderr
    kept = os.dup(2) if log is not None else None
    try:
        if log is not None and kept is not None:
            print(f"--- {time.strftime('%F %T')}, process {os.getpid()}", file=log)
            console.file = os.fdopen(os.dup(2), "w", errors=stderr.errors) if _descriptor(stderr) == 2 else stderr
            sys.stderr = log
            os.dup2(log.fileno(), 2)
        yield
    finally:
        ours.removeHandler(_handler)
        if kept is not None:
            sys.stderr = stderr
            os.dup2(kept, 2)
            os.close(kept)
            if console.file is not stderr:
                console.file.close()
            console.file = None  # type: ignore[assignment]  # whatever sys.stderr is


def _descriptor(file: TextIO) -> int | None:
    try:
        return file.fileno()
    except (OSError, ValueError):  # a test's
        return None


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Show a step while it runs: a spinner with the time on a terminal, else one line."""
    if not console.is_terminal:
        console.print(f"{what} ...", markup=False)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, redirect_stderr=False) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def counting(what: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show how far a step is: a bar on a terminal, else a line at the start, one now and then, and one at the end.

    Args:
        unit: what is counted, and has happened to it: "rows are answered".

    Yields:
        What is to be called with (done, total); a total of None is not known.
    """
    words = ""

    def count(done: int, total: int | None) -> None:
        nonlocal words
        words = f"{done:,} {unit}" if total is None else f"{done:,} of {total:,} {unit}"

    if not console.is_terminal:
        console.print(f"{what} ...", markup=False)
        shown = time.monotonic()

        def line(done: int, total: int | None) -> None:
            nonlocal shown
            count(done, total)
            if time.monotonic() - shown >= _LINE_S:
                shown = time.monotonic()
                console.print(f"{words} ...", markup=False)

        yield line
        if words:
            console.print(words, markup=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, redirect_stderr=False) as progress:
        bar = progress.add_task(what, total=None, words="")

        def move(done: int, total: int | None) -> None:
            count(done, total)
            progress.update(bar, completed=done, total=total, words=words)

        yield move


def notify(what: str) -> None:
    """Print a line as it is."""
    console.print(what, markup=False, soft_wrap=True)


def warn(what: str, style: str = "red") -> None:
    """Print a line in a colour."""
    console.print(what, style=style, markup=False, soft_wrap=True)


def show_error(error: Exception) -> None:
    """Print an error as one line; one that nobody foresaw goes to the log in full."""
    text = " ".join(str(error).split())
    if not isinstance(error, LorauterError | OSError):
        text = f"unforeseen {type(error).__name__}: {text}"
        if log := _open_log():
            traceback.print_exception(error, file=log)
            text += f"; the log has its traceback: {log_path()}"
    warn(f"error: {text}")
