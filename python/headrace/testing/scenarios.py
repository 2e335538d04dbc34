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
import dataclasses
import random
from collections.abc import Callable
from typing import Any

from headrace._model import BUGS, ModelLoop
from headrace._simulated import SimulatedEngine
from headrace._virtual import ContractViolation, Deadlock, SeededRandom, SimulationError
from headrace.protocol import Protocol
from headrace.testing.simulation import SimulatedLoop, VirtualSocket

__all__ = ["KINDS", "WORLDS", "OracleError", "Script", "oracle_of", "run_scenario"]

ADDRESS = ("server", 80)
# Virtual seconds. After abort() nothing is left to wait for but cancelled operations, each delayed by 1 ms at most.
PATIENCE = 0.25
# An end that hasn't been told to end by then aborts.
LIFETIME = 5.0
# And by then every connection must have come to its end.
LIMIT = 20.0

PERIOD = 65521  # a prime: shifted, repeated and lost bytes all show
_PATTERN = random.Random(0x68656164).randbytes(PERIOD) * 3

KINDS = ("bytes", "buffered", "lease")
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


def pattern(offset: int, size: int) -> bytes:
    """Bytes ``offset .. offset + size`` of an endless stream."""
    start = offset % PERIOD
    return _PATTERN[start : start + size]


@dataclasses.dataclass
class Script:
    """What one end does.

    ``writes`` are (delay in virtual seconds, bytes); ``ending`` is "close", "eof", "abort" or "wait"; ``reading`` is
    "steady", "slow" (a pause after each receive) or "late" (paused at first). An ``echo`` end sends back what it
    receives. After ``cut`` received bytes it closes, or aborts, from within the callback. ``high`` is the mark of flow
    control.
    With ``swap`` another protocol takes over now and then, in the middle of the stream.
    """

    writes: list[tuple[float, int]]
    ending: str
    reading: str
    pause: float
    echo: bool
    patient: bool  # heeds pause_writing
    hoard: int  # leases that it holds on to
    cut: int | None
    high: int
    swap: bool

    @classmethod
    def draw(cls, chance: SeededRandom, server: bool) -> Script:
        """A script, as the seed says."""
        echo = server and chance.likely(0.5)
        writes = []
        if not echo:
            for _ in range(chance.integer(0, 4)):
                size = chance.choice((1, 7, 64, 1000, 3000, 20000, 60000))
                delay = chance.choice((0.0, 0.0, 0.0, 1e-4, 5e-3))
                writes.append((delay, chance.integer(1, size)))
        return cls(
            writes=writes,
            ending="wait" if echo else chance.choice(("close", "close", "eof", "eof", "wait", "abort")),
            reading=chance.choice(("steady", "steady", "slow", "late")),
            pause=chance.choice((1e-5, 1e-3, 2e-2)),
            echo=echo,
            patient=chance.likely(0.7),
            hoard=chance.choice((0, 0, 1, 5, 40)),
            cut=chance.integer(0, 5000) if chance.likely(0.1) else None,
            high=chance.choice((0, 1, 1000, 20000, 65536)),
            swap=chance.likely(0.15),
        )


