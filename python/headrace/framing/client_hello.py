"""What a TLS client says first, read before any ``SSLObject`` exists.

A server that has several contexts must know the name that a client asks for when it makes the ``SSLObject``: changing
the context in OpenSSL's own callback doesn't bring the new context's rule about client certificates along.

Rules: bytes come in any pieces; the message may span records; at most LIMIT bytes are kept; a name is a DNS name in
ASCII (RFC 6066 section 3) or the connection ends. Nothing is decided here but the name, and nothing else is trusted:
OpenSSL reads the same bytes again.

See RFC 8446 sections 4.1.2 and 5.1, RFC 6066 section 3, RFC 7301 section 3.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.errors import FramingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import ReadableBuffer

__all__ = ["ClientHello", "ClientHelloReader"]

LIMIT = 64 * 1024  # bytes of the message; a hello with two post-quantum key shares is 3 KiB
LARGEST_RECORD = 16384  # bytes of a record that isn't encrypted
RECORD_HEADER = 5
MESSAGE_HEADER = 4
HANDSHAKE, CLIENT_HELLO = 22, 1
SERVER_NAME, ALPN, SUPPORTED_VERSIONS = 0, 16, 43
HOST_NAME = 0

NAME = re.compile(rb"[0-9A-Za-z_-]+(\.[0-9A-Za-z_-]+)*\Z")


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client asks for.

    ``server_name`` is in lower case, None if there's none; ``alpn_protocols`` and ``versions`` (of supported_versions,
    e.g. 0x0304) are in the client's order.
    """

    server_name: str | None
    alpn_protocols: tuple[bytes, ...]
    versions: tuple[int, ...]


class ClientHelloReader:
    """Puts the first message of a connection together. Raises :class:`headrace.errors.FramingError`."""

    __slots__ = ("_message", "_rest")

    def __init__(self) -> None:
        self._rest = bytearray()  # the beginning of a record that isn't whole
        self._message = bytearray()

    def feed(self, data: ReadableBuffer) -> ClientHello | None:
        """The hello as soon as it's whole; what comes behind it isn't looked at."""
        rest, message = self._rest, self._message
        rest += memoryview(data)
        position = 0
        while len(rest) - position >= RECORD_HEADER:
            length = record_length(rest, position)
            start = position + RECORD_HEADER
            if len(rest) - start < length:
                break
            message += rest[start : start + length]
            position = start + length
            if len(message) >= MESSAGE_HEADER:
                size = message_length(message)
                if len(message) >= MESSAGE_HEADER + size:
                    return parse(memoryview(bytes(message[MESSAGE_HEADER : MESSAGE_HEADER + size])))
        if not position and rest:
            # Said as early as it's known, and not when a record's worth of something else has come.
            check_first_bytes(rest)
        del rest[:position]
        return None


def check_first_bytes(head: bytearray) -> None:
    if head[0] != HANDSHAKE or (len(head) > 1 and head[1] != 3):
        raise FramingError(f"not a TLS ClientHello: the connection begins with {bytes(head[:8])!r}")


def record_length(data: bytearray, position: int) -> int:
    check_first_bytes(data[position : position + RECORD_HEADER])
    length = data[position + 3] << 8 | data[position + 4]
    if not 0 < length <= LARGEST_RECORD:
        raise FramingError(
            f"a TLS record of {length} bytes where the ClientHello is due (1..{LARGEST_RECORD})"
        )
    return length


def message_length(message: bytearray) -> int:
    if message[0] != CLIENT_HELLO:
        raise FramingError(
            f"TLS handshake message {message[0]} where the ClientHello ({CLIENT_HELLO}) is due"
        )
    size = int.from_bytes(message[1:MESSAGE_HEADER], "big")
    if size > LIMIT:
        raise FramingError(f"a ClientHello of {size} bytes; {LIMIT} are allowed")
    return size


def parse(body: memoryview) -> ClientHello:
    reader = Reader(body)
    reader.take(2 + 32)  # legacy version, random
    reader.vector(1)  # session id
    reader.vector(2)  # cipher suites
    reader.vector(1)  # compression methods
    extensions = dict(read_extensions(reader.vector(2))) if reader.left else {}
    return ClientHello(
        read_server_name(extensions.get(SERVER_NAME)),
        tuple(read_alpn(extensions.get(ALPN))),
        tuple(read_versions(extensions.get(SUPPORTED_VERSIONS))),
    )


class Reader:
    """Takes lengths and bytes off a message; what is short is a FramingError."""

    def __init__(self, data: memoryview) -> None:
        self.data = data

    @property
    def left(self) -> int:
        return len(self.data)

    def take(self, size: int) -> memoryview:
        if size > len(self.data):
            raise FramingError("a ClientHello whose lengths don't fit together")
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> memoryview:
        """What a length of ``size`` bytes stands before."""
        return self.take(self.number(size))


def read_extensions(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    reader = Reader(data)
    seen = set()
    while reader.left:
        kind = reader.number(2)
        if kind in seen:
            raise FramingError(f"extension {kind} comes twice in a ClientHello")
        seen.add(kind)
        yield kind, reader.vector(2)


def read_server_name(data: memoryview | None) -> str | None:
    if data is None:
        return None
    names = Reader(Reader(data).vector(2))
    while names.left:
        kind, name = names.number(1), bytes(names.vector(2))
        if kind == HOST_NAME:
            if len(name) > 255 or not NAME.match(name):
                raise FramingError(f"the server name in a ClientHello isn't a DNS name: {name[:64]!r}")
            return name.decode("ascii").lower()
    return None


def read_alpn(data: memoryview | None) -> Iterator[bytes]:
    if data is not None:
        protocols = Reader(Reader(data).vector(2))
        while protocols.left:
            yield bytes(protocols.vector(1))


def read_versions(data: memoryview | None) -> Iterator[int]:
    if data is not None:
        versions = Reader(Reader(data).vector(1))
        while versions.left:
            yield versions.number(2)
