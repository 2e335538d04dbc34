"""Worlds for tests of engines: an engine, connected descriptors for it, and the peers at their other ends.

The real engines get real sockets, the simulated one virtual descriptors; both have the same methods.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conftest import descriptors
from headrace._engine import Engine
from headrace._pool import BufferPool

PATIENCE = 30.0  # real seconds that the simulated engine waits for another thread


class Peer:
    """The other end of a connection: a non-blocking socket that isn't the engine's."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end

    def send(self, data: bytes) -> int:
        """Sends what fits; 0 if nothing does."""
        try:
            return self.end.send(data)
        except BlockingIOError:
            return 0

    def receive(self, limit: int = 65536) -> bytes | None:
        """What's there; None if that's nothing (yet), empty at the end."""
        try:
            return self.end.recv(limit)
        except BlockingIOError:
            return None

    def finish(self) -> None:
        self.end.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.end.close()


class Sockets:
    """A world of real sockets."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cleanup = contextlib.ExitStack()

    def give(self, end: socket.socket) -> int:
        """A descriptor for the engine, closed at the end if it's still what it was."""
        end.setblocking(False)
        fd = end.detach()
        inode = os.fstat(fd).st_ino

        def close() -> None:
            with contextlib.suppress(OSError):
                if os.fstat(fd).st_ino == inode:
                    os.close(fd)

        self.cleanup.callback(close)
        return fd

    def engine(self, pool: BufferPool | None = None) -> Engine:
        from headrace._epoll import EpollEngine
        from headrace._uring import UringEngine

        engine = {"uring": UringEngine, "epoll": EpollEngine}[self.name](pool)
        self.cleanup.callback(retire, engine)
        engine.start()
        return engine

    def pair(self) -> tuple[int, Peer]:
        """A connected descriptor for the engine, and its peer; small buffers, so that a send can be cut short."""
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.cleanup.callback(far.close)
        return self.give(near), Peer(far)

    def quick_pair(self) -> tuple[int, Peer]:
        """The same, cheaper to make."""
        near, far = socket.socketpair()
        self.cleanup.callback(far.close)
        return self.give(near), Peer(far)

    def listener(self) -> tuple[int, Callable[[], Peer]]:
        """A listening descriptor for the engine, and what connects to it."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        address = listener.getsockname()

        def connect() -> Peer:
            end = socket.create_connection(address)
            self.cleanup.callback(end.close)
            return Peer(end)

        return self.give(listener), connect

    @contextlib.contextmanager
    def without_descriptors(self) -> Iterator[None]:
        """No further descriptor can be had."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()) + 1, hard))
        taken: list[int] = []
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.dup(0))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)

    def read(self, fd: int, size: int) -> bytes:
        """Takes bytes off the engine's end, behind its back."""
        return os.read(fd, size)


class VirtualPeer:
    """The same at a virtual descriptor."""

    def __init__(self, engine: Any, fd: int) -> None:
        self.engine, self.fd, self.closed = engine, fd, False

    def send(self, data: bytes) -> int:
        try:
            return int(self.engine.write(self.fd, data))
        except BlockingIOError:
            return 0

    def receive(self, limit: int = 65536) -> bytes | None:
        try:
            return bytes(self.engine.read(self.fd, limit))
        except BlockingIOError:
            return None

    def finish(self) -> None:
        self.engine.shutdown_virtual(self.fd)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.engine.close_virtual(self.fd)


class Simulation:
    """A world of virtual descriptors; one engine at a time."""

    name = "simulated"

    def __init__(self) -> None:
        self.cleanup = contextlib.ExitStack()
        self.made: Any = None

    def engine(self, pool: BufferPool | None = None) -> Engine:
        simulated = pytest.importorskip("headrace._simulated")
        self.made = simulated.SimulatedEngine(
            1, pool, faults=simulated.NO_FAULTS, descriptors=300, patience=PATIENCE
        )
        self.cleanup.callback(retire, self.made)
        self.made.start()
        return self.made  # type: ignore[no-any-return]

    def pair(self) -> tuple[int, VirtualPeer]:
        near, far = self.made.socketpair()
        return near, VirtualPeer(self.made, far)

    quick_pair = pair

    def listener(self) -> tuple[int, Callable[[], VirtualPeer]]:
        return self.made.listen("here", backlog=256), lambda: VirtualPeer(
            self.made, self.made.connect("here")
        )

    @contextlib.contextmanager
    def without_descriptors(self) -> Iterator[None]:
        taken: list[int] = []
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(self.made.listen(object()))
        yield
        for fd in taken:
            self.made.close_virtual(fd)

    def read(self, fd: int, size: int) -> bytes:
        return bytes(self.made.read(fd, size))


def retire(engine: Engine) -> None:
    """The end of an engine; every block must be back then."""
    engine.stop()
    engine.close()
    pool = engine.pool
    if pool is not None and not pool.outstanding:
        assert pool.free == pool.allocated, f"blocks are lost: {pool.stats()}"


World = Sockets | Simulation
