"""What the loop inherits from asyncio works through its turn, on both engines: selector, signals, processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import pytest

import headrace
from streams import Leases, connected, in_thread


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    with near, far:
        yield near, far


# ---- descriptors ---------------------------------------------------------------------------------------------


def test_a_reader_is_called_as_long_as_there_is_something_to_read(
    loop: headrace.EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Level-triggered: a byte that isn't read is told again."""
    near, far = pair
    calls = 0

    def ready() -> None:
        nonlocal calls
        calls += 1
        if calls < 5:
            return  # look away
        assert near.recv(100) == b"x"
        loop.call_later(0.02, loop.stop)

    loop.add_reader(near, ready)
    far.send(b"x")
    loop.run_forever()
    assert calls == 5
    assert loop.remove_reader(near)
    assert not loop.remove_reader(near)


def test_a_writer_is_called_while_there_is_room(
    loop: headrace.EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    written = 0

    def ready() -> None:
        nonlocal written
        try:
            written += near.send(bytes(4096))
        except BlockingIOError:
            pytest.fail("called without room")
        if written >= 1 << 20:
            loop.remove_writer(near)
            loop.stop()

    def drain() -> None:
        far.recv(65536)

    loop.add_writer(near, ready)
    loop.add_reader(far, drain)
    loop.run_forever()
    loop.remove_reader(far)
    assert written >= 1 << 20


def test_readers_change_in_the_middle_of_a_turn(
    loop: headrace.EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    seen: list[str] = []

    def first() -> None:
        seen.append("first")
        loop.add_reader(near, second)  # in its place

    def second() -> None:
        seen.append("second")
        loop.remove_reader(near)
        loop.call_later(0.01, loop.stop)

    loop.add_reader(near, first)
    far.send(b"x")
    loop.run_forever()
    assert seen == ["first", "second"]


def test_what_a_reader_raises_is_reported_and_what_interrupts_it_is_not_lost(
    loop: headrace.EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    interrupts = [True]

    def ready() -> None:
        if interrupts:
            interrupts.pop()
            raise KeyboardInterrupt
        assert near.recv(10) == b"x"
        loop.stop()

    loop.add_reader(near, ready)
    far.send(b"x")
    with pytest.raises(KeyboardInterrupt):
        loop.run_forever()
    loop.run_forever()
    loop.remove_reader(near)


def test_a_registered_descriptor_is_closed_by_its_owner(
    loop: headrace.EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """The loop holds nothing of the user's: closing the file closes it for the other side at once."""
    near, far = pair
    loop.add_reader(near, pytest.fail)
    loop.run_until_complete(asyncio.sleep(0))
    loop.remove_reader(near)
    near.close()
    assert far.recv(1) == b""


def test_sock_methods(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
            listener.setblocking(False)
            client.setblocking(False)
            accepting = asyncio.ensure_future(loop.sock_accept(listener))
            await loop.sock_connect(client, listener.getsockname())
            served, _ = await accepting
            with served:
                data = os.urandom(1 << 20)
                sending = asyncio.ensure_future(loop.sock_sendall(client, data))
                got = bytearray()
                while len(got) < len(data):
                    got += await loop.sock_recv(served, 65536)
                await sending
                assert got == data
                receiving = asyncio.ensure_future(loop.sock_recv_into(client, buffer := bytearray(10)))
                await asyncio.sleep(0)
                await loop.sock_sendall(served, b"answer")
                assert await receiving == 6
                assert buffer[:6] == b"answer"

    loop.run_until_complete(main())


def test_the_descriptor_of_a_transport_is_its_own(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        protocol = Leases()
        transport, peer = await connected(protocol)
        descriptor = transport.get_extra_info("socket").fileno()
        for call in (
            lambda: loop.add_reader(descriptor, print),
            lambda: loop.add_writer(descriptor, print),
            lambda: loop.remove_reader(descriptor),
            lambda: loop.remove_writer(descriptor),
        ):
            with pytest.raises(RuntimeError, match="is used by transport"):
                call()
        sock = transport._sock
        with pytest.raises(RuntimeError, match="is used by transport"):
            await loop.sock_recv(sock, 1)
        transport.close()
        await protocol.seen("lost")
        peer.close()

    loop.run_until_complete(main())


# ---- pipes and processes -------------------------------------------------------------------------------------


def test_pipes(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        read_end, write_end = os.pipe()
        reader = asyncio.StreamReader()
        source, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb", 0)
        )
        sink, protocol = await loop.connect_write_pipe(
            asyncio.streams.FlowControlMixin, os.fdopen(write_end, "wb", 0)
        )
        writer = asyncio.StreamWriter(sink, protocol, None, loop)
        data = os.urandom(1 << 20)
        writer.write(data)
        received = asyncio.ensure_future(reader.readexactly(len(data)))
        await writer.drain()
        assert await received == data
        writer.close()
        assert await reader.read() == b""
        source.close()

    loop.run_until_complete(main())


def test_subprocesses(engine_name: str) -> None:
    """`headrace.run`, as a program does it: the watcher of child processes may want the loop of the main thread."""

    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import sys; data = sys.stdin.buffer.read(); sys.stdout.buffer.write(data[::-1]); sys.exit(3)",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        data = os.urandom(300_000)
        out, _ = await process.communicate(data)
        assert out == data[::-1]
        assert process.returncode == 3

    headrace.run(main(), engine=engine_name)


# ---- signals -------------------------------------------------------------------------------------------------


def test_a_signal_handler_runs_in_the_loop(loop: headrace.EventLoop) -> None:
    seen: list[tuple[str, bool]] = []

    def caught(name: str) -> None:
        seen.append((name, loop.is_running()))
        loop.stop()

    before = signal.getsignal(signal.SIGUSR1)
    loop.add_signal_handler(signal.SIGUSR1, caught, "now")
    loop.call_later(0.01, os.kill, os.getpid(), signal.SIGUSR1)
    loop.run_forever()
    # One that comes between two runs is served by the next.
    os.kill(os.getpid(), signal.SIGUSR1)
    loop.run_forever()
    assert seen == [("now", True)] * 2
    assert loop.remove_signal_handler(signal.SIGUSR1)
    assert not loop.remove_signal_handler(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) in (before, signal.SIG_DFL)


def test_a_handler_s_signal_wakes_a_sleeping_loop(loop: headrace.EventLoop) -> None:
    """From another thread's kill, while the loop waits for nothing in particular."""
    loop.add_signal_handler(signal.SIGUSR1, loop.stop)
    thread = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGUSR1))
    loop.call_soon(lambda: loop.call_soon(thread.start))
    loop.run_forever()
    thread.join()
    loop.remove_signal_handler(signal.SIGUSR1)


def test_the_wake_up_descriptor_is_given_back(loop: headrace.EventLoop) -> None:
    async def nothing() -> None:
        pass

    with socket.socket() as mine:
        mine.setblocking(False)
        before = signal.set_wakeup_fd(mine.fileno())
        try:
            loop.run_until_complete(nothing())
            assert signal.set_wakeup_fd(mine.fileno()) == mine.fileno()
        finally:
            signal.set_wakeup_fd(before)


# ---- names ---------------------------------------------------------------------------------------------------


def test_names_are_resolved_in_the_executor(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        found = await loop.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
        assert {address[4][0] for address in found} <= {"127.0.0.1", "::1"}
        assert await in_thread(threading.current_thread) is not threading.main_thread()

    loop.run_until_complete(main())
