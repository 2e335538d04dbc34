"""Load for web applications: connections that each wait for an answer before they ask again.

``python -m bench.web_load APPLICATION -p PORT -P PID -n CONNECTIONS -t SECONDS -w WARMUP`` prints one JSON line
with the server's CPU time per request, as ``loadgen`` does. An answer that isn't the first one's equal in length,
status and body ends the run with an error. Plain sockets and epoll: what a client library costs would be the
limit, and the server would idle.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

BODY = b"x" * 64
GET = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n\r\n"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
MASK = b"\x01\x02\x03\x04"
FRAME_TO_SERVER = (  # RFC 6455, section 5.2: final, binary, masked
    bytes([0x82, 0x80 | len(BODY)]) + MASK + bytes(byte ^ MASK[at % 4] for at, byte in enumerate(BODY))
)
FRAME_TO_CLIENT = bytes([0x82, len(BODY)]) + BODY
REPLY_TIMEOUT = 10.0  # seconds


class LoadError(RuntimeError):
    """The server answered something else than it should, or nothing."""


def cpu_ns(pid: int) -> int:
    """How long the threads of a process were on a processor."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def receive(peer: socket.socket, complete: Callable[[bytes], bool]) -> bytes:
    """Blocking, for what comes before the measured time."""
    data = b""
    while not complete(data):
        more = peer.recv(65536)
        if not more:
            raise LoadError(f"closed after {data!r}")
        data += more
    return data


def http_length(data: bytes) -> int | None:
    """Bytes of a whole response with Content-Length, or None while its head isn't complete."""
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        return None
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    if not head.startswith(b"HTTP/1.1 200") or not length:
        raise LoadError(f"answered {head!r}")
    return len(head) + len(end) + int(length[1])


def http_complete(data: bytes) -> bool:
    length = http_length(data)
    return length is not None and len(data) >= length


@dataclass
class Connection:
    """One client: what it has of the answer that it waits for."""

    peer: socket.socket
    request: bytes
    reply: int  # bytes
    ends_with: bytes
    pending: bytearray = field(default_factory=bytearray)

    @classmethod
    def open(cls, application: str, port: int) -> Connection:
        """Connected, upgraded where that's asked for, and answered once."""
        peer = socket.create_connection(("127.0.0.1", port), REPLY_TIMEOUT)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if application == "websockets":
            peer.sendall(UPGRADE)
            switched = receive(peer, lambda data: data.endswith(b"\r\n\r\n"))
            if not switched.startswith(b"HTTP/1.1 101"):
                raise LoadError(f"answered {switched!r}")
            peer.setblocking(False)
            return cls(peer, FRAME_TO_SERVER, len(FRAME_TO_CLIENT), FRAME_TO_CLIENT)
        peer.sendall(GET)
        first = receive(peer, http_complete)
        if not first.endswith(BODY):
            raise LoadError(f"answered {first!r}")
        peer.setblocking(False)
        return cls(peer, GET, len(first), BODY)

    def ask(self) -> None:
        if self.peer.send(self.request) != len(self.request):
            raise LoadError("a request of some bytes didn't fit in the socket's buffer")

    def answered(self) -> bool:
        """Takes what has come; whether the answer is whole."""
        data = self.peer.recv(65536)
        if not data:
            raise LoadError("closed by the server")
        self.pending += data
        if len(self.pending) < self.reply:
            return False
        if len(self.pending) > self.reply or not self.pending.endswith(self.ends_with):
            raise LoadError(f"answered {bytes(self.pending)!r}")
        self.pending.clear()
        return True


class Load:
    """All connections of a run."""

    def __init__(self, application: str, port: int, connections: int) -> None:
        self.connections = [Connection.open(application, port) for _ in range(connections)]
        self.by_descriptor = {each.peer.fileno(): each for each in self.connections}
        self.epoll = select.epoll()
        for descriptor in self.by_descriptor:
            self.epoll.register(descriptor, select.EPOLLIN)

    def run(self, seconds: float) -> int:
        """Answers received in that time; each connection's next question is under way."""
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            ready = self.epoll.poll(REPLY_TIMEOUT)
            if not ready:
                raise LoadError(f"no answer within {REPLY_TIMEOUT:g} s")
            for descriptor, _ in ready:
                connection = self.by_descriptor[descriptor]
                if connection.answered():
                    count += 1
                    connection.ask()
        return count

    def close(self) -> None:
        self.epoll.close()
        for connection in self.connections:
            connection.peer.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.web_load")
    parser.add_argument("application", choices=["aiohttp", "uvicorn", "websockets"])
    parser.add_argument("-p", dest="port", type=int, required=True)
    parser.add_argument("-P", dest="pid", type=int, required=True)
    parser.add_argument("-n", dest="connections", type=int, default=1)
    parser.add_argument("-t", dest="seconds", type=float, default=0.3)
    parser.add_argument("-w", dest="warmup", type=float, default=0.1)
    given = parser.parse_args()
    load = Load(given.application, given.port, given.connections)
    try:
        for connection in load.connections:
            connection.ask()
        load.run(given.warmup)
        begun, cpu = time.monotonic(), cpu_ns(given.pid)
        count = load.run(given.seconds)
        cpu, elapsed = cpu_ns(given.pid) - cpu, time.monotonic() - begun
    finally:
        load.close()
    if not count:
        raise LoadError("no answer in the measured time")
    print(json.dumps({"cpu_us_per_request": cpu / 1e3 / count, "requests_per_second": count / elapsed}))


if __name__ == "__main__":
    main()
