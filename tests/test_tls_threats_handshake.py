"""What hostile peers do before a TLS connection stands, and to get one. See docs/threats-tls.md for the whole list."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import ssl
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import headrace
from authorities import ca_file, issued
from headrace.errors import HandshakeError
from headrace.framing.tls import TLSCore
from headrace.security.certificates import ServerCertificates
from headrace.security.tls import TLSLayer
from headrace.testing import Faults, simulated_run
from hostile import (
    ALERT,
    APPLICATION_DATA,
    CLOSE_NOTIFY,
    FIN,
    HANDSHAKE,
    V12,
    V13,
    Plain,
    TLSPeer,
    client_context,
    in_one_byte_records,
    record,
    server_context,
)
from streams import Bytes, Recorder, reports
from test_tls_threats import NAME, client_tls, run, server_tls, serving

PUBLIC, ADMIN = "public.example", "admin.example"
CALM = Faults(**dict.fromkeys(Faults.NAMES, 0))
CLIENT_HELLO = 1


def by_name(**options: Any) -> headrace.TLS:
    """One certificate for two names; only one of them asks for the client's."""
    both = issued(PUBLIC, ADMIN)
    return headrace.TLS(
        certificates={
            PUBLIC: headrace.Certificate(both.chain, both.key),
            ADMIN: headrace.Certificate(
                both.chain, both.key, client_ca=ca_file(), client_certificate="required"
            ),
        },
        **options,
    )


def server_options(how: str, timeout: float | None = None) -> dict[str, Any]:
    """The three ways in which a server comes to its context; perhaps with another time limit for handshakes."""
    if how == "ssl":
        return {"ssl": server_context(NAME), "ssl_handshake_timeout": timeout}
    options = {} if timeout is None else {"handshake_timeout": timeout}
    return {"security": by_name(**options) if how == "by name" else server_tls(**options)}


NEVER = 3600.0  # seconds; a limit that isn't what ends a connection here


ways = pytest.mark.parametrize("how", ["security", "by name", "ssl"])


def client_hello(server_hostname: str = NAME, version: ssl.TLSVersion | None = None) -> bytes:
    outgoing = ssl.MemoryBIO()
    client = client_context(version).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=server_hostname)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


# ---- unbounded handshake data ----------------------------------------------------------------------------------


def claim(size: int, sent: int) -> bytes:
    """A ClientHello that says it has ``size`` bytes, and its beginning, in records of one byte."""
    return in_one_byte_records(HANDSHAKE, bytes([CLIENT_HELLO]) + size.to_bytes(3, "big") + bytes(sent))


@ways
@pytest.mark.parametrize("size", [0xFFFFFF, 131_000, 60_000])
def test_unbounded_handshake_data(loop: headrace.EventLoop, how: str, size: int) -> None:
    """16 MiB are claimed, or just what is allowed, in records of one byte: an error before the message is whole."""

    async def main() -> None:
        protocol = Bytes()
        peer = Plain(claim(size, 59_000))
        async with serving(lambda: protocol, **server_options(how, NEVER)) as address:
            await loop.create_connection(lambda: peer, *address)
            await peer.lost.wait()
        assert protocol.events == []

    run(loop, main())


