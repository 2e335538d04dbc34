"""Processes with .NET's own NegotiateStream, which a test gives tasks to."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["PATIENCE", "RUNTIMES", "DotNetPeer", "missing"]

HERE = Path(__file__).parent
PATIENCE = 40.0  # seconds: a virtual machine starts on a busy one
RUNTIMES = {"8": "dnv", "3.1": "dotnetcore2"}


def missing(runtime: str) -> str | None:
    """What isn't installed."""
    modules = [
        module
        for module in (RUNTIMES[runtime], "pythonnet", "clr_loader")
        if importlib.util.find_spec(module) is None
    ]
    return f"{', '.join(modules)} (the extra interop)" if modules else None


class DotNetPeer:
    """A process that does one task after the other; see ``negotiate_peer.py``."""

    def __init__(self, runtime: str, environment: dict[str, str]) -> None:
        self.runtime = runtime
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "negotiate_peer.py"), runtime],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._hear() == {"ready": True}

    def _hear(self) -> dict[str, Any]:
        """The next line. A process that says nothing in time is ended, and so has said nothing."""
        timer = threading.Timer(PATIENCE, self._process.kill)
        timer.start()
        try:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise AssertionError(f".NET {self.runtime} said nothing; it ended with {self._process.poll()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def give(self, **task: Any) -> None:
        """A task begins."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    async def answer(self) -> dict[str, Any]:
        """What it says next: a server's port, or the outcome."""
        return await asyncio.get_running_loop().run_in_executor(None, self._hear)

    def stop(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
