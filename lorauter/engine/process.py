"""An engine's device side in a process of its own: the side of whoever started it.

Neither the threads nor the interpreter of this process cost the device a step, and what a step brings comes as one
message. Weights never come here: the other side reads adapters, and keeps each for as long as its handle is held. The
process ends with this one, however that ends. Its log records are handled here. `lorauter.engine.child` is the other
side.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorauter.engine.config import EngineConfig
from lorauter.engine.engine import Engine, Told
from lorauter.engine.messages import Begin, Counters, Facts, Order, Report
from lorauter.engine.plan import AdapterKey
from lorauter.engine.text import TextCodec
from lorauter.errors import AdapterUnavailable, LorauterError, ServiceUnavailable
from lorauter.pickled import PickledError

if TYPE_CHECKING:
    from lorauter.engine.model import Decoder

logger = logging.getLogger("lorauter.engine")

_BUFFER = 1 << 20  # bytes on their way; the system may allow fewer
_READ = 1 << 17  # that are read at once
_LENGTH = struct.Struct("<Q")
_END_S = 20.0  # for the last step, before the process is killed

Load = Callable[[], "tuple[Decoder, TextCodec]"]
"""Loads the base model, in the other process: it has to be picklable."""
Ended = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """The first message to the process: what it runs, and from which level on it logs."""

    load: Load
    config: EngineConfig
    log_level: int


@dataclass(frozen=True)
class Ready:
    """The process's first word, once the model is there."""

    facts: Facts
    codec: TextCodec


@dataclass(frozen=True)
class Read:
    """Read an adapter, and keep it by this number."""

    number: int
    path: Path
    key: AdapterKey


@dataclass(frozen=True)
class ReadDone:
    """An adapter is there: its bytes, and what to warn of; or why it is not."""

    number: int
    nbytes: int = 0
    warnings: tuple[str, ...] = ()
    error: PickledError | None = None


class Orders(NamedTuple):
    """Orders, whose adapters are numbers, and the numbers that nobody holds any more once these are obeyed."""

    orders: Sequence[Order]
    released: Sequence[int]


class Channel:
    """One end of the connection between the two processes: pickles, each with its length before it.

    What is there is read in one go, as each time that a thread has read it waits for the interpreter.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._sending = threading.Lock()
        self._unread = bytearray()

    def send(self, message: object) -> None:
        """Send a message. Raises OSError if nobody is there."""
        packed = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(packed)) + packed)

    def receive(self) -> Any:
        """The next message. Raises EOFError or OSError once nobody is there."""
        unread, end = self._unread, _LENGTH.size
        while len(unread) < end or len(unread) < (end := _LENGTH.size + _LENGTH.unpack_from(unread)[0]):
            data = self._socket.recv(_READ)
            if not data:
                raise EOFError
            unread += data
        packed = bytes(memoryview(unread)[_LENGTH.size : end])
        del unread[:end]
        return pickle.loads(packed)  # noqa: S301 (from the other one of these two processes)

    def close(self) -> None:
        """Let go."""
        self._socket.close()


@dataclass(eq=False)
class AdapterHandle:
    """An adapter in the memory of the engine's process, which keeps it while this is held."""

    key: AdapterKey
    nbytes: int
    number: int

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.key[0]


