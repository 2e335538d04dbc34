"""The TLS framing without any I/O: its states, its limits, and what it makes of records in any pieces."""

from __future__ import annotations

import random
import ssl
import struct
from collections.abc import Callable
from typing import Any

import pytest

import headrace
from authorities import ca_file, issued
from headrace.errors import FramingError, HandshakeError
from headrace.framing import tls
from headrace.framing.pump import StdlibPump, available, make_pump
from headrace.framing.tls import State, TLSCore

NAME = "core.example"
PUMPS = [
    StdlibPump,
    pytest.param(
        make_pump, marks=pytest.mark.skipif(not available(), reason="no native pump here"), id="native"
    ),
]


def server_context() -> ssl.SSLContext:
    files = issued(NAME)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.chain, files.key)
    return context


def move(sender: TLSCore, receiver: TLSCore, size: int = 1 << 20) -> bytes:
    """Everything that waits, in pieces of that size; what came out."""
    data, plaintext = sender.outgoing(), list[bytes]()
    for start in range(0, len(data), size):
        receiver.receive(data[start : start + size], plaintext)
        while receiver.pending:
            receiver.receive(None, plaintext)
    return b"".join(plaintext)


def shaken(
    pump: Callable[..., Any] = make_pump, size: int = 1 << 20, server: Any = None
) -> tuple[TLSCore, TLSCore]:
    """A client and a server whose handshake is done."""
    client = TLSCore(ssl.create_default_context(cafile=ca_file()), server_hostname=NAME, pump=pump)
    server = TLSCore(server or server_context(), server_side=True, pump=pump)
    client.start()
    server.start()
    for _ in range(3):
        assert move(client, server, size) == b""
        assert move(server, client, size) == b""
    assert (client.state, server.state) == (State.OPEN, State.OPEN)
    return client, server


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100, 16_000, 1 << 20])
@pytest.mark.parametrize("pump", PUMPS)
def test_any_pieces(pump: Any, size: int) -> None:
    client, server = shaken(pump, size)
    message = random.Random(size).randbytes(50_000)
    for sender, receiver in ((client, server), (server, client)):
        for start in range(0, len(message), 20_000):
            sender.send(message[start : start + 20_000])
        assert move(sender, receiver, size) == message


@pytest.mark.parametrize("pump", PUMPS)
def test_states(pump: Any) -> None:
    client, server = shaken(pump)
    assert client.truncated
    client.send(b"last")
    client.close()
    assert client.state is State.CLOSING
    with pytest.raises(RuntimeError, match="nothing can be sent in state 'closing'"):
        client.send(b"more")
    assert move(client, server) == b"last"
    assert server.state is State.PEER_CLOSED
    assert server.peer_closed
    assert not server.truncated
    server.send(b"answer")  # its direction goes on
    assert client.truncated
    server.close()
    assert server.state is State.CLOSED
    assert move(server, client) == b"answer"
    assert client.state is State.CLOSED
    client.close()
    server.receive(b"\x17\x03\x03\x00\x01x", [])  # dropped
    assert not server.pending


@pytest.mark.parametrize("pump", PUMPS)
def test_what_comes_behind_close_notify_is_dropped(pump: Any) -> None:
    client, server = shaken(pump)
    client.send(b"before")
    client.close()
    other, _ = shaken(pump)
    other.send(b"after")
    plaintext: list[bytes] = []
    server.receive(client.outgoing() + other.outgoing(), plaintext)
    assert plaintext == [b"before"]
    assert not server.pending


@pytest.mark.parametrize("pump", PUMPS)
def test_a_bad_record_fails_after_what_was_good(pump: Any) -> None:
    client, server = shaken(pump)
    client.send(b"good")
    good = client.outgoing()
    client.send(b"bad")
    bad = bytearray(client.outgoing())
    bad[-1] ^= 1
    plaintext: list[bytes] = []
    with pytest.raises(ssl.SSLError) as caught:
        server.receive(good + bad, plaintext)
    assert plaintext == [b"good"]
    assert "RECORD_MAC" in str(caught.value).upper()
    assert server.state is State.FAILED
    assert server.outgoing()  # an alert
    assert not server.truncated


