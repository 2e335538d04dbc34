"""An event loop in a simulated world, and the runner of many seeds.

The loop is headrace's own, with its own stream transports and listeners; only the engine below is simulated. So
what is tested here is what runs in production, under a kernel and a network that are as hard as the seed says, on
a clock that jumps.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from headrace._simulated import SimulatedEngine
from headrace.loop import EventLoop

__all__ = [
    "SeedReport",
    "SimulatedLoop",
    "VirtualSocket",
    "replay",
    "run_seeds",
    "simulated_loop",
    "simulated_run",
]

T = TypeVar("T")

# How many of the last events a failed replay shows.
TRACE_SHOWN = 60


class VirtualSocket(socket.socket):
    """A virtual descriptor in the clothes of a socket: what transports, servers and their users ask of one.

    It is a ``socket.socket`` for ``isinstance``, but has no real descriptor: what isn't defined here fails with EBADF.
    Reading and writing never block. It calls itself a Unix stream socket, so nobody tries TCP options on it.
    """

    _engine: SimulatedEngine
    _number: int

    def __init__(self, engine: SimulatedEngine, fd: int) -> None:
        # Without socket.socket.__init__, which would ask the kernel about the descriptor.
        self._engine = engine
        self._number = fd

    def __repr__(self) -> str:
        return f"<VirtualSocket fd={self._number}>"

    family = socket.AF_UNIX
    type = socket.SOCK_STREAM
    proto = 0

    def fileno(self) -> int:
        """The virtual descriptor, or -1."""
        return self._number

    def detach(self) -> int:
        """Gives the descriptor away."""
        fd, self._number = self._number, -1
        return fd

    def close(self) -> None:
        """Closes the virtual descriptor. Idempotent."""
        if self._number >= 0:
            self._engine.close_virtual(self.detach())

    def _address(self, name: str) -> Any:
        found = self._engine.socket(self._number)
        if found is None:
            raise OSError(9, "the virtual descriptor is closed")
        return getattr(found, name)

    def getsockname(self) -> Any:
        """The address that the script gave."""
        return self._address("address")

    def getpeername(self) -> Any:
        """The peer's address; OSError for a listener."""
        peer = self._address("peer_address")
        if peer is None:
            raise OSError(107, "a listener has no peer")
        return peer

    def getsockopt(self, *arguments: Any) -> Any:
        """0, whatever is asked."""
        return 0

    def setsockopt(self, *arguments: Any) -> None:
        """Has no effect."""

    def setblocking(self, flag: bool) -> None:
        """Has no effect: it never blocks."""

    def gettimeout(self) -> float:
        """0.0: it never blocks."""
        return 0.0

    def listen(self, backlog: int = 100) -> None:
        """Has no effect: it listens from the start."""

    def send(self, data: Any, flags: int = 0) -> int:
        """Sends what fits; BlockingIOError when nothing does."""
        return self._engine.write(self._number, data)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receives what is there; BlockingIOError when nothing is."""
        return self._engine.read(self._number, size)

    def shutdown(self, how: int) -> None:
        """Ends the writing side."""
        self._engine.shutdown_virtual(self._number)


class SimulatedLoop(EventLoop):
    """A headrace event loop in a simulated world.

    ``time()`` is virtual, and a wait jumps to the next event. ``create_server(factory, host, port)`` and
    ``create_connection(factory, host, port)`` meet in the virtual network, at the address ``(host, port)``: any host
    name will do. Their transports are headrace's real ones.

    Parameters
    ----------
    seed : int
        Decides everything; the same seed and program give the same run.
    options
        As for `SimulatedEngine`: ``faults=``, single faults by name, ``patience=``, ``trace=`` ...

    A loop that waits for what can't happen raises `Deadlock`. Threads (executors, ``call_soon_threadsafe``) make a run
    depend on real time, and need ``patience``.
    """

    def __init__(self, seed: int = 0, **options: Any) -> None:
        engine = SimulatedEngine(seed, **options)
        super().__init__(engine)
        self.simulated = engine
        # The clock is the engine's from the beginning: timers may be set before the first run.
        self._start_engine()
        self._engine_stop()

    async def create_connection(
        self,
        protocol_factory: Callable[[], Any],
        host: str | None = None,
        port: int | None = None,
        *,
        sock: socket.socket | None = None,
        ssl: Any = None,
        server_hostname: str | None = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Connects to the virtual address ``(host, port)``; ConnectionRefusedError if nobody listens there."""
        if sock is None:
            sock = VirtualSocket(self.simulated, self.simulated.connect((host, port)))
            secured = ssl is not None or options.get("security") is not None
            if secured and server_hostname is None:
                server_hostname = host
        return await super().create_connection(
            protocol_factory, sock=sock, ssl=ssl, server_hostname=server_hostname, **options
        )

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], Any],
        host: str | None = None,
        port: int | None = None,
        *,
        sock: socket.socket | None = None,
        backlog: int = 100,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """Serves at the virtual address ``(host, port)``; OSError EADDRINUSE if it's taken."""
        if sock is None:
            sock = VirtualSocket(self.simulated, self.simulated.listen((host, port), backlog=backlog))
        return await super().create_server(protocol_factory, sock=sock, backlog=backlog, **options)

    async def create_datagram_endpoint(self, *arguments: Any, **options: Any) -> Any:
        """Raises NotImplementedError: the simulated network carries streams only."""
        raise NotImplementedError(
            "the simulated network has no datagrams; test protocols that use them on a real loop: "
            "headrace.new_event_loop()"
        )

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Waits for the executor's threads without a time limit: it would be in virtual time, and over at once."""
        await super().shutdown_default_executor()

    def _do_step(self, threads: Any, step: Callable[[], None]) -> None:
        """In the loop's thread: other threads' time isn't the simulation's."""
        self.call_soon(step)

    def _accepted_socket(self, fd: int, *shape: int) -> socket.socket:
        return VirtualSocket(self.simulated, fd)