class EngineProcess:
    """The core of an engine, in a process of its own: see `lorauter.engine.core.EngineCore`.

    Args:
        load: loads the base model, there.
        config: settings.
        told: is given each report, by this one's thread; an error once the process has ended.
        ended: is told how the process has ended, if it has not been closed, before anybody else learns of it.

    Raises:
        LorauterError, MemoryError, ...: what went wrong there, as it would here.
    """

    def __init__(self, load: Load, config: EngineConfig, told: Told, ended: Ended | None = None) -> None:
        self._told = told
        self._ended = ended
        self._reads: dict[int, Future[ReadDone | None]] = {}  # None once the process has ended
        self._numbers = iter(range(1 << 62))
        self._released: deque[int] = deque()
        self._closing = False
        self._end: str | None = None  # how it has ended
        self.running = 0
        self.counters = Counters()
        ready: Future[Ready] = Future()
        # The thread that starts a process is its parent to the system, which ends it with that thread.
        self._thread = threading.Thread(
            target=self._run,
            args=(Start(load, config, logging.getLogger("lorauter").getEffectiveLevel()), ready),
            name="lorauter-engine-process",
            daemon=True,
        )
        self._thread.start()
        told_ready = ready.result()
        self.facts, self.codec = told_ready.facts, told_ready.codec

    # --- lorauter.engine.engine.Core

    def take(self, orders: Sequence[Order]) -> None:
        """See `EngineCore.take`."""
        sent = [_by_number(order) if isinstance(order, Begin) and order.adapters else order for order in orders]
        released = [self._released.popleft() for _ in range(len(self._released))]
        with suppress(OSError):  # it has ended, and whoever waits is told so
            self._channel.send(Orders(sent, released))

    def read(self, path: Path, *, name: str, version: str) -> tuple[AdapterHandle, tuple[str, ...]]:
        """See `EngineCore.read`; waits."""
        number = next(self._numbers)
        answer = self._reads[number] = Future()
        with suppress(OSError):  # it has ended, or is about to, which the thread finds out
            self._channel.send(Read(number, path, (name, version)))
        if self._end is not None and self._reads.pop(number, None) is not None:  # it ended before this one was there
            answer.set_result(None)
        done = answer.result()
        if done is None:
            raise AdapterUnavailable("the engine's process has ended", adapter=name)
        if done.error is not None:
            raise done.error.raised()
        handle = AdapterHandle((name, version), done.nbytes, number)
        weakref.finalize(handle, self._released.append, number).atexit = False
        return handle, done.warnings

    def check_health(self) -> None:
        """Raise RuntimeError if the process has ended."""
        if self._end is not None:
            raise RuntimeError(self._end)

    def close(self) -> None:
        """Stop after the current step."""
        self._closing = True
        with suppress(OSError):
            self._channel.send(None)
        self._thread.join(_END_S)
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join()

    # --- the thread

    def _run(self, start: Start, ready: Future[Ready]) -> None:
        try:
            ours, theirs = socket.socketpair()
            for one in (ours, theirs):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            self._channel = Channel(ours.detach())
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603 (this Python)
                    [sys.executable, "-m", "lorauter.engine.child", str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
                )
        except Exception as error:  # noqa: BLE001 (the starter's to raise)
            ready.set_exception(error)
            return
        try:
            self._channel.send(start)
            while True:
                message = self._channel.receive()
                try:
                    self._obey(message, ready)
                except Exception:  # one message's trouble must not silence the process
                    logger.exception("what the engine's process said could not be taken in")
        except (EOFError, OSError):
            pass
        except Exception as error:  # what it says cannot be read, or it cannot be told what to load
            logger.exception("the engine's process is given up")
            self._process.kill()
            if not ready.done():
                ready.set_exception(error)
        code = self._process.wait()
        self._channel.close()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        end = "the engine was closed" if self._closing else f"the engine's process {how}"
        if not ready.done():  # by the system, which has no more memory, if by SIGKILL
            ready.set_exception((MemoryError if code == -signal.SIGKILL else LorauterError)(f"{end} as it started"))
        elif self._ended is not None and not self._closing and ready.exception() is None:
            self._ended(end)
        self._end = end
        for number in list(self._reads):
            if (answer := self._reads.pop(number, None)) is not None:
                answer.set_result(None)
        self._told(ServiceUnavailable(end))

    def _obey(self, message: object, ready: Future[Ready]) -> None:
        if isinstance(message, Report):
            self.running = message.running
            if message.counters is not None:
                self.counters = message.counters
            self._told(message)
        elif isinstance(message, ReadDone):
            self._reads.pop(message.number).set_result(message)
        elif isinstance(message, logging.LogRecord):
            logging.getLogger(message.name).handle(message)
        elif isinstance(message, Ready):
            ready.set_result(message)
        elif isinstance(message, PickledError):
            ready.set_exception(message.raised())


def _by_number(order: Begin) -> Begin:
    handles: Any = order.adapters
    return order._replace(adapters=tuple([(handle.number, weight) for handle, weight in handles]))


def start_process(load: Load, config: EngineConfig, *, ended: Ended | None = None) -> Engine:
    """An engine whose device's side is in a process of its own. Arguments and errors are those of `EngineProcess`."""

    def start(told: Told) -> tuple[EngineProcess, TextCodec]:
        core = EngineProcess(load, config, told, ended)
        return core, core.codec

    return Engine(start, config)


def load_in_process(
    model: str, config: EngineConfig, *, aliases: Sequence[str] = (), ended: Ended | None = None
) -> Engine:
    """Load a model and its tokenizer in a process of its own, and start an engine on it.

    Args:
        model, aliases: as for `lorauter.engine.load.load_decoder`.
        config: settings, those of where and how it runs among them.
        ended: is told how that process has ended, unless the engine was closed.

    Raises:
        ConfigError: as `load_decoder`.
        MemoryError: the system has ended it as it started.
    """
    return start_process(loading(model, config, aliases), config, ended=ended)


def loading(model: str, config: EngineConfig, aliases: Sequence[str]) -> Load:
    """What loads the model that is described so."""
    return partial(
        _load,
        model,
        device=config.device,
        dtype=config.dtype,
        threads=config.threads,
        aliases=tuple(aliases),
        tool_format=config.tool_format,
    )


def _load(model: str, **how: Any) -> tuple[Decoder, TextCodec]:
    from lorauter.engine.load import load_decoder  # and with it PyTorch, which the starter does without

    return load_decoder(model, **how)
