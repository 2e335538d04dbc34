"""TLS framing without I/O: records in, plaintext out, and the other way round. The cryptography is OpenSSL's.

Rules
-----
* The core owns an ``ssl.SSLObject`` and its two memory BIOs. Who uses it moves the bytes: ``feed`` and ``receive`` for
  what came, ``send`` and ``outgoing`` for what goes. After each call but ``feed`` there may be something ``outgoing``.
* What is fed is counted by record headers, before OpenSSL sees it: one SSL_read works off *all* records without
  plaintext that lie in its BIO (key updates, tickets, empty ones), so they are handed over SMALL_BATCH at a time,
  and SILENT_LIMIT of them in a row end the connection. OpenSSL itself has no such limit.
* ``receive`` stops after TURN_LIMIT small records, so that one peer can't keep the others of a loop waiting: ask
  ``pending`` and call again.
* Until the handshake is done nothing is decrypted for the user, and a peer may send HANDSHAKE_LIMIT bytes at most.
* The end of a stream is a close_notify. What follows it is dropped. The transport's end without one is a truncation:
  ``truncated`` tells.

    HANDSHAKE  -> OPEN          the handshake is done, and the peer has the certificate that the context demands
    OPEN       -> PEER_CLOSED   its close_notify came; we may still send (RFC 8446 section 6.1)
    OPEN       -> CLOSING       ours was sent; what the peer still sends can be received
    PEER_CLOSED, CLOSING -> CLOSED
    any        -> FAILED        an alert of the peer's, a bad record, a limit; ``outgoing`` may hold an alert for the peer

See RFC 8446 (TLS 1.3), RFC 5246 (TLS 1.2).
"""

from __future__ import annotations

import enum
import ssl
from collections import deque

__all__ = ["FramingError", "State", "TLSCore"]

HEADER = 5  # bytes: content type, version, length (RFC 8446 section 5.1)
LARGEST_PLAINTEXT = 16384  # bytes of one record
SMALL = 512  # bytes; records up to this length are counted
SMALL_BATCH = 32  # small records that OpenSSL is given at a time
TURN_LIMIT = 64  # small records that one receive() works off
SILENT_LIMIT = 32  # records in a row without plaintext; BoringSSL's and rustls' limit for key updates
HANDSHAKE_LIMIT = 128 * 1024  # bytes; a chain of ten large certificates is 30 KiB


class FramingError(Exception):
    """The peer broke a limit; the text says which."""


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


