"""PROXY headers on connections: who may send one, what the protocol hears of it, and what comes behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import headrace
import secured
from authorities import ca_file, issued
from headrace.framing.proxy import ALPN, CRC32C, SIGNATURE, encode
from headrace.security.proxy import HeaderReceiver
from streams import KINDS, Bytes, Leases, Recorder, reports
from toy_mechanism import Script, installed

CLIENT, SERVER = ("198.51.100.7", 40000), ("203.0.113.9", 443)
V1 = headrace.ProxyHeader(CLIENT, SERVER, version=1)
V2 = headrace.ProxyHeader(CLIENT, SERVER, tlvs=((ALPN, b"h2"), (CRC32C, bytes(4))))
HEADERS = {"v1": V1, "v2": V2}
LOOPBACK = ["127.0.0.0/8", "::1", "unix"]
BIG = bytes(range(256)) * 2000  # more than one receive
NAME = "server.example"

headers = pytest.mark.parametrize("header", HEADERS.values(), ids=list(HEADERS))
kinds = pytest.mark.parametrize("kind", KINDS)


def behind(trusted: Any = LOOPBACK, **options: Any) -> headrace.ProxyProtocol:
    return headrace.ProxyProtocol(trusted=trusted, **options)


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, 30))


def serving(protocol: Any, *security: Any, **options: Any) -> Any:
    stack = list(security) or [behind(**options)]
    return secured.serving(protocol, None, NAME, security=stack)


class Peer(asyncio.Protocol):
    """A client that says what it's told to, byte by byte or as it is."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lost = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set()

    async def one_by_one(self, data: bytes) -> None:
        for byte in data:
            self.transport.write(bytes([byte]))
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def connecting(address: Any) -> AsyncIterator[Peer]:
    loop = asyncio.get_running_loop()
    if isinstance(address, (str, bytes)):
        transport, peer = await loop.create_unix_connection(Peer, address)  # type: ignore[arg-type]
    else:
        transport, peer = await loop.create_connection(Peer, *address[:2])
    yield peer
    transport.abort()
    await peer.lost.wait()


def told(transport: Any) -> tuple[Any, ...]:
    return tuple(
        transport.get_extra_info(name)
        for name in ("peername", "sockname", "proxy_peername", "proxy_sockname")
    )


# ---- received ------------------------------------------------------------------------------------------------


@kinds
@headers
def test_a_connection_behind_a_header(
    loop: headrace.EventLoop, kind: str, header: headrace.ProxyHeader
) -> None:
    """Header and data in one segment, and byte by byte; the transport is the protocol's own afterwards."""

    async def main() -> None:
        async with serving(KINDS[kind]) as pair:
            for slowly in (False, True):
                async with connecting(pair.address) as peer:
                    near = peer.transport.get_extra_info("sockname")
                    if slowly:
                        await peer.one_by_one(encode(header) + b"hello")
                        peer.transport.write(BIG)
                    else:
                        peer.transport.write(encode(header) + b"hello" + BIG)
                    server = await pair.accepted.get()
                    assert told(server.transport) == (CLIENT, SERVER, near, pair.address)
                    assert server.transport.get_extra_info("proxy").source == CLIENT
                    assert server.transport.get_extra_info("proxy").alpn == header.alpn
                    await server.until(lambda server=server: len(server.data) == 5 + len(BIG))
                    assert server.data == b"hello" + BIG
                    assert isinstance(server.transport, headrace.StreamTransport)
                    assert server.transport.get_protocol() is server
                    server.transport.write(b"answer")
                    server.transport.close()
                    await peer.lost.wait()
                    assert peer.data == b"answer"
                await server.seen("lost")
                assert server.events[0] == "made"
                assert server.error is None

    run(loop, main())


@kinds
def test_paused_when_it_hears_of_the_connection(loop: headrace.EventLoop, kind: str) -> None:
    """What came behind the header waits, and so does the end of the stream behind that."""

    async def main() -> None:
        def pause(recorder: Recorder) -> None:
            recorder.transport.pause_reading()
            pair.accepted.put_nowait(recorder)

        async with serving(lambda: KINDS[kind](made=pause)) as pair, connecting(pair.address) as peer:
            peer.transport.write(encode(V2) + b"behind")
            peer.transport.write_eof()
            server = await pair.accepted.get()
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert server.events == ["made"]
            server.transport.resume_reading()
            await server.seen("lost")
            assert server.data == b"behind"
            assert server.events[-2:] == ["eof", "lost"]

    run(loop, main())


