"""lorauter's log lines, handed to Serve's logger of the process: its file, its JSON, the request's id on each line.

The level and the encoding are Serve's `logging_config`. What a client did wrong, or is refused, is no failure of the
deployment that says so: Serve would log it as one, with a traceback.
"""

from __future__ import annotations

import logging

from lorauter.errors import LorauterError

_SERVE = logging.getLogger("ray.serve")


class _ToServe(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if _SERVE.isEnabledFor(record.levelno):  # the level may have been changed since
            _SERVE.handle(record)


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
    ours.setLevel(_SERVE.getEffectiveLevel())
