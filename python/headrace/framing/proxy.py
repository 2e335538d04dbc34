"""The PROXY protocol, versions 1 and 2: what a proxy says before anything else, about whose connection it forwards.

``HeaderReader`` makes a ``ProxyHeader`` of bytes, ``encode`` makes bytes of one.

Rules
-----
* Bytes come in any pieces. The reader takes those of the header and no other: what is behind them isn't ours to know.
* ``wanted`` is how many bytes the header still has at least, so whoever reads just these never reads too far.
* Nothing is guessed. Bytes that can't begin a header are refused at the first one that says so; only what is wrong with
  an IPv6 address of version 1, or with the addresses and TLVs of version 2, is said when all of it is there.
* At most 107 bytes of version 1, with its CRLF, and 16 + 4,096 of version 2. Lengths are checked before bytes are kept.
* LOCAL, UNKNOWN and UNSPEC say nothing about addresses: the real ones count, and what comes in their block is dropped,
  TLVs included (what such a block holds before its TLVs, if it has any, nobody knows).
* A registered TLV comes once, and means what the specification says, or the header is refused. Others are just kept.
* A CRC32C that is there is verified, and one that is to be sent is computed.

Source: "The PROXY protocol, Versions 1 & 2" of HAProxy's authors; its sections are named below.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from headrace.errors import FramingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed import ReadableBuffer

__all__ = [
    "ALPN",
    "AUTHORITY",
    "CRC32C",
    "NETNS",
    "NOOP",
    "SSL",
    "UNIQUE_ID",
    "HeaderReader",
    "ProxyHeader",
    "ProxySSL",
    "encode",
]

Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int] | str | bytes
TLV: TypeAlias = tuple[int, bytes]

# Version 1, section 2.1.
SHORTEST_LINE = len(b"PROXY UNKNOWN\r\n")
LONGEST_LINE = 107  # with CRLF; the specification's worst case
UNKNOWN = b"PROXY UNKNOWN"
INET_FAMILIES = {b"TCP4": socket.AF_INET, b"TCP6": socket.AF_INET6}
# Bytes that are still to come at least when a line has reached its third field, its fourth...: the shortest fields,
# each with the space before it, and CRLF. The shortest addresses are "0.0.0.0" and "::".
LEFT_AT_LEAST = {b"TCP4": (8 + 2 + 2 + 2, 2 + 2 + 2, 2 + 2, 2), b"TCP6": (3 + 2 + 2 + 2, 2 + 2 + 2, 2 + 2, 2)}

OCTET = rb"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IPV4 = re.compile(rb"(?:%b\.){3}%b" % (OCTET, OCTET))
IPV4_BEGINNING = re.compile(rb"(?:%b\.){0,3}%b?" % (OCTET, OCTET))
# A dotted tail isn't in the specification's grammar, but inet_ntop, which senders use, has it for mapped addresses.
IPV6_BEGINNING = re.compile(rb"[0-9A-Fa-f:.]{0,39}")
PORT = re.compile(rb"0|[1-9][0-9]{0,4}")

# Version 2, section 2.2.
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
HEAD = 16  # bytes before the addresses
LONGEST_BLOCK = 4096  # bytes of addresses and TLVs; the specification means all of it to fit into 536
LOCAL, PROXY = 0x20, 0x21  # with the version in the high half
STREAM, DATAGRAM = 1, 2
PATH_SIZE = 108  # bytes of a Unix socket's address
ADDRESSES_SIZE = {1: 2 * 4 + 2 * 2, 2: 2 * 16 + 2 * 2, 3: 2 * PATH_SIZE}  # by family
FAMILIES = {1: socket.AF_INET, 2: socket.AF_INET6, 3: socket.AF_UNIX}
FAMILY_NUMBERS = {family: number for number, family in FAMILIES.items()}

# Types of TLVs, sections 2.2.1 to 2.2.7.
ALPN, AUTHORITY, CRC32C, NOOP, UNIQUE_ID, SSL, NETNS = 0x01, 0x02, 0x03, 0x04, 0x05, 0x20, 0x30
REGISTERED = frozenset((ALPN, AUTHORITY, CRC32C, UNIQUE_ID, SSL, NETNS))  # NOOP may come often
SSL_VERSION, SSL_CN, SSL_CIPHER, SSL_SIGNATURE, SSL_KEY = 0x21, 0x22, 0x23, 0x24, 0x25
LONGEST_UNIQUE_ID = 128
CLIENT_SSL, CLIENT_CERT_CONN, CLIENT_CERT_SESS = 1, 2, 4

POLYNOMIAL = 0x82F63B78  # of CRC32c, bits reversed (RFC 4960, appendix B)


# ---- what a header says --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProxySSL:
    """What a proxy tells about the TLS between its client and itself (section 2.2.6).

    ``version``, ``cipher``, ``signature_algorithm`` and ``key_algorithm`` are the proxy's words ("TLSv1.3"; the
    last two are about the proxy's own certificate); ``common_name`` is that of the client's. None is what wasn't told.
    ``verify`` is 0 if the client's certificate was verified, or if it showed none.
    """

    is_tls: bool
    is_certificate_of_connection: bool
    is_certificate_of_session: bool
    verify: int
    version: str | None = None
    common_name: str | None = None
    cipher: str | None = None
    signature_algorithm: str | None = None
    key_algorithm: str | None = None
    tlvs: tuple[TLV, ...] = ()

    @property
    def is_verified(self) -> bool:
        """Whether the client showed a certificate, and the proxy verified it."""
        return self.verify == 0 and (self.is_certificate_of_connection or self.is_certificate_of_session)


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """Whose connection a proxy forwards.

    Parameters
    ----------
    source, destination : address, optional
        The client's address, and the one that it connected to, as ``getpeername`` and ``getsockname`` have them:
        ``(host, port)`` with an IPv4 address, ``(host, port, 0, 0)`` with an IPv6 one (two items will do), a path, or
        bytes for an abstract name. Both or none. None: the proxy doesn't know (UNKNOWN in version 1), or it's LOCAL.
    version : {1, 2}
    is_local : bool
        The proxy has connected for its own sake, e.g. for a health check. Version 2 alone can say so.
    is_datagram : bool
        The client's is a datagram socket. Version 2 alone.
    tlvs : tuple of (int, bytes)
        What else is told, by type, in order. Version 2 with addresses alone. Whatever bytes a ``CRC32C`` has, the right
        ones are sent.

    Raises
    ------
    ValueError
        For what no header says.
    """

    source: Address | None = None
    destination: Address | None = None
    version: Literal[1, 2] = 2
    is_local: bool = False
    is_datagram: bool = False
    tlvs: tuple[TLV, ...] = ()

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, not {self.version!r}")
        object.__setattr__(self, "tlvs", tuple((kind, bytes(value)) for kind, value in self.tlvs))
        if self.source is None or self.destination is None:
            self._check_without_addresses()
        else:
            source, destination = normal(self.source), normal(self.destination)
            if family_of(source) is not family_of(destination):
                raise ValueError(
                    f"source and destination are of different families: {source!r}, {destination!r}"
                )
            object.__setattr__(self, "source", source)
            object.__setattr__(self, "destination", destination)
            if self.is_local:
                raise ValueError("a LOCAL header says nothing about addresses")
        if self.version == 1 and (
            self.is_local or self.is_datagram or self.tlvs or self.family is socket.AF_UNIX
        ):
            raise ValueError(
                "version 1 has TCP over IPv4 and IPv6, and UNKNOWN: no LOCAL, datagrams, TLVs or Unix sockets"
            )
        self._check_tlvs()

    def _check_without_addresses(self) -> None:
        if self.source is not None or self.destination is not None:
            raise ValueError("a header has source and destination, or neither")
        if self.tlvs or self.is_datagram:
            raise ValueError("TLVs and datagrams go together with addresses")

    def _check_tlvs(self) -> None:
        seen = set()
        for kind, value in self.tlvs:
            if not 0 <= kind <= 0xFF or len(value) > 0xFFFF:
                raise ValueError(f"a TLV of type {kind!r} and {len(value)} bytes")
            if kind in seen and kind in REGISTERED:
                raise ValueError(f"TLV {kind:#04x} comes twice")
            seen.add(kind)
            if kind == CRC32C and len(value) != 4:
                raise ValueError(f"a CRC32C of {len(value)} bytes, not 4")
            if kind == UNIQUE_ID and len(value) > LONGEST_UNIQUE_ID:
                raise ValueError(f"a unique ID of {len(value)} bytes; {LONGEST_UNIQUE_ID} are allowed")
        if seen & {AUTHORITY, SSL, NETNS}:
            _ = self.authority, self.ssl, self.netns  # each raises what is wrong with it

    @classmethod
    def forwarding(
        cls,
        transport: object,
        *,
        version: Literal[1, 2] = 2,
        tlvs: Iterable[TLV] = (),
    ) -> ProxyHeader:
        """The header for forwarding that accepted connection: its ``peername`` and ``sockname``.

        Those of a header that it came with itself, if it did: chains of proxies keep the first one's client.
        """
        ask = transport.get_extra_info  # type: ignore[attr-defined]  # an asyncio.BaseTransport
        return cls(ask("peername"), ask("sockname"), version=version, tlvs=tuple(tlvs))

    @property
    def family(self) -> socket.AddressFamily | None:
        """``socket.AF_INET``, ``AF_INET6`` or ``AF_UNIX``; None without addresses."""
        return None if self.source is None else family_of(self.source)

    def _value(self, wanted: int) -> bytes | None:
        return next((value for kind, value in self.tlvs if kind == wanted), None)

    @property
    def alpn(self) -> bytes | None:
        """The protocol above, as ALPN has it (section 2.2.1)."""
        return self._value(ALPN)

    @property
    def authority(self) -> str | None:
        """The host name that the client asked for: TLS' SNI (section 2.2.2)."""
        return text_of(self._value(AUTHORITY), "utf-8")

    @property
    def unique_id(self) -> bytes | None:
        """What the proxy calls this connection, up to 128 bytes (section 2.2.5)."""
        return self._value(UNIQUE_ID)

    @property
    def netns(self) -> str | None:
        """The name of the client's network namespace (section 2.2.7)."""
        return text_of(self._value(NETNS), "ascii")

    @property
    def ssl(self) -> ProxySSL | None:
        """The TLS between the client and the proxy (section 2.2.6)."""
        value = self._value(SSL)
        return None if value is None else read_ssl(value)


