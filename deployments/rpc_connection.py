"""A connection between two processes: the proof that both know a token, then lots of messages, each a pickle with its
length before it.

Neither end reads more than the proof of whoever does not know the token. Knows nothing of what the messages say, but
that their second part is the number of whose they are.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import pickle
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

logger = logging.getLogger("lorauter.rpc")

_MAGIC = b"lorauter-rpc-1\n\0"
_NONCE, _PROOF = 32, hashlib.sha256().digest_size
_HELLO = len(_MAGIC) + _NONCE
_LENGTH = struct.Struct("<Q")
_LONGEST = 1 << 31  # bytes of one lot: more is no message of ours
GREETING_S = 5.0
_LOST_S = 10  # without a sign of life from the other machine's kernel
_MANY = 32  # messages that are said in one turn of the loop, after which it has to go on


class ConnectionLost(Exception):
    """Nobody is at the other end any more, or nobody who knows the token. What became of a call there is not known."""


class Connection(asyncio.Protocol):
    """One end.

    Args:
        role: `b"client"` or `b"server"`.
        token: what both ends know.
        received: is told of messages.
        unsendable: makes another message of one that is no pickle, given its second part and why; None says nothing.
        lost: is told that nobody is at the other end any more.
    """

    def __init__(
        self,
        role: bytes,
        token: bytes,
        received: Callable[[Sequence[Any]], None],
        unsendable: Callable[[int, Exception], Any],
        lost: Callable[[], None],
    ) -> None:
        self._role = role
        self.name = ""  # what the other end of a server's calls itself
        self._token = token
        self._received = received
        self._unsendable = unsendable
        self._lost = lost
        self._nonce = secrets.token_bytes(_NONCE)
        self._theirs: bytes | None = None  # their nonce, once they have said it
        self._proved = False  # whether they have shown that they know the token
        self._unread = bytearray()
        self._unsent: list[Any] = []
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.greeted.add_done_callback(lambda done: done.cancelled() or done.exception())  # not all wait for it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = made = cast(asyncio.Transport, transport)
        _tune(transport.get_extra_info("socket"))
        asyncio.get_running_loop().call_later(GREETING_S, self._give_up)
        made.write(_MAGIC + self._nonce)

    def data_received(self, data: bytes) -> None:
        try:
            if self._unread or not self._proved:
                self._unread += data
                if self._proved or self._greet():
                    del self._unread[: self._read(self._unread)]
            elif (read := self._read(data)) < len(data):
                self._unread += data[read:]
        except Exception:
            logger.exception("a connection is given up")
            self.close()

    def _read(self, data: bytes | bytearray) -> int:
        """Read the lots that are whole; how many bytes these are."""
        start = 0
        while len(data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            if length > _LONGEST:
                raise ValueError(f"a lot of {length} bytes")
            end = start + _LENGTH.size + length
            if len(data) < end:
                break
            messages = pickle.loads(memoryview(data)[start + _LENGTH.size : end])  # noqa: S301 (of who knows the token)
            start = end
            self._received(messages)
        return start

    def _greet(self) -> bool:
        """Read their greeting, and prove that the token is known here; whether they have proved it."""
        if self._theirs is None and len(self._unread) >= _HELLO:
            if not self._unread.startswith(_MAGIC):
                self.close()
                return False
            self._theirs = bytes(self._unread[len(_MAGIC) : _HELLO])
            del self._unread[:_HELLO]
            assert self._transport is not None
            self._transport.write(self._proof(self._role, self._theirs, self._nonce))
        if self._theirs is None or len(self._unread) < _PROOF:
            return False
        proof = bytes(self._unread[:_PROOF])
        del self._unread[:_PROOF]
        other = b"client" if self._role == b"server" else b"server"
        if not hmac.compare_digest(proof, self._proof(other, self._nonce, self._theirs)):
            logger.warning("somebody without the token has connected")
            self.close()
            return False
        self._proved = True
        if not self.greeted.done():  # else nobody waits for it any more
            self.greeted.set_result(None)
        return True

    def _proof(self, role: bytes, challenge: bytes, own: bytes) -> bytes:
        return hmac.digest(self._token, role + challenge + own, "sha256")

    def _give_up(self) -> None:
        if not self._proved:
            self.close()

    def send(self, message: Any) -> None:
        """Send with all else that is said in this turn of the loop; nothing, once the connection is lost."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(message)

    def _flush(self) -> None:
        messages, self._unsent = self._unsent, []
        self._write(messages)

    def _write(self, messages: Sequence[Any]) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        try:
            lot = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # noqa: BLE001 (of one of them, whose own end it is)
            if len(messages) > 1:
                for message in messages:
                    self._write([message])
            elif (instead := self._unsendable(messages[0][1], error)) is not None:
                self._write([instead])
            return
        self._transport.write(_LENGTH.pack(len(lot)) + lot)

    @property
    def behind(self) -> bool:
        """Whether much is to be written, or the other end does not read it."""
        return len(self._unsent) >= _MANY or not self._writable.is_set()

    async def writable(self) -> None:
        """Wait until the other end has read about all that was sent."""
        await asyncio.sleep(0)  # what was said is written, whoever says it never waits for anything else
        await self._writable.wait()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        self._writable.set()
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionLost("the other end has hung up"))
        self._lost()


def _tune(connection: socket.socket) -> None:
    """No wait for more to send, and a machine that is lost is found out."""
    with suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        alive = {"TCP_KEEPIDLE": _LOST_S // 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": _LOST_S // 2}
        for option, value in {**alive, "TCP_USER_TIMEOUT": _LOST_S * 1000}.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
