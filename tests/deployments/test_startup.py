"""Why a part cannot start: told in one line by its replica, and found again in what Serve says."""

import asyncio
import errno
import traceback
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from deployments.startup import explained, found_cause, tells_why
from lorauter.errors import CannotStart, ConfigError, LorauterError, StoreUnavailable


def failing(error: Exception) -> type:
    @tells_why
    class Part:
        def __init__(self) -> None:
            raise error

    return Part


def serves_message(error: Exception) -> str:
    """What Serve makes of a constructor's error, in its own words."""
    with pytest.raises(CannotStart) as caught:
        failing(error)()
    trace = "".join(traceback.format_exception(caught.value))
    return (
        "A replica failed to start with exception. Retrying 2 more time(s). Error:\n"
        f"\x1b[36mray::ServeReplica:lorauter:Part.initialize()\x1b[39m (pid=7)\nRuntimeError: {trace}"
    )


@pytest.mark.parametrize(
    ("error", "line", "for_good"),
    [
        (
            ConfigError("the model cannot be loaded:\n  no such\n\n  file"),
            "the model cannot be loaded: no such file",
            True,
        ),
        (StoreUnavailable("down", uri="s3://b"), "s3://b: down", False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "no room on the GPU: CUDA out of memory", False),
        (RuntimeError("the kernel\nimage is wrong"), "RuntimeError: the kernel image is wrong", False),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "the disk is full", False),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "LORAUTER_HOME", True),
        (ModuleNotFoundError("No module named 'x'"), "make install", True),
        (SafetensorError("incomplete metadata"), "weights are damaged: incomplete metadata; download or copy", True),
        (MemoryError(), "out of memory", False),
        (RuntimeError("x" * 5000), "RuntimeError: xxx", False),
    ],
)
def test_a_cause_comes_out_of_serves_message_in_one_line(error: Exception, line: str, for_good: bool) -> None:
    found = found_cause(serves_message(error), "Part")
    assert found is not None
    text, is_for_good = found
    assert text.startswith("Part cannot start: ")
    assert line in text
    assert "\n" not in text
    assert len(text) < 1100
    assert is_for_good == for_good


def test_no_room_on_the_gpu_is_told_however_it_is_wrapped() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        except RuntimeError as error:
            raise ConfigError(f"base model 'x' cannot be loaded: {error}") from error
    except LorauterError as error:
        assert "engine.max_batch" in explained(error)
        assert "Tried to allocate 2.00 GiB" in explained(error)


def test_a_message_without_a_told_cause_gives_its_last_line() -> None:
    died = "A replica failed to start. Error:\nThe actor died.\n\x1b[31mThe worker was killed\x1b[0m\n"
    assert found_cause(died, "LoraModel") == ("LoraModel cannot start: The worker was killed", False)
    assert found_cause("", "LoraModel") is None
    assert found_cause("The deployment is running as it should.", "LoraModel") is None


def test_an_asynchronous_constructor_tells_too_and_what_goes_well_is_left_alone() -> None:
    @tells_why
    class Part:
        def __init__(self, value: Any, *, key: int = 1) -> None:
            self.value = value, key

    @tells_why
    class Late:
        async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
            raise ConfigError("no")

    assert Part(2, key=3).value == (2, 3)
    with pytest.raises(CannotStart, match="Late cannot start: no") as caught:
        asyncio.run(Late.__init__(object.__new__(Late)))  # type: ignore[arg-type]
    assert caught.value.part == "Late"
