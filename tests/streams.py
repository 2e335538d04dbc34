"""Protocols that note what happens to them, and sockets to talk to them: for the tests of transports and listeners."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import tempfile
from collections.abc import Callable
from typing import Any

import headrace

PATIENCE = 20.0  # seconds; a blocking peer waits no longer for a byte


class Recorder:
    """What the three kinds of protocol below share: every callback is noted, every byte kept.

    ``on`` maps a callback's name to what it does besides, given the recorder. Bytes come as ``received``.
    """

    transport: Any = None

    def __init__(self, **on: Callable[[Any], Any]) -> None:
        self.on = on
        self.events: list[str] = []
        self.data = bytearray()
        self.error: BaseException | None = None
        self.changed = asyncio.Event()

    def note(self, event: str) -> Any:
        self.events.append(event)
        self.changed.set()
        return self.on[event](self) if event in self.on else None

    async def seen(self, event: str, count: int = 1) -> None:
        """Returns when the callback has come that often."""
        await self.until(lambda: self.events.count(event) >= count)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when the condition holds; it's looked at after each callback."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.note("made")

    def got(self, data: bytes) -> None:
        self.data += data
        self.note("received")

    def eof_received(self) -> Any:
        return self.note("eof")

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.error = exc
        self.note("lost")


class Leases(Recorder, headrace.Protocol):
    def lease_received(self, lease: headrace.Lease) -> None:
        with lease:
            data = bytes(lease)
        self.got(data)


class Bytes(Recorder, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.got(data)


class Buffered(Recorder, asyncio.BufferedProtocol):
    size = 1000

    def get_buffer(self, sizehint: int) -> bytearray:
        self.buffer = bytearray(self.size)
        self.note("get_buffer")
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.got(bytes(self.buffer[:nbytes]))


KINDS: dict[str, type[Recorder]] = {"leases": Leases, "bytes": Bytes, "buffered": Buffered}


def sockets(
    family: int = socket.AF_INET, *, receive_buffer: int | None = None
) -> tuple[socket.socket, socket.socket]:
    """A connected pair of blocking sockets: the accepted end, and the peer that connected to it."""
    with socket.socket(family) as listener, tempfile.TemporaryDirectory() as folder:
        address: Any = {
            socket.AF_INET: ("127.0.0.1", 0),
            socket.AF_INET6: ("::1", 0),
            socket.AF_UNIX: os.path.join(folder, "socket"),
        }[socket.AddressFamily(family)]
        listener.bind(address)
        listener.listen()
        peer = socket.socket(family)
        peer.settimeout(PATIENCE)
        if receive_buffer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        peer.connect(listener.getsockname())
        near, _ = listener.accept()
    return near, peer


async def connected(
    protocol: Any, family: int = socket.AF_INET, *, receive_buffer: int | None = None
) -> tuple[Any, socket.socket]:
    """A transport with ``protocol``, and the blocking socket at its other end."""
    near, peer = sockets(family, receive_buffer=receive_buffer)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, near)
    return transport, peer


def reset(peer: socket.socket) -> None:
    """Ends the connection with a RST."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def receive_all(peer: socket.socket) -> bytes:
    """Every byte to the end of the stream; closes the socket."""
    got = bytearray()
    with peer:
        while data := peer.recv(65536):
            got += data
    return bytes(got)


def send_all(peer: socket.socket, data: bytes, piece: int = 1 << 20) -> None:
    """Sends everything, in pieces, and closes."""
    with peer:
        for start in range(0, len(data), piece):
            peer.sendall(data[start : start + piece])


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


def reports(loop: asyncio.AbstractEventLoop) -> list[dict[str, Any]]:
    """What the exception handler is told from now on."""
    found: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: found.append(context))
    return found
