"""A loop belongs to the thread that runs it, and only as long as it runs."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

import headrace

T = TypeVar("T")

STREAM = random.Random(11).randbytes(8 * 1024 * 1024)


def in_thread(function: Callable[[], T]) -> T:
    """The result of ``function``, called in a new thread; what it raises is raised here."""
    outcome: list[Callable[[], T]] = []

    def run() -> None:
        try:
            result = function()
        except BaseException as caught:
            error = caught
            outcome.append(lambda: raise_(error))
        else:
            outcome.append(lambda: result)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(40)
    assert not thread.is_alive()
    return outcome[0]()


def raise_(error: BaseException) -> Any:
    raise error


class Echo(headrace.Protocol):
    """Echoes, and stops the loop once when so many bytes have come, and at the end of the connection."""

    def __init__(self, stop_after: int) -> None:
        self.stop_after = stop_after
        self.received = 0
        self.threads: set[int] = set()
        self.ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def lease_received(self, lease: headrace.Lease) -> None:
        with lease:
            before, self.received = self.received, self.received + len(lease)
            self.threads.add(threading.get_ident())
            self.transport.write(lease)
        if before < self.stop_after <= self.received:
            asyncio.get_running_loop().stop()

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        assert exc is None
        self.ended = True
        asyncio.get_running_loop().stop()


def exchange(sock: socket.socket) -> bytes:
    """Sends the stream and reads the echo at the same time, as the echo isn't kept anywhere."""
    sender = threading.Thread(target=lambda: (sock.sendall(STREAM), sock.shutdown(socket.SHUT_WR)))
    sender.start()
    received = bytearray()
    while data := sock.recv(1 << 16):
        received += data
    sender.join(10)
    sock.close()
    return bytes(received)


@pytest.mark.timeout(60)
def test_made_in_one_thread_run_in_two_others_closed_in_a_fourth(engine_name: str) -> None:
    """With a connection in mid-stream between the two runs, in both directions."""
    loop = in_thread(lambda: headrace.new_event_loop(engine=engine_name))
    echo = Echo(stop_after=1024 * 1024)
    client = socket.socket()
    client.settimeout(30)
    received: list[bytes] = []
    talker = threading.Thread(target=lambda: received.append(exchange(client)))

    async def serve() -> asyncio.Server:
        return await loop.create_server(lambda: echo, "127.0.0.1", 0)

    def first() -> asyncio.Server:
        server = loop.run_until_complete(serve())
        client.connect(server.sockets[0].getsockname())
        talker.start()
        loop.run_forever()
        return server

    server = in_thread(first)
    assert 1024 * 1024 <= echo.received < len(STREAM)
    assert not echo.ended

    def second() -> None:
        loop.run_forever()
        server.close()
        loop.run_until_complete(server.wait_closed())

    in_thread(second)
    talker.join(30)
    assert received == [STREAM]
    assert echo.ended
    assert echo.received == len(STREAM)
    assert loop.engine_name == engine_name
    assert loop.stats()["pool"]["leased"] == 0
    in_thread(loop.close)
    assert loop.is_closed()


def test_a_running_loop_refuses_a_second_thread(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        def run_too() -> str:
            with pytest.raises(RuntimeError, match="already running"):
                loop.run_forever()
            with pytest.raises(RuntimeError, match="running event loop"):
                loop.close()
            return "refused"

        assert await asyncio.to_thread(run_too) == "refused"

    loop.run_until_complete(main())


def test_two_loops_in_two_threads_talk_to_each_other(engine_name: str) -> None:
    """Each serves the other's client, and wakes the other a thousand times."""
    rounds = 1000
    ready = threading.Barrier(2, timeout=20)
    addresses: dict[int, tuple[str, int]] = {}
    loops: dict[int, headrace.EventLoop] = {}
    engines: list[str | None] = []

    async def main(number: int) -> bytes:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, headrace.EventLoop)
        loops[number] = loop
        server = await loop.create_server(lambda: CrossEcho(), "127.0.0.1", 0)
        addresses[number] = server.sockets[0].getsockname()
        woken = 0
        all_woken = loop.create_future()
        done = loop.create_future()

        def wake() -> None:
            nonlocal woken
            woken += 1
            if woken == rounds:
                all_woken.set_result(None)

        wakes[number] = wake
        dones[number] = lambda: done.set_result(None)
        await asyncio.to_thread(ready.wait)
        other = 1 - number
        reader, writer = await asyncio.open_connection(*addresses[other])
        data = STREAM[number * 1_000_000 :][:1_000_000]
        writer.write(data)
        for _ in range(rounds):
            loops[other].call_soon_threadsafe(wakes[other])
            await asyncio.sleep(0)
        received = await reader.readexactly(len(data))
        assert received == data
        writer.close()
        await writer.wait_closed()
        await all_woken
        loops[other].call_soon_threadsafe(dones[other])
        await done  # the other still needs this one's server
        server.close()
        await server.wait_closed()
        engines.append(loop.engine_name)
        return received

    wakes: dict[int, Callable[[], None]] = {}
    dones: dict[int, Callable[[], None]] = {}
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(headrace.run(main(n), engine=engine_name)))
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == sorted([STREAM[:1_000_000], STREAM[1_000_000:2_000_000]])
    assert engines == [engine_name] * 2


class CrossEcho(headrace.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def lease_received(self, lease: headrace.Lease) -> None:
        with lease:
            self.transport.write(lease)
