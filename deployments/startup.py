"""Why a part of the service cannot start: its replica tells it in one line, which is found again in Serve's report.

Serve's message of a deployment holds the traceback of its replica's constructor and ends with the error's own line, so
that the cause is there in `serve status` and in a RayService's status too. Knows nothing of what the parts do.
"""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from ray.exceptions import RayError

from lorauter.errors import (
    AdapterUnavailable,
    CannotStart,
    LorauterError,
    Overloaded,
    ServiceUnavailable,
    StoreUnavailable,
)

logger = logging.getLogger("lorauter.startup")

_FOR_GOOD, _FOR_NOW = "cannot start: ", "cannot start now: "
_MAY_PASS = (StoreUnavailable, ServiceUnavailable, AdapterUnavailable, Overloaded)
_TOLD = re.compile(rf"(?P<part>\w+) (?P<kind>{_FOR_GOOD}|{_FOR_NOW})(?P<cause>.+)")
_DAMAGED = "SafetensorError"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST = 1000  # characters of a cause
T = TypeVar("T", bound=type)


def tells_why(part: T) -> T:
    """A class decorator: an error of the constructor is logged in full, and raised as CannotStart with its cause."""
    construct: Any = part.__init__  # type: ignore[misc]

    def told(error: Exception) -> CannotStart:
        logger.error("%s does not start", part.__name__, exc_info=error)
        kind = _FOR_NOW if isinstance(error, _MAY_PASS) or not _is_known(error) else _FOR_GOOD
        return CannotStart(f"{part.__name__} {kind}{explained(error)}", part=part.__name__)

    if inspect.iscoroutinefunction(construct):

        @functools.wraps(construct)
        async def init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                await construct(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 (whatever it is has to be told)
                raise told(error) from None

    else:

        @functools.wraps(construct)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                construct(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001
                raise told(error) from None

    part.__init__ = init  # type: ignore[misc]
    return part


def _is_known(error: Exception) -> bool:
    """Whether it is an error that another try will not mend, unless it is one of _MAY_PASS."""
    return isinstance(error, LorauterError | ImportError | PermissionError) or type(error).__name__ == _DAMAGED


def explained(error: BaseException) -> str:
    """An error as one line, with what to do about it where the error itself does not say."""
    chain = list(_behind(error))
    for cause in chain:
        if type(cause).__name__ == "OutOfMemoryError":  # PyTorch's
            return _line(
                f"no room on the GPU: {_line(str(cause), 250)}; take a smaller base model, lower engine.max_batch, "
                "engine.max_model_len or engine.adapter_bytes, or end what else uses the GPU"
            )
        if isinstance(cause, MemoryError):
            return "out of memory; take a smaller base model, or give the replica a larger machine"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return _line(f"the disk is full: {cause}; make room, or name other folders: LORAUTER_HOME, cache.directory")
        if type(cause).__name__ == _DAMAGED:
            return _line(f"the base model's weights are damaged: {cause}; download or copy them again")
    if isinstance(error, LorauterError):
        return _line(str(error))
    if isinstance(error, PermissionError):
        return _line(f"{error}; give the service's user the right, or name another folder: LORAUTER_HOME")
    if isinstance(error, ImportError):
        return _line(f"{error}; the environment is not complete: run 'make install', or build the image anew")
    if isinstance(error, RayError):  # of another process: a traceback, which ends with the error's own line
        lines = [line for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
        told = next((found for line in reversed(lines) if (found := _TOLD.search(line))), None)
        return _line(told[0] if told else f"{type(error).__name__}: {lines[-1] if lines else ''}")
    return _line(f"{type(error).__name__}: {error}")


def _behind(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        yield step
        step = step.__cause__ or step.__context__


def _line(text: str, longest: int = _LONGEST) -> str:
    text = " ".join(_COLOURS.sub("", text).split())
    return text if len(text) <= longest else f"{text[:longest]}..."


def found_cause(message: str, part: str) -> tuple[str, bool] | None:
    """What Serve's message of a deployment tells of why its replicas do not start, and whether that is for good.

    None where the message speaks of no failure.
    """
    lines = [line.strip() for line in _COLOURS.sub("", message).splitlines() if line.strip()]
    for line in reversed(lines):
        if found := _TOLD.search(line):
            return f"{found['part']} {_FOR_GOOD}{found['cause']}", found["kind"] == _FOR_GOOD
    if not lines or "fail" not in lines[0].lower():
        return None
    return f"{part} {_FOR_GOOD}{_line(lines[-1])}", False
