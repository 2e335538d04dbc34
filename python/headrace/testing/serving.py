"""Servers in processes of their own, for tests and benchmarks of protocols.

Theory of operation
-------------------
The server must not share the interpreter, the loop or the processor time of the test that measures it. So
`ServerProcess` starts fresh interpreters (nothing is forked: no lock, loop or descriptor is inherited by
accident) and talks to each over a socketpair, the *control*:

* parent -> child: one line of JSON (the parent's ``sys.path``), then the pickled setup;
* child -> parent: lines of JSON; the first says that it listens, or why it can't;
* parent -> child: ``stats`` asks for the loop's counters; the end of the stream asks the child to end. So a child
  never outlives its parent, however that dies.

The parent binds the port and keeps it while the children, which share it by SO_REUSEPORT, come up.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from headrace.errors import HeadraceError

__all__ = ["ServerFailed", "ServerProcess"]

ENGINES = ("uring", "epoll")
OTHER_LOOPS = ("asyncio", "uvloop")  # to compare an asyncio.Protocol with
START_TIMEOUT = 30.0  # seconds; a cold interpreter on a busy machine takes a while
ANSWER_TIMEOUT = 10.0
STOP_TIMEOUT = 10.0
BACKLOG = 1024
MOST_WORKERS = 256
LONGEST_FAILURE = 4000  # characters; all of them together fit the control's buffer
MOST_FAILURES = 20  # texts of exceptions that a child keeps; more are only counted
LONGEST_LINE = 1 << 20

CHILD = "from headrace.testing.serving import child_main; child_main()"


class ServerFailed(HeadraceError):  # noqa: N818 (a state of the server, said as such)
    """The server process couldn't start, ended early, or its protocol raised; the text has its traceback."""


@dataclass(frozen=True)
class Setup:
    """What a child is told."""

    factory: Callable[[], asyncio.BaseProtocol]
    engine: str | None
    address: tuple[str, int]


class Control:
    """One end of the socketpair: lines of text, each wait bounded."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.buffer = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_line(self, timeout: float) -> str | None:
        """The next line without its end; None when the other side is gone. Raises TimeoutError."""
        self.socket.settimeout(timeout)
        while b"\n" not in self.buffer:
            if len(self.buffer) > LONGEST_LINE:
                raise ServerFailed("the server process sent a line without end")
            try:
                data = self.socket.recv(65536)
            except ConnectionError:
                return None
            if not data:
                return None
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        self.socket.close()


class Worker:
    """One child, seen from the parent."""

    def __init__(self, setup: bytes) -> None:
        ours, theirs = socket.socketpair()
        self.control = Control(ours)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CHILD],
                stdin=theirs.fileno(),
                # The parent's own import path comes with the setup; this one only has to find headrace.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        ours.settimeout(START_TIMEOUT)
        try:
            self.control.send(setup)
        except ConnectionError:
            # It ended before it read everything: wait_ready says so.
            return

    def wait_ready(self) -> dict[str, Any]:
        """What the child said when it was listening; `ServerFailed` when it couldn't."""
        try:
            line = self.control.read_line(START_TIMEOUT)
        except TimeoutError:
            raise ServerFailed(f"the server process wasn't ready after {START_TIMEOUT:g} s") from None
        if line is None:
            raise ServerFailed(f"the server process ended at its start, with status {self.process.wait()}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise ServerFailed(f"the server process couldn't start:\n{message['error']}")
        return message

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to a question; `ServerFailed` when there is none."""
        try:
            self.control.send(f"{question}\n".encode())
            line = self.control.read_line(ANSWER_TIMEOUT)
        except TimeoutError:
            raise ServerFailed(f"the server process is stuck: no answer in {ANSWER_TIMEOUT:g} s") from None
        except ConnectionError:
            line = None
        if line is None:
            raise ServerFailed(f"the server process has ended, with status {self.process.wait(STOP_TIMEOUT)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """Ends the child: by closing the control, and if that doesn't do, by a signal."""
        self.control.close()
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def encode(setup: Setup) -> bytes:
    """The setup as the child reads it. `TypeError` when the factory can't be imported by another process."""
    try:
        pickled = pickle.dumps(setup)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            "protocol_factory runs in another process, which imports it: it must be a class or function at the "
            f"top of a module, or a functools.partial of one, not a lambda or a local: {error}"
        ) from error
    header = json.dumps({"path": sys.path, "length": len(pickled)}).encode()
    return header + b"\n" + pickled


