"""``loop.sock_*``: what they bring, that a cancelled one has consumed nothing, and what they refuse."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
import os
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from headrace import EventLoop

NOISE = os.urandom(1 << 16)


def stream_pair() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    return near, far


def datagram_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    return sock


def listening_socket() -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    return sock


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.done()


# ---- cancellation loses nothing ------------------------------------------------------------------------------


def into_buffer(loop: EventLoop, sock: socket.socket) -> Coroutine[Any, Any, bytes]:
    async def receive() -> bytes:
        buffer = bytearray(4096)
        return bytes(buffer[: await loop.sock_recv_into(sock, buffer)])

    return receive()


RECEIVERS: dict[str, Callable[[EventLoop, socket.socket], Coroutine[Any, Any, bytes]]] = {
    "recv": lambda loop, sock: loop.sock_recv(sock, 4096),
    "recv_into": into_buffer,
}


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_10_mib_arrive_whole_though_receives_are_cancelled_at_every_turn(
    loop: EventLoop, receiver: str
) -> None:
    size = 10 << 20
    near, far = stream_pair()
    sent = hashlib.sha256()

    def send() -> None:
        far.setblocking(True)
        left = size
        while left:
            piece = NOISE[: min(left, 1 + left % 3571)]
            sent.update(piece)
            far.sendall(piece)
            left -= len(piece)
        far.close()

    async def main() -> tuple[bytes, int]:
        received, cancellations = hashlib.sha256(), 0
        patience = itertools.cycle(range(5))
        while True:
            task = loop.create_task(RECEIVERS[receiver](loop, near))
            await turns(next(patience))
            task.cancel()
            try:
                data = await task
            except asyncio.CancelledError:
                cancellations += 1
                continue
            if not data:
                return received.digest(), cancellations
            received.update(data)

    thread = threading.Thread(target=send)
    thread.start()
    digest, cancellations = loop.run_until_complete(main())
    thread.join()
    near.close()
    assert digest == sent.digest()
    assert cancellations > 100


def test_a_receive_that_is_cancelled_when_data_are_there_leaves_them(loop: EventLoop) -> None:
    """The cancellation comes between the completion and the task's resumption."""
    near, far = stream_pair()

    async def main() -> None:
        for number in range(100):
            task = loop.create_task(loop.sock_recv(near, 100))
            await turns(1)
            far.send(b"%d" % number)
            await turns(number % 4)
            task.cancel()
            try:
                data = await task
            except asyncio.CancelledError:
                data = await loop.sock_recv(near, 100)
            assert data == b"%d" % number

    loop.run_until_complete(main())
    near.close()
    far.close()


def test_10_000_cancelled_accepts_leave_no_descriptor(loop: EventLoop) -> None:
    listener = listening_socket()

    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(10_000):
            task = loop.create_task(loop.sock_accept(listener))
            await turns(number % 3)
            await cancelled(task)
        assert len(os.listdir("/proc/self/fd")) == before

    loop.run_until_complete(main())
    listener.close()


def test_a_connection_that_a_cancelled_accept_might_have_had_is_the_next_one_s(loop: EventLoop) -> None:
    listener = listening_socket()

    async def main() -> None:
        for number in range(200):
            task = loop.create_task(loop.sock_accept(listener))
            await turns(number % 2)
            client = socket.create_connection(listener.getsockname())
            await turns(number % 5)
            task.cancel()
            try:
                connection, address = await task
            except asyncio.CancelledError:
                connection, address = await loop.sock_accept(listener)
            assert address == client.getsockname()
            assert connection.gettimeout() == 0
            connection.close()
            client.close()

    loop.run_until_complete(main())
    listener.close()


def test_cancelled_datagram_receives_lose_none(loop: EventLoop) -> None:
    near, far = datagram_socket(), datagram_socket()

    async def main() -> None:
        for number in range(300):
            task = loop.create_task(loop.sock_recvfrom(near, 100))
            await turns(number % 2)
            far.sendto(b"%d" % number, near.getsockname())
            await turns(number % 4)
            task.cancel()
            try:
                data, address = await task
            except asyncio.CancelledError:
                data, address = await loop.sock_recvfrom(near, 100)
            assert (data, address) == (b"%d" % number, far.getsockname())

    loop.run_until_complete(main())
    near.close()
    far.close()


