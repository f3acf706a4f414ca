"""Lets this machine's processes compute on a GPU at the same time, by NVIDIA's MPS.

Otherwise a GPU is one process's after the other's, for slices of a millisecond or two: an encoder beside an engine that
is never idle waits for its turn, and then takes the engine's. Knows nothing of what computes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from deployments.devices import gpu_bytes
from lorauter.parent import end_with_parent

_CONTROL = "nvidia-cuda-mps-control"
_PIPES, _LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_SOCKET = "control"  # in the folder of pipes, once the daemon listens
_START_S, _END_S, _PROBE_S = 10.0, 10.0, 60.0
_PROBE = """
import ctypes, sys
cuda, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
for call, *given in (
    (cuda.cuInit, 0),
    (cuda.cuDeviceGet, ctypes.byref(device), 0),
    (lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),),
):
    if problem := call(*given):
        sys.exit(f"CUDA's error {problem}")
"""


@contextmanager
def gpus_are_shared(notify: Callable[[str], None]) -> Iterator[None]:
    """Until the end of the block whoever is started computes beside the others on its GPU, where that is possible.

    Where `CUDA_MPS_PIPE_DIRECTORY` is set already, the daemon is somebody else's, and is left alone.

    Args:
        notify: is told if a GPU and MPS are there, and it does not work.
    """
    control = shutil.which(_CONTROL)
    if control is None or _PIPES in os.environ or not gpu_bytes():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        own = {_PIPES: folder, _LOGS: folder}
        environment = {**os.environ, **own}
        daemon = subprocess.Popen(  # noqa: S603 (found on the path)
            [control, "-f"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        )  # fmt: skip
        try:
            if problem := _problem(daemon, environment):
                notify(f"the processes on a GPU take turns on it, since MPS does not work here: {problem}")
                _end(control, daemon, environment)
            else:
                os.environ.update(own)
            yield
        finally:
            for name in own:
                os.environ.pop(name, None)
            _end(control, daemon, environment)


def _problem(daemon: subprocess.Popen[bytes], environment: dict[str, str]) -> str | None:
    """Why who asks the daemon gets no GPU; None if it does."""
    ends = time.monotonic() + _START_S
    while not (Path(environment[_PIPES]) / _SOCKET).exists():
        if daemon.poll() is not None or time.monotonic() > ends:
            return f"{_CONTROL} does not start"
        time.sleep(0.02)
    try:
        probe = subprocess.run(  # noqa: S603 (our own)
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=_PROBE_S
        )
    except subprocess.TimeoutExpired:
        return "a process that asks for a GPU waits for it in vain"
    return None if probe.returncode == 0 else (probe.stderr.strip().splitlines() or ["no GPU"])[-1]


def _end(control: str, daemon: subprocess.Popen[bytes], environment: dict[str, str]) -> None:
    """End the daemon, and the servers that it has started."""
    if daemon.poll() is not None:
        return
    with suppress(subprocess.TimeoutExpired):
        order = b"quit -t 5\n"
        subprocess.run([control], env=environment, input=order, capture_output=True, timeout=_END_S)  # noqa: S603
    with suppress(subprocess.TimeoutExpired):
        daemon.wait(_END_S)
        return
    daemon.kill()
    daemon.wait()
