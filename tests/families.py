"""Processes that tests start, with all that those start: any of them may end by itself at any moment."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from contextlib import suppress

import psutil


def family(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> list[psutil.Process]:
    """The descendants of a process; none of one that has ended."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command(process: psutil.Process) -> str:
    """Its title or command; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(processes: Iterable[psutil.Process]) -> None:
    """Those that are left of them."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Kill a process with its family, and wait until it is gone."""
    if process.poll() is None:
        kill(family(process))
        process.kill()
        process.wait()