class ServerProcess:
    """A server on 127.0.0.1 in processes of its own.

    Parameters
    ----------
    protocol_factory : callable
        Makes the protocol of each connection, as for ``loop.create_server``: usually the class itself. It is
        pickled by reference, so it must stand at the top of an importable module (``functools.partial`` of such
        a class is fine); else `TypeError`.
    engine : {None, "uring", "epoll", "asyncio", "uvloop"}
        The engine of headrace's loop, which raises if it can't have it; None lets headrace choose. The last two
        are other loops, to compare with; they serve ``asyncio.Protocol`` and ``BufferedProtocol`` only.
    workers : int
        Processes that share the port, 1 to 256.

    Starts at once and returns when every worker listens; raises `ServerFailed` with the child's traceback when
    one can't. Use it as a context manager, or call `close`. Not thread-safe.
    """

    def __init__(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        *,
        engine: str | None = None,
        workers: int = 1,
    ) -> None:
        if engine is not None and engine not in ENGINES + OTHER_LOOPS:
            raise ValueError(
                f"engine must be None, {', '.join(map(repr, ENGINES + OTHER_LOOPS))}; not {engine!r}"
            )
        if not 1 <= workers <= MOST_WORKERS:
            raise ValueError(f"workers must be 1 to {MOST_WORKERS}, not {workers}")
        self.workers: list[Worker] = []
        self.closed = False
        with socket.socket() as placeholder:
            placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            placeholder.bind(("127.0.0.1", 0))
            self.address: tuple[str, int] = placeholder.getsockname()
            setup = encode(Setup(protocol_factory, engine, self.address))
            try:
                for _ in range(workers):
                    self.workers.append(Worker(setup))
                ready = [worker.wait_ready() for worker in self.workers]
            except BaseException:
                self._stop()
                raise
        self.engine: str = ready[0]["engine"]
        self.engine_reason: str = ready[0]["reason"]

    @property
    def host(self) -> str:
        """Always ``127.0.0.1``."""
        return self.address[0]

    @property
    def port(self) -> int:
        """Chosen by the kernel."""
        return self.address[1]

    @property
    def pids(self) -> list[int]:
        """The processes that serve."""
        return [worker.process.pid for worker in self.workers]

    def cpu_seconds(self) -> float:
        """What the server has been on a processor so far: all threads of all workers, in nanosecond steps.

        From ``/proc/PID/task/*/schedstat``. Threads that have ended aren't in it.
        """
        return sum(on_cpu_nanoseconds(pid) for pid in self.pids) / 1e9

    def stats(self) -> list[dict[str, Any]]:
        """``EventLoop.stats()`` of each worker (empty for other loops); `ServerFailed` when one doesn't answer."""
        return [worker.ask("stats")["stats"] for worker in self.workers]

    def failures(self) -> list[str]:
        """Tracebacks of what reached the loops' exception handlers: what the protocol raised, above all.

        At most 20 for each worker; then a line says how many more there were.
        """
        return [failure for worker in self.workers for failure in worker.ask("stats")["failures"]]

    def close(self) -> None:
        """Ends the processes. Idempotent.

        Raises `ServerFailed` when a worker had ended by itself, or an exception had reached its loop's handler:
        an error in a callback is not to go unseen.
        """
        if self.closed:
            return
        try:
            failures = self.failures()
        finally:
            self._stop()
        if failures:
            raise ServerFailed("the server's loop caught exceptions:\n" + "\n".join(failures))

    def _stop(self) -> None:
        self.closed = True
        for worker in self.workers:
            worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._stop()  # what goes wrong now is a consequence

    def __repr__(self) -> str:
        return f"<ServerProcess {self.host}:{self.port} on {self.engine}, {len(self.workers)} workers>"