# ---- several at a time ---------------------------------------------------------------------------------------


def test_many_may_accept_from_one_listener(loop: EventLoop) -> None:
    listener = listening_socket()

    async def main() -> None:
        accepting = [loop.create_task(loop.sock_accept(listener)) for _ in range(50)]
        await turns(2)
        for task in accepting[::2]:
            await cancelled(task)
        clients = [socket.create_connection(listener.getsockname()) for _ in range(25)]
        accepted = await asyncio.gather(*accepting[1::2])
        assert sorted(address for _, address in accepted) == sorted(each.getsockname() for each in clients)
        for each in [*clients, *(connection for connection, _ in accepted)]:
            each.close()

    loop.run_until_complete(main())
    listener.close()


def test_many_may_send_and_receive_on_one_socket(loop: EventLoop) -> None:
    """Each datagram of a full Unix socket waits for its turn; each receiver gets one."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    near.setblocking(False)
    far.setblocking(False)

    async def main() -> None:
        data = [b"%d" % number for number in range(500)]
        receiving = [loop.create_task(loop.sock_recv(near, 100)) for _ in data]
        await turns(2)
        sending = [loop.create_task(loop.sock_sendall(far, each)) for each in data]
        await asyncio.gather(*sending)
        assert sorted(await asyncio.gather(*receiving)) == sorted(data)

    loop.run_until_complete(main())
    near.close()
    far.close()


def test_a_wait_outlives_a_run_of_the_loop(loop: EventLoop) -> None:
    """Between runs nothing is in flight; the next run goes on waiting, here in another thread."""
    near, far = stream_pair()
    task = loop.create_task(loop.sock_recv(near, 100))
    loop.run_until_complete(turns(3))
    assert not task.done()
    far.send(b"later")
    result: list[bytes] = []
    thread = threading.Thread(target=lambda: result.append(loop.run_until_complete(task)))
    thread.start()
    thread.join()
    assert result == [b"later"]
    near.close()
    far.close()


# ---- each call -----------------------------------------------------------------------------------------------


def test_sendall_sends_all_to_a_slow_reader(loop: EventLoop) -> None:
    near, far = stream_pair()
    data = NOISE * 64

    async def main() -> None:
        sending = loop.create_task(loop.sock_sendall(near, memoryview(data).cast("I")))
        received = bytearray()
        while len(received) < len(data):
            piece = await loop.sock_recv(far, 50_000)
            assert piece
            received += piece
        await sending
        assert received == data
        near.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(far, 1) == b""
        assert await loop.sock_recv_into(far, bytearray(1)) == 0

    loop.run_until_complete(main())
    near.close()
    far.close()


def test_sendall_to_a_peer_that_has_gone(loop: EventLoop) -> None:
    near, far = stream_pair()

    async def main() -> None:
        sending = loop.create_task(loop.sock_sendall(near, NOISE * 64))
        await turns(3)
        far.close()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            await sending

    loop.run_until_complete(main())
    near.close()


def test_datagrams_to_and_fro(loop: EventLoop) -> None:
    near, far = datagram_socket(), datagram_socket()

    async def main() -> None:
        receiving = loop.create_task(loop.sock_recvfrom(near, 65_535))
        await turns(2)
        assert await loop.sock_sendto(far, NOISE[:65_507], near.getsockname()) == 65_507
        assert await receiving == (NOISE[:65_507], far.getsockname())
        assert await loop.sock_sendto(far, b"", near.getsockname()) == 0
        assert await loop.sock_recvfrom(near, 10) == (b"", far.getsockname())
        buffer = bytearray(8)
        filling = loop.create_task(loop.sock_recvfrom_into(near, buffer))
        await turns(2)
        await loop.sock_sendto(far, b"0123456789", near.getsockname())
        assert await filling == (8, far.getsockname())
        assert buffer == b"01234567"
        await loop.sock_sendto(far, b"abcdef", near.getsockname())
        assert await loop.sock_recvfrom_into(near, buffer, 3) == (3, far.getsockname())
        assert buffer == b"abc34567"

    loop.run_until_complete(main())
    near.close()
    far.close()


def test_errors_of_the_system_are_raised(loop: EventLoop) -> None:
    async def main() -> None:
        with socket.socket() as unconnected:
            unconnected.setblocking(False)
            with pytest.raises(OSError) as caught:
                await loop.sock_recv(unconnected, 1)
            assert caught.value.errno == errno.ENOTCONN
            with pytest.raises(OSError) as caught:
                await loop.sock_accept(unconnected)
            assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError) as caught:
            await loop.sock_recv(unconnected, 1)
        assert caught.value.errno == errno.EBADF

    loop.run_until_complete(main())


def test_a_reset_ends_a_receive_that_waits(loop: EventLoop) -> None:
    listener = listening_socket()

    async def main() -> None:
        client = socket.create_connection(listener.getsockname())
        connection, _ = await loop.sock_accept(listener)
        receiving = loop.create_task(loop.sock_recv(connection, 1))
        await turns(2)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        with pytest.raises(ConnectionResetError):
            await receiving
        connection.close()

    loop.run_until_complete(main())
    listener.close()


def test_a_socket_may_be_closed_as_soon_as_its_receive_was_cancelled(loop: EventLoop) -> None:
    """The peer sees the end at once, and whoever gets the number next isn't disturbed."""

    async def main() -> None:
        for _ in range(50):
            near, far = stream_pair()
            receiving = loop.create_task(loop.sock_recv(near, 1))
            await turns(2)
            await cancelled(receiving)
            near.close()
            other, peer = stream_pair()
            waiting = loop.create_task(loop.sock_recv(other, 1))
            assert await loop.sock_recv(far, 1) == b""
            await loop.sock_sendall(peer, b"x")
            assert await waiting == b"x"
            for each in (far, other, peer):
                each.close()

    loop.run_until_complete(main())


