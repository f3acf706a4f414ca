"""lorauter's log lines, handed to Serve's logger of the process: its file, its JSON, the request's id on each line.

The level and the encoding are Serve's `logging_config`. What a client did wrong, or is refused, is no failure of the
deployment that says so: Serve would log it as one, with a traceback. Lines that each request has are written some at a
time, a moment later: by themselves they took a tenth of what a request costs.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import time
from collections.abc import Mapping
from logging.handlers import MemoryHandler
from threading import Lock
from typing import Any

from ray._common.formatters import JSONFormatter
from ray.serve.context import _get_serve_request_context

from deployments.encoded import encoded
from lorauter.errors import LorauterError

_SERVE = logging.getLogger("ray.serve")
_AS_IT_GOES = {"serve_access_log": True, "log_to_stderr": False}  # to the file alone, as Serve has its own
_PAUSE_S = 0.1  # for which lines wait for others
_MANY = 64
_OF_A_TASK = ("task_id", "task_name", "task_func_name", "request_id", "route", "application", "_ray_timestamp_ns")


def as_it_goes(logger: logging.Logger, message: str, facts: Mapping[str, Any], level: int = logging.INFO) -> None:
    """Log a line that each request has: it goes to Serve's file alone, unless `enable_access_log` is false."""
    if logger.isEnabledFor(level) and not (level == logging.INFO and _lines.take(message, facts)):
        logger.log(level, message, extra={**_AS_IT_GOES, **facts})


class _Text(str):
    """Lines as they are to be written."""


class _Lines:
    """Lines of requests as Serve would write them in JSON."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._handler: MemoryHandler | None = None
        self._same: dict[str, Any] = {}  # what all lines say; nothing where they are not to be written
        self._heads: dict[str, bytes] = {}  # of lines of a message: what all of them say
        self._held: list[bytes] = []
        self._second = 0, b""

    def join(self, handler: MemoryHandler) -> None:
        """Write to where a handler of Serve's does, whose file has a `_Once`."""
        told = logging.makeLogRecord(_AS_IT_GOES)
        plain = vars(logging.makeLogRecord({})).keys() | _AS_IT_GOES.keys() | {*_OF_A_TASK}
        self._same, self._heads = {}, {}
        if handler.filter(told):
            self._same = {"process": os.getpid()} | {k: v for k, v in vars(told).items() if k not in plain}
        self._handler = handler

    def take(self, message: str, facts: Mapping[str, Any]) -> bool:
        """Write a line, with others; whether it is to be written so."""
        if self._handler is None or self._handler not in _SERVE.handlers:  # a new configuration has replaced it
            return False
        if not self._same:
            return True
        now, context = time.time_ns(), _get_serve_request_context()
        if (head := self._heads.get(message)) is None:
            head = self._heads[message] = encoded({"levelname": "INFO", "message": message, **self._same})[1:-1]
        of_request = {"route": context.route, "request_id": context.request_id, "application": context.app_name}
        own = {**facts, **{name: value for name, value in of_request.items() if value}, "timestamp_ns": now}
        line = b'{"asctime":"%s",%s,%s' % (self._told(now), head, encoded(own)[1:])
        with self._lock:
            self._held.append(line)
            held = len(self._held)
        if held == 1:
            try:
                asyncio.get_running_loop().call_later(_PAUSE_S, self.write)
            except RuntimeError:  # nobody would come back to it
                self.write()
        elif held >= _MANY:
            self.write()
        return True

    def _told(self, now: int) -> bytes:
        second, rest = divmod(now, 10**9)
        if second != self._second[0]:
            self._second = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second)).encode()
        return b"%s,%03d" % (self._second[1], rest // 10**6)

    def write(self) -> None:
        """Write what is held."""
        with self._lock:
            held, self._held = self._held, []
        file = self._handler.target if self._handler is not None else None
        if held and file is not None:
            file.handle(logging.makeLogRecord({"msg": _Text(b"\n".join(held).decode()), "levelno": logging.INFO}))


_lines = _Lines()
atexit.register(_lines.write)


class _ToServe(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if _SERVE.isEnabledFor(record.levelno):  # the level may have been changed since
            _lines.write()
            _SERVE.handle(record)


class _Once(logging.Formatter):
    """Formats a record once: the file's handler asks twice, the first time for its length alone."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter
        self._last: tuple[logging.LogRecord | None, str] = None, ""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.msg, _Text):
            return record.msg
        if self._last[0] is not record:
            self._last = record, self._formatter.format(record)
        return self._last[1]


def _errors_of_ours_in_a_line(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if record.name == _SERVE.name and isinstance(error, LorauterError):
        record.msg, record.args, record.exc_info = f"{record.getMessage()} {error}", (), None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return _SERVE.isEnabledFor(record.levelno)


def join_serve_logs() -> None:
    """Have this process's lorauter loggers speak through Serve's; called by each deployment as it starts."""
    ours = logging.getLogger("lorauter")
    if not any(isinstance(handler, _ToServe) for handler in ours.handlers):
        ours.addHandler(_ToServe())
        ours.propagate = False
        _SERVE.addFilter(_errors_of_ours_in_a_line)
        for handler in _SERVE.handlers:
            file = handler.target if isinstance(handler, MemoryHandler) else None
            if isinstance(handler, MemoryHandler) and file is not None and file.formatter is not None:
                in_json = isinstance(file.formatter, JSONFormatter) and not file.formatter.additional_log_standard_attrs
                file.setFormatter(_Once(file.formatter))
                if in_json:
                    _lines.join(handler)
    ours.setLevel(_SERVE.getEffectiveLevel())
