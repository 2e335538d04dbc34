"""The examples in README and docs run as they stand."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SERVES_FOREVER = "headrace.run(main())\n"


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page):
    examples = list(Sybil(parsers=[PythonCodeBlockParser()]).parse(page).examples())
    for example in examples:
        if SERVES_FOREVER not in str(example.parsed):
            example.evaluate()


def test_the_server_of_the_readme_echoes():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (source,) = [block for block in blocks if SERVES_FOREVER in block]
    port = unused_port()
    server = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", source.replace("8888", str(port))],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with connect(port, server) as client:
            client.sendall(b"x" * 100_000)
            received = bytearray()
            while len(received) < 100_000:
                received += client.recv(65536)
        assert received == b"x" * 100_000
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=30)
        assert errors.rstrip().endswith("KeyboardInterrupt")
    finally:
        server.kill()
        server.communicate()


def connect(port: int, server: subprocess.Popen[str]) -> socket.socket:
    """Connects as soon as the server listens."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        time.sleep(0.05)
    server.kill()
    raise AssertionError(f"the server doesn't listen: {server.communicate()[1]}")