def test_a_protocol_that_takes_over_from_the_first_bytes(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        second = Leases()
        switch = {"received": lambda first: first.transport.set_protocol(second)}
        async with serving(lambda: Bytes(**switch)) as pair, connecting(pair.address) as peer:
            peer.transport.write(encode(V1) + b"first")
            server = await pair.accepted.get()
            await server.seen("received")
            peer.transport.write(b"second")
            await second.seen("received")
            assert (server.data, second.data) == (b"first", b"second")

    run(loop, main())


def test_a_header_alone_and_data_later(loop: headrace.EventLoop) -> None:
    """A server that speaks first does so as soon as the header is there."""

    async def main() -> None:
        greeting = {"made": lambda server: server.transport.write(b"220 hello\r\n")}
        async with serving(lambda: Bytes(**greeting)) as pair, connecting(pair.address) as peer:
            peer.transport.write(encode(V2)[:-1])
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not peer.data
            peer.transport.write(encode(V2)[-1:])
            while not peer.data:
                await asyncio.sleep(0.001)
            assert peer.data == b"220 hello\r\n"

    run(loop, main())


@pytest.mark.parametrize(
    "header", [headrace.ProxyHeader(is_local=True), headrace.ProxyHeader(), headrace.ProxyHeader(version=1)]
)
def test_headers_without_addresses(loop: headrace.EventLoop, header: headrace.ProxyHeader) -> None:
    async def main() -> None:
        async with serving(Bytes) as pair, connecting(pair.address) as peer:
            near = peer.transport.get_extra_info("sockname")
            peer.transport.write(encode(header))
            server = await pair.accepted.get()
            assert told(server.transport) == (near, pair.address, near, pair.address)
            assert server.transport.get_extra_info("proxy") == header
            assert server.transport.get_extra_info("proxy").is_local is header.is_local

    run(loop, main())


@pytest.mark.parametrize(
    "header",
    [
        headrace.ProxyHeader(("2001:db8::7", 1), ("2001:db8::9", 2)),
        headrace.ProxyHeader(("2001:db8::7", 1), ("2001:db8::9", 2), version=1),
        headrace.ProxyHeader("/run/client", b"\0abstract"),
    ],
)
def test_addresses_of_other_families(loop: headrace.EventLoop, header: headrace.ProxyHeader) -> None:
    async def main() -> None:
        async with serving(Bytes) as pair, connecting(pair.address) as peer:
            peer.transport.write(encode(header))
            server = await pair.accepted.get()
            assert told(server.transport)[:2] == (header.source, header.destination)

    run(loop, main())


def test_unix_sockets(loop: headrace.EventLoop, tmp_path: Path) -> None:
    """``"unix"`` trusts whoever can connect; networks don't."""
    path = os.fspath(tmp_path / "socket")

    async def main() -> None:
        accepted: asyncio.Queue[Recorder] = asyncio.Queue()
        for trusted in (["unix"], ["127.0.0.1", "0.0.0.0/0", "::/0"]):
            server = await loop.create_unix_server(
                lambda: Leases(made=accepted.put_nowait), path, security=behind(trusted)
            )
            async with server, connecting(path) as peer:
                peer.transport.write(encode(V2) + b"data")
                if trusted != ["unix"]:
                    await peer.lost.wait()
                    break
                recorder = await accepted.get()
                assert told(recorder.transport) == (CLIENT, SERVER, "", path)
                await recorder.seen("received")
            Path(path).unlink(missing_ok=True)  # asyncio does it itself since 3.13
        assert accepted.empty()

    run(loop, main())


def test_ipv6_and_mapped_addresses(loop: headrace.EventLoop) -> None:
    """An IPv4 peer of a socket for both is trusted by its IPv4 network."""

    async def main() -> None:
        with socket.socket(socket.AF_INET6) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::", 0))
            port = sock.getsockname()[1]
            accepted: asyncio.Queue[Recorder] = asyncio.Queue()
            server = await loop.create_server(
                lambda: Leases(made=accepted.put_nowait), sock=sock, security=behind(["127.0.0.0/8", "::1"])
            )
            async with server:
                for host in ("127.0.0.1", "::1"):
                    async with connecting((host, port)) as peer:
                        peer.transport.write(encode(V1))
                        recorder = await accepted.get()
                        real = recorder.transport.get_extra_info("proxy_peername")
                        assert real[0] == ("::1" if host == "::1" else "::ffff:127.0.0.1")

    run(loop, main())


# ---- refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "headrace.security")
    return caplog


@pytest.mark.parametrize("trusted", [[], ["10.0.0.0/8", "unix", "::/0"]])
def test_peers_that_are_not_trusted(loop: headrace.EventLoop, trusted: list[str], log: Any) -> None:
    """They are refused without a byte being read."""

    async def main() -> None:
        async with serving(Bytes, trusted=trusted) as pair:
            for say in (b"", encode(V1), encode(V2)):
                async with connecting(pair.address) as peer:
                    peer.transport.write(say)
                    await peer.lost.wait()
                    assert not peer.data
            assert pair.accepted.empty()

    run(loop, main())
    assert log.text.count("isn't trusted to send a PROXY header") == 3


@kinds
def test_not_trusted_and_not_required(loop: headrace.EventLoop, kind: str) -> None:
    """What looks like a header is the protocol's then, and says nothing about addresses."""

    async def main() -> None:
        options: Any = {"trusted": ["10.0.0.0/8"], "required": False}
        async with serving(KINDS[kind], **options) as pair, connecting(pair.address) as peer:
            server = await pair.accepted.get()  # before a byte has come
            near = peer.transport.get_extra_info("sockname")
            peer.transport.write(encode(V1) + b"data")
            await server.until(lambda: len(server.data) == len(encode(V1)) + 4)
            assert server.data == encode(V1) + b"data"
            assert told(server.transport) == (near, pair.address, None, None)
            assert server.transport.get_extra_info("proxy") is None

    run(loop, main())


def test_trusted_and_not_required(loop: headrace.EventLoop, log: Any) -> None:
    """Nothing is guessed: a proxy that is trusted sends a header."""

    async def main() -> None:
        async with serving(Bytes, required=False) as pair, connecting(pair.address) as peer:
            peer.transport.write(b"GET / HTTP/1.1\r\n\r\n")
            await peer.lost.wait()
            assert pair.accepted.empty()

    run(loop, main())
    assert "not a PROXY header" in log.text


@pytest.mark.parametrize(
    "data",
    [
        b"G",
        b"\x16\x03\x01",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1 99999\r\n",
        b"PROXY UNKNOWN " + b"x" * 100,
        SIGNATURE + b"\x21\x11\xff\xff",
        SIGNATURE + b"\x21\x11\x00\x0d" + bytes(13),
        b"\0" * 300_000,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_hostile_bytes(loop: headrace.EventLoop, data: bytes, log: Any) -> None:
    """The connection ends, and nobody hears of it but the log."""

    async def main() -> None:
        found = reports(loop)
        async with serving(Leases) as pair, connecting(pair.address) as peer:
            peer.transport.write(data)
            await peer.lost.wait()
            assert pair.accepted.empty()
        assert not found

    run(loop, main())
    assert log.text.count("\n") == 1


def test_only_the_version_that_is_asked_for(loop: headrace.EventLoop, log: Any) -> None:
    async def main() -> None:
        for version, good, bad in ((1, V1, V2), (2, V2, V1)):
            async with serving(Bytes, version=version) as pair:
                async with connecting(pair.address) as peer:
                    peer.transport.write(encode(bad)[:1])
                    await peer.lost.wait()
                async with connecting(pair.address) as peer:
                    peer.transport.write(encode(good))
                    assert (await pair.accepted.get()).transport.get_extra_info("proxy").version == version

    run(loop, main())
    assert log.text.count("is allowed") == 2


@headers
def test_the_end_within_a_header(loop: headrace.EventLoop, header: headrace.ProxyHeader, log: Any) -> None:
    """At every byte; an end before the first one is what health checks do, and no news."""
    whole = encode(header)

    async def main() -> None:
        async with serving(Bytes) as pair:
            for size in range(len(whole)):
                async with connecting(pair.address) as peer:
                    peer.transport.write(whole[:size])
                    peer.transport.write_eof()
                    await peer.lost.wait()
            assert pair.accepted.empty()

    run(loop, main())
    assert log.text.count("ended within its PROXY header") == len(whole) - 1 == log.text.count("\n")


@pytest.mark.parametrize("data", [b"", b"PROXY TCP4", SIGNATURE])
def test_a_header_has_its_time(loop: headrace.EventLoop, data: bytes, log: Any) -> None:
    async def main() -> None:
        security = behind(timeout=0.05)
        async with serving(Bytes, security) as pair, connecting(pair.address) as peer:
            peer.transport.write(data)
            await peer.lost.wait()
            assert pair.accepted.empty()
        assert not security._pending

    run(loop, main())
    assert f"in 0.05 s no PROXY header came but {len(data)} bytes of one" in log.text


def test_the_time_is_the_headers_alone(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with serving(Bytes, timeout=0.05) as pair, connecting(pair.address) as peer:
            peer.transport.write(encode(V1))
            server = await pair.accepted.get()
            await asyncio.sleep(0.1)
            assert server.events == ["made"]

    run(loop, main())


def test_the_oldest_without_a_header_gives_way(loop: headrace.EventLoop, log: Any) -> None:
    async def main() -> None:
        security = behind(max_pending_handshakes=2)
        async with serving(Bytes, security) as pair, contextlib.AsyncExitStack() as peers:
            waiting = [await peers.enter_async_context(connecting(pair.address)) for _ in range(2)]
            while len(security._pending) < 2:
                await asyncio.sleep(0.001)
            await peers.enter_async_context(connecting(pair.address))
            await waiting[0].lost.wait()
            waiting[1].transport.write(encode(V1))
            await pair.accepted.get()
            assert len(security._pending) == 1
        assert not security._pending

    run(loop, main())
    assert log.text.count("the oldest gives way") == 1


def test_a_protocol_that_fails_when_it_hears_of_the_connection(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        found = reports(loop)
        async with serving(lambda: Bytes(made=lambda _: 1 / 0)) as pair, connecting(pair.address) as peer:
            peer.transport.write(encode(V1) + b"data")
            await peer.lost.wait()
        assert [type(report["exception"]) for report in found] == [ZeroDivisionError]

    run(loop, main())


def test_a_server_that_closes_with_connections_before_their_header(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        security = behind()
        async with serving(Bytes, security) as pair, connecting(pair.address) as peer:
            while not security._pending:
                await asyncio.sleep(0.001)
            receiver: Any = next(iter(security._pending))
            assert isinstance(receiver, HeaderReceiver)
            assert repr(receiver).startswith("<headrace.HeaderReceiver from ('127.0.0.1', ")
            receiver._transport.abort()
            await peer.lost.wait()
        assert not security._pending

    run(loop, main())


# ---- under TLS, Kerberos and NTLM ------------------------------------------------------------------------------


@kinds
@headers
def test_before_tls(loop: headrace.EventLoop, kind: str, header: headrace.ProxyHeader) -> None:
    """The header comes first on the wire, in the clear; the layers' questions go down to it."""
    files = issued(NAME)
    tls = headrace.TLS(certificate=files.chain, private_key=files.key)

    async def main() -> None:
        async with serving(KINDS[kind], behind(), tls) as pair:
            client = KINDS[kind]()
            security = [headrace.ProxyProtocol(header=header), headrace.TLS(ca=ca_file())]
            transport = await pair.connect(client, security)
            server = await pair.accepted.get()
            assert told(server.transport)[:2] == (CLIENT, SERVER)
            assert server.transport.get_extra_info("proxy").source == CLIENT
            assert server.transport.get_extra_info("security").protocol == "TLSv1.3"
            transport.write(BIG)
            await server.until(lambda: len(server.data) == len(BIG))
            assert server.data == BIG
            transport.close()
            await server.seen("lost")
            await client.seen("lost")

    run(loop, main())


def test_before_tls_and_negotiate(loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    script = installed(monkeypatch, Script())
    files = issued(NAME)
    tls = headrace.TLS(certificate=files.chain, private_key=files.key)
    negotiate = headrace.Negotiate(accept=headrace.AccessList(["realm:TOY"]), channel_binding="never")

    async def main() -> None:
        async with serving(Leases, behind(), tls, negotiate) as pair:
            security = [
                headrace.ProxyProtocol(header=V2),
                headrace.TLS(ca=ca_file()),
                headrace.Negotiate(target="host/toy", channel_binding="never"),
            ]
            client = Leases()
            transport = await pair.connect(client, security)
            server = await pair.accepted.get()
            assert server.transport.get_extra_info("security").remote_identity.name == script.user
            assert told(server.transport)[:2] == (CLIENT, SERVER)
            transport.write(BIG)
            await server.until(lambda: len(server.data) == len(BIG))
            transport.close()
            await server.seen("lost")
            await client.seen("lost")

    run(loop, main())


@pytest.mark.parametrize("slowly", [False, True])
def test_before_negotiate_alone(
    loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch, slowly: bool
) -> None:
    installed(monkeypatch, Script())
    negotiate = headrace.Negotiate(accept=headrace.AccessList(["realm:TOY"]))

    async def main() -> None:
        async with serving(Bytes, behind(), negotiate) as pair:
            client = Bytes()
            security = [headrace.ProxyProtocol(header=V1), headrace.Negotiate(target="host/toy")]
            transport = await pair.connect(client, security)
            server = await pair.accepted.get()
            transport.write(b"data")
            await server.seen("received")
            assert told(server.transport)[0] == CLIENT
            transport.close()
            await client.seen("lost")

    run(loop, main())


def test_a_client_whose_header_is_refused(loop: headrace.EventLoop) -> None:
    files = issued(NAME)
    tls = headrace.TLS(certificate=files.chain, private_key=files.key)

    async def main() -> None:
        async with serving(Bytes, behind(["10.0.0.0/8"]), tls) as pair:
            with pytest.raises(ConnectionError):
                await pair.connect(Bytes(), [headrace.ProxyProtocol(header=V1), headrace.TLS(ca=ca_file())])

    run(loop, main())


# ---- sent ----------------------------------------------------------------------------------------------------


@kinds
@headers
def test_a_client_sends_a_header(loop: headrace.EventLoop, kind: str, header: headrace.ProxyHeader) -> None:
    """And then what it writes when it hears of the connection; the transport is its own."""

    async def main() -> None:
        async with secured.serving(Bytes, None, NAME) as pair:
            client = KINDS[kind](made=lambda client: client.transport.write(b"first"))
            transport, protocol = await loop.create_connection(
                lambda: client, *pair.address, security=headrace.ProxyProtocol(header=header)
            )
            assert protocol is client
            assert transport is client.transport
            assert isinstance(transport, headrace.StreamTransport)
            assert transport.get_protocol() is client
            server = await pair.accepted.get()
            await server.until(lambda: server.data.endswith(b"first"))
            assert server.data == encode(header) + b"first"
            server.transport.write(b"answer")
            await client.until(lambda: client.data == b"answer")
            transport.close()
            await client.seen("lost")

    run(loop, main())


def test_a_client_over_a_unix_socket(loop: headrace.EventLoop, tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "socket")

    async def main() -> None:
        accepted: asyncio.Queue[Recorder] = asyncio.Queue()
        server = await loop.create_unix_server(
            lambda: Leases(made=accepted.put_nowait), path, security=behind(["unix"])
        )
        async with server:
            sent = headrace.ProxyProtocol(source="/run/client", destination=path)
            transport, _ = await loop.create_unix_connection(Leases, path, security=sent)
            recorder = await accepted.get()
            assert told(recorder.transport) == ("/run/client", path, "", path)
            transport.abort()

    run(loop, main())


def test_a_chain_of_proxies(loop: headrace.EventLoop) -> None:
    """A proxy that sends on the addresses of the header that it got, or its client's real ones."""

    async def main() -> None:
        async with (
            serving(Bytes) as last,
            secured.serving(Bytes, None, NAME) as plain,
            serving(Bytes) as first,
        ):
            for header, server in ((V1, first), (V2, first), (None, plain)):
                async with connecting(server.address) as peer:
                    peer.transport.write(b"" if header is None else encode(header))
                    middle = await server.accepted.get()
                    forwarded = headrace.ProxyHeader.forwarding(middle.transport, tlvs=((ALPN, b"h2"),))
                    transport = await last.connect(Bytes(), headrace.ProxyProtocol(header=forwarded))
                    recorder = await last.accepted.get()
                    real = (peer.transport.get_extra_info("sockname"), server.address)
                    assert told(recorder.transport)[:2] == (real if header is None else (CLIENT, SERVER))
                    assert recorder.transport.get_extra_info("proxy").alpn == b"h2"
                    transport.abort()

    run(loop, main())


def test_streams(loop: headrace.EventLoop) -> None:
    """``headrace.start_server`` and ``open_connection``."""

    async def serve(reader: headrace.Reader, writer: headrace.Writer) -> None:
        peername = writer.get_extra_info("peername")
        line = await reader.readline()
        writer.write(line + repr(peername).encode())

    async def main() -> None:
        server = await headrace.start_server(serve, "127.0.0.1", 0, security=behind())
        async with server:
            for version in (1, 2):
                reader, writer = await headrace.open_connection(
                    *server.sockets[0].getsockname(),
                    security=headrace.ProxyProtocol(source=CLIENT, destination=SERVER, version=version),
                )
                async with writer:
                    writer.write(b"hello\n")
                    assert await reader.read() == b"hello\n" + repr(CLIENT).encode()

    run(loop, main())


# ---- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"trusted": "10.0.0.0/8"}, TypeError, "a list of networks"),
        ({"trusted": ["10.0.0.1/8"]}, ValueError, "host bits"),
        ({"trusted": ["localhost"]}, ValueError, "localhost"),
        ({"version": 3}, ValueError, "version must be"),
        ({"timeout": 0}, ValueError, "timeout must be"),
        ({"max_pending_handshakes": 0}, ValueError, "at least 1"),
        ({"header": V1, "version": 2}, ValueError, "version 2 is asked for"),
        ({"header": V1, "source": CLIENT, "destination": SERVER}, ValueError, "either"),
        ({"source": CLIENT}, ValueError, "or neither"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        headrace.ProxyProtocol(**options)


def test_who_is_trusted() -> None:
    security = behind(["10.0.0.0/8", "2001:db8::/32", "192.0.2.1"])
    for address in ("10.1.2.3", "2001:db8::1", "192.0.2.1", "::ffff:10.1.2.3", "2001:db8::1%eth0"):
        assert security.trusts((address, 1))
    for peername in (
        ("11.1.2.3", 1),
        ("2001:db9::1", 1),
        ("192.0.2.2", 1),
        ("::ffff:11.1.2.3", 1),
        "",
        "/a",
        None,
    ):
        assert not security.trusts(peername)
    assert behind(["unix"]).trusts("")
    assert behind(["unix"]).trusts(b"\0name")
    assert not behind(["unix"]).trusts(None)
    assert behind(["::ffff:10.0.0.0/104"]).trusts(("::ffff:10.1.2.3", 1))


def test_what_is_missing(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        nothing = headrace.ProxyProtocol()
        with pytest.raises(ValueError, match="trusted= is needed"):
            await loop.create_server(Bytes, "127.0.0.1", 0, security=nothing)
        with pytest.raises(ValueError, match="header="):
            await loop.create_connection(Bytes, "127.0.0.1", 1, security=nothing)
        tls = headrace.TLS(ca=ca_file())
        for stack in ([tls, behind()], [behind(), behind()]):
            with pytest.raises(ValueError, match="comes before everything else"):
                await loop.create_server(Bytes, "127.0.0.1", 0, security=stack)
        with pytest.raises(ValueError, match="ssl"):
            await loop.create_connection(Bytes, "127.0.0.1", 1, security=behind(), ssl=True)

    run(loop, main())


def test_not_in_the_middle_of_a_connection(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with secured.serving(Bytes, None, NAME) as pair:
            transport, protocol = await loop.create_connection(Bytes, *pair.address)
            with pytest.raises(TypeError):
                await loop.start_security(transport, protocol, behind())  # type: ignore[arg-type]
            transport.abort()
            await protocol.seen("lost")

    run(loop, main())
