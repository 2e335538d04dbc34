"""KeyboardInterrupt and SystemExit from a callback leave the loop, as with asyncio, and lose nothing else.

Ctrl-C runs the handler of SIGINT wherever the interpreter is: also in the middle of a protocol's callback. A program
that catches it may run the loop again, at least to close its connections in order.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import headrace
from streams import KINDS, Buffered, Leases, Recorder, connected, in_thread, receive_all, send_all


class Once:
    """Raises KeyboardInterrupt the first time that it's called."""

    def __init__(self) -> None:
        self.raised = False

    def __call__(self, recorder: Recorder | None = None) -> None:
        if not self.raised:
            self.raised = True
            raise KeyboardInterrupt


def interrupted(loop: headrace.EventLoop, main: Coroutine[Any, Any, None]) -> None:
    """Runs ``main`` over one interrupt to its end."""
    task = loop.create_task(main)
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(task)
    loop.run_until_complete(task)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("callback", ["made", "received"])
def test_bytes_that_come_after_an_interrupt(loop: headrace.EventLoop, kind: str, callback: str) -> None:
    data = os.urandom(100_000)

    async def main() -> None:
        protocol = KINDS[kind](**{callback: Once()})
        server = await loop.create_server(lambda: protocol, "127.0.0.1", 0)
        async with server:
            peer = socket.create_connection(server.sockets[0].getsockname())
            await in_thread(send_all, peer, data)
            await protocol.seen("lost")
        assert protocol.data == data
        assert protocol.events.count("lost") == 1

    interrupted(loop, main())


def test_an_interrupt_while_a_buffer_is_asked_for(loop: headrace.EventLoop) -> None:
    data = os.urandom(20_000)

    async def main() -> None:
        protocol = Buffered(get_buffer=Once())
        _, peer = await connected(protocol)
        await in_thread(send_all, peer, data)
        await protocol.seen("lost")
        assert protocol.data == data

    interrupted(loop, main())


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_while_held_bytes_are_passed_on(loop: headrace.EventLoop, kind: str) -> None:
    data = os.urandom(300_000)

    async def main() -> None:
        protocol = KINDS[kind](received=lambda self: self.transport.pause_reading())
        transport, peer = await connected(protocol)
        peer.sendall(b"x")
        await protocol.seen("received")
        sending = asyncio.ensure_future(in_thread(send_all, peer, data))
        while not loop.stats()["pool"]["outstanding"]:  # bytes are held
            await asyncio.sleep(0.001)
        protocol.on["received"] = Once()
        transport.resume_reading()
        await protocol.seen("lost")
        await sending
        assert protocol.data == b"x" + data

    interrupted(loop, main())


def test_an_interrupt_at_the_end_of_the_stream(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        protocol = Leases(eof=Once())
        _, peer = await connected(protocol)
        peer.close()
        await protocol.seen("lost")
        assert protocol.events == ["made", "eof", "lost"]

    interrupted(loop, main())


@pytest.mark.parametrize("callback", ["pause", "resume"])
@pytest.mark.parametrize("high", [0, 65536])
def test_an_interrupt_in_flow_control(loop: headrace.EventLoop, callback: str, high: int) -> None:
    data = os.urandom(2 << 20)

    async def main() -> None:
        protocol = Leases(**{callback: Once()})
        transport, peer = await connected(protocol, receive_buffer=8192)
        transport.set_write_buffer_limits(high=high)
        loop.call_soon(transport.write, data)
        loop.call_soon(transport.close)
        received = asyncio.ensure_future(in_thread(receive_all, peer))
        await protocol.seen("lost")
        assert await received == data

    interrupted(loop, main())


def test_an_interrupt_in_connection_lost(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        protocol = Leases(lost=Once())
        transport, peer = await connected(protocol)
        transport.close()
        assert await in_thread(receive_all, peer) == b""
        assert protocol.events == ["made", "lost"]
        assert transport.get_extra_info("socket").fileno() == -1

    interrupted(loop, main())


def test_an_interrupt_in_the_factory_drops_that_connection_alone(loop: headrace.EventLoop) -> None:
    once = Once()
    made: list[Leases] = []

    def factory() -> Leases:
        once()
        made.append(Leases())
        return made[-1]

    async def main() -> None:
        server = await loop.create_server(factory, "127.0.0.1", 0)
        async with server:
            address = server.sockets[0].getsockname()
            with socket.create_connection(address, 20) as first:
                assert await in_thread(first.recv, 1) == b""
            with socket.create_connection(address, 20):
                while not made:
                    await asyncio.sleep(0.001)
            await made[0].seen("lost")

    interrupted(loop, main())


def test_the_rest_of_the_batch_is_delivered_after_an_interrupt(loop: headrace.EventLoop) -> None:
    """Many connections have bytes in one turn; the callback of one raises."""

    async def main() -> None:
        once: Callable[[Any], None] = Once()
        protocols = [Leases(received=once) for _ in range(20)]
        pairs = [await connected(protocol) for protocol in protocols]
        for _, peer in pairs:
            peer.sendall(b"x")
        for _, peer in pairs:
            peer.close()
        for protocol in protocols:
            await protocol.seen("lost")
            assert protocol.data == b"x"
            assert protocol.events == ["made", "received", "eof", "lost"]

    interrupted(loop, main())