def test_tiny_records_of_a_handshake_are_fair() -> None:
    """One turn works off 64 of them and at most a batch of 32 more, whoever reads the ClientHello."""
    files = issued(NAME)
    records = 20_000
    by_one = server_context(NAME)
    by_two = ServerCertificates(dict.fromkeys((None, NAME), headrace.Certificate(files.chain, files.key)))
    for context in (by_one, lambda hello: by_two.select(hello.server_name)[0]):
        core = TLSCore(context, server_side=True)
        core.receive(claim(60_000, records), [])
        calls = 1
        while core.pending:
            core.receive(None, [])
            calls += 1
        assert calls >= records // (64 + 32)


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@ways
def test_unfinished_handshakes_take_little_memory(loop: headrace.EventLoop, how: str) -> None:
    """Each of 50 peers has sent nearly what is allowed and stops there: at most 256 KiB each."""
    peers_count = 50
    beginning = claim(60_000, 20_000)  # 6 bytes on the wire for each of these

    async def main() -> None:
        async with serving(Bytes, **server_options(how)) as address:
            growth = 0
            for count in (5, peers_count):  # the first time, also the loop's own buffers are made
                before = resident()
                peers = [Plain(beginning) for _ in range(count)]
                for peer in peers:
                    await loop.create_connection(lambda peer=peer: peer, *address)
                while any(peer.transport.get_write_buffer_size() for peer in peers):
                    await asyncio.sleep(0)
                for _ in range(500):  # turns, in which the servers read it all
                    await asyncio.sleep(0)
                assert [layer._core.pending for layer in layers() if layer._core.pending] == []
                growth = resident() - before
                assert not any(peer.lost.is_set() for peer in peers)
                for peer in peers:
                    peer.transport.abort()
                    await peer.lost.wait()
                while any(layer._lower is not None and not layer.is_closing() for layer in layers()):
                    await asyncio.sleep(0)
            assert growth <= peers_count * 256 * 1024

    run(loop, main())


