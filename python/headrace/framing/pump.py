"""TLS pumps: what moves records into OpenSSL and out of it. ``framing/tls.py`` decides which, when and how many.

A *pump* owns an ``ssl.SSLObject`` and the two ends that this reads records from and writes them to. Both pumps make
the object by ``context.wrap_bio``, so callbacks, SNI, verification and the key log are CPython's:

``StdlibPump``   ``ssl.MemoryBIO``, pure Python
``NativePump``   (``headrace._tls_pump``) OpenSSL reads straight from the caller's buffer and writes straight into the
                 ``bytes`` that are sent; needs an interpreter whose ``_ssl`` has loaded libssl as a shared library

``make_pump`` takes the native one where its self-test passes, once a process, at the first use.
``HEADRACE_TLS_PUMP=stdlib`` or ``native`` in the environment forces one.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Pump", "StdlibPump", "make_pump"]

LARGEST_PLAINTEXT = 16384  # bytes of one record (RFC 8446 section 5.1)


class Pump(Protocol):
    """What ``framing/tls.py`` needs. Not thread-safe. Where it says so, what OpenSSL finds is an ``ssl.SSLError``."""

    @property
    def ssl_object(self) -> ssl.SSLObject:
        """For ``getpeercert``, ``cipher`` and the like. It may outlive the pump, but then reads and writes nothing."""
        ...

    @property
    def pending(self) -> int:
        """Bytes that ``outgoing`` would give."""
        ...

    def handshake(self, data: ReadableBuffer) -> bool:
        """Goes on with the handshake, by ``data`` from the peer (may be empty); True when it's done.

        What of ``data`` lies behind the handshake is kept for ``decrypt``. Raises ``ssl.SSLError``, also
        ``ssl.SSLCertVerificationError``; then there may be an alert in ``outgoing``.
        """
        ...

    def decrypt(self, data: ReadableBuffer, plaintext: list[bytes]) -> bool:
        """Appends what the records in ``data`` hold, as soon as they are complete; ``data`` may be cut anywhere.

        False when the peer's close_notify was met, then and ever after: what is behind it is dropped. Raises
        ``ssl.SSLError``; what was decrypted before the bad record is in ``plaintext`` all the same.
        """
        ...

    def encrypt(self, data: ReadableBuffer) -> int:
        """Makes full records and a rest of ``data``, and says how many bytes of it were taken.

        That is fewer than all only while OpenSSL must read something first: a renegotiation of TLS 1.2. Raises
        ``ssl.SSLError``.
        """
        ...

    def outgoing(self) -> bytes:
        """Takes the records that are to be sent; ``b""`` if there are none."""
        ...

    def close(self) -> None:
        """Puts a close_notify behind the records to be sent, once. Receiving goes on, sending is over.

        Raises ``ssl.SSLError`` before the end of the handshake and after an error.
        """
        ...


class StdlibPump:
    """A :class:`Pump` of the standard library's parts alone.

    One ``bytes`` object for each record. Parameters as those of ``ssl.SSLContext.wrap_bio``, and its errors.
    """

    __slots__ = ("_closed", "_incoming", "_outgoing", "_peer_closed", "_unread", "ssl_object")

    def __init__(
        self,
        context: ssl.SSLContext,
        server_side: bool,
        server_hostname: str | None,
        session: ssl.SSLSession | None,
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.ssl_object = context.wrap_bio(
            self._incoming, self._outgoing, server_side, server_hostname, session
        )
        self._closed = False
        self._peer_closed = False
        self._unread: list[bytes] = []

    @property
    def pending(self) -> int:
        return self._outgoing.pending

    def handshake(self, data: ReadableBuffer) -> bool:
        self._incoming.write(data)
        try:
            self.ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def decrypt(self, data: ReadableBuffer, plaintext: list[bytes]) -> bool:
        if self._unread:
            plaintext += self._unread
            self._unread.clear()
        if self._peer_closed:
            return False
        self._incoming.write(data)
        return self._read(plaintext)

    def _read(self, plaintext: list[bytes]) -> bool:
        incoming, read = self._incoming, self.ssl_object.read
        while incoming.pending or self.ssl_object.pending():
            try:
                piece = read(LARGEST_PLAINTEXT)
            except ssl.SSLWantReadError:
                return True
            except ssl.SSLZeroReturnError:
                piece = b""
            if not piece:  # CPython's way to say it, if we haven't sent our own close_notify
                self._peer_closed = True
                incoming.read()
                return False
            plaintext.append(piece)
        return True

    def encrypt(self, data: ReadableBuffer) -> int:
        write = self.ssl_object.write
        with memoryview(data) as view, view.cast("B") as octets:
            size = len(octets)
            sent = 0
            try:
                while sent < size:  # CPython has SSL_MODE_ENABLE_PARTIAL_WRITE set: a record each time
                    with octets[sent : sent + LARGEST_PLAINTEXT] as piece:
                        sent += write(piece)
            except ssl.SSLWantReadError:
                pass
        return sent

    def outgoing(self) -> bytes:
        return self._outgoing.read() if self._outgoing.pending else b""

    def close(self) -> None:
        if self._closed:
            return
        # unwrap() looks for the peer's close_notify and fails for good if it meets data: those are read first.
        self._read(self._unread)
        try:
            self.ssl_object.unwrap()
        except ssl.SSLWantReadError:
            pass  # the peer's close_notify hasn't come
        self._closed = True


def make_pump(
    context: ssl.SSLContext,
    server_side: bool = False,
    server_hostname: str | None = None,
    session: ssl.SSLSession | None = None,
) -> Pump:
    """The pump that is used here; see above. Errors are those of ``ssl.SSLContext.wrap_bio``."""
    return StdlibPump(context, server_side, server_hostname, session)
