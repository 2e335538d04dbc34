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

import logging
import os
import ssl
from typing import TYPE_CHECKING, Protocol

from headrace.errors import EngineUnavailable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from headrace._tls_pump import NativePump

__all__ = ["Pump", "StdlibPump", "available", "make_pump", "reason"]

logger = logging.getLogger("headrace")

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
        while incoming.pending:
            try:
                piece = read(LARGEST_PLAINTEXT)  # a whole record: nothing of it stays with OpenSSL
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
        size = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
        if not size:
            return 0
        write = self.ssl_object.write
        sent = 0
        try:
            if size <= LARGEST_PLAINTEXT:
                sent = write(data)
            while sent < size:  # CPython has SSL_MODE_ENABLE_PARTIAL_WRITE set: a record each time
                with memoryview(data).cast("B") as octets, octets[sent : sent + LARGEST_PLAINTEXT] as piece:
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


# ---- which one ---------------------------------------------------------------------------------------------

VARIABLE = "HEADRACE_TLS_PUMP"
_maker: type[StdlibPump | NativePump] | None = None
_reason: str | None = None


def make_pump(
    context: ssl.SSLContext,
    server_side: bool = False,
    server_hostname: str | None = None,
    session: ssl.SSLSession | None = None,
) -> Pump:
    """The pump that is used here; see above. Errors are those of ``ssl.SSLContext.wrap_bio``.

    At the first use also :class:`headrace.errors.EngineUnavailable`, if the environment forces the native pump and it
    can't run here, and ValueError, if it names another.
    """
    global _maker
    if _maker is None:
        _maker = _choose()
    if _maker is StdlibPump:
        return _maker(context, server_side, server_hostname, session)
    from headrace._tls_pump import UnknownLayoutError

    try:
        return _maker(context, server_side, server_hostname, session)
    except UnknownLayoutError:  # a context with objects of its own
        return StdlibPump(context, server_side, server_hostname, session)


def _choose() -> type[StdlibPump | NativePump]:
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "stdlib", "native"):
        raise ValueError(f"{VARIABLE} must be 'stdlib' or 'native', not {wanted!r}")
    if wanted == "stdlib":
        logger.debug("TLS records go through ssl.MemoryBIO: %s=stdlib", VARIABLE)
        return StdlibPump
    if available():
        from headrace._tls_pump import NativePump

        logger.debug("TLS records go straight through %s", ssl.OPENSSL_VERSION)
        return NativePump
    if wanted:
        raise EngineUnavailable(
            f"{VARIABLE}=native, but the native TLS pump can't run here: {reason()}. Unset it, or use another Python"
        )
    logger.debug("TLS records go through ssl.MemoryBIO; the native pump can't run here: %s", reason())
    return StdlibPump


def available() -> bool:
    """Whether ``NativePump`` can run here. It's tried out at the first call, which takes a few milliseconds."""
    return not reason()


def reason() -> str:
    """Why ``NativePump`` can't run here; ``""`` if it can."""
    global _reason
    if _reason is None:
        _reason = _try_native()
    return _reason


def _try_native() -> str:
    try:
        from headrace import _tls_pump
    except ImportError as error:
        return str(error)
    problem = _tls_pump.load()
    if problem:
        return problem
    try:
        _self_test(_tls_pump.NativePump)
    except (ssl.SSLError, RuntimeError) as error:
        return f"its self-test failed: {error}"
    return ""


def _self_test(native: type[NativePump]) -> None:
    """A connection each way between the two pumps. RuntimeError or ``ssl.SSLError`` if something doesn't fit."""
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        # An anonymous key exchange needs no certificate, which could only be loaded from a file.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AECDH+AES:@SECLEVEL=0")
        contexts.append(context)
    _try_connection(native(contexts[0], True, None, None), StdlibPump(contexts[1], False, None, None))
    _try_connection(StdlibPump(contexts[0], True, None, None), native(contexts[1], False, None, None))


def _try_connection(server: Pump, client: Pump) -> None:
    shaken: set[Pump] = set()
    for _ in range(4):  # flights of a handshake
        for one, other in ((client, server), (server, client)):
            if one not in shaken and one.handshake(other.outgoing()):
                shaken.add(one)
    message = bytes(range(256)) * 80  # a full record and a rest
    for sender, receiver in ((client, server), (server, client)):
        received: list[bytes] = []
        taken = sender.encrypt(message)
        sender.close()
        size = sender.pending
        records = sender.outgoing()
        open_before = receiver.decrypt(records[:-1], received)
        open_after = receiver.decrypt(records[-1:], received)
        outcome = (len(shaken), taken, size, b"".join(received), open_before, open_after)
        if outcome != (2, len(message), len(records), message, True, False):
            raise RuntimeError("what was sent and what was received differ")
