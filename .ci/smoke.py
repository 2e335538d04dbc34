"""What must work right after `pip install headrace`: import, and an echo on each engine."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import sys

import headrace


class Echo(headrace.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def lease_received(self, lease: headrace.Lease) -> None:
        self.transport.write(lease)


async def echo() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"ping")
    assert await reader.readexactly(4) == b"ping"
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


assert "site-packages" in (headrace.__file__ or ""), headrace.__file__
for module in pkgutil.walk_packages(headrace.__path__, "headrace."):
    # What needs an extra says so by an ImportError that names it.
    if not module.name.startswith(("headrace.cli", "headrace.testing")):
        importlib.import_module(module.name)
for engine in ("uring", "epoll"):
    headrace.run(echo(), engine=engine)
print(f"headrace {headrace.__version__} on Python {sys.version.split()[0]}: echo on uring and epoll")
