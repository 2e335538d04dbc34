"""TLS framing without I/O: records in, plaintext out, and the other way round. The cryptography is OpenSSL's.

Rules
-----
* The core owns a *pump* (see ``pump.py``): an ``ssl.SSLObject`` and the two buffers it reads from and writes to. Who
  uses the core moves the bytes: ``receive`` for what came, ``send`` and ``outgoing`` for what goes. After each call
  there may be something ``outgoing``, also after one that failed: an alert for the peer.
* What is received is counted by record headers, before OpenSSL sees it: one SSL_read works off *all* records without
  plaintext that it can get (key updates, tickets, empty ones), so small records are handed over SMALL_BATCH at a time,
  and SILENT_LIMIT of them in a row end the connection. OpenSSL itself has no such limit.
* ``receive`` stops after TURN_LIMIT small records, so that one peer can't keep the others of a loop waiting: while
  there is something ``pending``, call it again.
* Until the handshake is done nothing is decrypted for the user, and a peer may send HANDSHAKE_LIMIT bytes at most.
* A server with a choice of contexts reads the ClientHello itself and makes the ``SSLObject`` from the context that is
  meant. (Another context set in OpenSSL's own callback doesn't bring its rule about client certificates along.)
* After every handshake, resumed or not: a context that demands a certificate and a peer without one don't go together.
* The end of a stream is a close_notify. What follows it is dropped. The transport's end without one is a truncation:
  ``truncated`` tells.

    HANDSHAKE  -> OPEN          the handshake is done, and the peer has the certificate that the context demands
    OPEN       -> PEER_CLOSED   its close_notify came; we may still send (RFC 8446 section 6.1)
    OPEN       -> CLOSING       ours was sent; what the peer still sends can be received
    PEER_CLOSED, CLOSING -> CLOSED
    any        -> FAILED        an alert of the peer's, a bad record, a broken limit

See RFC 8446 (TLS 1.3), RFC 5246 (TLS 1.2).
"""

from __future__ import annotations

import enum
import ssl
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from headrace.errors import FramingError, HandshakeError
from headrace.framing.client_hello import ClientHello, ClientHelloReader
from headrace.framing.pump import Pump, make_pump

if TYPE_CHECKING:
    from headrace._pool import Lease

    _Data: TypeAlias = bytes | memoryview | Lease

__all__ = ["State", "TLSCore"]

HEADER = 5  # bytes: content type, version, length (RFC 8446 section 5.1)
SMALL = 512  # bytes; records up to this length are counted
SMALL_BATCH = 32  # small records that OpenSSL is given at a time
TURN_LIMIT = 64  # small records that one receive() works off
SILENT_LIMIT = 32  # records in a row without plaintext; BoringSSL's and rustls' limit for key updates
HANDSHAKE_LIMIT = 128 * 1024  # bytes; a chain of ten large certificates is 30 KiB
HANDSHAKE_STEP = 16 * 1024  # bytes that OpenSSL is given at a time until then


class State(enum.Enum):
    """See the table above."""

    HANDSHAKE = "handshake"
    OPEN = "open"
    PEER_CLOSED = "peer closed"
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"


PEER_HAS_CLOSED = {State.OPEN: State.PEER_CLOSED, State.CLOSING: State.CLOSED}
WE_HAVE_CLOSED = {State.OPEN: State.CLOSING, State.PEER_CLOSED: State.CLOSED}
ENDED = frozenset((State.PEER_CLOSED, State.CLOSED, State.FAILED))
OPEN = State.OPEN  # looked up once a record


