"""What is io_uring's own: its kinds of buffer rings.

Before Linux 6.12 each receive consumes a buffer; the engine can be made to work so on any kernel.
"""

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


def echo_through(
    engine: UringEngine, messages: list[bytes], server_protocol: type[Echo] = Echo
) -> list[bytes]:
    """The echoes of all messages, each on a connection of its own, all at once."""

    async def main() -> list[bytes]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(server_protocol, "127.0.0.1", 0)
        async with server:
            address = server.sockets[0].getsockname()
            return await asyncio.gather(*(echo(address, message) for message in messages))

    return headrace.run(main(), engine=engine)


@pytest.fixture(autouse=True)
def needs_uring() -> None:
    reason = why_not("uring")
    if reason is not None:
        pytest.skip(f"needs io_uring: {reason}")


@pytest.mark.parametrize("pool", [None, (4096, 1, 4)], ids=["default-pool", "four-blocks"])
def test_every_byte_is_echoed_without_incremental_buffers(pool: tuple[int, int, int] | None) -> None:
    engine = UringEngine(BufferPool(*pool) if pool else None, incremental=False)
    messages = [random.Random(size).randbytes(size) for size in SIZES * 3]
    assert echo_through(engine, messages) == messages
    assert engine.pool is not None
    # 64 x 32 KiB are the default there: a small receive uses a whole block up, so blocks are many and small.
    assert pool or (engine.pool.block_size, engine.pool.target) == (32_768, 64)
    assert (engine.pool.outstanding, engine.pool.free) == (0, engine.pool.allocated)


def test_a_pool_that_wants_more_blocks_posted_than_the_ring_has_room_for() -> None:
    pool = BufferPool(4096, 600, 2000)
    posted: list[int] = []

    class Watching(Echo):
        def lease_received(self, lease: headrace.Lease) -> None:
            posted.append(pool.posted)
            super().lease_received(lease)

    messages = [random.Random(size).randbytes(size) for size in SIZES * 3]
    assert echo_through(UringEngine(pool), messages, Watching) == messages
    assert 0 < max(posted) <= 256
    assert (pool.outstanding, pool.free) == (0, pool.allocated)


def test_features_are_known_while_there_is_a_ring() -> None:
    engine = UringEngine(incremental=False)
    assert engine.features == {}
    engine.start()
    features = engine.features
    engine.stop()
    engine.close()
    assert set(features) == {"incremental_buffers", "receive_limit", "deferred_completions", "files"}
    assert features["incremental_buffers"] is False
    assert engine.features == {}