@pytest.mark.parametrize("pump", PUMPS)
def test_no_more_than_so_much_at_a_time(pump: Any) -> None:
    """Small records are worked off in portions; the rest is pending, and in order."""
    client, server = shaken(pump)
    for number in range(1000):
        client.send(struct.pack(">I", number))
    data, turns, got = client.outgoing(), 0, b""
    plaintext: list[bytes] = []
    server.receive(data, plaintext)
    while server.pending:
        turns += 1
        assert len(b"".join(plaintext)) <= 4 * (tls.TURN_LIMIT + tls.SMALL_BATCH)
        got += b"".join(plaintext)
        plaintext.clear()
        server.receive(None, plaintext)
    got += b"".join(plaintext)
    assert got == b"".join(struct.pack(">I", number) for number in range(1000))
    assert turns >= 1000 // (tls.TURN_LIMIT + tls.SMALL_BATCH) - 1


def test_bytes_before_the_handshake_s_end_are_limited() -> None:
    server = TLSCore(server_context(), server_side=True)
    record = b"\x16\x03\x01\x40\x00" + b"\x01\x02\x00\x00" + bytes(16380)
    with pytest.raises((FramingError, ssl.SSLError)):
        for _ in range(tls.HANDSHAKE_LIMIT // len(record) + 2):
            server.receive(record, [])
    assert server.state is State.FAILED


def test_a_context_by_the_client_s_name() -> None:
    asked = []

    def select(hello: Any) -> ssl.SSLContext:
        asked.append(hello.server_name)
        return server_context()

    for size in (1, 7, 1 << 20):
        client, server = shaken(size=size, server=select)
        assert client.ssl_object.version() == server.ssl_object.version() == "TLSv1.3"
        client.send(b"hello")
        assert move(client, server, size) == b"hello"
    assert asked == [NAME] * 3
    with pytest.raises(AttributeError, match="before the ClientHello"):
        _ = TLSCore(select, server_side=True).ssl_object


def test_who_is_refused_by_name() -> None:
    def refuse(hello: Any) -> ssl.SSLContext:
        raise HandshakeError("not here")

    client = TLSCore(ssl.create_default_context(cafile=ca_file()), server_hostname=NAME)
    server = TLSCore(refuse, server_side=True)
    client.start()
    with pytest.raises(HandshakeError, match="not here"):
        server.receive(client.outgoing(), [])
    assert server.state is State.FAILED
    assert server.outgoing() == b""


def test_a_callback_that_switches_contexts_is_checked_again() -> None:
    """OpenSSL doesn't ask for a certificate that only the other context demands; the core does."""
    strict = server_context()
    strict.load_verify_locations(ca_file())
    strict.verify_mode = ssl.CERT_REQUIRED
    lax = server_context()

    def switch(ours: Any, name: str | None, context: ssl.SSLContext) -> None:
        ours.context = strict

    lax.sni_callback = switch
    client = TLSCore(ssl.create_default_context(cafile=ca_file()), server_hostname=NAME)
    server = TLSCore(lax, server_side=True)
    client.start()
    move(client, server)
    move(server, client)
    with pytest.raises(HandshakeError, match="showed no certificate"):
        move(client, server)
    assert server.state is State.FAILED


def test_leases_are_decrypted_where_they_lie() -> None:
    pool = headrace.BufferPool()
    client, server = shaken()
    client.send(b"x" * 100_000)
    plaintext: list[bytes] = []
    with pool._copy(client.outgoing()) as lease:
        server.receive(lease, plaintext)
        assert not server.pending
    assert b"".join(plaintext) == b"x" * 100_000