def layers() -> list[TLSLayer]:
    """All that are alive."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is TLSLayer]


# ---- a handshake that never ends -------------------------------------------------------------------------------


class Dribbling(asyncio.Protocol):
    """Sends a byte of its flight each second, so that no idle timer ever fires."""

    def __init__(self, flight: bytes) -> None:
        self.flight = iter(flight)
        self.lost = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.more()

    def more(self) -> None:
        byte = next(self.flight, None)
        if byte is not None and not self.lost.is_set():
            self.transport.write(bytes([byte]))
            asyncio.get_running_loop().call_later(1.0, self.more)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set()


@pytest.mark.parametrize("flight", [client_hello(), b""], ids=["slow", "silent"])
@pytest.mark.parametrize(
    ("how", "seconds"), [("security", 10), ("by name", 10), ("ssl", 60), ("ssl_handshake_timeout", 7)]
)
def test_handshake_deadline_of_a_server(how: str, seconds: float, flight: bytes) -> None:
    """The time limit is one for the whole handshake, counted from its beginning."""

    async def main() -> float:
        loop: Any = asyncio.get_running_loop()
        options = server_options(how)
        if how == "ssl_handshake_timeout":
            options = {"ssl": server_context(NAME), "ssl_handshake_timeout": seconds}
        server = await loop.create_server(Bytes, "tls", 443, **options)
        peer = Dribbling(flight)
        began = loop.time()
        await loop.create_connection(lambda: peer, "tls", 443)
        await peer.lost.wait()
        server.close()
        return float(loop.time() - began)

    for seed in range(5):
        assert seconds <= simulated_run(main(), seed, faults=CALM) < seconds + 1


@pytest.mark.parametrize(
    "say", [record(HANDSHAKE, bytes([2, 0, 1, 0])) + bytes(200), b""], ids=["slow", "silent"]
)
@pytest.mark.parametrize(("how", "seconds"), [("security", 10), ("ssl", 60)])
def test_handshake_deadline_of_a_client(how: str, seconds: float, say: bytes) -> None:
    async def main() -> float:
        loop: Any = asyncio.get_running_loop()
        peers: list[Dribbling] = []
        # A header says that the record has more bytes than the limit has seconds.
        flight = record(HANDSHAKE, bytes([2, 0, 1, 0]) + bytes(200)) if say else b""

        def factory() -> Dribbling:
            peers.append(Dribbling(flight))
            return peers[-1]

        server = await loop.create_server(factory, "tls", 443)
        options: Any = {"security": client_tls()} if how == "security" else {"ssl": client_context()}
        kind = HandshakeError if how == "security" else ConnectionAbortedError
        began = loop.time()
        with pytest.raises(kind, match="handshake"):
            await loop.create_connection(Bytes, "tls", 443, server_hostname=NAME, **options)
        ended = loop.time()
        await peers[0].lost.wait()
        server.close()
        return float(ended - began)

    for seed in range(5):
        assert seconds <= simulated_run(main(), seed, faults=CALM) < seconds + 1


def test_handshake_deadline(loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    """Over a real kernel: a peer that stays silent is let go."""

    async def main() -> None:
        protocol = Bytes()
        peer = Plain()
        async with serving(lambda: protocol, security=server_tls(handshake_timeout=0.02)) as address:
            await loop.create_connection(lambda: peer, *address)
            await peer.lost.wait()
        assert protocol.events == []
        assert "took longer than 0.02 s" in caplog.text

    with caplog.at_level(logging.INFO, "headrace.security"):
        run(loop, main())


def test_handshakes_under_way_are_limited() -> None:
    """2,000 silent clients, of which 1,024 stay: the oldest went. A good one connects in no time."""

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        server = await loop.create_server(Bytes, "tls", 443, security=server_tls())
        await crowd(loop, ("tls", 443), clients=2000, pending=1024)
        server.close()
        await asyncio.sleep(30)

    for seed in range(2):
        simulated_run(main(), seed, faults=CALM, descriptors=5000)


def test_handshakes_under_way_are_limited_over_a_kernel(loop: headrace.EventLoop) -> None:
    """The same with fewer: a process may have 1,024 descriptors only."""

    async def main() -> None:
        async with serving(Bytes, security=server_tls(max_pending_handshakes=64)) as address:
            await crowd(loop, address, clients=200, pending=64)

    run(loop, main())


async def crowd(loop: Any, address: Any, *, clients: int, pending: int) -> None:
    """Silent clients, a good one among them."""
    silent = [Plain() for _ in range(clients)]
    for peer in silent:
        await loop.create_connection(lambda peer=peer: peer, *address)
    for peer in silent[: clients - pending]:
        await peer.lost.wait()
    assert not any(peer.lost.is_set() for peer in silent[clients - pending :])
    good = TLSPeer(client_context(), server_hostname=NAME)
    began = loop.time()
    await loop.create_connection(lambda: good, *address)
    await good.handshake_done.wait()
    assert good.error is None
    assert good.tls.version()
    if type(loop) is not headrace.EventLoop:  # virtual time
        assert loop.time() - began < 1
    await silent[clients - pending].lost.wait()  # it gave way to the good one, and nobody else did
    assert sum(peer.lost.is_set() for peer in silent) == clients - pending + 1
    for each in (*silent, good):
        each.transport.abort()
        await each.lost.wait()


# ---- bytes where none belong -----------------------------------------------------------------------------------

EARLY = {
    "plain": b"EVIL\r\n" * 10,
    "as a record": record(APPLICATION_DATA, b"EVIL"),
    "behind a hello": client_hello(PUBLIC) + record(APPLICATION_DATA, b"EVIL" * 10),
}


@ways
@pytest.mark.parametrize("end", [FIN, None], ids=["FIN", "open"])
@pytest.mark.parametrize("early", EARLY)
def test_data_before_the_handshake(loop: headrace.EventLoop, how: str, early: str, end: str | None) -> None:
    """Never reaches a server's protocol, which doesn't even hear of the connection."""

    async def main() -> None:
        protocols: list[Recorder] = []

        def factory() -> Recorder:
            protocols.append(Bytes())
            return protocols[-1]

        found = reports(loop)
        async with serving(factory, **server_options(how, NEVER)) as address:
            peer = Plain(EARLY[early], end=end)
            await loop.create_connection(lambda: peer, *address)
            await peer.lost.wait()
        assert [protocol.events for protocol in protocols] == [[]]
        assert all(isinstance(context["exception"], ssl.SSLError) for context in found)

    run(loop, main())


@pytest.mark.parametrize("how", ["security", "ssl"])
@pytest.mark.parametrize("end", [FIN, None], ids=["FIN", "open"])
@pytest.mark.parametrize("early", ["plain", "as a record"])
def test_data_before_the_handshake_for_a_client(
    loop: headrace.EventLoop, how: str, early: str, end: str | None
) -> None:
    async def main() -> None:
        protocol = Bytes()
        peer = Plain(EARLY[early], end=end)
        options: Any = {"security": client_tls()} if how == "security" else {"ssl": client_context()}
        reports(loop)
        async with serving(lambda: peer) as address:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await loop.create_connection(lambda: protocol, *address, server_hostname=NAME, **options)
            await peer.lost.wait()
        assert protocol.events == []

    run(loop, main())


LINE = b"STARTTLS\r\n"


class Eager(TLSPeer):
    """Says the line and its ClientHello in one segment."""

    def connection_made(self, transport: Any) -> None:
        transport.write(LINE)
        super().connection_made(transport)


@pytest.mark.parametrize("how", ["security", "ssl"])
def test_starttls_injection(loop: headrace.EventLoop, how: str) -> None:
    """Plain bytes behind the line, in the same segment: the handshake fails, nobody ever reads them."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == LINE
        while len(reader._buffer) < 4:  # type: ignore[attr-defined]
            await reader._wait_for_data("test")  # type: ignore[attr-defined]
        context: Any = server_tls() if how == "security" else server_context(NAME)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await writer.start_tls(context)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            assert await reader.read() == b""
        writer.close()
        served.set_result(None)

    async def main() -> None:
        reports(loop)
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            peer = Plain(LINE + b"EVIL\r\n")
            await loop.create_connection(lambda: peer, *server.sockets[0].getsockname())
            await served
            await peer.lost.wait()

    served: asyncio.Future[None] = loop.create_future()
    run(loop, main())


