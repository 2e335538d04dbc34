"""A loop turn ends, whatever peers do: timers and other callbacks get their turn."""

from __future__ import annotations

import asyncio
import collections
import socket
import threading
from typing import Any

import headrace

STREAM_BYTES = 64 * 1024 * 1024
# What is posted ahead may all be delivered in one turn, and nearly as much again that came during the wait.
TURN_BYTES = 2 * 8 * 256 * 1024


class PausingEcho(headrace.Protocol):
    """Echoes, and doesn't read while its peer doesn't. So receives are armed anew all the time."""

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.received: collections.Counter[int] = collections.Counter()
        self.lost = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def lease_received(self, lease: headrace.Lease) -> None:
        self.received[self.loop.turns] += len(lease)
        self.transport.write(lease)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


def converse(address: Any) -> None:
    """A peer in a thread of its own that sends as fast as it can, and reads as fast."""
    with socket.create_connection(address) as sock:
        sock.settimeout(50)

        def send() -> None:
            for _ in range(STREAM_BYTES >> 20):
                sock.sendall(bytes(1 << 20))
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while sock.recv(1 << 20):
            pass
        sender.join()


def test_a_fast_peer_is_served_over_many_turns(loop):
    """io_uring may complete a receive within the very flush that arms it: still that's the next turn's."""
    echo = PausingEcho(loop)
    server = loop.run_until_complete(loop.create_server(lambda: echo, "127.0.0.1", 0))
    peer = threading.Thread(target=converse, args=(server.sockets[0].getsockname(),))
    peer.start()
    assert loop.run_until_complete(echo.lost) is None
    peer.join()
    server.close()
    loop.run_until_complete(server.wait_closed())
    assert echo.received.total() == STREAM_BYTES
    assert max(echo.received.values()) <= TURN_BYTES
