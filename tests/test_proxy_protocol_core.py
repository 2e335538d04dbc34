"""PROXY headers as bytes: the specification's own, every way to cut them, and what none may be."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.errors import FramingError
from headrace.framing.proxy import (
    ALPN,
    AUTHORITY,
    CRC32C,
    LONGEST_BLOCK,
    LONGEST_LINE,
    NETNS,
    NOOP,
    SIGNATURE,
    SSL,
    UNIQUE_ID,
    HeaderReader,
    ProxyHeader,
    checksum,
    crc32c,
    encode,
)

V4 = (("192.168.0.1", 56324), ("192.168.0.11", 443))
V6 = (("2001:db8::1", 1, 0, 0), ("::1", 65535, 0, 0))
PATHS = ("/run/client", b"\0abstract")


def tlv(type: int, value: bytes) -> bytes:
    return bytes([type]) + len(value).to_bytes(2, "big") + value


def block(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + bytes([command, family]) + len(body).to_bytes(2, "big") + body


V4_BODY = bytes([192, 168, 0, 1, 192, 168, 0, 11]) + bytes.fromhex("dc0401bb")
V6_BODY = bytes.fromhex("20010db8" + "00" * 11 + "01" + "00" * 15 + "01" + "0001ffff")
UNIX_BODY = b"/run/client".ljust(108, b"\0") + b"\0abstract".ljust(108, b"\0")

# Bytes, and what they say. Of version 1: the lines that section 2.1 has, and the shortest ones.
LINES: dict[bytes, ProxyHeader] = {
    b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n": ProxyHeader(
        ("255.255.255.255", 65535), ("255.255.255.255", 65535), version=1
    ),
    b"PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n": (
        ProxyHeader((":".join(["ffff"] * 8), 65535), (":".join(["ffff"] * 8), 65535), version=1)
    ),
    b"PROXY UNKNOWN\r\n": ProxyHeader(version=1),
    b"PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff "
    b"65535 65535\r\n": ProxyHeader(version=1),
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n": ProxyHeader(*V4, version=1),
    b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n": ProxyHeader(("0.0.0.0", 0), ("0.0.0.0", 0), version=1),
    b"PROXY TCP6 :: :: 0 0\r\n": ProxyHeader(("::", 0), ("::", 0), version=1),
    b"PROXY TCP6 2001:DB8::1 ::1 1 65535\r\n": ProxyHeader(*V6, version=1),
    b"PROXY TCP6 ::ffff:10.0.0.1 ::1 1 2\r\n": ProxyHeader(("::ffff:10.0.0.1", 1), ("::1", 2), version=1),
    b"PROXY UNKNOWN a\rb\nc \r\r\n": ProxyHeader(version=1),
}
BLOCKS: dict[bytes, ProxyHeader] = {
    block(0x21, 0x11, V4_BODY): ProxyHeader(*V4),
    block(0x21, 0x12, V4_BODY): ProxyHeader(*V4, is_datagram=True),
    block(0x21, 0x21, V6_BODY): ProxyHeader(*V6),
    block(0x21, 0x22, V6_BODY): ProxyHeader(*V6, is_datagram=True),
    block(0x21, 0x31, UNIX_BODY): ProxyHeader(*PATHS),
    block(0x21, 0x32, UNIX_BODY): ProxyHeader(*PATHS, is_datagram=True),
    block(0x20, 0x00, b""): ProxyHeader(is_local=True),
    # LOCAL: all of its block is dropped, a family that doesn't exist as well.
    block(0x20, 0x11, V4_BODY): ProxyHeader(is_local=True),
    block(0x20, 0xFF, b"anything"): ProxyHeader(is_local=True),
    block(0x21, 0x00, b""): ProxyHeader(),
    block(0x21, 0x00, b"unknown"): ProxyHeader(),
    block(0x21, 0x10, V4_BODY): ProxyHeader(),
    block(0x21, 0x01, V4_BODY): ProxyHeader(),
    block(0x21, 0x11, V4_BODY + tlv(ALPN, b"h2") + tlv(0xE0, b"ours")): ProxyHeader(
        *V4, tlvs=((ALPN, b"h2"), (0xE0, b"ours"))
    ),
    block(0x21, 0x11, V4_BODY + tlv(NOOP, bytes(LONGEST_BLOCK - 15))): ProxyHeader(
        *V4, tlvs=((NOOP, bytes(LONGEST_BLOCK - 15)),)
    ),
}
VECTORS = {**LINES, **BLOCKS}

vectors = pytest.mark.parametrize(
    ("data", "header"), VECTORS.items(), ids=[f"{data[:40]!r}..." for data in VECTORS]
)


def read(data: bytes, version: Any = None) -> ProxyHeader | None:
    """All at once; nothing may be left."""
    reader = HeaderReader(version)
    assert reader.feed(data) == len(data)
    return reader.header


def refused_at(data: bytes) -> int:
    """How many bytes it takes, one at a time, to be refused."""
    reader = HeaderReader()
    for position in range(len(data)):
        try:
            assert reader.feed(data[position : position + 1]) == 1
        except FramingError:
            return position + 1
    raise AssertionError(f"accepted: {data!r}")


@vectors
def test_vectors(data: bytes, header: ProxyHeader) -> None:
    assert read(data) == header


@vectors
def test_every_truncation(data: bytes, header: ProxyHeader) -> None:
    """Nothing is known before the last byte; and never are more bytes wanted than the header has left."""
    cuts = range(len(data)) if len(data) < 300 else [*range(40), *range(40, len(data), 97), len(data) - 1]
    for cut in cuts:
        reader = HeaderReader()
        reader.feed(data[:cut])
        assert reader.header is None
        assert 0 < reader.wanted <= len(data) - cut
        assert reader.received == cut


@vectors
def test_one_byte_at_a_time(data: bytes, header: ProxyHeader) -> None:
    reader = HeaderReader()
    for byte in data:
        assert reader.header is None
        assert reader.feed(bytes([byte])) == 1
    assert reader.header == header
    assert reader.wanted == 0


@vectors
def test_as_many_as_wanted(data: bytes, header: ProxyHeader) -> None:
    """As the transport does it: the steps are few, and end with the header's last byte."""
    reader, position, steps = HeaderReader(), 0, 0
    while reader.wanted:
        piece = data[position : position + reader.wanted]
        position += reader.feed(piece)
        steps += 1
    assert (position, reader.header) == (len(data), header)
    if header.source is not None:
        assert steps <= 3 if header.version == 2 else 40


