"""The pool under a loop, on real sockets. Freed blocks are poisoned: memory given back early shows."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Self

import pytest

import headrace
from headrace import BufferPool, EventLoop, Lease

BLOCK = 64 * 1024
IN_PLACE = 3000  # bytes of a receive that is delivered in place: more than 2 KiB
Main = Callable[[EventLoop], Coroutine[Any, Any, None]]


class Bench:
    """A loop on an engine and a small pool; everything must be back in the pool when it's closed."""

    def __init__(self, engine: str) -> None:
        self.engine = engine

    def run(self, main: Main, *, target: int = 8, maximum: int = 8) -> BufferPool:
        pool = BufferPool(BLOCK, target, maximum)
        loop = headrace.new_event_loop(engine=self.engine, pool=pool)
        try:
            loop.run_until_complete(main(loop))
            assert loop.engine_name == self.engine
        finally:
            loop.close()
        assert (pool.free, pool.outstanding, pool.leased_bytes) == (pool.allocated, 0, 0), pool.stats()
        return pool


@pytest.fixture
def bench(engine_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("HEADRACE_POISON", "1")
    monkeypatch.delenv("HEADRACE_LEAKS", raising=False)
    return Bench(engine_name)


def posted(loop: EventLoop) -> int:
    stats = loop.stats()
    return int(stats["engine"].get("posted", stats["pool"]["posted"]))


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


class Receiver(headrace.Protocol):
    """Calls `receive(self, lease)` for each lease; `lost` is set when the connection is gone."""

    def __init__(self, receive: Callable[[Any, Lease], None]) -> None:
        self.receive = receive
        self.received = 0
        self.ended = asyncio.Event()
        self.lost = asyncio.Event()
        self.error: BaseException | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def lease_received(self, lease: Lease) -> None:
        self.received += len(lease)
        try:
            self.receive(self, lease)
        except BaseException as error:
            self.error = error
            raise

    def eof_received(self) -> bool:
        self.ended.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


class Service:
    """A server on 127.0.0.1 and the protocols that it has made."""

    def __init__(self, loop: EventLoop, receive: Callable[[Any, Lease], None]) -> None:
        self.loop = loop
        self.receive = receive
        self.made: list[Receiver] = []
        self.accepted: asyncio.Queue[Receiver] = asyncio.Queue()

    def factory(self) -> Receiver:
        protocol = Receiver(self.receive)
        self.made.append(protocol)
        self.accepted.put_nowait(protocol)
        return protocol

    async def __aenter__(self) -> Self:
        self.server = await self.loop.create_server(self.factory, "127.0.0.1", 0)
        self.address = self.server.sockets[0].getsockname()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.server.close()
        for protocol in self.made:
            protocol.transport.abort()
        for protocol in self.made:
            await protocol.lost.wait()
            assert protocol.error is None
        await self.server.wait_closed()


async def send(address: Any, data: bytes) -> None:
    """One way, and to the end: returns when the server has closed its side as well."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(data)
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def exchange(address: Any, message: bytes, rounds: int) -> None:
    """`rounds` times: sends a message, and waits for its echo."""
    reader, writer = await asyncio.open_connection(*address)
    for number in range(rounds):
        sent = number.to_bytes(4, "big") + message
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
    writer.close()
    await writer.wait_closed()


async def lock_step(address: Any, data: bytes, size: int) -> None:
    """Sends pieces of `size` bytes, each when the server has answered the one before it with a byte."""
    reader, writer = await asyncio.open_connection(*address)
    for start in range(0, len(data), size):
        writer.write(data[start : start + size])
        await reader.readexactly(1)
    writer.close()
    await writer.wait_closed()


def echo(protocol: Receiver, lease: Lease) -> None:
    # Released while it's being sent: that must wait for the kernel.
    protocol.transport.write(lease)
    lease.release()


# --- what was promised about receiving


@pytest.mark.parametrize("keep", [False, True], ids=["released", "held"])
def test_a_replacement_is_posted_before_a_block_s_last_lease_is_delivered(bench: Bench, keep: bool) -> None:
    data = noise(40 * BLOCK)
    target = 4

    async def main(loop: EventLoop) -> None:
        at_delivery: list[int] = []
        hoard: list[Lease] = []

        def receive(protocol: Receiver, lease: Lease) -> None:
            at_delivery.append(posted(loop))
            if keep:
                hoard.append(lease)
            else:
                lease.release()

        async with Service(loop, receive) as service:
            sending = asyncio.ensure_future(send(service.address, data))
            protocol = await service.accepted.get()
            await protocol.ended.wait()
            protocol.transport.close()
            await sending
        # Forty blocks' worth of bytes came: each block's last lease was among these deliveries.
        assert protocol.received == len(data)
        assert set(at_delivery) == {target if bench.engine == "uring" else 1}
        if keep:
            assert b"".join(map(bytes, hoard)) == data
            for lease in hoard:
                lease.release()

    bench.run(main, target=target, maximum=64)


def test_a_held_memoryview_keeps_its_bytes_while_10000_receives_happen(bench: Bench) -> None:
    data = noise(10_000 * IN_PLACE)

    async def main(loop: EventLoop) -> None:
        held: list[tuple[memoryview, bytes]] = []
        receives = copies = complete = 0

        def receive(protocol: Receiver, lease: Lease) -> None:
            nonlocal receives, copies, complete
            receives += 1
            copies += lease.copied
            start = protocol.received - len(lease)
            if receives >= 2500 * len(held) and not lease.copied:
                held.append((memoryview(lease), data[start : protocol.received]))
            else:
                assert lease == data[start : protocol.received]
                lease.release()
            for view, expected in held:
                assert view == expected
            while complete < protocol.received // IN_PLACE:
                complete += 1
                protocol.transport.write(b"+")

        async with Service(loop, receive) as service:
            await lock_step(service.address, data, IN_PLACE)
        assert receives >= 10_000
        assert copies < receives // 2  # what is left at a block's end is small
        assert len(held) >= 4
        for view, expected in held:
            assert view == expected
            view.release()

    bench.run(main, target=4, maximum=12)


@pytest.mark.parametrize("size", [100, IN_PLACE], ids=["100 bytes each", "in place"])
def test_a_protocol_that_holds_everything_until_1_mib_has_come_completes(bench: Bench, size: int) -> None:
    data = noise(1 << 20)

    async def main(loop: EventLoop) -> None:
        hoard: list[Lease] = []
        answered = 0

        def receive(protocol: Receiver, lease: Lease) -> None:
            nonlocal answered
            hoard.append(lease)
            assert loop.stats()["pool"]["pinned"] <= 4
            while answered < min(protocol.received // size, (len(data) - 1) // size):
                answered += 1
                protocol.transport.write(b"+")
            if protocol.received == len(data):
                protocol.transport.write(b"+")

        async with Service(loop, receive) as service:
            await lock_step(service.address, data, size)
        assert len(hoard) >= len(data) // size
        assert b"".join(map(bytes, hoard)) == data
        in_place = sum(len(lease) for lease in hoard if not lease.copied)
        assert in_place <= 256 * 1024
        assert (in_place > 0) == (size > 2048)
        for lease in hoard:
            lease.release()

    bench.run(main)


def test_hoarders_and_a_fast_sender_cannot_starve_their_neighbours(bench: Bench) -> None:
    """Eight blocks; three connections keep all they get, one sends as fast as it can, four echo."""
    hoarded = [noise(16 * BLOCK, seed) for seed in range(3)]

    async def main(loop: EventLoop) -> None:
        hoards: dict[Receiver, list[Lease]] = {}
        most_pinned = 0

        def hoard(protocol: Receiver, lease: Lease) -> None:
            nonlocal most_pinned
            hoards.setdefault(protocol, []).append(lease)
            most_pinned = max(most_pinned, loop.stats()["pool"]["pinned"])

        def swallow(protocol: Receiver, lease: Lease) -> None:
            lease.release()

        async with (
            Service(loop, hoard) as hoarders,
            Service(loop, swallow) as sink,
            Service(loop, echo) as echoes,
        ):
            flood = asyncio.ensure_future(flood_until_cancelled(sink.address))
            greedy = [asyncio.ensure_future(send(hoarders.address, data)) for data in hoarded]
            neighbours = [asyncio.ensure_future(exchange(echoes.address, noise(4000), 100)) for _ in range(4)]
            await asyncio.gather(*neighbours)
            for _ in greedy:
                protocol = await hoarders.accepted.get()
                await protocol.ended.wait()
                protocol.transport.close()
            await asyncio.gather(*greedy)
            # Everything that can be pinned is: it makes no difference to a new neighbour, in place or not.
            assert most_pinned == 4
            await exchange(echoes.address, noise(4000), 100)
            await exchange(echoes.address, noise(200_000), 5)
            flood.cancel()
            await asyncio.wait([flood])
            assert flood.cancelled()
        assert sink.made[0].received > 0
        assert sorted(b"".join(map(bytes, hoard)) for hoard in hoards.values()) == sorted(hoarded)
        for leases in hoards.values():
            for lease in leases:
                lease.release()

    bench.run(main)


async def flood_until_cancelled(address: Any) -> None:
    _, writer = await asyncio.open_connection(*address)
    piece = bytes(BLOCK)
    try:
        while True:
            writer.write(piece)
            await writer.drain()
    finally:
        writer.transport.abort()


def test_a_pool_of_one_block_serves_many(bench: Bench) -> None:
    async def main(loop: EventLoop) -> None:
        async with Service(loop, echo) as service:
            await asyncio.gather(*(exchange(service.address, noise(5000, i), 20) for i in range(10)))

    pool = bench.run(main, target=1, maximum=1)
    assert pool.allocated == 1
    assert pool.leases == 0


# --- the life of a lease


def test_a_lease_that_is_released_while_it_is_sent_sends_the_right_bytes(bench: Bench) -> None:
    async def main(loop: EventLoop) -> None:
        async with Service(loop, echo) as service:
            await exchange(service.address, noise(1 << 20), 8)

    pool = bench.run(main)
    assert pool.leases > 0


def test_slices_are_sent_and_let_go_of(bench: Bench) -> None:
    def swap(protocol: Receiver, lease: Lease) -> None:
        with lease:
            protocol.transport.writelines([lease[:7], lease[7:]])

    async def main(loop: EventLoop) -> None:
        async with Service(loop, swap) as service:
            await exchange(service.address, noise(6000), 100)

    pool = bench.run(main)
    assert pool.collected == 0


def test_leases_outlive_their_connection_and_their_loop(
    engine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_POISON", "1")
    data = noise(100_000)
    hoard: list[Lease] = []

    async def main(loop: EventLoop) -> None:
        async with Service(loop, lambda protocol, lease: hoard.append(lease)) as service:
            sending = asyncio.ensure_future(send(service.address, data))
            protocol = await service.accepted.get()
            await protocol.ended.wait()
            protocol.transport.close()
            await sending

    pool = BufferPool(BLOCK, 4, 8)
    loop = headrace.new_event_loop(engine=engine_name, pool=pool)
    try:
        loop.run_until_complete(main(loop))
    finally:
        loop.close()
    assert any(not lease.copied for lease in hoard)
    assert b"".join(map(bytes, hoard)) == data
    assert pool.pinned > 0
    for lease in hoard:
        lease.release()
    assert (pool.free, pool.outstanding) == (pool.allocated, 0)


def test_leases_are_released_in_other_threads_while_the_loop_runs(bench: Bench) -> None:
    async def main(loop: EventLoop) -> None:
        handed: list[Lease] = []
        filled = threading.Condition()
        finished = False

        def hand_over(protocol: Receiver, lease: Lease) -> None:
            protocol.transport.write(lease)
            with filled:
                handed.append(lease)
                filled.notify()

        def worker() -> None:
            while True:
                with filled:
                    filled.wait_for(lambda: handed or finished)
                    if not handed:
                        return
                    lease = handed.pop()
                assert len(bytes(lease)) == len(lease)
                lease.release()

        threads = [threading.Thread(target=worker) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            async with Service(loop, hand_over) as service:
                await asyncio.gather(*(exchange(service.address, noise(20_000, i), 50) for i in range(4)))
        finally:
            with filled:
                finished = True
                filled.notify_all()
            for thread in threads:
                thread.join()

    bench.run(main)
