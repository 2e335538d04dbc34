"""A security layer: a protocol to the transport below it, and a transport to the protocol above it.

One object is both, for each connection. The framing itself is a core without I/O (``headrace.framing``); this is what
binds it to transports and to a loop.

Rules
-----
* What is received is decrypted from the lease it came in, and passed on record by record. What is written meanwhile
  goes out together afterwards; what is written at other times goes out at the turn's end.
* Writing queues plaintext. It's encrypted only while the transport below takes more: after its ``pause_writing`` the
  rest waits as plaintext, and the protocol above is paused. So one ledger counts all that isn't sent.
* The transport below is paused while the protocol above is, while something that came hasn't been worked off, and while
  answers that the framing itself owes the peer (to key updates) pile up because the peer doesn't read them.
* The protocol above hears of its connection only when the handshake is done and the peer is let in; it doesn't hear
  of one that failed.
* The end of the peer's stream comes after everything that was received before it, however long reading was paused.
* A connection whose both streams have ended closes by itself.
* ``close`` sends what is queued and the framing's end, then waits for the peer's, but not for ever.
* What the framing owes a peer when it fails (an alert) is sent, if it can be sent at once.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import logging
import ssl
from asyncio import constants, transports
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias
from typing import Protocol as TypingProtocol

from headrace._pool import Lease
from headrace.errors import AccessDenied, SecurityError, StalledError
from headrace.protocol import Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from headrace.loop import EventLoop
    from headrace.security.access import AccessList
    from headrace.security.identity import Identity

__all__ = ["Core", "SecurityLayer"]

logger = logging.getLogger("headrace.security")

# Plaintext that is encrypted at a time, at most: some full records, which one send takes together.
SLICE = 64 * 1024
# Items of at least this many bytes are encrypted by themselves: a copy to join them would gain nothing.
LARGE = 16 * 1024
# As soon as so much is queued it's encrypted, so that the flow control is seen to in time.
FLUSH_AT = 64 * 1024
# Bytes that the framing may owe a peer that doesn't read, before nothing more is read from it.
ANSWERS_LIMIT = 64 * 1024

Piece: TypeAlias = bytes | memoryview | Lease

# What a core raises; everything else is a mistake of ours.
CORE_ERRORS = (ssl.SSLError, SecurityError)


class Core(TypingProtocol):
    """What a layer asks of its framing."""

    def start(self) -> None:
        """Begins the handshake."""

    def receive(self, data: bytes | memoryview | Lease | None, plaintext: list[bytes]) -> None:
        """Works off what came, or what is ``pending``."""

    pending: Any  # true while ``receive`` is to be called again
    peer_closed: bool  # it has ended its stream

    def send(self, data: Piece) -> None:
        """Makes records of ``data``."""

    @property
    def unsent(self) -> int:
        """Bytes that were sent but wait for something to be received."""

    def outgoing(self) -> bytes:
        """Takes the records that are to be sent."""

    def close(self) -> None:
        """Ends our stream."""


class Kind(enum.Enum):
    """What the protocol above takes."""

    BYTES = 1
    LEASES = 2
    BUFFERED = 3


BYTES, LEASES, BUFFERED = Kind.BYTES, Kind.LEASES, Kind.BUFFERED


class SecurityLayer(transports._FlowControlMixin, Protocol):
    """A secured connection; an :class:`asyncio.Transport`. Made by the loop. Belongs to the loop's thread.

    A subclass gives ``_core``, and says by the first methods below what its framing is about.
    """

    __slots__ = (
        "__weakref__",
        "_access",
        "_answers",
        "_asking",
        "_closing",
        "_conn_lost",
        "_connected",
        "_context",
        "_core",
        "_corked",
        "_end",
        "_end_told",
        "_eof_written",
        "_error",
        "_established",
        "_goodbye",
        "_handshake_timeout",
        "_held",
        "_kind",
        "_lower",
        "_lower_ended",
        "_lower_full",
        "_lower_held",
        "_marked",
        "_paused",
        "_protocol",
        "_queue",
        "_queued",
        "_received",
        "_shutdown_timeout",
        "_slice",
        "_timer",
        "_unsent_before",
        "_waiter",
    )

    _start_tls_compatible = True
    _sendfile_compatible = constants._SendfileMode.FALLBACK
    _core: Any  # a Core
    _protocol: Any
    _received: Any

    def __init__(
        self,
        loop: EventLoop,
        protocol: asyncio.BaseProtocol,
        *,
        handshake_timeout: float,
        shutdown_timeout: float,
        waiter: asyncio.Future[None] | None = None,
        connected: bool = False,
    ) -> None:
        self._loop = loop
        self._extra: dict[str, Any] = {}
        self._waiter = waiter
        self._handshake_timeout = handshake_timeout
        self._shutdown_timeout = shutdown_timeout
        self._adopt(protocol)
        self._lower: Any = None
        self._context: contextvars.Context | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._access: AccessList | None = None  # which has let the peer in
        self._asking: asyncio.Task[None] | None = None  # it's finding out
        self._error: BaseException | None = None
        self._connected = connected  # connection_lost is owed
        self._established = False  # the handshake is done, and the peer let in
        self._closing = False  # nothing more is passed on, or taken to be sent
        self._goodbye = False  # the framing's end is sent, or won't be
        self._eof_written = False
        self._conn_lost = 0
        # Receiving.
        self._held: deque[Piece] = deque()  # what the protocol hasn't taken
        self._end = False  # the peer's stream has ended, and the protocol is to be told
        self._end_told = False
        self._paused = False  # by the protocol
        self._lower_held = False  # the transport below is paused by us
        self._lower_ended = False
        # Sending.
        self._queue: deque[Piece] = deque()
        self._queued = 0
        self._slice = SLICE  # bytes of plaintext that are encrypted at a time
        self._corked = False
        self._marked = False
        self._lower_full = False
        self._protocol_paused = False
        self._answers = 0
        self._unsent_before = 0

    # ---- what a framing adds ---------------------------------------------------------------------------------

    def _handshake_done(self) -> bool:
        """Whether it is, and the peer let in; asked after each receive until it's true. Raises what keeps it out."""
        raise NotImplementedError

    def _truncation(self) -> BaseException | None:
        """What the protocol gets when the transport ended and the framing didn't; None: an end like any other."""
        raise NotImplementedError

    def _deadline_error(self) -> Exception:
        raise NotImplementedError

    def _tells_failures(self) -> bool:
        """Whether what OpenSSL finds wrong is logged outside of debug mode, too."""
        raise NotImplementedError

    def _half_closes(self) -> bool:
        """Whether each direction may end by itself."""
        raise NotImplementedError

    def _leaves_silently(self) -> bool:
        """Whether the peer has left in such a way that it isn't told of our end."""
        return False

    # ---- the beginning ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._lower = transport
        self._context = contextvars.copy_context()
        if self._closing:  # by somebody who waited for the handshake, and gave up
            self._lower.abort()
            return
        self._timer = self._loop.call_later(
            self._handshake_timeout, self._handshake_overdue, context=self._context
        )
        try:
            self._core.start()
        except CORE_ERRORS as exc:
            self._fail(exc)
        else:
            self._send_outgoing()

    def _handshake_overdue(self) -> None:
        if not self._established:
            self._fail(self._deadline_error())

    def _establish(self) -> None:
        self._established = True
        assert self._timer is not None
        self._timer.cancel()
        self._timer = None
        if not self._connected:
            self._connected = True
            self._protocol.connection_made(self)
        self._wake_waiter(None)

    def _ask(self, access: AccessList, identity: Identity | None) -> bool:
        """Whether the peer is let in; False also while that is being found out.

        Raises :class:`headrace.errors.AccessDenied`.
        """
        access._watch(self)  # first: a change from another thread isn't missed
        self._access = access
        answer = access.ask(identity)
        if answer is True:
            return True
        if answer is False:
            raise AccessDenied(access.explain(identity))
        self._paused = True  # nothing is passed on before the answer
        self._control_reading()
        self._asking = self._loop.create_task(self._wait_for_answer(answer, access, identity))
        return False

    async def _wait_for_answer(
        self, answer: Awaitable[bool], access: AccessList, identity: Identity | None
    ) -> None:
        try:
            permitted = await answer
        except Exception as exc:
            self._protocol_failed(exc)
            return
        self._asking = None
        if self._closing:
            return
        if not permitted or access.denies(identity):
            self._denied(AccessDenied(access.explain(identity)))
        elif not self._established:
            self._paused = False
            self._let_in()

    def _denied(self, exc: AccessDenied) -> None:
        self._fail(exc)

    def _let_in(self) -> None:
        """What was waiting for an answer goes on."""
        self._establish()
        if not self._paused:
            self._paused = True
            self.resume_reading()

    def _recheck_access(self) -> None:
        """The access list has changed."""
        access = self._access
        if access is None or self._closing or not self._established:
            return
        identity = self.get_extra_info("security").remote_identity
        answer = access.ask(identity)
        if answer is False:
            self._denied(AccessDenied(access.explain(identity)))
        elif answer is not True:
            self._asking = self._loop.create_task(self._wait_for_answer(answer, access, identity))

    def _wake_waiter(self, exc: BaseException | None) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None or waiter.done():
            return
        if exc is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(exc)

    # ---- receiving -------------------------------------------------------------------------------------------

    def _receive(self, data: bytes | memoryview | Lease | None) -> None:
        core = self._core
        plaintext: list[bytes] = []
        error = None
        self._corked = True
        try:
            try:
                core.receive(data, plaintext)
                if not self._established and self._handshake_done():
                    self._establish()
            except CORE_ERRORS as exc:
                error = exc
            if not plaintext:
                pass
            elif self._closing:
                self._came_too_late()
            elif len(plaintext) > 1 or self._paused or self._kind is BUFFERED:
                self._pass_on(plaintext)
            elif self._kind is BYTES:
                self._received(plaintext[0])
            else:
                self._received(self._loop._engine.pool.adopt(plaintext[0]))  # type: ignore[union-attr]
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._protocol_failed(exc)
            return
        finally:
            self._corked = False
        if error is not None:
            self._fail(error)
            return
        if self._queue:
            self._flush()
        else:
            self._send_outgoing()
        if core.pending or self._held or core.peer_closed:
            self._look_after()

    # From a transport of headrace's own, and from another one.
    lease_received = data_received = _receive  # type: ignore[assignment]  # it takes more than leases

    def _came_too_late(self) -> None:
        """Bytes of the peer's after ``close``.

        Where each direction ends by itself they are dropped, until the peer has read what we sent and ends its own: a
        reset would take back what is still on its way. asyncio's users get what they know: the connection's end.
        """
        if self._goodbye and not self._half_closes() and not self._lower.get_write_buffer_size():
            self._lower.abort()

    def _look_after(self) -> None:
        """The less usual ends of a receive."""
        if self._core.pending:
            # It was enough for one turn.
            self._hold_lower()
            self._loop.call_soon(self._go_on, context=self._context)
        elif self._core.peer_closed:
            self._ended()

    def _go_on(self) -> None:
        """The protocol takes bytes again, or there was more than a turn's work."""
        if self._lower is None or (self._paused and not self._closing):
            return
        if self._held and not self._pass_on_held():
            return
        if self._core.pending:
            self._receive(None)
        if self._core.pending or self._held:
            return
        if self._end:
            self._ended()
        self._control_reading()

    def _pass_on_held(self) -> bool:
        held, self._held = self._held, deque()
        if self._closing:
            return True
        self._corked = True
        try:
            self._pass_on(held)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._protocol_failed(exc)
            return False
        finally:
            self._corked = False
        self._flush()
        return not self._held

    def _pass_on(self, plaintext: Iterable[Piece]) -> None:
        """Hands bytes to the protocol, in the pieces that they came in; what it doesn't take any more is held."""
        pieces = iter(plaintext)
        for data in pieces:
            if self._paused:
                self._held.append(data)
                self._held.extend(pieces)
                return
            if self._closing:
                return
            if self._kind is BYTES:
                self._received(data if type(data) is bytes else bytes(data))
            elif self._kind is LEASES:
                self._received(self._lease_of(data))
            else:
                self._fill_buffers(data)

    def _lease_of(self, data: Piece) -> Lease:
        engine = self._loop._engine
        assert engine is not None
        assert engine.pool is not None
        return engine.pool.adopt(data if type(data) is bytes else bytes(data))

    def _fill_buffers(self, data: Piece) -> None:
        """For an ``asyncio.BufferedProtocol``: copies into its buffers, as many as it takes."""
        view = memoryview(data)
        protocol: Any = self._protocol
        while view and not self._closing:
            if self._paused or self._protocol is not protocol:
                self._held.append(view)
                if not self._paused:
                    self._loop.call_soon(self._go_on, context=self._context)
                return
            buffer = memoryview(protocol.get_buffer(len(view)))
            if not len(buffer):
                raise RuntimeError("get_buffer() returned an empty buffer")
            size = min(len(buffer), len(view))
            buffer[:size] = view[:size]
            protocol.buffer_updated(size)
            view = view[size:]

    def _ended(self) -> None:
        """The peer's stream is over. The protocol hears of it when it has taken everything that came before."""
        if self._closing:
            self._finish_closing()
            return
        self._end = True
        if self._paused or self._held or self._core.pending:
            return
        if self._end_told:
            self._finish_closing()
            return
        truncation = None if self._core.peer_closed else self._truncation()
        if truncation is not None:
            self._fail(truncation)
            return
        self._end_told = True
        keep_open = False
        try:
            keep_open = self._protocol.eof_received()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._protocol_failed(exc)
            return
        if keep_open and not self._half_closes():
            asyncio.log.logger.warning("returning true from eof_received() has no effect when using ssl")
            keep_open = False
        if not keep_open:
            self.close()

    def eof_received(self) -> bool:
        """The transport below has ended; whether it is to stay open."""
        self._lower_ended = True
        if self._loop.get_debug():
            asyncio.log.logger.debug("%r received EOF", self)
        if not self._established:
            self._fail(self._error or ConnectionResetError("the peer ended the connection in the handshake"))
        else:
            self._ended()
        return not self._lower.is_closing()

    def pause_reading(self) -> None:
        """No callback brings bytes, or the end of the stream, until ``resume_reading``."""
        if not self._closing and not self._paused:
            self._paused = True
            self._control_reading()

    def resume_reading(self) -> None:
        """Ends a pause. What was received meanwhile comes first, in the next turn."""
        if self._closing or not self._paused:
            return
        self._paused = False
        if self._held or self._end or self._core.pending:
            self._loop.call_soon(self._go_on, context=self._context)
        else:
            self._control_reading()

    def is_reading(self) -> bool:
        """Whether bytes are being passed on: neither paused nor closing."""
        return not self._closing and not self._paused

    def _hold_lower(self) -> None:
        if not self._lower_held:
            self._lower_held = True
            self._lower.pause_reading()

    def _control_reading(self) -> None:
        """Pauses the transport below, or lets it go on; see the rules."""
        if self._lower is None:
            return
        if (
            not self._closing and (self._paused or self._held or self._answers > ANSWERS_LIMIT)
        ) or self._core.pending:
            self._hold_lower()
        elif self._lower_held:
            self._lower_held = False
            self._lower.resume_reading()

    # ---- sending ---------------------------------------------------------------------------------------------

    def write(self, data: Any) -> None:
        """Queues ``data`` (bytes, bytearray, memoryview or Lease) to be encrypted and sent at the turn's end.

        Many small pieces of one turn share a record. Mutable buffers are copied; a lease is kept until it's encrypted.
        Never blocks; see ``pause_writing``. After the connection is lost, what is written is dropped.
        """
        if type(data) is not bytes:
            data = checked(data)
        if (self._closing or self._eof_written) and self._dropped():
            return
        size = len(data)
        if size:
            self._queue.append(data)
            self._queued += size
            if not self._corked or self._queued >= FLUSH_AT:
                self._queued_more()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Queues every item, as ``write`` does, with one look at the flow control at the end."""
        items = [checked(data) for data in list_of_data]
        size = sum(map(len, items))
        if not size or self._dropped():
            return
        self._queue.extend(item for item in items if len(item))
        self._queued += size
        self._queued_more()

    def _dropped(self) -> bool:
        """Whether it's too late to write."""
        if self._eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if not self._closing:
            return False
        if self._conn_lost >= constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES:
            asyncio.log.logger.warning("SSL connection is closed")
        self._conn_lost += 1
        return True

    def _queued_more(self) -> None:
        if self._queued >= FLUSH_AT:
            self._flush()
        elif not self._corked and not self._marked:
            self._marked = True
            self._loop._at_turn_end(self._flush)

    def _flush(self) -> None:
        """Encrypts what is queued, as far as the transport below takes it."""
        self._marked = False
        queue, lower = self._queue, self._lower
        if queue and self._established and not self._goodbye and lower is not None:
            send, outgoing = self._core.send, self._core.outgoing
            try:
                while queue and not self._lower_full:
                    if len(queue) == 1 and self._queued <= self._slice:
                        data = queue.popleft()
                    else:
                        data = next_slice(queue, self._slice)
                    self._queued -= len(data)
                    send(data)
                    lower.write(outgoing())
            except CORE_ERRORS as exc:
                self._fail(exc)
                return
        else:
            self._send_outgoing()
        if (self._closing or self._eof_written) and not queue and not self._goodbye:
            self._say_goodbye()

    def _send_outgoing(self) -> None:
        """What the framing itself has to say: the handshake, answers to key updates, alerts."""
        data = self._core.outgoing()
        if not data or self._lower is None:
            return
        self._lower.write(data)
        if self._lower_full:
            self._answers += len(data)
            self._control_reading()

    def pause_writing(self) -> None:
        """The transport below has enough for now."""
        self._lower_full = True
        if not self._protocol_paused:
            self._protocol_paused = True
            self._call_protocol("pause_writing")

    def resume_writing(self) -> None:
        """The transport below takes more: first what waits here."""
        self._lower_full = False
        if self._answers:
            self._answers = 0
            self._control_reading()
        self._flush()
        if not self._lower_full and self._protocol_paused:
            self._protocol_paused = False
            self._call_protocol("resume_writing")

    def _call_protocol(self, method: str) -> None:
        if self._protocol is None or not self._connected:
            return
        try:
            getattr(self._protocol, method)()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._loop.call_exception_handler(
                {
                    "message": f"protocol.{method}() failed",
                    "exception": exc,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )

    def write_eof(self) -> None:
        """Ends our stream behind what was written; the peer's goes on.

        Raises
        ------
        NotImplementedError
            Where half a connection can't be closed: see ``can_write_eof``.
        """
        if not self.can_write_eof():
            raise NotImplementedError("asyncio's ssl= has no half-closed connections; headrace.TLS has")
        if not self._eof_written and not self._closing:
            self._eof_written = True
            self._flush()

    def can_write_eof(self) -> bool:
        """Whether ``write_eof`` can be called."""
        return self._half_closes()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """See :meth:`asyncio.WriteTransport.set_write_buffer_limits`; counted is what the transport below holds."""
        self._lower.set_write_buffer_limits(high, low)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """(low, high), in bytes."""
        limits: tuple[int, int] = self._lower.get_write_buffer_limits()
        return limits

    def get_write_buffer_size(self) -> int:
        """Bytes that aren't sent: plaintext that waits, and records below."""
        size: int = self._queued + self._core.unsent
        return size if self._lower is None else size + self._lower.get_write_buffer_size()

    # ---- the end ---------------------------------------------------------------------------------------------

    def is_closing(self) -> bool:
        """Whether the connection is closed, or on the way there."""
        return self._closing

    def close(self) -> None:
        """Sends what is queued and the framing's end, waits for the peer's as long as the time limit says, and closes.

        Nothing more is received. Before the handshake is done there's nothing to be said: it's an ``abort`` then.
        """
        if self._closing:
            return
        self._closing = True
        self._held.clear()
        if not self._established:
            if self._lower is not None:
                self._lower.abort()
            return
        self._unsent_before = self.get_write_buffer_size()
        self._timer = self._loop.call_later(
            self._shutdown_timeout, self._shutdown_overdue, context=self._context
        )
        if not self._corked:
            self._flush()
        elif not self._queue:
            # _receive() flushes what is queued, and looks no further when there's nothing.
            self._loop.call_soon(self._flush, context=self._context)
        if self._core.pending:
            self._loop.call_soon(self._go_on, context=self._context)
        self._control_reading()
        if self._goodbye and self._lower_ended:
            # Our stream had ended before, and the peer's has: there's nothing to wait for.
            self._finish_closing()

    def _say_goodbye(self) -> None:
        """Everything is encrypted: the framing's end goes behind it."""
        if self._core.unsent:
            return
        self._goodbye = True
        if not self._leaves_silently():
            try:
                self._core.close()
            except CORE_ERRORS as exc:
                self._fail(exc)
                return
            self._send_outgoing()
        if self._core.peer_closed or self._lower_ended:
            self._finish_closing()

    def _finish_closing(self) -> None:
        """The peer's stream is over: when ours is as well, nothing more can come."""
        if self._goodbye and (self._closing or self._end_told) and self._lower is not None:
            self._closing = True
            self._lower.close()

    def _shutdown_overdue(self) -> None:
        self._timer = None
        unsent = self.get_write_buffer_size()
        if self._half_closes() and unsent and unsent < self._unsent_before:
            # What was queued goes out, slowly; the peer's answer to it has its time after that.
            self._unsent_before = unsent
            self._timer = self._loop.call_later(
                self._shutdown_timeout, self._shutdown_overdue, context=self._context
            )
            return
        self._force_close(self._shutdown_error(unsent))

    def _shutdown_error(self, unsent: int) -> Exception | None:
        """What the protocol gets when the peer doesn't end its stream in time."""
        if not unsent:
            return None
        return StalledError(
            f"the peer took no byte for {self._shutdown_timeout:g} s while the closing connection had {unsent} to send"
        )

    def abort(self) -> None:
        """Closes the connection at once; what is queued is dropped."""
        self._force_close(None)

    def _force_close(self, exc: BaseException | None) -> None:
        self._closing = self._goodbye = True
        if exc is not None and self._error is None:
            self._error = exc
        if self._lower is not None:
            self._lower._force_close(exc)

    def _protocol_failed(self, exc: BaseException) -> None:
        """A callback of the protocol's raised: nobody knows any more what the connection means."""
        self._fail(exc, f"Fatal error: a callback of {type(self._protocol).__qualname__} failed.")

    def _fail(self, exc: BaseException, message: str = "the secured connection failed") -> None:
        """The connection is over; the peer is told why, if that can be done at once."""
        if self._lower is None or self._lower.is_closing():
            return
        if isinstance(exc, SecurityError) or (isinstance(exc, ssl.SSLError) and self._tells_failures()):
            logger.info("%r: %s", self, exc)
        elif isinstance(exc, OSError):
            if self._loop.get_debug():
                asyncio.log.logger.debug("%r: %s", self, message, exc_info=exc)
        else:
            self._loop.call_exception_handler(
                {"message": message, "exception": exc, "transport": self, "protocol": self._protocol}
            )
        self._error = exc
        self._closing = self._goodbye = True
        alert = self._core.outgoing()
        if alert and not self._lower_ended and not self._lower.get_write_buffer_size():
            self._lower.write(alert)
            self._lower.close()
        else:
            self._lower._force_close(exc)
        self._wake_waiter(exc)

    def connection_lost(self, exc: BaseException | None) -> None:
        error = self._error or exc
        self._closing = self._goodbye = True
        self._conn_lost += 1
        self._queue.clear()
        self._queued = 0
        self._held.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        if self._access is not None:
            self._access._unwatch(self)
        protocol, self._protocol = self._protocol, None
        self._received = _ignore
        self._context = None
        try:
            if self._connected:
                protocol.connection_lost(error)
        finally:
            self._wake_waiter(error or ConnectionResetError("the connection was lost in the handshake"))

    # ---- what it is ------------------------------------------------------------------------------------------

    def _adopt(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        self._received = None
        if isinstance(protocol, Protocol):
            self._kind = Kind.LEASES
            self._received = protocol.lease_received
        elif isinstance(protocol, asyncio.BufferedProtocol):
            self._kind = Kind.BUFFERED
        else:
            self._kind = Kind.BYTES
            # A protocol that only writes has none; a byte that comes all the same is its failure.
            self._received = getattr(protocol, "data_received", None) or protocol.__getattribute__

    def get_protocol(self) -> Any:
        """The protocol that the callbacks go to."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Makes another protocol take over, from the next callback on; of any of the three kinds."""
        self._adopt(protocol)
        self._connected = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What the layer knows, else what the transport below does."""
        if name in self._extra:
            return self._extra[name]
        return default if self._lower is None else self._lower.get_extra_info(name, default)

    def __repr__(self) -> str:
        state = "closing" if self._closing else "open" if self._established else "in its handshake"
        return f"<headrace.{type(self).__name__} {state} over {self._lower!r}>"


def _ignore(data: object) -> None:
    """Nothing is passed on behind the end of a stream."""


def checked(data: Any) -> Piece:
    """Bytes that stay as they are until they are encrypted."""
    if type(data) is bytes:
        return data
    if type(data) is Lease:
        return data._to_send()
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    raise TypeError(f"data: expecting a bytes-like instance, got {type(data).__name__}")


def next_slice(queue: deque[Piece], size: int = SLICE) -> Piece:
    """Takes up to ``size`` bytes from a queue's head: a large item or a part of it, or small ones joined."""
    item = queue[0]
    if len(item) >= LARGE:
        if len(item) <= size:
            queue.popleft()
            return item
        view = memoryview(item)
        queue[0] = view[size:]
        return view[:size]
    parts: list[Piece] = []
    room = size
    while queue and room and len(queue[0]) < LARGE:
        item = queue[0]
        if len(item) > room:
            view = memoryview(item)
            queue[0] = view[room:]
            item = view[:room]
        else:
            queue.popleft()
        parts.append(item)
        room -= len(item)
    return b"".join(parts)