@vectors
def test_what_is_behind_is_left(data: bytes, header: ProxyHeader) -> None:
    for behind in (b"GET / HTTP/1.1\r\n", data, b"\r\n", b"\n"):
        reader = HeaderReader()
        assert reader.feed(memoryview(data + behind)) == len(data)
        assert reader.header == header
        assert reader.feed(behind) == 0


@vectors
def test_only_one_version(data: bytes, header: ProxyHeader) -> None:
    assert read(data, header.version) == header
    with pytest.raises(FramingError, match="only"):
        HeaderReader(3 - header.version).feed(data[:1])  # type: ignore[arg-type]


@vectors
def test_what_is_read_can_be_sent(data: bytes, header: ProxyHeader) -> None:
    assert read(encode(header)) == header
    if data in (encode(header), block(0x20, 0x11, V4_BODY)):
        return
    # The same in other words: what is ignored, and spellings of IPv6.
    assert header.source is None or b"TCP6" in data


# ---- refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "at"),
    [
        (b"GET / HTTP/1.1\r\n", 1),
        (b"\x16\x03\x01\x02\x00\x01", 1),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 3),
        (b"POST / HTTP/1.1\r\n", 2),
        (b"proxy TCP4", 1),
        (b"PROXY  TCP4", 7),
        (b"PROXY\tTCP4", 6),
        (b"PROXY UDP4", 8),
        (b"PROXY TCP5", 10),
        (b"PROXY TCP44", 11),
        (b"PROXY UNKNOWNS\r\n", 14),
        (b"PROXY UNKNOWN\r \r\n", 15),
        (b"PROXY UNKNOWN\n", 14),
        (b"PROXY TCP4\r\n", 11),
        (b"PROXY TCP4  1.1.1.1", 12),
        (b"PROXY TCP4 01.1.1.1", 13),
        (b"PROXY TCP4 256.1.1.1", 14),
        (b"PROXY TCP4 1..1", 14),
        (b"PROXY TCP4 1.1.1 ", 17),
        (b"PROXY TCP4 1.1.1.1.", 19),
        (b"PROXY TCP4 ::1", 12),
        (b"PROXY TCP4 -1", 12),
        (b"PROXY TCP6 fe80::1%", 19),
        (b"PROXY TCP6 g", 12),
        (b"PROXY TCP6 " + b"0" * 40, 51),
        (b"PROXY TCP4 1.1.1.1 1.1.1.1 01", 29),
        (b"PROXY TCP4 1.1.1.1 1.1.1.1 65536", 32),
        (b"PROXY TCP4 1.1.1.1 1.1.1.1 +1", 28),
        (b"PROXY TCP4 1.1.1.1 1.1.1.1  ", 28),
        (b"PROXY TCP4 1.1.1.1 1.1.1.1 1 \r", 30),
        (b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1 ", 31),
        (b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\n", 31),
        (b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\r", 32),
        (b"PROXY UNKNOWN " + b"x" * 200, LONGEST_LINE - 1),
        (b"\r\n\r\n\r", 5),
        (SIGNATURE[:-1] + b"\r", 12),
        (SIGNATURE + b"\x11", 13),
        (SIGNATURE + b"\x31", 13),
        (SIGNATURE + b"\x22", 13),
        (SIGNATURE + b"\x2f", 13),
        (SIGNATURE + b"\x21\x41", 14),
        (SIGNATURE + b"\x21\x13", 14),
        (SIGNATURE + b"\x21\x11\x11", 15),
        (SIGNATURE + b"\x20\x00\xff", 15),
        (SIGNATURE + b"\x21\x11\x10\x01", 16),
        (SIGNATURE + b"\x21\x11\x00\x0b", 16),
        (SIGNATURE + b"\x21\x21\x00\x23", 16),
        (SIGNATURE + b"\x21\x31\x00\xd7", 16),
    ],
)
def test_refused_at_the_first_byte_that_says_so(data: bytes, at: int) -> None:
    assert refused_at(data) == at
    with pytest.raises(FramingError):
        HeaderReader().feed(data)


def test_any_other_byte_in_what_is_fixed() -> None:
    for good in (b"PROXY TCP4 ", b"PROXY TCP6 ", SIGNATURE):
        for position in range(len(good)):
            for byte in range(256):
                data = good[:position] + bytes([byte])
                others = (b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN", SIGNATURE)
                if not any(other.startswith(data) for other in others):
                    assert refused_at(data) == len(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PROXY TCP6 ::: ::1 1 1\r\n", "not an IP address"),
        (b"PROXY TCP6 1:2 ::1 1 1\r\n", "not an IP address"),
        (b"PROXY TCP6 1.1.1.1 1.1.1.1 1 1\r\n", "TCP6"),
        (b"PROXY TCP6 ::1 12345::1 1 1\r\n", "not an IP address"),
        (block(0x21, 0x11, V4_BODY + b"\x04"), "longer than what is left"),
        (block(0x21, 0x11, V4_BODY + b"\x04\0"), "longer than what is left"),
        (block(0x21, 0x11, V4_BODY + b"\x04\0\x01"), "longer than what is left"),
        (block(0x21, 0x11, V4_BODY + tlv(CRC32C, b"123")), "of 3 bytes"),
        (block(0x21, 0x11, V4_BODY + tlv(CRC32C, b"1234")), "CRC32C is wrong"),
        (block(0x21, 0x11, V4_BODY + tlv(UNIQUE_ID, bytes(129))), "129 bytes"),
        (block(0x21, 0x11, V4_BODY + 2 * tlv(ALPN, b"h2")), "twice"),
        (block(0x21, 0x11, V4_BODY + tlv(AUTHORITY, b"\xff")), "utf-8"),
        (block(0x21, 0x11, V4_BODY + tlv(NETNS, b"\xff")), "ascii"),
        (block(0x21, 0x11, V4_BODY + tlv(SSL, b"\1\0\0\0")), "at least 5"),
        (block(0x21, 0x11, V4_BODY + tlv(SSL, b"\1\0\0\0\0\x21\0\5TLS")), "longer than what is left"),
        (block(0x21, 0x11, V4_BODY + tlv(SSL, b"\1\0\0\0\0" + tlv(0x23, b"\xff"))), "ascii"),
    ],
)
def test_refused_when_all_of_it_is_there(data: bytes, says: str) -> None:
    assert refused_at(data) == len(data)
    with pytest.raises(FramingError, match=says):
        HeaderReader().feed(data)


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda tail: SIGNATURE + tail)))
@example(b"PROXY UNKNOWN \xff\r\n")
def test_any_bytes(data: bytes) -> None:
    """A header, a refusal or more to come; and the same in one piece as byte by byte."""
    outcomes = []
    for step in (len(data) or 1, 1):
        reader = HeaderReader()
        try:
            taken = sum(reader.feed(data[at : at + step]) for at in range(0, len(data), step))
        except FramingError:
            outcomes.append("refused")
        else:
            assert taken <= len(data)
            assert (reader.header is None) == (reader.wanted > 0)
            outcomes.append(repr((reader.header, taken)))
    assert outcomes[0] == outcomes[1]


