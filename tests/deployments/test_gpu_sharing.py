"""The daemon that lets processes share a GPU, by a stand-in of it: there is none on a CPU."""

import os
import stat
from pathlib import Path

import psutil
import pytest

from deployments import gpu_sharing
from deployments.gpu_sharing import gpus_are_shared

DAEMON = """#!/bin/bash
# As NVIDIA's: -f is the daemon, and without arguments what comes by stdin are its orders.
if [ "$1" = -f ]; then
    echo $$ > "$CUDA_MPS_PIPE_DIRECTORY/pid"
    touch "$CUDA_MPS_PIPE_DIRECTORY/control"
    exec sleep 600
fi
read -r order
[[ $order == quit* ]] && kill "$(cat "$CUDA_MPS_PIPE_DIRECTORY/pid")"
"""


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU, and the daemon's program, which is to be written."""
    monkeypatch.setattr(gpu_sharing, "gpu_bytes", lambda: 1 << 37)
    monkeypatch.setattr(gpu_sharing, "_PROBE", "pass")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(DAEMON)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def mine() -> str | None:
    return os.environ.get("CUDA_MPS_PIPE_DIRECTORY")


def test_who_is_started_within_finds_the_daemon_and_it_ends_afterwards(daemon: Path, told: list[str]) -> None:
    with gpus_are_shared(told.append):
        pipes = mine()
        assert pipes is not None
        assert os.environ["CUDA_MPS_LOG_DIRECTORY"] == pipes
        running = psutil.Process(int((Path(pipes) / "pid").read_text()))
        assert running.is_running()
    assert not running.is_running()
    assert not Path(pipes).exists()
    assert mine() is None
    assert not told


def test_it_ends_with_an_error_too(daemon: Path, told: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt), gpus_are_shared(told.append):
        running = psutil.Process(int((Path(str(mine())) / "pid").read_text()))
        raise KeyboardInterrupt
    assert not running.is_running()
    assert mine() is None


def test_one_that_hears_nothing_is_killed(daemon: Path, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sharing, "_END_S", 0.2)
    daemon.write_text(DAEMON.replace("kill ", ": "))
    with gpus_are_shared(told.append):
        running = psutil.Process(int((Path(str(mine())) / "pid").read_text()))
    assert not running.is_running()


@pytest.mark.parametrize(
    ("probe", "problem"),
    [("import sys; sys.exit('CUDA error 805')", "CUDA error 805"), ("import time; time.sleep(60)", "in vain")],
)
def test_a_gpu_that_cannot_be_shared_is_taken_in_turns(
    daemon: Path, told: list[str], monkeypatch: pytest.MonkeyPatch, probe: str, problem: str
) -> None:
    monkeypatch.setattr(gpu_sharing, "_PROBE", probe)
    monkeypatch.setattr(gpu_sharing, "_PROBE_S", 1.0 if "sleep" in probe else 60.0)
    with gpus_are_shared(told.append):
        assert mine() is None
    assert len(told) == 1
    assert problem in told[0]


def test_a_daemon_that_does_not_start_is_told(daemon: Path, told: list[str]) -> None:
    daemon.write_text("#!/bin/sh\nexit 1\n")
    with gpus_are_shared(told.append):
        assert mine() is None
    assert "does not start" in told[0]


def test_somebody_elses_daemon_is_left_alone(daemon: Path, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "theirs")
    with gpus_are_shared(told.append):
        assert mine() == "theirs"
    assert mine() == "theirs"


@pytest.mark.parametrize("lacks", ["a GPU", "the program"])
def test_without_either_nothing_is_started(
    daemon: Path, told: list[str], monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    if lacks == "a GPU":
        monkeypatch.setattr(gpu_sharing, "gpu_bytes", lambda: 0)
    else:
        daemon.unlink()
    with gpus_are_shared(told.append):
        assert mine() is None
    assert not told
