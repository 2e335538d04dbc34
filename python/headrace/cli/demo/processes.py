"""The parent's side of a child process: start it, talk to it, notice its end, and leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

from headrace.cli.demo.child import ChildOptions

__all__ = ["Child", "ChildError"]

_LONGEST_LINE = 4 * 1024 * 1024  # bytes: a result has one number a connection
_KEPT_LINES = 50  # of what a child writes to its standard error
_PATIENCE = 2.0  # seconds between asking a child to end, SIGTERM and SIGKILL


class ChildError(Exception):
    """A child process failed, died, or didn't answer in time."""


class Child:
    """One of the demo's child processes. ``on_sample`` gets its samples; other events are waited for by name.

    A child is in a session of its own, so Ctrl-C reaches the parent alone, which then ends the children in
    order.
    """

    def __init__(
        self, role: str, process: asyncio.subprocess.Process, on_sample: Callable[[dict[str, Any]], None]
    ) -> None:
        self.role = role
        self.pid = process.pid
        self.said: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process = process
        self._on_sample = on_sample
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._readers = [asyncio.create_task(self._read_events()), asyncio.create_task(self._read_errors())]

    @classmethod
    async def start(
        cls, role: str, options: ChildOptions, on_sample: Callable[[dict[str, Any]], None]
    ) -> Child:
        """Starts ``headrace.cli.demo.<role>``."""
        # As this process, a child looks for modules in the current directory or it doesn't.
        safe = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *safe,
            "-m",
            f"headrace.cli.demo.{role}",
            options.to_json(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
            start_new_session=True,
            env={**os.environ, **options.security.environment},
        )
        return cls(role, process, on_sample)

    async def _read_events(self) -> None:
        assert self._process.stdout is not None
        try:
            while line := await self._process.stdout.readline():
                event = json.loads(line)
                if event["event"] == "sample":
                    self._on_sample(event)
                else:
                    self._events.put_nowait(event)
        finally:
            self._events.put_nowait(None)

    async def _read_errors(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            self.said.append(line.decode(errors="replace").rstrip())

    def tell(self, command: str, **fields: Any) -> None:
        """Sends a command; to a child that has died, nothing: the next ``expect`` says what happened."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(json.dumps({"do": command, **fields}).encode() + b"\n")

    async def expect(self, name: str, timeout: float) -> dict[str, Any]:
        """The next event, which must be ``name``. Raises :class:`ChildError` for anything else."""
        try:
            async with asyncio.timeout(timeout):
                event = await self._events.get()
                if event is None:
                    await self._process.wait()
        except TimeoutError:
            raise ChildError(f"the {self.role} process didn't answer in {timeout:g} s") from None
        if event is None:
            self._events.put_nowait(None)
            raise ChildError(await self._obituary())
        if event["event"] == "failed":
            raise ChildError(f"the {self.role} process: {event['error']}")
        if event["event"] != name:
            raise ChildError(f"the {self.role} process said {event['event']!r} in place of {name!r}")
        return event

    async def died(self) -> None:
        """Never returns; raises :class:`ChildError` when the process ends or reports a failure."""
        await asyncio.wait(self._readers[:1])
        await self.expect("nothing", 5.0)

    async def _obituary(self) -> str:
        await asyncio.wait(self._readers, timeout=1.0)
        code = self._process.returncode
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        said = "".join(f"\n  {line}" for line in self.said)
        return f"the {self.role} process {how}" + (f"; it said:{said}" if said else "")

    async def stop(self) -> None:
        """Ends the process, by force if it must be, and collects it. Returns in a few seconds at most."""
        assert self._process.stdin is not None
        self.tell("stop")
        self._process.stdin.close()
        for force in (self._process.terminate, self._process.kill, None):
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._process.wait()
                break
            except TimeoutError:
                if force is not None:
                    with contextlib.suppress(ProcessLookupError):
                        force()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
