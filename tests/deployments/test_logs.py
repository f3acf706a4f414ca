from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.context import _set_request_context
from ray.serve.schema import LoggingConfig

from deployments.logs import as_it_goes, join_serve_logs
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


Configure = Callable[..., Path]


@pytest.fixture
def configure(serve_log: Kept, tmp_path: Path) -> Iterator[Configure]:
    """Configure Serve's logger as a replica has it; returns the folder of its file."""
    files: list[logging.Handler] = []

    def configure(name: str = "a", *, max_bytes: int = 1 << 20, **config: Any) -> Path:
        configure_component_logger(
            component_name="Router",
            component_id="one",
            logging_config=LoggingConfig(**{"encoding": "JSON", "logs_dir": str(tmp_path / name), **config}),
            max_bytes=max_bytes,
            backup_count=1,
        )
        handler = logging.getLogger("ray.serve").handlers[-1]
        assert isinstance(handler, MemoryHandler) and handler.target is not None
        files.append(handler.target)
        return tmp_path / name

    yield configure
    for file in files:
        file.close()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.glob("*.log") for line in path.read_text().splitlines()]


def test_lines_of_requests_are_written_together_and_say_what_serve_would_have_them_say(configure: Configure) -> None:
    file = configure()
    join_serve_logs()
    ours = logging.getLogger("lorauter.requests")

    async def serve() -> int:
        for n in range(3):
            _set_request_context(request_id=f"id-{n}")
            as_it_goes(ours, "request answered", {"status": 200, "seconds": 0.25 * n, "confidence": float("nan")})
        held = len(rows_of(file))
        while len(rows_of(file)) < 3:
            await asyncio.sleep(0.01)
        as_it_goes(ours, "request left", {"status": 499})
        ours.warning("a fault")  # it comes after what was said before it
        ours.info("a line")
        return held

    assert asyncio.run(serve()) == 0
    as_it_goes(ours, "of a thread", {})
    rows = rows_of(file)
    assert [row["message"] for row in rows] == ["request answered"] * 3 + [
        "request left",
        "a fault",
        "a line",
        "of a thread",
    ]
    assert [row.get("request_id") for row in rows[:4]] == ["id-0", "id-1", "id-2", "id-2"]
    assert (rows[1]["status"], rows[1]["seconds"], rows[1]["confidence"]) == (200, 0.25, None)
    of_serve = rows[5].keys() - {"filename", "lineno"}
    assert rows[3].keys() == of_serve | {"status"}
    assert {name: rows[3][name] for name in ("levelname", "process", "component_name", "component_id")} == {
        name: rows[5][name] for name in ("levelname", "process", "component_name", "component_id")
    }
    assert rows[3]["asctime"][:10] == rows[5]["asctime"][:10]
    assert [row["timestamp_ns"] for row in rows] == sorted(row["timestamp_ns"] for row in rows)


@pytest.mark.parametrize("config", [{"encoding": "TEXT"}, {"enable_access_log": False}, {"log_level": "WARNING"}])
def test_lines_of_requests_are_written_as_they_are_configured(configure: Configure, config: dict[str, Any]) -> None:
    folder = configure(**config)
    join_serve_logs()
    as_it_goes(logging.getLogger("lorauter.requests"), "request answered", {"status": 200})
    logging.getLogger("lorauter.requests").warning("a fault")
    [text] = [path.read_text() for path in folder.glob("*.log")]
    assert ("request answered" in text) == ("encoding" in config)
    assert "a fault" in text


def test_lines_of_requests_follow_a_new_configuration_and_a_file_that_is_full(configure: Configure) -> None:
    ours = logging.getLogger("lorauter.requests")
    old = configure("old", max_bytes=400)
    join_serve_logs()
    for n in range(5):
        as_it_goes(ours, f"request {n}", {"status": 200})
    assert len([*old.iterdir()]) == 2
    new = configure("new")
    as_it_goes(ours, "request of the new one", {})
    assert [row["message"] for row in rows_of(new)] == ["request of the new one"]