@contextlib.contextmanager
def simulated_loop(seed: int = 0, **options: Any) -> Iterator[SimulatedLoop]:
    """A `SimulatedLoop`, closed at the end; a contract violation that a callback swallowed is raised there."""
    loop = SimulatedLoop(seed, **options)
    try:
        yield loop
        loop.simulated.check()
    finally:
        loop.close()


def simulated_run(main: Coroutine[Any, Any, T], seed: int = 0, **options: Any) -> T:
    """``asyncio.run`` in a simulated world.

    Raises what `main` raises, with the seed in a note; ContractViolation when an endpoint broke the engine contract;
    `Deadlock` when nothing can happen any more.
    """
    loop: list[SimulatedLoop] = []

    def factory() -> SimulatedLoop:
        loop.append(SimulatedLoop(seed, **options))
        return loop[0]

    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            result = runner.run(main)
            loop[0].simulated.check()
            return result
    except BaseException as error:
        error.add_note(f"in the simulated world of seed {seed}")
        raise


@dataclasses.dataclass
class SeedReport:
    """What many seeds came to.

    ``failures`` are pairs of seed and exception; ``seconds`` are real ones.
    """

    seeds: int
    seconds: float
    failures: list[tuple[int, BaseException]]

    @property
    def seeds_per_second(self) -> float:
        """Seeds per real second, on one core."""
        return self.seeds / self.seconds if self.seconds else 0.0


def run_seeds(
    first: int, count: int, scenario: Callable[[int], object], *, stop_after: int | None = None
) -> SeedReport:
    """Runs ``scenario(seed)`` for `count` seeds from `first` on; a seed fails by raising.

    With `stop_after` it ends after so many failures. KeyboardInterrupt and SystemExit aren't failures.
    """
    failures: list[tuple[int, BaseException]] = []
    began = time.perf_counter()
    seeds = 0
    for seed in range(first, first + count):
        seeds += 1
        try:
            scenario(seed)
        except Exception as error:
            failures.append((seed, error))
            if stop_after is not None and len(failures) >= stop_after:
                break
    return SeedReport(seeds, time.perf_counter() - began, failures)


def replay(seed: int, scenario: Callable[..., object] | None = None, **options: Any) -> object:
    """Runs one seed again, with a trace; when it fails, the last events are in a note of the exception.

    Parameters
    ----------
    seed : int
        As printed with the failure.
    scenario : callable, optional
        Called as ``scenario(seed, trace=trace, **options)``; by default `run_scenario`. ``trace`` is a list to which
        the scenario's engine hands its trace.
    """
    if scenario is None:
        from headrace.testing.scenarios import run_scenario

        scenario = run_scenario
    trace: list[Any] = []
    try:
        return scenario(seed, trace=trace, **options)
    except BaseException as error:
        lines = [line for events in trace for line in events]
        shown = "\n".join(lines[-TRACE_SHOWN:])
        error.add_note(f"the last of {len(lines)} events of seed {seed}:\n{shown}")
        raise