CALLS: dict[str, Callable[[EventLoop, Any], Coroutine[Any, Any, Any]]] = {
    "recv": lambda loop, sock: loop.sock_recv(sock, 1),
    "recv_into": lambda loop, sock: loop.sock_recv_into(sock, bytearray(1)),
    "recvfrom": lambda loop, sock: loop.sock_recvfrom(sock, 1),
    "recvfrom_into": lambda loop, sock: loop.sock_recvfrom_into(sock, bytearray(1)),
    "sendall": lambda loop, sock: loop.sock_sendall(sock, b"x"),
    "sendto": lambda loop, sock: loop.sock_sendto(sock, b"x", ("127.0.0.1", 9)),
    "accept": lambda loop, sock: loop.sock_accept(sock),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_transport_s_socket_is_refused(loop: EventLoop, call: str) -> None:
    near, far = stream_pair()

    async def main() -> None:
        transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, near)
        with pytest.raises(RuntimeError, match="is used by transport"):
            await CALLS[call](loop, near)
        transport.close()
        await turns(3)

    loop.run_until_complete(main())
    far.close()


@pytest.mark.parametrize("call", CALLS)
def test_sockets_that_would_block_the_loop_are_refused(loop: EventLoop, call: str) -> None:
    near, far = stream_pair()

    async def main() -> None:
        near.setblocking(True)
        loop.set_debug(True)
        with pytest.raises(ValueError, match="must be non-blocking"):
            await CALLS[call](loop, near)
        loop.set_debug(False)
        near.setblocking(False)
        with (
            ssl.create_default_context().wrap_socket(
                near, do_handshake_on_connect=False, server_hostname="a"
            ) as tls,
            pytest.raises(TypeError, match="SSLSocket"),
        ):
            await CALLS[call](loop, tls)

    loop.run_until_complete(main())
    far.close()
