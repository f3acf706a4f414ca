"""What runs in an engine's own process: `python -m lorauter.engine.child DESCRIPTOR PARENT`.

The main thread takes messages in, the core's thread computes and reports, and two more read adapters. It ends when its
parent does. `lorauter.engine.process` is the other side.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import QueueHandler
from typing import Any

from lorauter.engine.core import EngineCore
from lorauter.engine.messages import Begin, Order, Report
from lorauter.engine.process import Channel, Orders, Read, ReadDone, Ready, Start
from lorauter.engine.slots import PackedAdapter
from lorauter.errors import LorauterError
from lorauter.garbage import settle
from lorauter.parent import end_with_parent
from lorauter.pickled import PickledError

_READERS = 2
# Whoever else runs here gives the interpreter back to the thread that feeds the device at once.
_SWITCH_S = 0.00005


class _Forward(QueueHandler):
    """Log records, for the parent to handle."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # only what `enqueue` does with it
        self._channel = channel

    def enqueue(self, record: logging.LogRecord) -> None:
        self._channel.send(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Nobody is there to be told."""


class Child:
    """An engine's core, and the adapters that the parent holds."""

    def __init__(self, channel: Channel, core: EngineCore) -> None:
        self._channel = channel
        self._core = core
        self._adapters: dict[int, PackedAdapter] = {}
        self._readers = ThreadPoolExecutor(_READERS, "adapters")

    def obey(self, message: Orders | Read | None) -> bool:
        """Do what the parent says; False where it is to end."""
        if isinstance(message, Orders):
            self._core.take([self._with_adapters(order) for order in message.orders])
            for number in message.released:
                del self._adapters[number]
        elif isinstance(message, Read):
            self._readers.submit(self._read, message)
        return message is not None

    def _with_adapters(self, order: Order) -> Order:
        if not isinstance(order, Begin) or not order.adapters:
            return order
        numbers: Any = order.adapters
        return order._replace(adapters=tuple([(self._adapters[number], weight) for number, weight in numbers]))

    def _read(self, read: Read) -> None:
        try:
            packed, warnings = self._core.read(read.path, name=read.key[0], version=read.key[1])
        except BaseException as error:  # noqa: BLE001 (the parent's to judge)
            self._channel.send(ReadDone(read.number, error=PickledError.of(error)))
            return
        self._adapters[read.number] = packed
        self._channel.send(ReadDone(read.number, packed.nbytes, warnings))


def main() -> None:
    """Run until the parent says so, or is gone."""
    channel = Channel(int(sys.argv[1]))
    end_with_parent(int(sys.argv[2]), signal.SIGKILL)  # elsewhere than on Linux it ends when the channel does
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to obey
    sys.setswitchinterval(_SWITCH_S)
    start: Start = channel.receive()
    logger = logging.getLogger("lorauter")
    logger.addHandler(_Forward(channel))
    logger.propagate = False
    logger.setLevel(start.log_level)

    def told(report: Report | Exception) -> None:
        if isinstance(report, Exception):  # closed, or beyond use
            os._exit(0 if closing.is_set() else 1)
        report.failed = [(id, PickledError.of(error).raised()) for id, error in report.failed]  # as what can travel
        channel.send(report)

    closing = threading.Event()
    try:
        decoder, codec = start.load()
        core = EngineCore(decoder, codec, start.config, told)
        del decoder
        settle()
        channel.send(Ready(core.facts, codec))
    except BaseException as error:  # noqa: BLE001 (the parent's to raise)
        if not isinstance(error, LorauterError):
            error.add_note(f"in the engine's process:\n{traceback.format_exc()}")
        channel.send(PickledError.of(error))
        return
    child = Child(channel, core)
    try:
        while child.obey(channel.receive()):
            pass
    except (EOFError, OSError):  # the parent is gone
        os._exit(1)
    closing.set()
    core.close()


if __name__ == "__main__":
    main()
