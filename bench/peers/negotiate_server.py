"""One server of authenticated streams, for bench/negotiate.py.

usage: negotiate_server.py KIND sink|source|echo|handshake [CERTIFICATE]

KIND: negotiate (headrace.Negotiate), tls (headrace.TLS, with that certificate) or pyspnego (asyncio's streams on
uvloop, pyspnego's own wrap and unwrap over MIT krb5). Prints ``READY <port>`` when it listens.
"""

from __future__ import annotations

import asyncio
import importlib
import struct
import sys
from typing import Any

import headrace

CHUNK = bytes(256 * 1024)
FRAME = 12 * 1024
DONE, IN_PROGRESS = 0x14, 0x16
HANDSHAKE_HEADER = struct.Struct(">BBBH")
DATA_HEADER = struct.Struct("<I")


class Sink(headrace.Protocol):
    def lease_received(self, lease: headrace.Lease) -> None:
        lease.release()


class Echo(headrace.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def lease_received(self, lease: headrace.Lease) -> None:
        self.transport.write(lease)


class Source(headrace.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.writable = True

    def lease_received(self, lease: headrace.Lease) -> None:
        self.resume_writing()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        while self.writable and not self.transport.is_closing():
            self.transport.write(CHUNK)


PROTOCOLS = {"sink": Sink, "handshake": Sink, "echo": Echo, "source": Source}


async def serve_headrace(kind: str, mode: str, certificate: str | None) -> asyncio.Server:
    security: Any
    if kind == "tls":
        security = headrace.TLS(certificate=certificate, private_key=certificate)
    else:
        security = headrace.Negotiate()
    loop: Any = asyncio.get_running_loop()
    server: asyncio.Server = await loop.create_server(PROTOCOLS[mode], "127.0.0.1", 0, security=security)
    return server


async def pyspnego_authenticated(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
    context = importlib.import_module("spnego").server(hostname="localhost", service="host")
    while not context.complete:
        *_, size = HANDSHAKE_HEADER.unpack(await reader.readexactly(5))
        token = context.step(await reader.readexactly(size)) or b""
        kind = DONE if context.complete else IN_PROGRESS
        writer.write(HANDSHAKE_HEADER.pack(kind, 1, 0, len(token)) + token)
    return context


async def pyspnego_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mode: str) -> None:
    context = await pyspnego_authenticated(reader, writer)

    async def send(data: bytes) -> None:
        for position in range(0, len(data), FRAME):
            token = context.wrap(data[position : position + FRAME]).data
            writer.write(DATA_HEADER.pack(len(token)) + token)
        await writer.drain()

    while True:
        (size,) = DATA_HEADER.unpack(await reader.readexactly(4))
        data = context.unwrap(await reader.readexactly(size)).data
        if mode == "echo":
            await send(data)
        while mode == "source":
            await send(CHUNK)


async def serve_pyspnego(mode: str) -> asyncio.Server:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await pyspnego_connection(reader, writer, mode)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            writer.close()

    return await asyncio.start_server(handle, "127.0.0.1", 0, limit=1 << 20)


async def main(kind: str, mode: str, certificate: str | None = None) -> None:
    if kind == "pyspnego":
        server = await serve_pyspnego(mode)
    else:
        server = await serve_headrace(kind, mode, certificate)
    async with server:
        print("READY", server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    package = "uvloop" if sys.argv[1] == "pyspnego" else "headrace"
    with asyncio.Runner(loop_factory=importlib.import_module(package).new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