@pytest.mark.parametrize("how", ["security", "ssl"])
def test_starttls_loss(loop: headrace.EventLoop, how: str) -> None:
    """A ClientHello behind the line, in the same segment, isn't lost."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == LINE
        context: Any = server_tls() if how == "security" else server_context(NAME)
        await writer.start_tls(context)
        writer.write(await reader.readexactly(6))
        await writer.drain()
        served.set_result(None)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            peer = Eager(client_context(), server_hostname=NAME)
            await loop.create_connection(lambda: peer, *server.sockets[0].getsockname())
            await peer.handshake_done.wait()
            assert peer.error is None
            peer.write(b"secret")
            await peer.until(lambda: peer.data == b"secret")
            await served
            peer.transport.abort()
            await peer.lost.wait()

    served: asyncio.Future[None] = loop.create_future()
    run(loop, main())


CLOSING = {
    "at once": record(ALERT, CLOSE_NOTIFY),
    "many": record(ALERT, CLOSE_NOTIFY) * 1000,
    "behind the hello": client_hello(PUBLIC) + record(ALERT, CLOSE_NOTIFY),
    "within the hello": client_hello(PUBLIC)[:100] + record(ALERT, CLOSE_NOTIFY),
}


@ways
@pytest.mark.parametrize("closing", CLOSING)
def test_close_notify_in_the_handshake(loop: headrace.EventLoop, how: str, closing: str) -> None:
    """The connection is over within a few turns of the loop, which nothing keeps busy."""

    async def main() -> None:
        protocol = Bytes()
        reports(loop)
        peer = Plain(CLOSING[closing])
        async with serving(lambda: protocol, **server_options(how, NEVER)) as address:
            await loop.create_connection(lambda: peer, *address)
            began = loop.turns
            if closing == "within the hello":  # which takes it for a part of the hello: that never ends
                peer.transport.write(bytes(1000))
            await peer.lost.wait()
            assert loop.turns - began <= 30
        assert protocol.events == []

    run(loop, main())


@pytest.mark.parametrize("how", ["security", "ssl"])
def test_close_notify_in_a_client_s_handshake(loop: headrace.EventLoop, how: str) -> None:
    async def main() -> None:
        peer = Plain(record(ALERT, CLOSE_NOTIFY))
        options: Any = {"security": client_tls()} if how == "security" else {"ssl": client_context()}
        protocol = Bytes()
        async with serving(lambda: peer) as address:
            began = loop.turns
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await loop.create_connection(lambda: protocol, *address, server_hostname=NAME, **options)
            assert loop.turns - began <= 30
            await peer.lost.wait()
        assert protocol.events == []

    run(loop, main())


# ---- who gets in without a certificate -------------------------------------------------------------------------


def switching() -> ssl.SSLContext:
    """A user's own server context, whose callback switches to one that demands certificates: OpenSSL doesn't ask."""
    contexts = {name: server_context(PUBLIC) for name in (PUBLIC, ADMIN)}
    both = issued(PUBLIC, ADMIN)
    for context in contexts.values():
        context.load_cert_chain(both.chain, both.key)
    contexts[ADMIN].verify_mode = ssl.CERT_REQUIRED
    contexts[ADMIN].load_verify_locations(ca_file())

    def switch(ssl_object: Any, name: str | None, context: ssl.SSLContext) -> None:
        if name is not None:
            ssl_object.context = contexts[name]

    contexts[PUBLIC].sni_callback = switch
    return contexts[PUBLIC]


class Door:
    """A server that greets whom it lets in, and notes which name they asked for."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.let_in: list[Recorder] = []

    async def knock(self, address: Any, context: ssl.SSLContext, name: str, session: Any = None) -> TLSPeer:
        """A client that was greeted, or sent away."""
        peer = TLSPeer(context, server_hostname=name, session=session)
        loop: Any = asyncio.get_running_loop()
        await loop.create_connection(lambda: peer, *address)
        await peer.until(lambda: peer.data == b"welcome" or peer.lost.is_set())
        return peer

    async def leave(self, peer: TLSPeer) -> ssl.SSLSession | None:
        session = peer.tls.session
        peer.transport.abort()
        await peer.lost.wait()
        return session

    def greet(self, protocol: Recorder) -> None:
        self.let_in.append(protocol)
        protocol.transport.write(b"welcome")

    def serving(self) -> Any:
        return serving(lambda: Bytes(made=self.greet), **self.options)