def text_of(value: bytes | None, encoding: str) -> str | None:
    return None if value is None else value.decode(encoding)


def read_ssl(value: bytes) -> ProxySSL:
    if len(value) < 5:
        raise ValueError(f"an SSL TLV of {len(value)} bytes; it has at least 5")
    tlvs = tuple(read_tlvs(value[5:]))
    found = dict(reversed(tlvs))  # of several, the first
    return ProxySSL(
        is_tls=bool(value[0] & CLIENT_SSL),
        is_certificate_of_connection=bool(value[0] & CLIENT_CERT_CONN),
        is_certificate_of_session=bool(value[0] & CLIENT_CERT_SESS),
        verify=int.from_bytes(value[1:5], "big"),
        version=text_of(found.get(SSL_VERSION), "ascii"),
        common_name=text_of(found.get(SSL_CN), "utf-8"),
        cipher=text_of(found.get(SSL_CIPHER), "ascii"),
        signature_algorithm=text_of(found.get(SSL_SIGNATURE), "ascii"),
        key_algorithm=text_of(found.get(SSL_KEY), "ascii"),
        tlvs=tlvs,
    )


def read_tlvs(data: bytes) -> Iterator[TLV]:
    position = 0
    while position < len(data):
        start = position + 3
        end = start + int.from_bytes(data[position + 1 : start], "big")
        if start > len(data) or end > len(data):
            raise ValueError(f"the TLV at byte {position} of {len(data)} is longer than what is left")
        yield data[position], data[start:end]
        position = end