def on_cpu_nanoseconds(pid: int) -> int:
    """Time on a processor of a process's threads; 0 for one that is gone."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(thread.read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread ended between the listing and the reading
    return total


# ---- the child ------------------------------------------------------------------------------------------------


def read_setup(control: Control) -> Setup:
    """The setup, after the parent's import path was taken over."""
    line = control.read_line(START_TIMEOUT)
    if line is None:
        raise SystemExit("the parent has ended")
    header = json.loads(line)
    sys.path[:] = header["path"]
    while len(control.buffer) < header["length"]:
        data = control.socket.recv(65536)
        if not data:
            raise SystemExit("the parent has ended")
        control.buffer += data
    pickled, control.buffer = control.buffer[: header["length"]], control.buffer[header["length"] :]
    setup: Setup = pickle.loads(pickled)
    return setup


def new_loop(engine: str | None) -> asyncio.AbstractEventLoop:
    """A loop of the kind asked for."""
    if engine in OTHER_LOOPS:
        loop: asyncio.AbstractEventLoop = importlib.import_module(engine or "asyncio").new_event_loop()
        return loop
    from headrace import new_event_loop

    return new_event_loop(engine)


class Child:
    """What answers the parent, on the loop that serves."""

    def __init__(self, control: Control, setup: Setup) -> None:
        self.control = control
        self.setup = setup
        self.failures: list[str] = []
        self.more_failures = 0
        self.asked = b""

    async def run(self) -> None:
        """Serves until the parent closes the control."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self.on_exception)
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(self.setup.address)
        server = await loop.create_server(self.setup.factory, sock=listener, backlog=BACKLOG)
        self.ended = asyncio.Event()
        self.control.socket.setblocking(False)
        loop.add_reader(self.control.socket, self.on_control)
        self.say({"engine": self.engine_name(), "reason": getattr(loop, "engine_reason", "")})
        await self.ended.wait()
        loop.remove_reader(self.control.socket)
        server.close()  # not wait_closed: that waits for the connections

    def engine_name(self) -> str:
        return str(getattr(asyncio.get_running_loop(), "engine_name", None) or self.setup.engine)

    def say(self, message: dict[str, Any]) -> None:
        # Lines are short and the parent waits for each: they fit the socket's buffer.
        self.control.send(json.dumps(message).encode() + b"\n")

    def on_control(self) -> None:
        try:
            data = self.control.socket.recv(4096)
        except ConnectionError:
            data = b""
        if not data:
            self.ended.set()
            return
        self.asked += data
        while b"\n" in self.asked:
            _, _, self.asked = self.asked.partition(b"\n")
            self.say({"stats": self.stats(), "failures": self.told_failures()})

    def stats(self) -> dict[str, Any]:
        stats: Callable[[], dict[str, Any]] = getattr(asyncio.get_running_loop(), "stats", dict)
        return stats()

    def told_failures(self) -> list[str]:
        more = [f"and {self.more_failures} more"] if self.more_failures else []
        return self.failures + more

    def on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Notes what the protocol raised, for the parent."""
        if len(self.failures) >= MOST_FAILURES:
            self.more_failures += 1
            return
        exception = context.get("exception")
        lines = traceback.format_exception(exception) if exception else []
        text = f"{context.get('message', '')}\n{''.join(lines)}"
        # Its end says the most: where it was raised, and what.
        self.failures.append(text if len(text) <= LONGEST_FAILURE else f"...{text[-LONGEST_FAILURE:]}")


def child_main() -> None:
    """The child's whole life."""
    control = Control(socket.socket(fileno=os.dup(0)))
    # The protocol may read its standard input: not what the parent sends.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        setup = read_setup(control)
        with asyncio.Runner(loop_factory=functools.partial(new_loop, setup.engine)) as runner:
            runner.run(Child(control, setup).run())
    except Exception:
        try:
            control.send(json.dumps({"error": traceback.format_exc()}).encode() + b"\n")
        except ConnectionError:
            raise SystemExit(1) from None  # nobody is there to hear it
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # Ctrl-C goes to the whole group; the parent tells it