class End:
    """One end of a connection: runs its script, and watches what happens to it."""

    def __init__(self, world: World, script: Script, server: bool) -> None:
        self.world = world
        self.script = script
        self.server = server
        self.peer: End | None = None
        self.transport: Any = None
        self.socket: Any = None
        self.base = 0
        self.written = self.received = 0
        self.made = self.lost = 0
        self.eof = self.ended = self.closed = self.aborted = False
        self.paused = self.writing_paused = False
        self.hoarded: list[tuple[Any, int]] = []
        self.remaining = list(script.writes)
        self.told_at_end = 0
        self.unread = (0, 0)

    def __repr__(self) -> str:
        return f"{'server' if self.server else 'client'} of connection {self.base}"

    def fail(self, oracle: str, text: str) -> None:
        """An oracle has found something."""
        self.world.fail(oracle, f"{self!r}: {text}")

    # ---- callbacks -------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Finds out who the peer is, and begins."""
        self.made += 1
        if self.made > 1:
            self.fail("callbacks", "connection_made came twice")
        self.transport = transport
        self.socket = self.world.socket_of(transport)
        name = self.socket.peer_address if self.server else self.socket.address
        self.base = name[1]
        self.world.meet(self)
        self.world.set_limits(transport, self.script.high)
        self.world.call_later(LIFETIME - 1.0, self.look)
        self.world.call_later(LIFETIME, self.give_up)
        if self.script.reading == "late":
            self.pause()
        self.write_next()

    def took(self, data: Any) -> None:
        """Bytes came."""
        self.check_alive("bytes came")
        if self.paused:
            self.fail("callbacks", "bytes came while reading was paused")
        if not data:
            self.fail("bytes", "an empty receive")
        peer = self.peer
        if peer is None or self.received + len(data) > peer.written:
            written = peer.written if peer else 0
            self.fail("bytes", f"{self.received + len(data)} bytes have come, {written} were written")
        if data != pattern(self.base * 7919 + self.received, len(data)):
            self.fail("bytes", f"wrong bytes within {self.received} .. {self.received + len(data)}")
        self.received += len(data)
        if self.script.echo:
            self.write(data)
        if self.script.reading == "slow" and not self.ended:
            self.pause()
        if self.script.cut is not None and self.received > self.script.cut and not self.closed:
            self.cut()
        elif self.script.swap and self.world.random.likely(0.2):
            self.world.swap_protocol(self)

    def keep(self, lease: Any, offset: int) -> None:
        """Holds on to a lease of the bytes at `offset`, and lets go of the oldest beyond the script's number."""
        self.hoarded.append((lease, offset))
        if len(self.hoarded) > self.script.hoard:
            self.let_go()

    def let_go(self) -> None:
        """Gives the oldest lease back; its bytes must still be what they were."""
        lease, offset = self.hoarded.pop(0)
        if lease != pattern(self.base * 7919 + offset, len(lease)):
            self.fail("bytes", f"a held lease of the bytes {offset} .. {offset + len(lease)} has changed")
        lease.release()

    def eof_received(self) -> bool:
        """The peer has ended its direction."""
        self.check_alive("the end of the stream came")
        if self.eof:
            self.fail("callbacks", "the end of the stream came twice")
        if self.paused:
            self.fail("callbacks", "the end of the stream came while reading was paused")
        self.eof = True
        self.told_at_end = self.socket.told
        peer = self.peer
        if self.socket.incoming.broken is None:
            if peer is None:
                # Accepted while the server was being closed, and so closed at once by the listener.
                if not self.world.server_closed:
                    self.fail("end", "an end of stream from a peer that never was")
            elif not (peer.ended or peer.closed):
                self.fail("end", "an end of stream that the peer never sent")
            elif not peer.aborted and self.received != peer.written:
                self.fail(
                    "complete", f"{self.received} of {peer.written} bytes came before the end of the stream"
                )
        keep_open = bool(self.remaining) and not self.ended
        if not keep_open:
            self.closed = True
        return keep_open

    def connection_lost(self, reason: BaseException | None) -> None:
        """The end, once."""
        self.lost += 1
        if self.lost > 1 or not self.made:
            self.fail("callbacks", f"connection_lost came {self.lost} times, connection_made {self.made}")
        while self.hoarded:
            self.let_go()
        self.judge_loss(reason, self.socket.incoming.broken, self.socket.told)
        self.world.call_later(PATIENCE, self.check_gone)
        self.world.live -= 1

    def judge_loss(self, reason: BaseException | None, broken: str | None, told: int) -> None:
        """Whether this end of the connection is the one that the network gave it."""
        if reason is not None:
            if not isinstance(reason, OSError):
                self.fail("callbacks", f"connection_lost({reason!r})")
            elif broken is None:
                self.fail("reset", f"connection_lost({reason!r}), but nobody reset the connection")
        elif (self.told_at_end and not self.aborted) or (told and not self.closed):
            self.fail("reset", f"the kernel told error {told}, connection_lost told none")
        elif not (self.closed or self.eof):
            self.fail("end", f"lost without a reason ({broken or 'the connection was whole'})")

    def pause_writing(self) -> None:
        """The transport holds much; an echo stops reading, others stop writing, if they are patient."""
        if self.writing_paused:
            self.fail("callbacks", "pause_writing came twice")
        self.writing_paused = True

    def resume_writing(self) -> None:
        """The transport has room again."""
        if not self.writing_paused:
            self.fail("callbacks", "resume_writing came without pause_writing")
        self.writing_paused = False
        if self.script.patient:
            self.write_next()

    # ---- actions ---------------------------------------------------------------------------------------------

    def check_alive(self, what: str) -> None:
        if not self.made or self.lost or self.closed:
            when = "after connection_lost" if self.lost else "after close()" if self.closed else "at first"
            self.fail("callbacks", f"{what} {when}")

    def write(self, data: Any) -> None:
        if not self.transport.is_closing() and not self.ended:
            self.written += len(data)
            self.world.write(self.transport, data)

    def write_next(self) -> None:
        """The next write of the script, in its time; after the last one the ending."""
        if self.lost or self.closed or self.ended:
            return
        if not self.remaining:
            self.finish()
            return
        delay, size = self.remaining[0]
        if delay:
            self.remaining[0] = (0.0, size)
            self.world.call_later(delay, self.write_next)
            return
        if self.writing_paused and self.script.patient:
            return  # goes on in resume_writing
        self.remaining.pop(0)
        self.write(pattern(self.written + self.base * 7919, size))
        self.write_next()

    def finish(self) -> None:
        ending = self.script.ending
        if ending == "wait" or self.transport.is_closing():
            return
        self.ended = True
        if ending == "close":
            self.closed = True
            self.transport.close()
        elif ending == "abort":
            self.abort()
        else:
            self.transport.write_eof()
            if self.eof:
                self.closed = True
                self.transport.close()

    def cut(self) -> None:
        """Has had enough, in the middle of a callback."""
        if self.script.pause > 1e-4:
            self.abort()
        else:
            self.closed = self.ended = True
            self.transport.close()

    def abort(self) -> None:
        """Ends it at once, and sees to it that this is soon."""
        self.closed = self.aborted = self.ended = True
        self.transport.abort()
        self.world.call_later(PATIENCE, self.check_lost)

    def look(self) -> None:
        """One second before the end of its life: what lies unread in the kernel?"""
        if not self.lost:
            self.unread = (self.socket.incoming.arrived, self.socket.incoming.taken)

    def give_up(self) -> None:
        """The end of its life. What lay unread a second ago must have been read, unless it didn't want to."""
        if self.lost:
            return
        arrived, taken = self.unread
        if arrived > taken == self.socket.incoming.taken and not self.paused and not self.closed:
            self.fail("liveness", f"{arrived - taken} bytes lay unread for a second")
        self.abort()

    def pause(self) -> None:
        """Stops reading for a while."""
        if not self.paused and not self.closed and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()
            self.world.call_later(self.script.pause, self.resume)

    def resume(self) -> None:
        if self.paused and not self.lost and not self.closed:
            self.paused = False
            self.transport.resume_reading()

    # ---- checks in their time --------------------------------------------------------------------------------

    def check_lost(self) -> None:
        """Some time after abort()."""
        if not self.lost:
            self.fail("liveness", f"no connection_lost {PATIENCE} s after abort(); {self.socket!r}")

    def check_gone(self) -> None:
        """Some time after connection_lost."""
        if self.socket.operations or self.socket.fd >= 0:
            self.fail("operations", f"{self.socket!r} lives on after connection_lost")
        self.transport = None
        self.world.checks_left -= 1


