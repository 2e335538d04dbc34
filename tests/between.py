"""Somebody between the ends of a NegotiateStream: hears all that is said, and may change, withhold or repeat it."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

from streams import Leases

__all__ = ["DONE", "ERROR", "IN_PROGRESS", "Between", "Frame", "Heard", "RelayTLS", "repeat", "wire"]

# What a handshake frame is ([MS-NNS] section 2.2.1).
DONE, ERROR, IN_PROGRESS = 0x14, 0x15, 0x16

Side: TypeAlias = Literal["client", "server"]


def wire(kind: int | None, body: bytes) -> bytes:
    """A frame; of data, where ``kind`` is None."""
    if kind is None:
        return struct.pack("<I", len(body)) + body
    return struct.pack(">BBBH", kind, 1, 0, len(body)) + body


@dataclass(frozen=True)
class Frame:
    """What one side said at a time, and which of its frames of the handshake or of data that was."""

    side: Side
    kind: int | None
    body: bytes
    number: int

    @property
    def wire(self) -> bytes:
        return wire(self.kind, self.body)

    def is_first_data(self, side: Side) -> bool:
        return self.side == side and self.kind is None and self.number == 0


@dataclass(frozen=True)
class RelayTLS:
    """How a relayer ends a client's TLS, and begins one of its own with the server."""

    towards_client: ssl.SSLContext
    towards_server: ssl.SSLContext
    server_name: str


# What is passed on instead of a frame; None ends the connection there.
Change: TypeAlias = Callable[[Frame], bytes | None]


class Between:
    """Relays every connection that it gets to ``target``; ``change`` may have it relay something else."""

    def __init__(self, target: Any, change: Change | None = None, tls: RelayTLS | None = None) -> None:
        self.target = target
        self.change = change or (lambda frame: frame.wire)
        self.tls = tls
        self.frames: list[Frame] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        context = self.tls.towards_client if self.tls else None
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0, ssl=context)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.gather(*self._tasks)

    @property
    def address(self) -> Any:
        return self._server.sockets[0].getsockname()

    def said(self, side: Side) -> bytes:
        """All that one side has said, frame by frame, as it was before any change."""
        return b"".join(frame.wire for frame in self.frames if frame.side == side)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        options: Any = {}
        if self.tls:
            options = {"ssl": self.tls.towards_server, "server_hostname": self.tls.server_name}
        from_server, to_server = await asyncio.open_connection(*self.target[:2], **options)
        done = asyncio.Event()  # the server has said so: what follows is data
        await asyncio.gather(
            self._pass("client", reader, to_server, done), self._pass("server", from_server, writer, done)
        )
        for each in (writer, to_server):
            each.transport.abort()

    async def _pass(
        self, side: Side, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, done: asyncio.Event
    ) -> None:
        seen: dict[bool, int] = {True: 0, False: 0}
        try:
            while (head := await reader.read(1)) != b"":
                kind = None if done.is_set() else head[0]
                head += await reader.readexactly(3 if kind is None else 4)
                size = struct.unpack("<I", head)[0] if kind is None else struct.unpack(">BBBH", head)[3]
                frame = Frame(side, kind, await reader.readexactly(size), seen[kind is None])
                seen[kind is None] += 1
                self.frames.append(frame)
                passed_on = self.change(frame)
                if passed_on is None:
                    break
                if side == "server" and kind == DONE:
                    done.set()
                writer.write(passed_on)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()  # an end that was reset is passed on as such
        if writer.can_write_eof():
            writer.write_eof()
        else:
            writer.close()


class Heard:
    """Makes a server's protocols, and knows of every callback that any of them has had."""

    def __init__(self, on: dict[str, Callable[[Any], Any]] | None = None) -> None:
        self.on = on or {}
        self.made: list[Leases] = []

    def __call__(self) -> Leases:
        self.made.append(Leases(**self.on))
        return self.made[-1]

    @property
    def events(self) -> list[str]:
        return [event for each in self.made for event in each.events]


async def repeat(address: Any, said: bytes) -> bytes:
    """Says all that to a server at once; what it answers before it ends the connection."""
    reader, writer = await asyncio.open_connection(*address[:2])
    answered = bytearray()
    writer.write(said)
    try:
        while data := await reader.read(65536):
            answered += data
    except ConnectionResetError:
        # It closes without having read everything: of the answer there is what came before.
        pass
    writer.transport.abort()
    return bytes(answered)