@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("resumed", [False, True], ids=["fresh", "resumed"])
@pytest.mark.parametrize("how", ["by name", "sni_callback"])
def test_client_certificates_aren_t_bypassed_by_sni(
    loop: headrace.EventLoop, how: str, resumed: bool, version: ssl.TLSVersion
) -> None:
    """Who has no certificate doesn't get in by a name that demands one, nor by a session of another name's."""

    async def main() -> None:
        door = Door({"security": by_name()} if how == "by name" else {"ssl": switching()})
        reports(loop)
        context = client_context(version)
        async with door.serving() as address:
            session = None
            if resumed:
                first = await door.knock(address, context, PUBLIC)
                session = await door.leave(first)
                again = await door.knock(address, context, PUBLIC, session)
                assert again.data == b"welcome"
                assert again.tls.session_reused
                session = await door.leave(again)
                assert session is not None
            before = len(door.let_in)
            peer = await door.knock(address, context, ADMIN, session)
            if how == "sni_callback" and resumed and version == V12:
                # OpenSSL tells the callback the session's name, not the one that is asked for (SSL_get_servername):
                # for everybody on this side it's one more connection to the public name.
                assert peer.tls.session_reused
                context = door.let_in.pop().transport.get_extra_info("sslcontext")
                assert context.verify_mode == ssl.CERT_NONE
                await door.leave(peer)
            else:
                assert peer.lost.is_set()
                assert not peer.data
            assert len(door.let_in) == before

    run(loop, main())


