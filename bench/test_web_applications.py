"""Web applications: CPU of the server per request, the same application on each loop."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.peers import Peer
from bench.rounds import (
    LOAD_TIMEOUT,
    Measurement,
    Placement,
    Result,
    Row,
    Server,
    ServerError,
    Settings,
    running,
    started_on,
)
from bench.suite import CLOCK, Board, play_back

HERE = Path(__file__).parent
# GET of 64 bytes, the same with httptools as parser, and an echo of 64 bytes; ``peers/web_server.py``.
APPLICATIONS = ("aiohttp", "uvicorn", "websockets")
CONNECTIONS = (1, 50)
ROWS = [Row("web", connections, label=name) for name in APPLICATIONS for connections in CONNECTIONS]
PEERS = ["uvloop", "headrace-uring", "headrace-epoll", "asyncio"]


def web_peer(name: str) -> Peer:
    """A server on that loop."""
    loop, _, engine = name.partition("-")
    command = (sys.executable, str(HERE / "peers" / "web_server.py"), loop)
    environment = {"HEADRACE_ENGINE": engine} if engine else {}
    return Peer(name, command, needs=loop, environment=environment)


def load(server: Server, row: Row, settings: Settings, processor: int | None) -> Measurement:
    """One run of ``web_load.py``; ``ServerError`` when it couldn't measure."""
    words = [sys.executable, "-m", "bench.web_load", row.label]
    words += ["-p", str(server.port), "-P", str(server.process.pid), "-n", str(row.connections)]
    words += ["-t", str(settings.seconds), "-w", str(settings.warmup)]
    with started_on(processor):
        done = subprocess.run(words, capture_output=True, timeout=LOAD_TIMEOUT, cwd=HERE.parent)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        raise ServerError(f"{server.peer.name}, {row}: {reason}. {server.said()}".strip())
    measurement: Measurement = json.loads(done.stdout)
    return measurement


def run_web_row(row: Row, names: Sequence[str], settings: Settings) -> Result:
    """Interleaved rounds of the same application on each loop; every server runs for the whole row."""
    result = Result(row, settings, Placement.choose())
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for peer in map(web_peer, names):
            if reason := peer.missing():
                result.failures[peer.name] = reason
                continue
            try:
                servers[peer.name] = stack.enter_context(running(peer, row.label, result.placement.server))
            except ServerError as failure:
                result.failures[peer.name] = str(failure)
        for _ in range(settings.rounds):
            measured: dict[str, Measurement] = {}
            result.rounds.append(measured)
            for name, server in list(servers.items()):
                try:
                    measured[name] = load(server, row, settings, result.placement.load)
                except ServerError as failure:
                    result.failures[name] = str(failure)
                    del servers[name]
    return result


def web_id(row: Row) -> str:
    return f"{row.label}-n{row.connections}"


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ROWS, ids=web_id)
@pytest.mark.parametrize("peer", PEERS)
def test_web_application(row: Row, peer: str, benchmark: Any, board: Board) -> None:
    pytest.importorskip(row.label)
    if row not in board.results:
        names = list(dict.fromkeys(["uvloop", *board.selected[row]]))
        board.results[row] = run_web_row(row, names, board.settings)
    play_back(benchmark, board.results[row], peer)
