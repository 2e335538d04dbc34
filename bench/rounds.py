"""Interleaved rounds: A B C A B C ..., so that what disturbs the machine disturbs every peer alike.

Each server runs in a process of its own on the first processor, the load generator on the second; with one
processor they share it, and the result says so. Only numbers of the same round are compared with each other.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from bench.native.build import program
from bench.peers import TLS, Peer, find_peer

__all__ = ["Placement", "Result", "Row", "ServerError", "Settings", "run_row"]

START_TIMEOUT = 20.0  # seconds
STOP_TIMEOUT = 5.0
LOAD_TIMEOUT = 30.0
MANY_CONNECTIONS = 5000
CHECK_SECONDS = 0.05

# What a server's cost is measured in, per mode of the load generator.
METRICS = {
    "echo": "cpu_us_per_request",
    "sink": "cpu_seconds_per_gigabyte",
    "source": "cpu_seconds_per_gigabyte",
    "storm": "cpu_us_per_connection",
    "handshake": "cpu_us_per_request",
    "resume": "cpu_us_per_request",
    "idle": "bytes_per_connection",
    "datagram-echo": "cpu_us_per_request",
    "datagram-sink": "cpu_us_per_request",
    "micro": "cpu_us_per_event",
    "web": "cpu_us_per_request",
    "client": "cpu_us_per_request",
}
TLS_LOADS = tuple(TLS + load for load in ("echo", "sink", "source", "idle", "handshake", "resume"))
LOADS = ("echo", "sink", "source", "storm", "idle", "datagram-echo", "datagram-sink", *TLS_LOADS)
SIZED = ("echo", "sink", "idle", "datagram-echo", "datagram-sink")

Measurement = dict[str, Any]  # what the load generator prints


class ServerError(RuntimeError):
    """A peer didn't start, or a run against it failed; the text has what it wrote."""


@dataclass(frozen=True)
class Row:
    """One line of a table: what the load generator does, or work inside this process (mode "micro").

    A mode that begins with "tls-" is one over TLS; full handshakes and resumed ones exist only there. In mode "web"
    the load comes from ``web_load.py``, in mode "client" the peer is the load; the label names the application.
    """

    mode: str
    connections: int = 1
    size: int = 64
    rate: float = 0.0  # bytes per second in total; 0: as fast as it goes
    label: str = ""  # of a micro or web row

    @classmethod
    def parse(cls, text: str) -> Row:
        """``"echo -n 100 -s 64"``, in the load generator's own words; ``ValueError`` for anything else."""
        words = shlex.split(text)
        if not words or words[0] not in LOADS or len(words) % 2 == 0:
            raise ValueError(
                f"a row is '{'|'.join(LOADS)} [-n CONNECTIONS] [-s BYTES] [-r RATE]', not {text!r}"
            )
        given = dict(zip(words[1::2], words[2::2], strict=True))
        unknown = given.keys() - {"-n", "-s", "-r"}
        if unknown:
            raise ValueError(f"unknown in a row: {', '.join(sorted(unknown))}")
        return cls(words[0], int(given.get("-n", 1)), int(given.get("-s", 64)), float(given.get("-r", 0)))

    def __str__(self) -> str:
        if self.label:
            return f"{self.label} -n {self.connections}" if self.mode in ("web", "client") else self.label
        if self.kind not in SIZED:
            return f"{self.mode} -n {self.connections}"
        rate = f" -r {self.rate:g}" if self.rate else ""
        return f"{self.mode} -n {self.connections} -s {self.size}{rate}"

    @property
    def tls(self) -> bool:
        return self.mode.startswith(TLS)

    @property
    def kind(self) -> str:
        """The mode, whether over TLS or not."""
        return self.mode.removeprefix(TLS)

    @property
    def metric(self) -> str:
        """The key of a measurement that says what the server's work cost; less is better."""
        return "server_cpu_percent_of_core" if self.rate else METRICS[self.kind]

    @property
    def server_mode(self) -> str:
        kind = "echo" if self.kind in ("storm", "handshake", "resume", "idle") else self.kind
        return TLS + kind if self.tls else kind

    @property
    def needs_new_servers(self) -> bool:
        """A storm measures growth of memory: every round wants a server that hasn't grown yet. And where a
        server still closes thousands of connections when the next round's come, it runs out of descriptors.
        """
        return self.kind in ("storm", "idle") or self.connections > MANY_CONNECTIONS

    def arguments(self) -> list[str]:
        """The words for the load generator."""
        words = [self.kind, "-n", str(self.connections), "-s", str(self.size)]
        return [*words, "-r", str(self.rate)] if self.rate else words


