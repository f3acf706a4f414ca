from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from deployments.logs import join_serve_logs
from lorauter.errors import InvalidRequest


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.levels: list[str] = []
        self.traced = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.levels.append(record.levelname)
        self.traced += record.exc_info is not None


@pytest.fixture
def serve_log() -> Iterator[Kept]:
    """What Serve's logger is given; all loggers are as before in the end."""
    loggers = [logging.getLogger(name) for name in ("ray.serve", "lorauter")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    kept = Kept()
    loggers[0].handlers = [kept]
    loggers[0].setLevel(logging.INFO)
    yield kept
    loggers[0].filters = []
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_lines_go_to_serve_once_and_at_its_level(serve_log: Kept, capsys: pytest.CaptureFixture[str]) -> None:
    join_serve_logs()
    join_serve_logs()
    ours = logging.getLogger("lorauter.requests")
    ours.debug("a detail")
    ours.info("a line")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # as a new configuration does
    ours.warning("too little")
    ours.error("a fault")
    assert serve_log.lines == ["a line", "a fault"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "error", "line", "level", "traced"),
    [
        ("ray.serve", InvalidRequest("top_k is 0", param="top_k"), "Request failed. top_k is 0", "INFO", 0),
        ("ray.serve", ValueError("a fault"), "Request failed.", "ERROR", 1),
        ("lorauter.api", InvalidRequest("x"), "Request failed.", "ERROR", 1),  # who logs it of ours wants to know
    ],
)
def test_what_a_client_did_wrong_is_a_line(
    serve_log: Kept, name: str, error: Exception, line: str, level: str, traced: int
) -> None:
    join_serve_logs()
    try:
        raise error
    except Exception:
        logging.getLogger(name).exception("Request failed.")  # as Serve does
    assert (serve_log.lines, serve_log.levels, serve_log.traced) == ([line], [level], traced)