class BytesEnd(asyncio.Protocol):
    """An `End` as an ``asyncio.Protocol``."""

    def __init__(self, end: End) -> None:
        self.connection_made = end.connection_made  # type: ignore[method-assign]
        self.data_received = end.took  # type: ignore[method-assign]
        self.eof_received = end.eof_received  # type: ignore[method-assign]
        self.connection_lost = end.connection_lost  # type: ignore[method-assign,assignment]
        self.pause_writing = end.pause_writing  # type: ignore[method-assign]
        self.resume_writing = end.resume_writing  # type: ignore[method-assign]


class BufferedEnd(asyncio.BufferedProtocol):
    """An `End` as an ``asyncio.BufferedProtocol``, with buffers of all sizes."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.buffer = bytearray()
        self.connection_made = end.connection_made  # type: ignore[method-assign]
        self.eof_received = end.eof_received  # type: ignore[method-assign]
        self.connection_lost = end.connection_lost  # type: ignore[method-assign,assignment]
        self.pause_writing = end.pause_writing  # type: ignore[method-assign]
        self.resume_writing = end.resume_writing  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> bytearray:
        """A new buffer each time: what is in it is then certainly this receive."""
        self.buffer = bytearray(self.end.world.random.choice((1 + sizehint // 2, 4096, 65536)))
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """The transport has put bytes there."""
        self.end.took(bytes(self.buffer[:nbytes]))


class LeaseEnd(Protocol):
    """An `End` as a ``headrace.Protocol`` that holds on to some leases."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.connection_made = end.connection_made  # type: ignore[method-assign]
        self.eof_received = end.eof_received  # type: ignore[method-assign]
        self.connection_lost = end.connection_lost  # type: ignore[method-assign,assignment]
        self.pause_writing = end.pause_writing  # type: ignore[method-assign]
        self.resume_writing = end.resume_writing  # type: ignore[method-assign]

    def lease_received(self, lease: Any) -> None:
        """Looks at the bytes where they lie; an echo sends the lease itself. Some are kept, whole or as a slice."""
        end = self.end
        offset = end.received
        end.took(lease)
        end.keep(lease[:] if end.script.echo else lease, offset)


ADAPTERS: dict[str, Callable[[End], Any]] = {"bytes": BytesEnd, "buffered": BufferedEnd, "lease": LeaseEnd}


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
        return ADAPTERS[self.kind or self.random.choice(KINDS)](end)

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