class TLSCore:
    """One end of a TLS connection.

    Parameters
    ----------
    context : ssl.SSLContext
        Never changed.
    server_side : bool
    server_hostname : str, optional
        What a client asks for (SNI) and checks the certificate against.
    session : ssl.SSLSession, optional
        A client's, to be resumed.

    Methods raise ``ssl.SSLError`` for what OpenSSL finds and :class:`FramingError` for what breaks a limit; both leave
    the state FAILED. Not thread-safe.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.ssl_object = context.wrap_bio(
            self._incoming, self._outgoing, server_side, server_hostname, session
        )
        self.state = State.HANDSHAKE
        self._pending: deque[memoryview] = deque()
        self._header = b""  # of a record whose header came in pieces
        self._left = 0  # bytes of the current record that haven't come yet
        self._handshake_bytes = 0
        self._silent = 0

    # ---- what came -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins the handshake: a client has something to send."""
        self._step()

    def feed(self, data: memoryview) -> None:
        """Takes bytes of the stream, which must stay unchanged until they aren't ``pending`` any more."""
        if self.state not in (State.PEER_CLOSED, State.CLOSED, State.FAILED):
            self._pending.append(data)

    @property
    def pending(self) -> bool:
        """Whether something that was fed hasn't been worked off."""
        return bool(self._pending)

    def receive(self) -> list[bytes]:
        """Plaintext out of what was fed, a piece for each record; goes through the handshake on the way."""
        plaintext: list[bytes] = []
        small = 0
        while self._pending and small < TURN_LIMIT:
            chunk, records, little = self._next_chunk()
            small += little
            self._incoming.write(chunk)
            if self.state is State.HANDSHAKE:
                self._handshake_bytes += len(chunk)
                self._step()
                if self.state is State.HANDSHAKE:
                    if self._handshake_bytes > HANDSHAKE_LIMIT:
                        self._fail(f"more than {HANDSHAKE_LIMIT} bytes came before the end of the handshake")
                    continue
            before = len(plaintext)
            self._decrypt(plaintext, len(chunk))
            if len(plaintext) > before:
                self._silent = 0
            else:
                self._silent += records
                if self._silent > SILENT_LIMIT:
                    self._fail(f"more than {SILENT_LIMIT} records in a row carried no data")
        return plaintext

    def _next_chunk(self) -> tuple[memoryview, int, int]:
        """The bytes that OpenSSL gets next, and how many records begin in them, and how many of those are small."""
        view = self._pending[0]
        size = len(view)
        position = min(self._left, size)
        self._left -= position
        records = little = 0
        while position < size and little < SMALL_BATCH:
            missing = HEADER - len(self._header)
            if size - position < missing:
                self._header += bytes(view[position:])
                position = size
                break
            header = self._header + view[position : position + missing]
            self._header = b""
            length = header[3] << 8 | header[4]
            records += 1
            little += length <= SMALL
            position += missing
            body = min(length, size - position)
            self._left = length - body
            position += body
        if position == size:
            self._pending.popleft()
            return view, records, little
        self._pending[0] = view[position:]
        return view[:position], records, little

    def _decrypt(self, plaintext: list[bytes], fed: int) -> None:
        read, incoming = self.ssl_object.read, self._incoming
        size = min(fed + HEADER, LARGEST_PLAINTEXT)
        while True:
            try:
                data = read(size)
            except ssl.SSLWantReadError:
                return
            except ssl.SSLZeroReturnError:  # what b"" is before our own close_notify
                data = b""
            except ssl.SSLError:
                self.state = State.FAILED
                raise
            if not data:
                self.state = PEER_HAS_CLOSED[self.state]
                self._pending.clear()
                return
            plaintext.append(data)
            # The usual case, told without an exception: all that was fed has been decrypted.
            if not incoming.pending and not self.ssl_object.pending():
                return

    def _step(self) -> None:
        try:
            self.ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError:
            self.state = State.FAILED
            raise
        # Asked again whatever OpenSSL did: a resumed session, or another context set in an SNI callback, has none.
        if (
            self.ssl_object.context.verify_mode == ssl.CERT_REQUIRED
            and self.ssl_object.getpeercert(binary_form=True) is None
        ):
            self._fail("the peer showed no certificate, and one is required")
        self.state = State.OPEN

    def _fail(self, text: str) -> None:
        self.state = State.FAILED
        self._pending.clear()
        raise FramingError(text)

    @property
    def truncated(self) -> bool:
        """Whether an end of the transport now would cut the stream short."""
        return self.state in (State.HANDSHAKE, State.OPEN, State.CLOSING)

    # ---- what goes -------------------------------------------------------------------------------------------

    def send(self, data: bytes | memoryview) -> None:
        """Encrypts ``data``, into full records of 16 KiB and a rest. In OPEN or PEER_CLOSED only."""
        if self.state not in (State.OPEN, State.PEER_CLOSED):
            raise RuntimeError(f"nothing can be sent in state {self.state.value!r}")
        sent = self.ssl_object.write(data)
        if sent < len(data):
            view = memoryview(data)
            while sent < len(data):
                sent += self.ssl_object.write(view[sent:])

    def outgoing(self) -> bytes:
        """Takes what is to be sent to the peer; ``b""`` if there is nothing."""
        return self._outgoing.read() if self._outgoing.pending else b""

    def close(self) -> None:
        """Puts a close_notify behind what was sent; nothing can be sent afterwards. Once, after the handshake."""
        state = WE_HAVE_CLOSED.get(self.state)
        if state is None:
            return
        try:
            self.ssl_object.unwrap()
        except ssl.SSLWantReadError:
            pass  # the peer's hasn't come
        except ssl.SSLError as error:
            # Application data lie before the peer's close_notify; ours has gone out all the same.
            if error.reason != "APPLICATION_DATA_AFTER_CLOSE_NOTIFY":
                self.state = State.FAILED
                raise
        self.state = state
