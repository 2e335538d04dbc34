"""The scripted ends of the simulator's scenarios: what each one does, and what it finds wrong with what becomes of it.

See `headrace.testing.scenarios` for the oracles.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headrace._virtual import SeededRandom
from headrace.protocol import Protocol

if TYPE_CHECKING:
    from headrace.testing.scenarios import World

__all__ = ["KINDS", "LIFETIME", "PATIENCE", "End", "Script", "adapt"]

# Virtual seconds. After abort() nothing is left to wait for but cancelled operations, each delayed by 1 ms at most.
PATIENCE = 0.25
# An end that hasn't been told to end by then aborts.
LIFETIME = 5.0

PERIOD = 65521  # a prime: shifted, repeated and lost bytes all show
_PATTERN = random.Random(0x68656164).randbytes(PERIOD) * 3

KINDS = ("bytes", "buffered", "lease")


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


def adapt(end: End, kind: str) -> Any:
    """A protocol of one of `KINDS` that is this end."""
    return ADAPTERS[kind](end)
