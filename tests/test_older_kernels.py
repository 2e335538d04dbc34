"""io_uring before Linux 6.12 consumes a buffer with each receive: the same engine, made to run so on any kernel."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

import headrace
from conftest import why_not
from headrace import BufferPool
from headrace._uring import UringEngine

SIZES = (1, 100, 2048, 2049, 32_768, 32_769, 300_000, 1_000_000)


class Echo(headrace.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def lease_received(self, lease: headrace.Lease) -> None:
        self.transport.write(lease)


async def echo(address: tuple[str, int], data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    sending = asyncio.create_task(send(writer, data))
    received = await reader.readexactly(len(data))
    await sending
    writer.close()
    await writer.wait_closed()
    return received


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    for start in range(0, len(data), 50_000):
        writer.write(data[start : start + 50_000])
        await writer.drain()


@pytest.mark.parametrize("pool", [None, (4096, 1, 4)], ids=["default-pool", "four-blocks"])
def test_every_byte_is_echoed_without_incremental_buffers(pool: tuple[int, int, int] | None) -> None:
    reason = why_not("uring")
    if reason is not None:
        pytest.skip(f"needs io_uring: {reason}")
    engine = UringEngine(BufferPool(*pool) if pool else None, incremental=False)
    messages = [random.Random(size).randbytes(size) for size in SIZES * 3]

    async def main() -> list[bytes]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Echo, "127.0.0.1", 0)
        async with server:
            address = server.sockets[0].getsockname()
            return await asyncio.gather(*(echo(address, message) for message in messages))

    assert headrace.run(main(), engine=engine) == messages
    assert engine.pool is not None
    # 64 x 32 KiB are the default there: a small receive uses a whole block up, so blocks are many and small.
    assert pool or (engine.pool.block_size, engine.pool.target) == (32_768, 64)
    assert (engine.pool.outstanding, engine.pool.free) == (0, engine.pool.allocated)