# ---- addresses -----------------------------------------------------------------------------------------------


def family_of(address: Address) -> socket.AddressFamily:
    if isinstance(address, (str, bytes)):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def normal(address: Address) -> Address:
    """The same as the socket module would have it."""
    if isinstance(address, (str, bytes)):
        return path_of(packed_path(address))
    if len(address) < 2:
        raise ValueError(f"not an address: {address!r}")
    return address_of(packed_host(address), address[1])


def packed_host(address: Address) -> bytes:
    family, host = family_of(address), str(address[0])
    try:
        return socket.inet_pton(family, host.partition("%")[0])  # a scope means nothing to others
    except OSError:
        raise ValueError(f"not an IP address: {host!r}") from None


def address_of(packed: bytes, port: object) -> Address:
    if not isinstance(port, int) or not 0 <= port <= 0xFFFF:
        raise ValueError(f"not a port: {port!r}")
    if len(packed) == 4:
        return (socket.inet_ntop(socket.AF_INET, packed), port)
    return (socket.inet_ntop(socket.AF_INET6, packed), port, 0, 0)


def packed_path(path: str | bytes) -> bytes:
    raw = os.fsencode(path)
    if len(raw) > PATH_SIZE:
        raise ValueError(f"a Unix socket's address of {len(raw)} bytes; {PATH_SIZE} are allowed")
    if b"\0" in raw and raw[0]:
        raise ValueError(f"a path with a NUL: {path!r}")
    return raw.ljust(PATH_SIZE, b"\0")