@dataclass(frozen=True)
class Settings:
    """How often, and how long each time."""

    rounds: int = 15
    seconds: float = 0.3
    warmup: float = 0.1
    verify: bool = False
    budget: float = float("inf")  # seconds; no round begins later, so a row has an end

    @classmethod
    def from_environment(cls, default: Settings | None = None) -> Settings:
        """What HEADRACE_BENCH_ROUNDS, _SECONDS, _WARMUP and _VERIFY say, and else ``default``."""
        default = default or cls()
        get = os.environ.get
        return replace(
            default,
            rounds=int(get("HEADRACE_BENCH_ROUNDS", default.rounds)),
            seconds=float(get("HEADRACE_BENCH_SECONDS", default.seconds)),
            warmup=float(get("HEADRACE_BENCH_WARMUP", default.warmup)),
            verify=get("HEADRACE_BENCH_VERIFY", str(int(default.verify))) == "1",
        )


@dataclass(frozen=True)
class Placement:
    """Which processor serves and which loads; None: wherever the kernel likes."""

    server: int | None
    load: int | None

    @classmethod
    def choose(cls) -> Placement:
        """The first two processors this process may use."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[1]) if len(allowed) > 1 else cls(None, None)

    @property
    def note(self) -> str:
        if self.server is None:
            return "one processor: server and load share it, ratios are compressed"
        return f"server on processor {self.server}, load on {self.load}"


@contextmanager
def started_on(processor: int | None) -> Iterator[None]:
    """Children started inside inherit the processor from their first instruction on."""
    if processor is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {processor})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class Server:
    """A running peer."""

    peer: Peer
    process: subprocess.Popen[bytes]
    port: int
    log: IO[bytes]

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace").strip()[-2000:]

    def complaint(self) -> str | None:
        """What's wrong with it after a run that could be measured: it has ended, or reported an error."""
        status = self.process.poll()
        if status is not None:
            return f"it ended with status {status}. {self.said()}"
        return f"it wrote: {said}" if (said := self.said()) else None


def raise_descriptor_limit() -> None:
    """Children inherit it: 1,000 connections don't fit in the usual soft limit of 1,024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def ready_port(process: subprocess.Popen[bytes]) -> int | None:
    """The port in the READY line, or None if none comes in ``START_TIMEOUT``."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], START_TIMEOUT)[0]:
        return None
    words = process.stdout.readline().split()
    return int(words[1]) if len(words) == 2 and words[0] == b"READY" else None


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


@contextmanager
def running(peer: Peer, mode: str, processor: int | None) -> Iterator[Server]:
    """Starts a peer and stops it at the end; ``ServerError`` when it doesn't listen in ``START_TIMEOUT``."""
    raise_descriptor_limit()
    with tempfile.TemporaryFile() as log:
        with started_on(processor):
            process = subprocess.Popen(
                peer.arguments(mode),
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **peer.environment},
            )
        try:
            port = ready_port(process)
            server = Server(peer, process, port or 0, log)
            if port is None:
                raise ServerError(f"{peer.name} didn't start: {server.said() or 'it said nothing'}")
            yield server
        finally:
            stop(process)


def load(server: Server, row: Row, settings: Settings, processor: int | None) -> Measurement:
    """One run of the load generator; ``ServerError`` when it couldn't measure."""
    words = [
        str(program("tls_loadgen" if row.tls else "loadgen")),
        *row.arguments(),
        "-t",
        str(settings.seconds),
        "-w",
        str(settings.warmup),
    ]
    words += ["-p", str(server.port), "-P", str(server.process.pid), "-D", str(LOAD_TIMEOUT)]
    if settings.verify:
        words.append("-v")
    with started_on(processor):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # The load generator ends itself at its deadline; ours is for the case that it can't.
    output, errors = process.communicate(timeout=LOAD_TIMEOUT + STOP_TIMEOUT)
    if process.returncode:
        reason = errors.decode(errors="replace").strip()
        raise ServerError(f"{server.peer.name}, {row}: {reason}. {server.said()}".strip())
    if row.tls and (complaint := server.complaint()):
        raise ServerError(f"{server.peer.name}, {row}: {complaint}")
    measurement: Measurement = json.loads(output)
    return measurement