@pytest.mark.parametrize("version", [V12, V13])
def test_client_certificates_by_name_let_their_owners_in(
    loop: headrace.EventLoop, version: ssl.TLSVersion
) -> None:
    """The other side of the test above; and a session that was made with a certificate isn't resumed without one."""

    async def main() -> None:
        door = Door({"security": by_name()})
        reports(loop)
        async with door.serving() as address:
            owner = await door.knock(address, client_context(version, "client.example"), ADMIN)
            assert owner.data == b"welcome"
            info = door.let_in[0].transport.get_extra_info("security")
            assert info.is_mutually_authenticated
            assert info.remote_identity.name == "client.example"
            session = await door.leave(owner)
            assert session is None or not session.has_ticket
            stranger = await door.knock(address, client_context(version, None), ADMIN)
            assert stranger.lost.is_set()
            self_signed = await door.knock(address, stranger_context(version), ADMIN)
            assert self_signed.lost.is_set()
            assert len(door.let_in) == 1

    run(loop, main())


def stranger_context(version: ssl.TLSVersion) -> ssl.SSLContext:
    """With a certificate of an authority that the server doesn't know."""
    context = client_context(version)
    files = issued("client.example", ca="strangers")
    context.load_cert_chain(files.chain, files.key)
    return context


@pytest.mark.parametrize("version", [V12, V13])
def test_a_name_without_a_certificate_is_refused(
    loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture, version: ssl.TLSVersion
) -> None:
    """No name at all, an unknown one, or one written otherwise: nobody falls through to a laxer context."""

    async def main() -> None:
        door = Door({"security": by_name()})
        async with door.serving() as address:
            for name in (None, "other.example", "x.admin.example"):
                context = client_context(version)
                context.check_hostname = False
                refused = await door.knock(address, context, name)  # type: ignore[arg-type]
                assert refused.lost.is_set()
            context = client_context(version)
            refused = await door.knock(address, context, ADMIN.upper())
            assert refused.lost.is_set()
            assert not door.let_in

    run(loop, main())


# ---- renegotiation and compression -----------------------------------------------------------------------------

OP_ALLOW_CLIENT_RENEGOTIATION = 1 << 8  # OpenSSL 3.0's; the standard library has no name for it


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command isn't installed")
@pytest.mark.parametrize("allowed", [False, True], ids=["ours", "a context that allows it"])
def test_renegotiation(loop: headrace.EventLoop, allowed: bool) -> None:
    """A client that wants a second handshake doesn't get one; with a context that allows it, this test sees it."""

    async def main() -> None:
        protocol = Bytes()
        security = server_tls()
        if allowed:
            context = server_context(NAME)
            context.options |= OP_ALLOW_CLIENT_RENEGOTIATION
            security = headrace.TLS(context=context)
        async with serving(lambda: protocol, security=security) as (host, port):
            command = f"openssl s_client -tls1_2 -servername {NAME} -connect {host}:{port}"
            process = await asyncio.create_subprocess_exec(
                *command.split(), stdin=-1, stdout=-1, stderr=asyncio.subprocess.STDOUT
            )
            assert process.stdin is not None
            await protocol.seen("made")
            process.stdin.write(b"before\n")
            await protocol.seen("received")
            context = protocol.transport.get_extra_info("sslcontext")
            process.stdin.write(b"R\n")
            if allowed:
                while context.session_stats()["accept_good"] < 2:
                    await asyncio.sleep(0.01)
                process.stdin.close()
            output, _ = await process.communicate()
            await protocol.seen("lost")
            assert b"RENEGOTIATING" in output
            assert context.session_stats()["accept_good"] == 1 + allowed
            assert (b"no renegotiation" in output) != allowed

    run(loop, main())


def with_compression(hello: bytes) -> bytes:
    """The same ClientHello, which offers DEFLATE (RFC 3749) as well."""
    message = bytearray(hello[5:])
    position = 4 + 2 + 32
    position += 1 + message[position]  # session id
    position += 2 + int.from_bytes(message[position : position + 2], "big")  # cipher suites
    assert message[position : position + 2] == b"\x01\x00"
    message[position : position + 2] = b"\x02\x01\x00"
    message[1:4] = (len(message) - 4).to_bytes(3, "big")
    return record(HANDSHAKE, bytes(message))