def path_of(packed: bytes) -> str | bytes:
    """A path; bytes for a name in the abstract namespace, whose length isn't told: up to its last other byte."""
    if packed[0] == 0:
        return packed.rstrip(b"\0") or ""
    return os.fsdecode(packed.split(b"\0", 1)[0])


# ---- reading -------------------------------------------------------------------------------------------------


class HeaderReader:
    """Puts the header of a connection together, of either version or just of one.

    Attributes
    ----------
    header : ProxyHeader or None
        As soon as it's whole.
    wanted : int
        Bytes that are still to come at least; 0: none.
    """

    __slots__ = ("_data", "_version", "header", "wanted")

    def __init__(self, version: Literal[1, 2] | None = None) -> None:
        self._version = version
        self._data = bytearray()
        self.header: ProxyHeader | None = None
        self.wanted = SHORTEST_LINE

    @property
    def received(self) -> int:
        """Bytes of the header that have come."""
        return len(self._data)

    def feed(self, data: ReadableBuffer) -> int:
        """How many of these bytes are the header's; the others are of what comes behind it.

        Raises
        ------
        FramingError
            No header begins so. The reader is of no use then.
        """
        view = memoryview(data).cast("B")
        taken = 0
        while self.wanted and taken < len(view):
            piece = view[taken : taken + self.wanted]
            self._data += piece
            taken += len(piece)
            self._advance()
        return taken

    def _advance(self) -> None:
        data = self._data
        version = 2 if data[0] == SIGNATURE[0] else 1
        self.wanted = block_wants(data) if version == 2 else line_wants(data)
        if self._version is not None and self._version != version:
            raise FramingError(f"a PROXY header of version {version}, and only {self._version} is allowed")
        if not self.wanted:
            try:
                self.header = parse_block(bytes(data)) if version == 2 else parse_line(bytes(data))
            except ValueError as exc:
                raise FramingError(f"a PROXY header that says what none says: {exc}") from None


def refusal(data: bytearray) -> FramingError:
    return FramingError(f"not a PROXY header: the connection begins with {bytes(data[-LONGEST_LINE:])!r}")


def line_wants(line: bytearray) -> int:
    """Bytes that a line of version 1 lacks at least."""
    if line.startswith(UNKNOWN):
        wanted = unknown_wants(line)
    else:
        wanted = inet_wants(line)
    if len(line) + wanted > LONGEST_LINE:
        raise FramingError(f"a PROXY line without CRLF in its {LONGEST_LINE} bytes")
    return wanted


