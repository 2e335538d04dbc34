"""One server on one asyncio-compatible loop, for the load generator.

usage: loop_server.py LOOP KIND PORT MODE [CERTIFICATE]

LOOP: asyncio, uvloop, rloop, aiofastnet, aiofastnet-uvloop or headrace (on the engine that HEADRACE_ENGINE names)
KIND: bytes (asyncio.Protocol), buffered (asyncio.BufferedProtocol), streams (asyncio streams) or, on
      headrace, lease (headrace.Protocol) or reader (headrace's streams)
MODE: echo, sink (receive and forget) or source (send without end after the first byte); on UDP, with bytes,
      datagram-echo or datagram-sink (every 16th is answered); tls-echo, tls-sink and tls-source are the first
      three over TLS 1.3, with the certificate and its key in that PEM file

Default settings, no tuning, the same code for every loop. Prints ``READY <port>`` when it listens.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Any

BACKLOG = 4096
CHUNK = b"\x07" * 262144
BUFFER_SIZE = 65536


class Flow:
    """Write side of a source: writes while the transport takes more."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.writable = True

    def connection_lost(self, exc: BaseException | None) -> None:
        self.writable = False

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self.send()

    def send(self) -> None:
        while self.writable and not self.transport.is_closing():
            self.transport.write(CHUNK)


class BytesEcho(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class BytesSink(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.received = 0

    def data_received(self, data: bytes) -> None:
        self.received += len(data)


class BytesSource(Flow, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.send()


class BufferedEcho(asyncio.BufferedProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.buffer = bytearray(BUFFER_SIZE)
        self.view = memoryview(self.buffer)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(bytes(self.view[:nbytes]))


class BufferedSink(asyncio.BufferedProtocol):
    buffer = bytearray(CHUNK)  # the bytes are forgotten: one for all

    def connection_made(self, transport: Any) -> None:
        self.received = 0

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += nbytes


class BufferedSource(Flow, asyncio.BufferedProtocol):
    buffer = bytearray(16)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.send()


PROTOCOLS: dict[tuple[str, str], type] = {
    ("bytes", "echo"): BytesEcho,
    ("bytes", "sink"): BytesSink,
    ("bytes", "source"): BytesSource,
    ("buffered", "echo"): BufferedEcho,
    ("buffered", "sink"): BufferedSink,
    ("buffered", "source"): BufferedSource,
}


def add_lease_protocols() -> None:
    """The same three on headrace.Protocol."""
    from headrace import Lease, Protocol

    class LeaseEcho(Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def lease_received(self, lease: Lease) -> None:
            self.transport.write(lease)

    class LeaseSink(Protocol):
        def connection_made(self, transport: Any) -> None:
            self.received = 0

        def lease_received(self, lease: Lease) -> None:
            self.received += len(lease)

    class LeaseSource(Flow, Protocol):
        def lease_received(self, lease: Lease) -> None:
            self.send()

    PROTOCOLS.update(
        {("lease", "echo"): LeaseEcho, ("lease", "sink"): LeaseSink, ("lease", "source"): LeaseSource}
    )


class DatagramEcho(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


class DatagramSink(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.received = 0

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received += 1
        if self.received % 16 == 0:
            self.transport.sendto(b"16 more", addr)


DATAGRAMS = {"datagram-echo": DatagramEcho, "datagram-sink": DatagramSink}


async def echo_stream(reader: Any, writer: Any) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def sink_stream(reader: Any, writer: Any) -> None:
    while await reader.read(65536):
        pass


async def source_stream(reader: Any, writer: Any) -> None:
    await reader.read(16)
    while True:
        writer.write(CHUNK)
        await writer.drain()


STREAMS = {"echo": echo_stream, "sink": sink_stream, "source": source_stream}


def stream_handler(mode: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    serve = STREAMS[mode]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass  # the load generator resets its connections at the end of a round
        finally:
            writer.close()

    return handle


def new_loop(name: str) -> asyncio.AbstractEventLoop:
    package, _, base = name.partition("-")
    factory: Callable[[], asyncio.AbstractEventLoop]
    if package == "aiofastnet":
        factory = importlib.import_module(base or "asyncio").new_event_loop
        factory = importlib.import_module(package).loop_factory(factory)
    else:
        factory = importlib.import_module(package).new_event_loop
    return factory()


def tls_arguments(kind: str, certificate: str) -> dict[str, Any]:
    """What makes a server one of TLS: nothing is tuned but that it's TLS 1.3 for all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate)
    if kind != "lease":
        return {"ssl": context}
    import headrace

    return {"security": headrace.TLS(context=context)}


def check_engine(loop: Any) -> None:
    """A table row must not show another engine than its name says."""
    wanted = os.environ.get("HEADRACE_ENGINE")
    if wanted and loop.engine_name != wanted:
        raise SystemExit(f"runs on {loop.engine_name}, not on {wanted}: {loop.engine_reason}")


async def serve_datagrams(name: str, port: int, mode: str) -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(DATAGRAMS[mode], ("127.0.0.1", port))
    if name == "headrace":
        check_engine(loop)
    print("READY", transport.get_extra_info("sockname")[1], flush=True)
    await asyncio.Event().wait()


async def main(name: str, kind: str, port: int, mode: str, certificate: str | None = None) -> None:
    if mode in DATAGRAMS:
        await serve_datagrams(name, port, mode)
        return
    # The protocol is named because asyncio sets TCP_NODELAY only where it is, as it does for a host and a port.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", port))
    listener.setblocking(False)
    bound_port = listener.getsockname()[1]  # asked now: rloop takes the descriptor out of the socket
    loop = asyncio.get_running_loop()
    server: asyncio.AbstractServer
    options: dict[str, Any] = {"sock": listener, "backlog": BACKLOG}
    if certificate:
        mode = mode.removeprefix("tls-")
        options |= tls_arguments(kind, certificate)
    if kind == "streams":
        server = await asyncio.start_server(stream_handler(mode), **options)
    elif kind == "reader":
        start_server = importlib.import_module(name).start_server
        server = await start_server(STREAMS[mode], **options)
    else:
        server = await loop.create_server(PROTOCOLS[kind, mode], **options)
    if name == "headrace":
        check_engine(loop)
    async with server:
        print("READY", bound_port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    loop_name, kind_name, port_text, mode_name, *certificates = sys.argv[1:]
    if loop_name == "headrace":
        add_lease_protocols()
    with asyncio.Runner(loop_factory=lambda: new_loop(loop_name)) as runner:
        runner.run(main(loop_name, kind_name, int(port_text), mode_name, *certificates))
