"""What the demo's two child processes have in common: how they start, talk to their parent, and end.

A child is started as ``python -m headrace.cli.demo.server`` (or ``load``) with its options as one JSON
argument. It gets commands as lines of JSON on its standard input and sends events as lines of JSON on its
standard output. It ends when its work is done, when its input closes (the parent is gone, however it went),
and, whatever happens, when its life time is over: then a watchdog that needs no loop and no interpreter lock
ends it with a traceback.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from time import monotonic_ns
from typing import Any, Self

import headrace
from headrace.cli.demo.histogram import LatencyHistogram
from headrace.cli.demo.security import Materials

__all__ = ["Channel", "ChildOptions", "Sampler", "run_child"]

_LONGEST_LINE = 64 * 1024  # commands are short
_READ_SIZE = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class ChildOptions:
    """What a child needs to know before it starts; rates are bytes a second, times seconds, sizes bytes."""

    engine: str | None
    protocol: str  # "lease" or "bytes"
    mode: str  # "oneway" or "echo"
    size: int
    connections: int
    seconds: float
    rate: float | None
    life_time: float
    host: str = "127.0.0.1"
    port: int = 0
    security: Materials = field(default_factory=Materials)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        return cls(**fields | {"security": Materials(**fields["security"])})


class Channel:
    """Commands from the parent, events to it. Everything is used in the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, commands: int, events: int) -> None:
        self._loop = loop
        self._commands = commands
        self._events = events
        self._buffer = b""
        self._received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        # Done when the parent is gone: nobody is left to work for.
        self.gone: asyncio.Future[None] = loop.create_future()
        os.set_blocking(commands, False)
        loop.add_reader(commands, self._readable)

    def close(self) -> None:
        self._loop.remove_reader(self._commands)
        self.gone.cancel()

    def _readable(self) -> None:
        try:
            data = os.read(self._commands, _READ_SIZE)
        except BlockingIOError:
            return
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self._received.put_nowait(json.loads(line))
        if not data or len(self._buffer) > _LONGEST_LINE:
            self._loop.remove_reader(self._commands)
            if not self.gone.done():
                self.gone.set_result(None)

    async def receive(self, command: str) -> dict[str, Any]:
        """The next command, which must be ``command``."""
        received = await self._received.get()
        if received.get("do") != command:
            raise RuntimeError(f"expected the command {command!r}, got {received!r}")
        return received

    def send(self, event: str, **fields: Any) -> None:
        """One event. Blocks while the pipe is full; the parent does nothing but to read it."""
        line = json.dumps({"event": event, **fields}, separators=(",", ":")).encode() + b"\n"
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._events, view) :]
        except BrokenPipeError:
            if not self.gone.done():
                self.gone.set_result(None)


def engine_fields(loop: headrace.EventLoop) -> dict[str, Any]:
    """Which engine runs and why; to be called in the running loop."""
    return {"pid": os.getpid(), "engine": loop.engine_name, "engine_reason": loop.engine_reason}


class Sampler:
    """Sends a ``sample`` at an interval: bytes and messages so far, new latencies, loop counters."""

    def __init__(
        self,
        loop: headrace.EventLoop,
        channel: Channel,
        totals: Callable[[], tuple[int, int]],
        latencies: LatencyHistogram,
    ) -> None:
        self._loop = loop
        self._channel = channel
        self._totals = totals
        self._latencies = latencies
        self._interval = 0.0
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self, at: float, interval: float) -> None:
        self._interval = interval
        self._due = at + interval
        self._handle = self._loop.call_at(self._due, self._tick)

    def stop(self) -> None:
        """Sends the last sample: what came since the one before."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
            self._send()

    def _tick(self) -> None:
        self._send()
        self._due += self._interval
        self._handle = self._loop.call_at(self._due, self._tick)

    def _send(self) -> None:
        received, messages = self._totals()
        self._channel.send(
            "sample",
            at=monotonic_ns(),
            bytes=received,
            messages=messages,
            latencies=self._latencies.take(),
            loop=self._loop.stats(),
        )


async def _work(
    main: Callable[[ChildOptions, Channel], Awaitable[None]],
    options: ChildOptions,
    commands: int,
    events: int,
) -> int:
    channel = Channel(asyncio.get_running_loop(), commands, events)

    async def work() -> None:
        await main(options, channel)

    task = asyncio.create_task(work())
    try:
        await asyncio.wait((task, channel.gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
            return 1
        error = task.exception()
        if error is None:
            return 0
        if not isinstance(error, OSError | headrace.HeadraceError):
            raise error  # a bug: the parent shows the traceback
        channel.send("failed", error=str(error) or repr(error))
        return 1
    finally:
        channel.close()


def _own_channel() -> tuple[int, int]:
    """The channel's descriptors, moved away from where a stray ``print`` or ``input`` would disturb it."""
    commands, events = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return commands, events


def run_child(main: Callable[[ChildOptions, Channel], Awaitable[None]]) -> int:
    """Runs ``main`` on headrace's loop with the options in ``sys.argv``; returns the exit status."""
    options = ChildOptions.from_json(sys.argv[1])
    faulthandler.dump_traceback_later(options.life_time, exit=True)
    commands, events = _own_channel()
    try:
        with asyncio.Runner(loop_factory=lambda: headrace.new_event_loop(options.engine)) as runner:
            return runner.run(_work(main, options, commands, events))
    except headrace.HeadraceError as error:  # the loop couldn't start
        line = json.dumps({"event": "failed", "error": str(error)}) + "\n"
        os.write(events, line.encode())
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