@ways
def test_compression(loop: headrace.EventLoop, how: str) -> None:
    """A client that offers it, and likes it best, gets none."""

    async def main() -> None:
        name = PUBLIC if how == "by name" else NAME
        peer = Plain(with_compression(client_hello(name, V12)))
        async with serving(Bytes, **server_options(how)) as address:
            await loop.create_connection(lambda: peer, *address)
            while len(peer.data) < 100:
                await asyncio.sleep(0)
            content_type, _, length = struct.unpack_from("!BHH", peer.data)
            assert content_type == HANDSHAKE
            server_hello = peer.data[5 : 5 + length]
            position = 4 + 2 + 32
            position += 1 + server_hello[position]
            assert server_hello[position + 2] == 0
            peer.transport.abort()
            await peer.lost.wait()

    run(loop, main())


# ---- what is left behind ---------------------------------------------------------------------------------------

FAILING = [
    ("garbage", b"GET / HTTP/1.1\r\n\r\n", None),
    ("silent", b"", FIN),
    ("half a hello", client_hello()[:100], FIN),
    ("a hello", client_hello(PUBLIC), FIN),
    ("early data", client_hello(PUBLIC) + record(APPLICATION_DATA, bytes(1000)), None),
]


@ways
def test_memory_after_failed_handshakes(loop: headrace.EventLoop, how: str) -> None:
    """2,000 handshakes that fail in five ways leave nothing. (20,000 take 20 s and show no more.)"""
    rounds = 2000 // len(FAILING)

    async def main() -> None:
        reports(loop)
        async with serving(Bytes, **server_options(how)) as address:

            async def fail_all(rounds: int) -> None:
                for _ in range(rounds):
                    for _, say, end in FAILING:
                        peer = Plain(say, end=end)
                        await loop.create_connection(lambda peer=peer: peer, *address)
                        await peer.lost.wait()
                await asyncio.sleep(0)

            await fail_all(50)  # caches fill, once
            alive = len(layers())
            pool = loop.stats()["pool"]
            before = resident()
            await fail_all(rounds)
            assert len(layers()) <= alive
            after = loop.stats()["pool"]
            assert after["outstanding"] == pool["outstanding"] == 0
            # Blocks; it may have grown once, by what is posted.
            assert after["allocated"] <= pool["allocated"] + 16
            assert resident() - before <= 6 << 20  # those blocks, if they were touched, and a KiB each

    run(loop, main())


def test_failed_handshakes_on_a_faulty_network() -> None:
    """Over the simulated engine: whatever is reset, cut or delayed, no connection stays beyond its time limits."""
    outcomes: Counter[bool] = Counter()

    async def main() -> bool:
        loop: Any = asyncio.get_running_loop()
        protocols: list[Recorder] = []

        def factory() -> Recorder:
            protocols.append(Bytes(made=lambda it: it.transport.close()))
            return protocols[-1]

        server = await loop.create_server(factory, "tls", 443, security=server_tls())
        peers: list[Any] = [Plain(say, end=end) for _, say, end in FAILING]
        peers.append(TLSPeer(client_context(), server_hostname=NAME))
        for peer in peers:
            with contextlib.suppress(OSError):
                await loop.create_connection(lambda peer=peer: peer, "tls", 443)
        await asyncio.sleep(30)
        server.close()
        assert all(protocol.events in ([], ["made", "lost"]) for protocol in protocols)
        assert sum("made" in protocol.events for protocol in protocols) <= 1
        assert loop.stats()["pool"]["leased"] == 0
        for peer in peers:
            if getattr(peer, "transport", None) is not None:
                assert peer.lost.is_set()
        return any(protocol.events for protocol in protocols)

    for seed in range(60):
        outcomes[simulated_run(main(), seed)] += 1
    assert outcomes[True]
