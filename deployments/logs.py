"""lorauter's log lines, handed to Serve's logger of the process: its file, its JSON, the request's id on each line.

The level and the encoding are Serve's `logging_config`.
"""

from __future__ import annotations

import logging

_SERVE = logging.getLogger("ray.serve")


class _ToServe(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if _SERVE.isEnabledFor(record.levelno):  # the level may have been changed since
            _SERVE.handle(record)


def join_serve_logs() -> None:
    """Have this process's lorauter loggers speak through Serve's; called by each deployment as it starts."""
    ours = logging.getLogger("lorauter")
    if not any(isinstance(handler, _ToServe) for handler in ours.handlers):
        ours.addHandler(_ToServe())
        ours.propagate = False
    ours.setLevel(_SERVE.getEffectiveLevel())