@dataclass
class Result:
    """The rounds of one row: ``rounds[k][peer]`` is what round k measured; a peer that failed is missing."""

    row: Row
    settings: Settings
    placement: Placement
    rounds: list[dict[str, Measurement]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def peers(self) -> list[str]:
        """Those that were measured at least once, in the order they were asked for."""
        return list(dict.fromkeys(name for measured in self.rounds for name in measured))

    def values(self, peer: str, key: str | None = None) -> list[float]:
        """One figure of a peer, round by round (default: the row's metric)."""
        key = key or self.row.metric
        return [measured[peer][key] for measured in self.rounds if key in measured.get(peer, {})]

    def ratios(self, peer: str, reference: str) -> list[float]:
        """Cost of the reference by cost of the peer in the same round: above 1 the peer is cheaper."""
        key = self.row.metric
        pairs = [
            (measured[reference][key], measured[peer][key])
            for measured in self.rounds
            if measured.get(reference, {}).get(key) and measured.get(peer, {}).get(key)
        ]
        return [theirs / ours for theirs, ours in pairs]


@dataclass
class Rounds:
    """Runs one peer after the other, and gives up on one that fails."""

    result: Result
    raw: Path | None
    on_measurement: Callable[[str, int], None] | None = None

    def numbers(self) -> Iterator[int]:
        """0, 1, 2 ... while there is time."""
        deadline = time.monotonic() + self.result.settings.budget
        for number in range(self.result.settings.rounds):
            if time.monotonic() > deadline:
                return
            yield number

    def check(self, servers: dict[str, Server]) -> None:
        """A short run against each server in which every byte that comes back is compared; it isn't measured.

        Comparing in the measured runs too would cost cache that the servers share; ``Settings.verify`` does it.
        """
        checking = replace(self.result.settings, seconds=CHECK_SECONDS, warmup=0, verify=True)
        for name, server in list(servers.items()):
            try:
                load(server, self.result.row, checking, self.result.placement.load)
            except ServerError as failure:
                self.result.failures[name] = str(failure)
                del servers[name]

    def run(self, servers: dict[str, Server], number: int) -> None:
        measured: dict[str, Measurement] = {}
        self.result.rounds.append(measured)
        for name, server in list(servers.items()):
            self.measure(server, measured, number)
            if name in self.result.failures:
                del servers[name]

    def measure(self, server: Server, measured: dict[str, Measurement], number: int) -> None:
        result, name = self.result, server.peer.name
        if self.on_measurement:
            self.on_measurement(name, number)
        try:
            measured[name] = load(server, result.row, result.settings, result.placement.load)
        except ServerError as failure:
            result.failures[name] = str(failure)
            return
        if self.raw:
            line = {
                "row": str(result.row),
                "round": number,
                "peer": name,
                "time": time.time(),
                **measured[name],
            }
            with self.raw.open("a") as file:
                file.write(json.dumps(line) + "\n")


def run_row(
    row: Row,
    names: Sequence[str],
    settings: Settings,
    *,
    raw: Path | None = None,
    on_measurement: Callable[[str, int], None] | None = None,
) -> Result:
    """Measures all peers on one row.

    A peer that can't run is left out, and ``Result.failures`` says why; nothing is raised for it.
    ``raw`` gets one JSON line per measurement. ``on_measurement(peer, round)`` is called before each one.
    """
    result = Result(row, settings, Placement.choose())
    rounds = Rounds(result, raw, on_measurement)
    peers = [peer for name in names if (peer := usable(name, row, result.failures))]
    if row.needs_new_servers:
        run_with_new_servers(peers, rounds)
    else:
        run_with_standing_servers(peers, rounds)
    return result


def usable(name: str, row: Row, failures: dict[str, str]) -> Peer | None:
    peer = find_peer(name)
    if reason := peer.missing(row.server_mode):
        failures[name] = reason
        return None
    return peer


def run_with_standing_servers(peers: Sequence[Peer], rounds: Rounds) -> None:
    """Each server runs for the whole row."""
    result = rounds.result
    servers: dict[str, Server] = {}
    with ExitStack() as stack:
        for peer in peers:
            try:
                server = running(peer, result.row.server_mode, result.placement.server)
                servers[peer.name] = stack.enter_context(server)
            except ServerError as failure:
                result.failures[peer.name] = str(failure)
        rounds.check(servers)
        for number in rounds.numbers():
            rounds.run(servers, number)


def run_with_new_servers(peers: Sequence[Peer], rounds: Rounds) -> None:
    """Each server is started anew for each round."""
    result = rounds.result
    for number in rounds.numbers():
        measured: dict[str, Measurement] = {}
        result.rounds.append(measured)
        for peer in peers:
            if peer.name in result.failures:
                continue
            try:
                with running(peer, result.row.server_mode, result.placement.server) as server:
                    rounds.measure(server, measured, number)
            except ServerError as failure:
                result.failures[peer.name] = str(failure)
