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
    """A process that does one task after the other; see ``negotiate_peer.py``. One that got stuck is replaced."""

    def __init__(self, runtime: str, environment: dict[str, str]) -> None:
        self.runtime = runtime
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._busy = False  # a task was given, and its outcome hasn't been heard

    def _hear(self) -> dict[str, Any]:
        """The next line. A process that says nothing in time is ended, and so has said nothing."""
        process = self._process
        assert process is not None
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise AssertionError(f".NET {self.runtime} said nothing; it ended with {process.wait(PATIENCE)}")
        answer: dict[str, Any] = json.loads(line)
        if "received" in answer or "failed" in answer:
            self._busy = False
        return answer

    def start(self) -> None:
        """A process that is ready for a task: the one that there is, if it has none."""
        if self._busy or (self._process is not None and self._process.poll() is not None):
            self.stop()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "negotiate_peer.py"), self.runtime],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
            assert self._hear() == {"ready": True}

    def give(self, **task: Any) -> None:
        """A task begins."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._busy = True
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    async def answer(self) -> dict[str, Any]:
        """What it says next: a server's port, or the outcome."""
        return await asyncio.get_running_loop().run_in_executor(None, self._hear)

    def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._busy:
            process.kill()
            self._busy = False
        with process:  # closes its pipes, and waits
            pass
