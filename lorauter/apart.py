"""Functions that may take for ever with what anybody has written, called in a process of their own, whose CPU seconds
and memory the kernel limits.

That process runs this file as a script, and the function's own by its path: there lorauter may be imported only within
functions that are not called so. Knows nothing of what is computed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from typing import Any

_WALL_S = 60.0  # where the machine is busy


class Unaffordable(Exception):
    """It takes more CPU seconds, or memory, than it may."""


def call_apart(file: str, name: str, *args: Any, cpu_s: int, memory_bytes: int, undone: str) -> Any:
    """Call a function of a file with what JSON can say; what it returns, as JSON says it.

    Args:
        undone: what to say where this machine cannot call it now.

    Raises:
        Unaffordable: it takes too much.
        ValueError: it raised one, of whichever kind, with the same words.
        OSError: this machine cannot call it now, which is no fault of the arguments.
    """
    asked = [sys.path, file, name, args, cpu_s, memory_bytes]
    try:
        done = subprocess.run(  # noqa: S603 (this interpreter and this file)
            [sys.executable, "-I", "-S", __file__],
            input=json.dumps(asked).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:  # the machine is busy: the CPU's seconds are bounded apart from these
        raise TimeoutError(f"{undone} within {_WALL_S:g} s") from error
    if done.returncode not in (0, -signal.SIGXCPU):
        raise OSError(f"{undone}: the process for it has ended with {done.returncode}")
    answer = json.loads(done.stdout) if done.returncode == 0 else {}
    if "wrong" in answer:
        raise ValueError(answer["wrong"])
    if "found" not in answer:
        raise Unaffordable
    return answer["found"]


def _main() -> None:
    import resource
    from runpy import run_path

    path, file, name, args, cpu_s, memory_bytes = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))  # SIGXCPU at the first, which nobody else sends
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    warnings.simplefilter("ignore")  # on what a later version of Python may read otherwise
    sys.path[:] = path
    answer: dict[str, Any] = {}
    try:
        answer["found"] = run_path(file)[name](*args)
    except MemoryError:
        pass
    except ValueError as error:
        answer["wrong"] = str(error)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