def unknown_wants(line: bytearray) -> int:
    """Whatever stands behind a space is ignored; only CRLF ends it."""
    if line.endswith(b"\r\n"):
        wanted = 0
    else:
        wanted = 1 if line.endswith(b"\r") else 2
    after = bytes(line[len(UNKNOWN) : SHORTEST_LINE])
    if after[:1] != b" " and not b"\r\n".startswith(after):
        raise refusal(line)
    return wanted


def inet_wants(line: bytearray) -> int:
    fields = bytes(line).split(b" ")
    last = len(fields) - 1
    if last < 2:  # one of its words
        words = (b"PROXY ", *(b"PROXY %b " % name for name in INET_FAMILIES), UNKNOWN)
        if not any(word.startswith(line) for word in words):
            raise refusal(line)
        return max(SHORTEST_LINE - len(line), 1)
    left = LEFT_AT_LEAST.get(fields[1])
    if fields[0] != b"PROXY" or left is None or last > 5:
        raise refusal(line)
    begins = IPV4_BEGINNING if fields[1] == b"TCP4" else IPV6_BEGINNING
    whole = IPV4 if fields[1] == b"TCP4" else IPV6_BEGINNING
    for field in fields[2 : min(last, 4)]:
        if not field or not whole.fullmatch(field):
            raise refusal(line)
    for field in fields[4:last]:
        if not is_port(field):
            raise refusal(line)
    if last < 4:
        good, wanted = begins.fullmatch(fields[last]) is not None, left[last - 2]
    else:
        good, wanted = port_wants(fields[last], ends_line=last == 5)
        wanted = wanted if last == 5 else left[last - 2]
    if not good:
        raise refusal(line)
    return wanted


def is_port(field: bytes) -> bool:
    return PORT.fullmatch(field) is not None and int(field) <= 0xFFFF


def port_wants(field: bytes, *, ends_line: bool) -> tuple[bool, int]:
    """Whether a port begins so, and what is missing behind it if it's the last of the line."""
    if ends_line and field.endswith(b"\r\n"):
        return is_port(field[:-2]), 0
    if ends_line and field.endswith(b"\r"):
        return is_port(field[:-1]), 1
    return not field or is_port(field), 2


def parse_line(line: bytes) -> ProxyHeader:
    if line.startswith(UNKNOWN):
        return ProxyHeader(version=1)
    _, name, source, destination, source_port, destination_port = line[:-2].decode("ascii").split(" ")
    header = ProxyHeader((source, int(source_port)), (destination, int(destination_port)), version=1)
    if header.family is not INET_FAMILIES[name.encode()]:
        raise ValueError(f"addresses that aren't of {name}")
    return header


def block_wants(data: bytearray) -> int:
    """Bytes that a block of version 2 lacks at least."""
    size = len(data)
    if size > HEAD:  # checked already
        return HEAD + int.from_bytes(data[14:16], "big") - size
    if not SIGNATURE.startswith(data[:12]):
        raise refusal(data)
    if size > 12 and data[12] not in (LOCAL, PROXY):
        raise FramingError(f"a PROXY header of version {data[12] >> 4} with command {data[12] & 15}")
    is_proxy = size > 12 and data[12] == PROXY
    # LOCAL's family is ignored.
    if size > 13 and is_proxy and (data[13] >> 4 > 3 or data[13] & 15 > DATAGRAM):
        raise FramingError(f"a PROXY header of address family {data[13] >> 4}, transport {data[13] & 15}")
    if size > 14 and data[14] << 8 > LONGEST_BLOCK:
        raise FramingError(f"a PROXY header of at least {data[14] << 8} bytes; {LONGEST_BLOCK} are allowed")
    if size < HEAD:
        return HEAD - size
    length = int.from_bytes(data[14:16], "big")
    least = addresses_size(data[13]) if is_proxy else 0
    if not least <= length <= LONGEST_BLOCK:
        raise FramingError(f"a PROXY header of {length} bytes, where {least} to {LONGEST_BLOCK} are due")
    return length


def addresses_size(family: int) -> int:
    """Bytes of the addresses; 0 where family or transport is UNSPEC."""
    return ADDRESSES_SIZE.get(family >> 4, 0) if family & 15 else 0


