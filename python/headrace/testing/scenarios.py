"""Scripted peers, and the oracles that judge what becomes of them.

A seed draws a few connections. Each end follows a `Script`: what it writes and when, how it reads, how it ends. The
same scripts run over the model transport (``headrace._model``), which shows that the oracles are right, and over
headrace's real loop and transports, which shows that those are.

The oracles
-----------
==============  ========================================================================================
bytes           what arrives is what was written: every byte, in order, none twice, none too many
callbacks       connection_made first and once, connection_lost last and once; nothing while reading is paused
                or after close(); no exception
complete        a reader that stays open gets everything that was written before the peer's close
end             an end of stream only where the peer has ended it; a connection isn't lost without a reason
reset           an error that the kernel told reaches connection_lost; none is invented
liveness        after abort() connection_lost comes within `PATIENCE`; every connection ends at last
operations      after connection_lost no operation is on the connection, and its descriptor is closed
leak            at the end no descriptor, no operation and no block of memory is left
contract        the engine's own checks (`ContractViolation`), at each step
deadlock        nobody waits for what can't happen (`Deadlock`)
==============  ========================================================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from headrace._model import BUGS, ModelLoop
from headrace._simulated import SimulatedEngine
from headrace._virtual import ContractViolation, Deadlock, SeededRandom, SimulationError
from headrace.testing.peers import KINDS, LIFETIME, PATIENCE, End, Script, adapt
from headrace.testing.simulation import SimulatedLoop, VirtualSocket

__all__ = ["KINDS", "WORLDS", "OracleError", "oracle_of", "run_scenario"]

ADDRESS = ("server", 80)
# Virtual seconds after which every connection must have come to its end.
LIMIT = 20.0
WORLDS = ("model", "loop")


class OracleError(SimulationError):
    """An oracle spoke up; ``oracle`` is its name."""

    def __init__(self, oracle: str, text: str, seed: int) -> None:
        super().__init__(f"{oracle}: {text}", seed)
        self.oracle = oracle


def oracle_of(error: BaseException) -> str:
    """The name of the oracle that this failure came from."""
    if isinstance(error, OracleError):
        return error.oracle
    if isinstance(error, ContractViolation):
        return "contract"
    if isinstance(error, Deadlock):
        return "deadlock"
    return type(error).__name__


class World:
    """What a scenario needs of a loop, and the book of all ends; see `ModelWorld` and `LoopWorld`."""

    def __init__(self, seed: int, engine: SimulatedEngine, kind: str | None) -> None:
        self.seed = seed
        self.engine = engine
        self.random = SeededRandom(seed ^ 0x7363656E6172696F)
        self.kind = kind
        self.waiting: dict[int, dict[bool, End]] = {}
        self.failures: list[OracleError] = []
        self.live = self.checks_left = 0
        self.connecting = 0
        self.server: Any = None
        self.settled = self.server_closed = False

    def fail(self, oracle: str, text: str) -> None:
        """The first failure counts; later ones follow from it."""
        self.failures.append(OracleError(oracle, text, self.seed))

    def new_end(self, server: bool) -> Any:
        """A protocol for a new end."""
        return self.adapt(End(self, Script.draw(self.random, server), server))

    def adapt(self, end: End) -> Any:
        """A protocol of the kind that was asked for, or of any."""
        return adapt(end, self.kind or self.random.choice(KINDS))

    def set_limits(self, transport: Any, high: int) -> None:
        """Sets the marks of flow control, where a transport can."""

    def swap_protocol(self, end: End) -> None:
        """Makes another protocol take over, where a transport can."""

    def write(self, transport: Any, data: Any) -> None:
        """Writes in one of the ways that a transport knows."""
        transport.write(data)

    def meet(self, end: End) -> None:
        """An end is connected; if the other one is, they get to know each other."""
        self.live += 1
        self.checks_left += 1
        ends = self.waiting.setdefault(end.base, {})
        if end.server in ends:
            self.fail("callbacks", f"two transports for {end!r}")
        ends[end.server] = end
        if len(ends) == 2:
            ends[True].peer, ends[False].peer = ends[False], ends[True]
            del self.waiting[end.base]
        else:
            # Until the other one shows up: nothing can have been written by it.
            end.peer = None

    def begin(self) -> None:
        """The listener, and connections in their time."""
        self.connecting = self.random.integer(1, 5)
        for _ in range(self.connecting):
            self.call_later(self.random.choice((0.0, 0.0, 1e-4, 3e-3)), self.connect)
        if self.random.likely(0.1):
            self.call_later(1e-3, self.stop_serving)

    def connected(self) -> None:
        """One client connection more was tried."""
        self.connecting -= 1
        if not self.connecting:
            # Accepts may be held up by EMFILE; whoever hasn't been accepted after that is reset.
            self.call_later(self.random.choice((1e-3, LIFETIME + 2)), self.close_server)

    def close_server(self) -> None:
        """Ends the scenario, but for the connections that are alive."""
        self.stop_serving()
        self.call_later(PATIENCE, self.settle)

    def stop_serving(self) -> None:
        """Closes the listener."""
        self.server_closed = True
        self.server.close()

    def settle(self) -> None:
        self.settled = True

    def finished(self) -> bool:
        """Nothing more to happen, or a failure."""
        return bool(self.failures) or (self.settled and not self.live and not self.checks_left)

    def run(self) -> None:
        """Everything, in one to three runs of the loop; then the last checks."""
        self.start()
        slices = [self.random.choice((1e-4, 2e-3, 0.1)) for _ in range(self.random.integer(0, 2))]
        for limit in (*slices, LIMIT):
            if self.run_loop(limit):
                break
        else:
            pending = "\n  ".join(self.engine.operations())
            self.fail(
                "liveness",
                f"{self.live} ends are alive after {LIMIT} virtual seconds; operations:\n  {pending}",
            )
        if not self.failures:
            self.judge_end()
        self.engine.check()
        if self.failures:
            raise self.failures[0]

    def judge_end(self) -> None:
        """The last oracles: nothing is left."""
        for error in self.errors():
            self.fail("callbacks", f"a callback raised {error!r}")
        if self.engine.descriptors():
            self.fail("leak", f"descriptors {self.engine.descriptors()} are open at the end")
        if self.engine.operations():
            self.fail("leak", f"operations at the end: {self.engine.operations()}")
        if self.engine.held_blocks():
            self.fail("leak", f"{self.engine.held_blocks()} blocks are held at the end")

    # What the two worlds do each in its way.

    def start(self) -> None:
        raise NotImplementedError

    def run_loop(self, limit: float) -> bool:
        raise NotImplementedError

    def call_later(self, delay: float, callback: Callable[[], object]) -> None:
        raise NotImplementedError

    def connect(self) -> None:
        raise NotImplementedError

    def socket_of(self, transport: Any) -> Any:
        raise NotImplementedError

    def errors(self) -> list[BaseException]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class ModelWorld(World):
    """Over the model transport; `bug` plants one of ``headrace._model.BUGS``."""

    def __init__(self, seed: int, kind: str | None = None, bug: str | None = None, **options: Any) -> None:
        plant = BUGS[bug][1] if bug is not None else None
        engine = SimulatedEngine(seed, plant=plant, **options)
        super().__init__(seed, engine, "bytes")
        self.loop = ModelLoop(engine, bug)

    def start(self) -> None:
        self.server = self.loop.listen(ADDRESS, lambda: self.new_end(True))
        self.begin()

    def run_loop(self, limit: float) -> bool:
        return self.loop.run(self.finished, limit)

    def call_later(self, delay: float, callback: Callable[[], object]) -> None:
        self.loop.call_later(delay, callback)

    def connect(self) -> None:
        try:
            self.loop.connect(ADDRESS, lambda: self.new_end(False))
        except OSError:
            pass  # the server was closed by then, or descriptors are short
        finally:
            self.connected()

    def socket_of(self, transport: Any) -> Any:
        return transport.get_extra_info("simulated_socket")

    def errors(self) -> list[BaseException]:
        return self.loop.errors

    def close(self) -> None:
        self.engine.close()


class LoopWorld(World):
    """Over headrace's loop and transports, with protocols of one kind, or of all three."""

    def __init__(self, seed: int, kind: str | None = None, bug: str | None = None, **options: Any) -> None:
        if bug is not None:
            raise ValueError("bugs are planted in the model only")
        self.loop = SimulatedLoop(seed, **options)
        super().__init__(seed, self.loop.simulated, kind)
        self.raised: list[BaseException] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop.set_exception_handler(self.handle)

    def handle(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception") or RuntimeError(context["message"])
        if not (isinstance(error, OSError) and "out of system resources" in context["message"]):
            self.raised.append(error)

    def start(self) -> None:
        listener = VirtualSocket(self.engine, self.engine.listen(ADDRESS))
        self.server = self.loop.run_until_complete(
            self.loop.create_server(lambda: self.new_end(True), sock=listener)
        )
        self.begin()

    def run_loop(self, limit: float) -> bool:
        deadline = self.loop.time() + limit
        self.loop.call_soon(self.look, deadline)
        self.loop.run_forever()
        return self.finished()

    def look(self, deadline: float) -> None:
        """Every now and then: is it over?"""
        if self.finished() or self.loop.time() >= deadline:
            self.loop.stop()
        else:
            self.loop.call_later(min(0.05, deadline - self.loop.time()), self.look, deadline)

    def call_later(self, delay: float, callback: Callable[[], object]) -> None:
        self.loop.call_later(delay, callback)

    def set_limits(self, transport: Any, high: int) -> None:
        transport.set_write_buffer_limits(high=high)

    def swap_protocol(self, end: End) -> None:
        end.transport.set_protocol(self.adapt(end))

    def write(self, transport: Any, data: Any) -> None:
        way = self.random.integer(0, 3)
        if way == 0:
            cut = self.random.integer(0, len(data))
            transport.writelines([data[:cut], b"", data[cut:]])
        elif way == 1:
            # Mutable buffers are the writer's again as soon as write() returns.
            buffer = bytearray(data)
            transport.write(buffer)
            buffer[:] = bytes(len(buffer))
        elif way == 2:
            transport.write(memoryview(data))
        else:
            transport.write(data)

    def connect(self) -> None:
        task = self.loop.create_task(self.connect_one())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def connect_one(self) -> None:
        try:
            await self.loop.create_connection(lambda: self.new_end(False), *ADDRESS)
        except OSError:
            pass  # the server was closed by then, or descriptors are short
        finally:
            self.connected()

    def socket_of(self, transport: Any) -> Any:
        return self.engine.socket(transport._sock_fd)

    def errors(self) -> list[BaseException]:
        return self.raised

    def close(self) -> None:
        self.loop.close()


def run_scenario(
    seed: int,
    *,
    world: str = "model",
    kind: str | None = None,
    bug: str | None = None,
    trace: list[Any] | None = None,
    **options: Any,
) -> SimulatedEngine:
    """One seed: scripted clients and servers in a simulated world.

    Parameters
    ----------
    seed : int
    world : {"model", "loop"}
        The model transport, or headrace's loop with its real transports.
    kind : {"bytes", "buffered", "lease"}, optional
        Which kind of protocol; by default each end has another. The model knows bytes only.
    bug : str, optional
        Plants one of ``headrace._model.BUGS`` (in the model world).
    trace : list, optional
        Gets the engine's trace.
    options
        For `SimulatedEngine`.

    Returns the engine, closed, for its counters. Raises `OracleError`, `ContractViolation` or `Deadlock`.
    """
    made = (ModelWorld if world == "model" else LoopWorld)(
        seed, kind=kind, bug=bug, trace=trace is not None, **options
    )
    if trace is not None:
        trace.append(made.engine.trace)
    try:
        made.run()
    finally:
        made.close()
    return made.engine
