"""Client applications against real servers: CPU of the client per request, the same client on each loop."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.rounds import (
    LOAD_TIMEOUT,
    Measurement,
    Placement,
    Result,
    Row,
    ServerError,
    Settings,
    running,
    started_on,
)
from bench.suite import CLOCK, Board, play_back
from bench.test_web_applications import PEERS, web_peer

HERE = Path(__file__).parent
# The tests' own PostgreSQL and Redis.
sys.path.append(str(HERE.parent / "tests" / "applications"))

from servers import postgres_cluster, redis_instance  # noqa: E402

# A prepared SELECT, a GET of 64 bytes, a GET over HTTP from aiohttp on asyncio.
CONNECTIONS = {"asyncpg": (1, 20), "redis": (1, 50), "httpx": (1, 20)}
ROWS = [Row("client", number, label=name) for name, numbers in CONNECTIONS.items() for number in numbers]


@contextmanager
def address_of_server(application: str, processor: int | None) -> Iterator[list[str]]:
    """Starts the application's server; the address it's to be connected to."""
    if application == "asyncpg":
        with postgres_cluster() as cluster:
            yield [cluster.host, str(cluster.port), cluster.user]
    elif application == "redis":
        with redis_instance() as port:
            yield ["127.0.0.1", str(port)]
    else:
        with running(web_peer("asyncio"), "aiohttp", processor) as server:
            yield ["127.0.0.1", str(server.port)]


class Client:
    """A connected client, which makes requests when it's told to."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.process = process

    def line(self) -> str:
        """What it says next; ``ServerError`` if it ends, or says nothing for LOAD_TIMEOUT."""
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], LOAD_TIMEOUT)[0]
        text = self.process.stdout.readline() if ready else ""
        if not text:
            raise ServerError(f"{self.name} {'ended' if ready else 'says nothing'}; its stderr tells why")
        return text

    def measure(self, seconds: float) -> Measurement:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        measurement: Measurement = json.loads(self.line())
        return measurement


@contextmanager
def connected(name: str, row: Row, address: Sequence[str], processor: int | None) -> Iterator[Client]:
    loop, _, engine = name.partition("-")
    command = [
        sys.executable,
        str(HERE / "peers" / "client_application.py"),
        loop,
        row.label,
        str(row.connections),
    ]
    environment = os.environ | ({"HEADRACE_ENGINE": engine} if engine else {})
    pipe = subprocess.PIPE
    with started_on(processor):
        process = subprocess.Popen([*command, *address], stdin=pipe, stdout=pipe, text=True, env=environment)
    with process:
        client = Client(name, process)
        try:
            client.line()
            yield client
        finally:
            process.kill()


def run_client_row(row: Row, names: Sequence[str], settings: Settings) -> Result:
    """Interleaved rounds of the same client on each loop, all against one server."""
    result = Result(row, settings, Placement.choose())
    with ExitStack() as stack:
        address = stack.enter_context(address_of_server(row.label, result.placement.load))
        clients: dict[str, Client] = {}
        for name in names:
            try:
                client = stack.enter_context(connected(name, row, address, result.placement.server))
                client.measure(settings.warmup)
                clients[name] = client
            except ServerError as failure:
                result.failures[name] = str(failure)
        for _ in range(settings.rounds):
            result.rounds.append({name: client.measure(settings.seconds) for name, client in clients.items()})
    return result


def client_id(row: Row) -> str:
    return f"{row.label}-n{row.connections}"


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ROWS, ids=client_id)
@pytest.mark.parametrize("peer", PEERS)
def test_client_application(row: Row, peer: str, benchmark: Any, board: Board) -> None:
    pytest.importorskip(row.label)
    if row not in board.results:
        names = list(dict.fromkeys(["uvloop", *board.selected[row]]))
        board.results[row] = run_client_row(row, names, board.settings)
    play_back(benchmark, board.results[row], peer)
