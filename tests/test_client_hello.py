"""The first message of a TLS client, read without OpenSSL: real hellos in any pieces, and everything that isn't one."""

from __future__ import annotations

import random
import ssl
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import FramingError
from headrace.framing.client_hello import LARGEST_RECORD, LIMIT, ClientHello, ClientHelloReader


def hello_of(name: str | None = "Server.Example", alpn: tuple[str, ...] = ("h2", "http/1.1")) -> bytes:
    """What OpenSSL says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(list(alpn))
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


HELLO = hello_of()
MESSAGE = HELLO[5:]


def records(message: bytes, size: int) -> bytes:
    pieces = [message[start : start + size] for start in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + struct.pack(">H", len(piece)) + piece for piece in pieces)


def read(data: bytes, size: int = LIMIT) -> ClientHello | None:
    reader = ClientHelloReader()
    for start in range(0, len(data), size):
        hello = reader.feed(data[start : start + size])
        if hello is not None:
            return hello
    return None


def check(hello: ClientHello | None) -> None:
    assert hello is not None
    assert hello.server_name == "server.example"
    assert hello.alpn_protocols == (b"h2", b"http/1.1")
    assert hello.versions == (0x0304, 0x0303)


def test_in_any_pieces() -> None:
    for size in (1, 2, 3, 5, 7, 100, len(HELLO)):
        check(read(HELLO, size))
    for cut in range(1, len(HELLO)):
        reader = ClientHelloReader()
        assert reader.feed(HELLO[:cut]) is None
        check(reader.feed(HELLO[cut:]))


@pytest.mark.parametrize("size", [1, 3, 50, 200])
def test_over_several_records(size: int) -> None:
    check(read(records(MESSAGE, size)))
    check(read(records(MESSAGE, size), 1))


def test_what_comes_behind_it_is_not_looked_at() -> None:
    check(read(HELLO + b"early data, or anything"))


def test_without_a_name() -> None:
    assert read(hello_of(None, ())) == ClientHello(None, (), (0x0304, 0x0303))
    assert read(hello_of("192.0.2.1", ())) == ClientHello(None, (), (0x0304, 0x0303))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\n", "begins with b'GET"),
        (b"G", "not a TLS ClientHello"),
        (b"\x16G", "not a TLS ClientHello"),
        (b"\x15\x03\x01\x00\x02\x02\x28", "not a TLS ClientHello"),
        (b"\x16\x03\x01\x00\x00", "a TLS record of 0 bytes"),
        (b"\x16\x03\x01" + struct.pack(">H", LARGEST_RECORD + 1), "a TLS record of 16385 bytes"),
        (records(b"\x02\x00\x00\x05hello", 100), "handshake message 2"),
        (records(b"\x01" + (LIMIT + 1).to_bytes(3, "big"), 100), f"a ClientHello of {LIMIT + 1} bytes"),
        (records(b"\x01\x00\x00\x05hello", 100), "lengths don't fit"),
    ],
)
def test_what_is_none(data: bytes, text: str) -> None:
    with pytest.raises(FramingError, match=text):
        read(data)


def with_name(name: bytes) -> bytes:
    """The same hello, asking for another name."""
    old = b"Server.Example"
    at = MESSAGE.index(old)
    grown = len(name) - len(old)
    body = bytearray(MESSAGE.replace(old, name))
    for offset, size in ((at - 2, 2), (at - 5, 2), (at - 7, 2)):
        value = int.from_bytes(body[offset : offset + size], "big") + grown
        body[offset : offset + size] = value.to_bytes(size, "big")
    extensions = 4 + 2 + 32
    extensions += 1 + body[extensions]
    extensions += 2 + int.from_bytes(body[extensions : extensions + 2], "big")
    extensions += 1 + body[extensions]
    value = int.from_bytes(body[extensions : extensions + 2], "big") + grown
    body[extensions : extensions + 2] = value.to_bytes(2, "big")
    body[1:4] = (len(body) - 4).to_bytes(3, "big")
    return records(bytes(body), LARGEST_RECORD)


@pytest.mark.parametrize(
    "name", [b"", b"a\0b", b"a..b", b".a", b"a b", b"\xc3\xa4.example", b"a" * 256, b"a\n"]
)
def test_names_that_are_none(name: bytes) -> None:
    with pytest.raises(FramingError, match="isn't a DNS name"):
        read(with_name(name))


def test_names_that_are() -> None:
    for name in (b"a", b"A-b.C_d.example", b"a" * 255):
        hello = read(with_name(name))
        assert hello is not None
        assert hello.server_name == name.decode().lower()


def test_an_extension_twice() -> None:
    body = bytearray(MESSAGE)
    at = body.index(b"\x00\x2b\x00\x05\x04")  # supported_versions
    name = body.index(b"Server.Example") - 9  # its extension's type
    body[at : at + 2] = body[name : name + 2]
    with pytest.raises(FramingError, match="comes twice"):
        read(records(bytes(body), LARGEST_RECORD))


@given(st.binary(max_size=300), st.integers(1, 50))
def test_nothing_else_is_raised(noise: bytes, size: int) -> None:
    try:
        read(noise, size)
    except FramingError:
        pass


@given(st.integers(0, len(HELLO) - 1), st.integers(1, 255))
def test_nothing_else_is_raised_for_a_changed_byte(at: int, change: int) -> None:
    data = bytearray(HELLO)
    data[at] ^= change
    try:
        read(bytes(data), random.Random(at).choice([1, 10, 1000]))
    except FramingError:
        pass