class TLSCore:
    """One end of a TLS connection.

    Parameters
    ----------
    context : ssl.SSLContext or callable
        Never changed. A server may give a function from the :class:`ClientHello` to a context.
    server_side : bool
    server_hostname : str, optional
        What a client asks for (SNI) and checks the certificate against.
    session : ssl.SSLSession, optional
        A client's, to be resumed.
    pump : callable, optional
        Makes the pump; for tests.

    Methods raise ``ssl.SSLError`` for what OpenSSL finds, :class:`headrace.errors.FramingError` for what breaks a limit
    and :class:`headrace.errors.HandshakeError` for a certificate that's missing; all leave the state FAILED. Not
    thread-safe.
    """

    __slots__ = (
        "_handshake_bytes",
        "_head",
        "_hello",
        "_left",
        "_make",
        "_pump",
        "_silent",
        "_unsent",
        "peer_closed",
        "pending",
        "state",
    )

    def __init__(
        self,
        context: ssl.SSLContext | Callable[[ClientHello], ssl.SSLContext],
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
        pump: Callable[..., Pump] = make_pump,
    ) -> None:
        self.state = State.HANDSHAKE
        self._pump: Pump | None = None
        self._hello: tuple[ClientHelloReader, list[bytes]] | None = None
        self._make: Callable[[ClientHello], Pump] | None = None
        if isinstance(context, ssl.SSLContext):
            self._pump = pump(context, server_side, server_hostname, session)
        else:
            select = context
            self._make = lambda hello: pump(select(hello), True, None, None)
            self._hello = ClientHelloReader(), []
        # What was received and hasn't been worked off; while there's something, receive(None) is to be called.
        self.pending: deque[memoryview] = deque()
        self.peer_closed = False  # its close_notify came
        self._unsent: deque[memoryview] = deque()
        self._head = b""  # the beginning of a record's header, when that came in pieces
        self._left = 0  # bytes of the current record that haven't come yet
        self._handshake_bytes = 0
        self._silent = 0

    @property
    def ssl_object(self) -> ssl.SSLObject:
        """OpenSSL's side. AttributeError while a server with a choice of contexts hasn't seen the ClientHello."""
        if self._pump is None:
            raise AttributeError("there is no SSLObject before the ClientHello has come")
        return self._pump.ssl_object

    # ---- what came -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins the handshake: a client has something to send."""
        if self._pump is not None:
            try:
                self._pump.handshake(b"")
            except ssl.SSLError:
                self.state = State.FAILED
                raise

    def receive(self, data: _Data | None, plaintext: list[bytes]) -> None:
        """Works off ``data``, or what is ``pending``, and appends the plaintext to ``plaintext``.

        ``data`` must stay unchanged until nothing is ``pending`` any more. What was decrypted before an error was met
        is in ``plaintext``.
        """
        try:
            if (
                self.state is OPEN
                and data is not None
                and not (self._left or self.pending or self._head)
                and (size := len(data)) > HEADER
                and (data[3] << 8 | data[4]) + HEADER == size
            ):
                # One whole record: the usual message.
                if not self._pump.decrypt(data, plaintext):  # type: ignore[union-attr]
                    self._peer_has_closed()
                elif plaintext:
                    self._silent = 0
                else:
                    self._was_silent(1)
            else:
                if data is not None and self.state not in ENDED:
                    self.pending.append(memoryview(data))
                self._receive(plaintext)
            if self._unsent:
                self._send_unsent()
        except (ssl.SSLError, FramingError, HandshakeError):
            self.state = State.FAILED
            self.pending.clear()
            raise

    def _receive(self, plaintext: list[bytes]) -> None:
        small = 0
        while self.pending and small < TURN_LIMIT:
            chunk, records, little = self._next_chunk()
            small += little
            if self.state is State.HANDSHAKE:
                self._shake_hands(chunk)
                if self.state is State.HANDSHAKE:
                    continue
                chunk, records = memoryview(b""), 0  # OpenSSL has what came behind the handshake
            assert self._pump is not None
            before = len(plaintext)
            if not self._pump.decrypt(chunk, plaintext):
                self._peer_has_closed()
            elif len(plaintext) > before:
                self._silent = 0
            else:
                self._was_silent(records)

    def _next_chunk(self) -> tuple[memoryview, int, int]:
        """The bytes that OpenSSL gets next, and how many records begin in them, and how many of those are small."""
        whole = view = self.pending[0]
        if self.state is State.HANDSHAKE:
            view = whole[:HANDSHAKE_STEP]
        size = len(view)
        position = min(self._left, size)
        self._left -= position
        records = little = 0
        while position < size and little < SMALL_BATCH:
            position, length = self._next_record(view, position)
            if length >= 0:
                records += 1
                little += length <= SMALL
        if position == len(whole):
            self.pending.popleft()
            return whole, records, little
        self.pending[0] = whole[position:]
        return view[:position], records, little

    def _next_record(self, view: memoryview, position: int) -> tuple[int, int]:
        """(where the record that begins at ``position`` ends in ``view``, its length); -1: its header isn't whole."""
        size = len(view)
        missing = HEADER - len(self._head)
        if size - position < missing:
            self._head += bytes(view[position:])
            return size, -1
        if self._head:
            head = self._head + view[position : position + missing]
            self._head = b""
            length = head[3] << 8 | head[4]
        else:
            length = view[position + 3] << 8 | view[position + 4]
        end = position + missing + length
        if end > size:
            self._left = end - size
            return size, length
        return end, length

    def _peer_has_closed(self) -> None:
        self.state = PEER_HAS_CLOSED[self.state]
        self.peer_closed = True
        self.pending.clear()

    def _was_silent(self, records: int) -> None:
        self._silent += records
        if self._silent > SILENT_LIMIT:
            raise FramingError(f"more than {SILENT_LIMIT} TLS records in a row carried no data")

    def _shake_hands(self, chunk: memoryview) -> None:
        self._handshake_bytes += len(chunk)
        data: bytes | memoryview = chunk
        if self._pump is None:
            hello = self._read_hello(chunk)
            if hello is None:
                self._check_handshake_bytes()
                return
            assert self._hello is not None
            assert self._make is not None
            self._pump = self._make(hello)
            data = b"".join(self._hello[1])
            self._hello = self._make = None
        if self._pump.handshake(data):
            self._check_certificate()
            self.state = OPEN
        else:
            self._check_handshake_bytes()

    def _check_handshake_bytes(self) -> None:
        if self._handshake_bytes > HANDSHAKE_LIMIT:
            raise FramingError(f"more than {HANDSHAKE_LIMIT} bytes came before the end of the TLS handshake")

    def _read_hello(self, chunk: memoryview) -> ClientHello | None:
        assert self._hello is not None
        reader, parts = self._hello
        parts.append(bytes(chunk))
        return reader.feed(chunk)

    def _check_certificate(self) -> None:
        """Asked again whatever OpenSSL did: a resumed session, or another context set in an SNI callback, has none."""
        ours = self.ssl_object
        if ours.context.verify_mode == ssl.CERT_REQUIRED and ours.getpeercert(binary_form=True) is None:
            raise HandshakeError("the peer showed no certificate, and one is required")

    @property
    def truncated(self) -> bool:
        """Whether an end of the transport now would cut the peer's stream short."""
        return self.state in (State.HANDSHAKE, State.OPEN, State.CLOSING)

    # ---- what goes -------------------------------------------------------------------------------------------

    def send(self, data: _Data) -> None:
        """Encrypts ``data``, into full records of 16 KiB and a rest. In OPEN or PEER_CLOSED only."""
        if self.state is not OPEN and self.state is not State.PEER_CLOSED:
            raise RuntimeError(f"nothing can be sent in state {self.state.value!r}")
        if self._unsent:
            self._unsent.append(memoryview(data))
            return
        taken = self._pump.encrypt(data)  # type: ignore[union-attr]
        if taken < len(data):
            self._unsent.append(memoryview(data)[taken:])

    def _send_unsent(self) -> None:
        """What had to wait until OpenSSL had read something: a renegotiation."""
        assert self._pump is not None
        while self._unsent:
            view = self._unsent[0]
            taken = self._pump.encrypt(view)
            if taken < len(view):
                self._unsent[0] = view[taken:]
                return
            self._unsent.popleft()

    @property
    def unsent(self) -> int:
        """Bytes that ``send`` took and OpenSSL hasn't yet: it must receive something first."""
        return sum(map(len, self._unsent))

    def outgoing(self) -> bytes:
        """Takes what is to be sent to the peer; ``b""`` if there is nothing."""
        return b"" if self._pump is None else self._pump.outgoing()

    def close(self) -> None:
        """Puts a close_notify behind what was sent; nothing can be sent afterwards. Once, after the handshake."""
        state = WE_HAVE_CLOSED.get(self.state)
        if state is None:
            return
        assert self._pump is not None
        try:
            self._pump.close()
        except ssl.SSLError:
            self.state = State.FAILED
            raise
        self.state = state