def parse_block(data: bytes) -> ProxyHeader:
    if data[12] == LOCAL:
        return ProxyHeader(is_local=True)
    family, size = data[13] >> 4, addresses_size(data[13])
    if not size:
        return ProxyHeader()
    block, rest = data[HEAD : HEAD + size], data[HEAD + size :]
    source, destination = paths(block) if FAMILIES[family] is socket.AF_UNIX else hosts(block)
    header = ProxyHeader(
        source, destination, is_datagram=data[13] & 15 == DATAGRAM, tlvs=tuple(read_tlvs(rest))
    )
    at = checksum_at(header.tlvs, HEAD + size)
    if at is not None and data[at : at + 4] != checksum(data, at):
        raise ValueError("its CRC32C is wrong")
    return header


def hosts(block: bytes) -> tuple[Address, Address]:
    size = (len(block) - 4) // 2
    source = address_of(block[:size], int.from_bytes(block[-4:-2], "big"))
    return source, address_of(block[size : 2 * size], int.from_bytes(block[-2:], "big"))


def paths(block: bytes) -> tuple[Address, Address]:
    return path_of(block[:PATH_SIZE]), path_of(block[PATH_SIZE:])


# ---- the checksum --------------------------------------------------------------------------------------------


def checksum_at(tlvs: tuple[TLV, ...], start: int) -> int | None:
    """Where the CRC32C's value is, with TLVs that begin at ``start``."""
    for kind, value in tlvs:
        if kind == CRC32C:
            return start + 3
        start += 3 + len(value)
    return None


def checksum(data: bytes, at: int) -> bytes:
    """The CRC32C of a header, whose own four bytes count as zeros (section 2.2.3)."""
    return crc32c(data[:at] + bytes(4) + data[at + 4 :]).to_bytes(4, "big")


def remainder(value: int) -> int:
    """Of one byte, by the polynomial."""
    for _ in range(8):
        value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
    return value


REMAINDERS = tuple(remainder(value) for value in range(256))


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ REMAINDERS[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


# ---- writing -------------------------------------------------------------------------------------------------


def encode(header: ProxyHeader) -> bytes:
    """The bytes of a header.

    Raises
    ------
    ValueError
        Its TLVs are more than what fits.
    """
    return line_of(header) if header.version == 1 else block_of(header)


def line_of(header: ProxyHeader) -> bytes:
    source, destination = header.source, header.destination
    if not isinstance(source, tuple) or not isinstance(destination, tuple):
        return UNKNOWN + b"\r\n"
    name = "TCP4" if header.family is socket.AF_INET else "TCP6"
    return f"PROXY {name} {source[0]} {destination[0]} {source[1]} {destination[1]}\r\n".encode("ascii")


def block_of(header: ProxyHeader) -> bytes:
    command = bytes([LOCAL if header.is_local else PROXY])
    source, destination, family = header.source, header.destination, header.family
    if source is None or destination is None or family is None:
        return SIGNATURE + command + bytes(3)
    transport = DATAGRAM if header.is_datagram else STREAM
    block = packed_addresses(source, destination)
    tlvs = b"".join(bytes([kind]) + len(value).to_bytes(2, "big") + value for kind, value in header.tlvs)
    size = len(block) + len(tlvs)
    if size > LONGEST_BLOCK:
        raise ValueError(f"a PROXY header of {size} bytes of addresses and TLVs; {LONGEST_BLOCK} are allowed")
    addressing = bytes([FAMILY_NUMBERS[family] << 4 | transport])
    data = SIGNATURE + command + addressing + size.to_bytes(2, "big") + block + tlvs
    at = checksum_at(header.tlvs, HEAD + len(block))
    return data if at is None else data[:at] + checksum(data, at) + data[at + 4 :]


def packed_addresses(source: Address, destination: Address) -> bytes:
    if isinstance(source, tuple) and isinstance(destination, tuple):
        ports = source[1].to_bytes(2, "big") + destination[1].to_bytes(2, "big")
        return packed_host(source) + packed_host(destination) + ports
    assert isinstance(source, (str, bytes))
    assert isinstance(destination, (str, bytes))
    return packed_path(source) + packed_path(destination)