# ---- TLVs ----------------------------------------------------------------------------------------------------


def test_crc32c() -> None:
    """The check value, and RFC 3720's (appendix B.4)."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


def test_checksum_is_made_and_verified() -> None:
    header = ProxyHeader(*V4, tlvs=((ALPN, b"h2"), (CRC32C, bytes(4)), (NOOP, b"")))
    data = encode(header)
    at = data.index(bytes([CRC32C, 0, 4])) + 3
    assert data[at : at + 4] == checksum(data, at) != bytes(4)
    assert read(data) == ProxyHeader(*V4, tlvs=((ALPN, b"h2"), (CRC32C, data[at : at + 4]), (NOOP, b"")))
    for position in range(16, len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(FramingError):
            HeaderReader().feed(changed)


def test_meaning_of_tlvs() -> None:
    sub = b"".join(
        [
            tlv(0x21, b"TLSv1.3"),
            tlv(0x22, "jürgen".encode()),
            tlv(0x23, b"TLS_AES_256_GCM_SHA384"),
            tlv(0x24, b"RSA-SHA256"),
            tlv(0x25, b"RSA2048"),
            tlv(0x26, b"x25519"),
        ]
    )
    told = (
        (ALPN, b"h2"),
        (AUTHORITY, "bücher.example".encode()),
        (UNIQUE_ID, bytes(128)),
        (NETNS, b"blue"),
        (SSL, b"\x07\0\0\0\0" + sub),
    )
    header = read(encode(ProxyHeader(*V6, tlvs=told)))
    assert header is not None
    assert (header.alpn, header.authority) == (b"h2", "bücher.example")
    assert (header.unique_id, header.netns) == (bytes(128), "blue")
    tls = header.ssl
    assert tls is not None
    assert (tls.is_tls, tls.is_certificate_of_connection, tls.is_certificate_of_session) == (True, True, True)
    assert (tls.verify, tls.is_verified) == (0, True)
    assert (tls.version, tls.common_name, tls.cipher) == ("TLSv1.3", "jürgen", "TLS_AES_256_GCM_SHA384")
    assert (tls.signature_algorithm, tls.key_algorithm) == ("RSA-SHA256", "RSA2048")
    assert tls.tlvs[-1] == (0x26, b"x25519")


@pytest.mark.parametrize(
    ("client", "verify", "verified"), [(1, 0, False), (3, 0, True), (5, 0, True), (3, 1, False)]
)
def test_who_is_verified(client: int, verify: int, verified: bool) -> None:
    """A client without a certificate has zero there, too."""
    header = ProxyHeader(*V4, tlvs=((SSL, bytes([client]) + verify.to_bytes(4, "big")),))
    assert header.ssl is not None
    assert header.ssl.is_verified is verified
    assert header.ssl.version is None


def test_without_tlvs() -> None:
    header = ProxyHeader(*V4)
    assert (header.alpn, header.authority, header.unique_id, header.netns, header.ssl) == (None,) * 5


# ---- headers of one's own ------------------------------------------------------------------------------------


def test_addresses_are_as_sockets_have_them() -> None:
    assert ProxyHeader(("FE80:0::1%eth0", 1), ("::1", 2)).source == ("fe80::1", 1, 0, 0)
    assert ProxyHeader("/a", b"/b").destination == "/b"
    assert ProxyHeader("", "/b").source == ""
    assert ProxyHeader("\0name", "").source == b"\0name"
    families = [ProxyHeader(*each).family for each in (V4, V6, PATHS)] + [ProxyHeader().family]
    assert families == [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, None]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"version": 3}, "version must be"),
        ({"source": V4[0]}, "or neither"),
        ({"destination": V4[0]}, "or neither"),
        ({"source": V4[0], "destination": V6[0]}, "different families"),
        ({"source": V4[0], "destination": "/path"}, "different families"),
        ({"source": ("localhost", 1), "destination": V4[1]}, "not an IP address"),
        ({"source": ("1.2.3.4", 65536), "destination": V4[1]}, "not a port"),
        ({"source": ("1.2.3.4", "80"), "destination": V4[1]}, "not a port"),
        ({"source": ("1.2.3.4",), "destination": V4[1]}, "not an address"),
        ({"source": "/" * 109, "destination": ""}, "109 bytes"),
        ({"source": "/a\0b", "destination": ""}, "NUL"),
        ({"source": V4[0], "destination": V4[1], "is_local": True}, "nothing about addresses"),
        ({"is_local": True, "tlvs": ((ALPN, b""),)}, "together with addresses"),
        ({"is_datagram": True}, "together with addresses"),
        ({"version": 1, "is_local": True}, "no LOCAL"),
        ({"version": 1, "source": "/a", "destination": "/b"}, "no LOCAL"),
        ({"version": 1, "source": V4[0], "destination": V4[1], "tlvs": ((ALPN, b""),)}, "no LOCAL"),
        ({"version": 1, "source": V4[0], "destination": V4[1], "is_datagram": True}, "no LOCAL"),
        ({"source": V4[0], "destination": V4[1], "tlvs": ((256, b""),)}, "type 256"),
        ({"source": V4[0], "destination": V4[1], "tlvs": ((0xE0, bytes(65536)),)}, "65536 bytes"),
    ],
)
def test_headers_that_say_nothing_sensible(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ProxyHeader(**options)


def test_more_than_fits() -> None:
    with pytest.raises(ValueError, match="4097 bytes"):
        encode(ProxyHeader(*V4, tlvs=((NOOP, bytes(LONGEST_BLOCK - 14)),)))


def test_immutable() -> None:
    header = ProxyHeader(*V4)
    with pytest.raises(AttributeError):
        header.source = None  # type: ignore[misc]
    assert hash(header) == hash(ProxyHeader(*V4))


ports = st.integers(0, 65535)
ipv4 = st.tuples(st.ip_addresses(v=4).map(str), ports)
ipv6 = st.tuples(st.ip_addresses(v=6).map(ipaddress.IPv6Address.__str__), ports)
paths = st.one_of(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=108),
    st.binary(min_size=1, max_size=106).map(lambda name: b"\0" + name + b"\x01"),
)
pairs = st.one_of(st.tuples(ipv4, ipv4), st.tuples(ipv6, ipv6), st.tuples(paths, paths))
tlvs = st.lists(
    st.tuples(st.one_of(st.just(NOOP), st.integers(0xE0, 0xFF)), st.binary(max_size=50)), max_size=20
)


@given(pairs, tlvs, st.booleans(), st.booleans())
def test_round_trips(pair: Any, tlvs: Any, is_datagram: bool, sums: bool) -> None:
    tlvs = [*tlvs, (CRC32C, bytes(4))] if sums else tlvs
    data = encode(ProxyHeader(*pair, is_datagram=is_datagram, tlvs=tuple(tlvs)))
    header = read(data)
    assert header is not None
    assert encode(header) == data
    again = ProxyHeader(*pair, is_datagram=is_datagram)
    assert (header.source, header.destination, header.is_datagram) == (
        again.source,
        again.destination,
        is_datagram,
    )
    assert [kind for kind, _ in header.tlvs] == [kind for kind, _ in tlvs]


@given(st.one_of(st.tuples(ipv4, ipv4), st.tuples(ipv6, ipv6)), st.data())
def test_round_trips_of_lines(pair: Any, data: Any) -> None:
    """In pieces of any size."""
    header = ProxyHeader(*pair, version=1)
    line = encode(header)
    reader, position = HeaderReader(), 0
    while position < len(line):
        size = data.draw(st.integers(1, len(line)))
        position += reader.feed(line[position : position + size])
    assert reader.header == header
