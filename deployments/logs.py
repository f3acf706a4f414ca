"""lorauter's log lines, handed to Serve's logger of the process: its file, its JSON, the request's id on each line.

The level and the encoding are Serve's `logging_config`. What a client did wrong, or is refused, is no failure of the
deployment that says so: Serve would log it as one, with a traceback.
"""

from __future__ import annotations

import logging
from logging.handlers import MemoryHandler

from lorauter.errors import LorauterError

_SERVE = logging.getLogger("ray.serve")
AS_IT_GOES = {"serve_access_log": True, "log_to_stderr": False}
"""What a line that each request has says beside its facts: it goes to the file alone, unless `enable_access_log` is
false, as Serve has it of its own."""


class _ToServe(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if _SERVE.isEnabledFor(record.levelno):  # the level may have been changed since
            _SERVE.handle(record)


class _Once(logging.Formatter):
    """Formats a record once: the file's handler asks twice, the first time for its length alone."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter
        self._last: tuple[logging.LogRecord | None, str] = None, ""

    def format(self, record: logging.LogRecord) -> str:
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
            if file is not None and file.formatter is not None:
                file.setFormatter(_Once(file.formatter))
    ours.setLevel(_SERVE.getEffectiveLevel())
