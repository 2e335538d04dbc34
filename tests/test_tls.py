"""TLS as users have it: ``security=headrace.TLS(...)`` and ``ssl=``, on every kind of protocol."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import ssl
from collections.abc import Callable
from typing import Any

import pytest

import headrace
import secured
from authorities import ca_file, issued
from headrace.errors import AccessDenied, CertificateError, HandshakeError, StalledError, TruncatedError
from headrace.security.layer import SLICE, SecurityLayer
from streams import KINDS, Bytes, Leases, Recorder, connected, in_thread, reports

BIG = random.Random(1).randbytes(3_000_000)
NAME = "server.example"


def server_tls(**options: Any) -> headrace.TLS:
    files = issued(NAME)
    return headrace.TLS(certificate=files.chain, private_key=files.key, **options)


def client_tls(**options: Any) -> headrace.TLS:
    return headrace.TLS(ca=ca_file(), **options)


def with_certificate(name: str = "client.example", **options: Any) -> headrace.TLS:
    files = issued(name)
    return client_tls(certificate=files.chain, private_key=files.key, **options)


def serving(protocol: Callable[[], Recorder], security: headrace.TLS | None = None, **options: Any) -> Any:
    if not options:
        options = {"security": security or server_tls()}
    return secured.serving(protocol, client_tls(), NAME, **options)


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, 30))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("kind", KINDS)
def test_all_bytes_both_ways(loop: headrace.EventLoop, kind: str, version: ssl.TLSVersion) -> None:
    """Pieces of any size, on every kind of protocol; the hash is the same, and both ends close in order."""
    pieces = [BIG[start : start + size] for start, size in cuts(len(BIG))]

    async def main() -> None:
        async with serving(KINDS[kind]) as pair:
            client = KINDS[kind]()
            context = ssl.create_default_context(cafile=ca_file())
            context.maximum_version = version
            transport = await pair.connect(client, headrace.TLS(context=context))
            server = await pair.accepted.get()
            for piece in pieces:
                transport.write(piece)
            server.transport.writelines(pieces)
            await server.until(lambda: len(server.data) == len(BIG))
            await client.until(lambda: len(client.data) == len(BIG))
            assert hashlib.sha256(client.data).digest() == hashlib.sha256(BIG).digest()
            assert server.data == client.data
            assert transport.get_extra_info("security").protocol == version.name.replace("_", ".")
            transport.close()
            await client.seen("lost")
            await server.seen("lost")
            assert client.error is None
            assert server.error is None
            assert server.events[-2:] == ["eof", "lost"]

    run(loop, main())


def cuts(size: int) -> list[tuple[int, int]]:
    """Pieces from one byte to several records."""
    rng = random.Random(2)
    found, start = [], 0
    while start < size:
        piece = rng.choice([1, 2, 100, 5000, 16384, 16385, 70_000, SLICE + 1, 500_000])
        found.append((start, piece))
        start += piece
    return found


def test_what_the_application_is_told(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        security = server_tls(ca=ca_file(), client_certificate="required", alpn=["h2", "http/1.1"])
        async with serving(Bytes, security) as pair:
            transport = await pair.connect(Bytes(), with_certificate(alpn=["http/1.1"]))
            server = await pair.accepted.get()
            near, far = (each.get_extra_info("security") for each in (transport, server.transport))
            for info in (near, far):
                assert (info.protocol, info.mechanism) == ("TLSv1.3", "TLS_AES_256_GCM_SHA384")
                assert (info.protection, info.is_encrypted, info.is_signed) == ("encrypt", True, True)
                assert info.alpn_protocol == "http/1.1"
                assert info.is_mutually_authenticated
                assert info.impersonation_level is None
                assert not info.resumed
                assert info.expires_at.tzinfo is not None
            assert (near.is_server, far.is_server) == (False, True)
            assert near.remote_identity.name == NAME
            assert "dns:client.example" in far.remote_identity.names
            assert far.remote_identity.certificate not in (None, near.remote_identity.certificate)
            assert near.channel_binding == far.channel_binding
            assert len(near.channel_binding) == 32
            assert transport.get_extra_info("cipher")[0] == near.mechanism
            assert dict(transport.get_extra_info("peercert")["subject"][0])
            assert transport.get_extra_info("peername") == pair.address
            assert transport.get_extra_info("compression") is None
            assert transport.get_extra_info("nothing", 5) == 5
            assert isinstance(transport, asyncio.Transport)
            transport.abort()
            server.transport.abort()

    run(loop, main())


def test_many_small_writes_of_a_turn_share_a_record(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with serving(Bytes) as pair:
            transport = await pair.connect(Bytes())
            server = await pair.accepted.get()
            for _ in range(1000):
                transport.write(b"0123456789")
            await server.until(lambda: len(server.data) == 10_000)
            assert server.events.count("received") == 1
            transport.abort()
            await server.seen("lost")

    run(loop, main())


def test_reading_is_paused_within_what_was_decrypted(loop: headrace.EventLoop) -> None:
    """After pause_reading nothing comes, though the bytes are here; after resume_reading all of it, and the end."""

    async def main() -> None:
        async with serving(lambda: Leases(received=lambda it: it.transport.pause_reading())) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            transport.write(BIG)
            transport.write_eof()
            got = 0
            while len(server.data) < len(BIG):
                await server.seen("received", server.events.count("received") + (0 if got else 1))
                assert not server.transport.is_reading()
                got = len(server.data)
                for _ in range(3):
                    await asyncio.sleep(0)
                assert len(server.data) == got
                assert "eof" not in server.events
                before = server.events.count("received")
                server.transport.resume_reading()
                if got < len(BIG):
                    await server.seen("received", before + 1)
            server.transport.resume_reading()
            await server.seen("eof")
            assert server.data == BIG
            await client.seen("lost")
            assert client.error is None

    run(loop, main())


def test_one_ledger_for_all_that_is_not_sent(loop: headrace.EventLoop) -> None:
    """Plaintext that waits counts with the records below; a writer that minds pause_writing is bounded."""

    async def main() -> None:
        async with serving(Bytes) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            server.transport.pause_reading()
            written = 0
            while "pause" not in client.events:
                transport.write(bytes(50_000))
                written += 50_000
                await asyncio.sleep(0)
            assert 0 < transport.get_write_buffer_size() < 400_000
            transport.write(bytes(1_000_000))  # all the same
            assert transport.get_write_buffer_size() >= 1_000_000
            assert transport.get_write_buffer_limits() == (16384, 65536)
            server.transport.resume_reading()
            await client.seen("resume")
            await server.until(lambda: len(server.data) == written + 1_000_000)
            assert transport.get_write_buffer_size() == 0
            transport.abort()
            await server.seen("lost")

    run(loop, main())


def test_half_closed(loop: headrace.EventLoop) -> None:
    """Each direction ends by itself: the answer comes after the question's end."""

    def answer(it: Recorder) -> bool:
        it.transport.write(bytes(it.data)[::-1])
        it.transport.write_eof()
        return True

    async def main() -> None:
        async with serving(lambda: Bytes(eof=answer), security=server_tls(shutdown_timeout=3600)) as pair:
            client = Bytes()
            # Nobody waits for a close_notify that has come.
            transport = await pair.connect(client, client_tls(shutdown_timeout=3600))
            assert transport.can_write_eof()
            transport.write(BIG)
            transport.write_eof()
            with pytest.raises(RuntimeError, match="after write_eof"):
                transport.write(b"more")
            await client.seen("lost")
            assert client.data == BIG[::-1]
            assert client.error is None

    run(loop, main())


def test_asyncio_has_no_half_closed_tls(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        files = issued(NAME)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.chain, files.key)
        async with serving(Bytes, ssl=context) as pair:
            transport, _ = await loop.create_connection(
                Bytes, *pair.address, ssl=ssl.create_default_context(cafile=ca_file()), server_hostname=NAME
            )
            assert not transport.can_write_eof()
            with pytest.raises(NotImplementedError):
                transport.write_eof()
            (await pair.accepted.get()).transport.abort()
            transport.abort()

    run(loop, main())


@pytest.mark.parametrize("how", ["close", "abort"])
def test_the_end_from_within_a_callback(loop: headrace.EventLoop, how: str) -> None:
    """What was written before goes out with close, and not with abort; connection_lost comes once, and last."""

    def leave(it: Recorder) -> None:
        it.transport.write(b"last words")
        getattr(it.transport, how)()
        it.transport.write(b"too late")

    async def main() -> None:
        async with serving(lambda: Bytes(received=leave)) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            transport.write(b"question")
            await client.seen("lost")
            await server.seen("lost")
            assert server.events.count("lost") == 1
            if how == "close":
                assert client.data == b"last words"
                assert client.error is None
            else:
                assert isinstance(client.error, (TruncatedError, ConnectionResetError))

    run(loop, main())


def test_an_error_in_a_callback_ends_that_connection(loop: headrace.EventLoop) -> None:
    def fail(it: Recorder) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        found = reports(loop)
        async with serving(lambda: Bytes(received=fail)) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            transport.write(b"x")
            await server.seen("lost")
            assert isinstance(server.error, ZeroDivisionError)
            await client.seen("lost")
        assert [type(context["exception"]) for context in found] == [ZeroDivisionError]
        assert found[0]["protocol"] is server

    run(loop, main())


@pytest.mark.parametrize("truncation", ["error", "eof"])
def test_an_end_without_close_notify(loop: headrace.EventLoop, truncation: Any) -> None:
    """An error after everything that came, unless it was said to be none."""

    async def main() -> None:
        async with serving(Bytes, server_tls(truncation=truncation)) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            transport.write(BIG)
            await asyncio.sleep(0)
            while transport.get_write_buffer_size():
                await asyncio.sleep(0)
            transport._lower.close()  # a FIN, and nothing before it
            await server.seen("lost")
            assert server.data == BIG
            if truncation == "error":
                assert isinstance(server.error, TruncatedError)
                assert "eof" not in server.events
            else:
                assert server.error is None
                assert server.events[-2:] == ["eof", "lost"]

    run(loop, main())


def test_access_lists(loop: headrace.EventLoop) -> None:
    """No callback for who isn't let in; the other side sees its connection end."""

    async def main() -> None:
        access = headrace.AccessList(["dns:alice.example", "dns:both.example"], deny=["dns:mallory.example"])
        security = server_tls(ca=ca_file(), client_certificate="required", accept=access)
        made: list[Recorder] = []

        def factory() -> Recorder:
            made.append(Bytes())
            return made[-1]

        async with serving(factory, security) as pair:
            transport = await pair.connect(Bytes(), with_certificate("alice.example"))
            (await pair.accepted.get()).transport.abort()
            transport.abort()
            for names in (("eve.example",), ("both.example", "mallory.example")):
                client = Bytes()
                files = issued(*names)
                await pair.connect(client, client_tls(certificate=files.chain, private_key=files.key))
                await client.seen(
                    "lost"
                )  # TLS 1.3: a client's handshake is done before the server has looked at it
                assert isinstance(client.error, (TruncatedError, ConnectionResetError))
            assert pair.accepted.empty()
            assert [recorder.events for recorder in made[1:]] == [[], []]

    run(loop, main())


def test_an_access_list_keeps_a_server_out_as_well(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with serving(Bytes) as pair:
            with pytest.raises(AccessDenied, match=r"'server\.example' is kept out: none of its names"):
                await pair.connect(Bytes(), client_tls(accept=headrace.AccessList(["dns:other.example"])))

    run(loop, main())


def test_certificates_by_name(loop: headrace.EventLoop) -> None:
    """Each name has its own certificate and its own rule about clients; the name is read before anything else."""

    async def main() -> None:
        def one(name: str, **options: Any) -> headrace.Certificate:
            files = issued(name)
            return headrace.Certificate(files.chain, files.key, **options)

        security = headrace.TLS(
            certificates={
                "open.example": one("open.example"),
                "closed.example": one("closed.example", client_ca=ca_file(), client_certificate="required"),
                "*.wild.example": one("*.wild.example"),
            }
        )
        async with serving(Bytes, security) as pair:

            async def name_seen(name: str, client: headrace.TLS) -> str:
                transport, _ = await loop.create_connection(
                    Bytes, *pair.address, security=client, server_hostname=name
                )
                server = await pair.accepted.get()
                identity = transport.get_extra_info("security").remote_identity
                assert (
                    transport.get_extra_info("security").channel_binding
                    == server.transport.get_extra_info("security").channel_binding
                )
                transport.abort()
                server.transport.abort()
                return str(identity.name)

            assert await name_seen("open.example", client_tls()) == "open.example"
            assert await name_seen("a.wild.example", client_tls()) == "*.wild.example"
            assert await name_seen("closed.example", with_certificate()) == "closed.example"
            refused = Bytes()
            await loop.create_connection(
                lambda: refused, *pair.address, security=client_tls(), server_hostname="closed.example"
            )
            await refused.seen("lost")
            assert refused.error is not None
            with pytest.raises((OSError, ssl.SSLError)):
                await name_seen("unknown.example", client_tls())
            assert pair.accepted.empty()

    run(loop, main())


def test_sessions_are_resumed(loop: headrace.EventLoop) -> None:
    """A client resumes, once for each ticket; a server that asks for certificates has none to give."""

    async def main() -> None:
        async def resumed(pair: secured.Pair, security: headrace.TLS) -> bool:
            client = Bytes()
            transport = await pair.connect(client, security)
            server = await pair.accepted.get()
            server.transport.write(b"hello")  # behind the tickets
            await client.seen("received")
            info = transport.get_extra_info("security")
            assert info.remote_identity.name == NAME
            transport.close()
            await client.seen("lost")
            return bool(info.resumed)

        async with serving(Bytes) as pair:
            client = client_tls()
            assert [await resumed(pair, client) for _ in range(3)] == [False, True, True]
            assert not await resumed(pair, client_tls(resumption=False))
        async with serving(Bytes, server_tls(ca=ca_file(), client_certificate="required")) as pair:
            client = with_certificate()
            assert [await resumed(pair, client) for _ in range(2)] == [False, False]

    run(loop, main())


def test_reload(loop: headrace.EventLoop, tmp_path: Any) -> None:
    """New files serve new connections; files that can't be used change nothing."""
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"

    def install(name: str) -> None:
        files = issued(name, NAME)
        chain.write_bytes(files.chain.read_bytes())
        key.write_bytes(files.key.read_bytes())

    async def main() -> None:
        install("one.example")
        security = headrace.TLS(certificate=chain, private_key=key)
        async with serving(Bytes, security) as pair:

            async def name_seen() -> tuple[str, ...]:
                transport = await pair.connect(Bytes())
                (await pair.accepted.get()).transport.abort()
                names: tuple[str, ...] = transport.get_extra_info("security").remote_identity.names
                transport.abort()
                return names

            assert "dns:one.example" in await name_seen()
            install("two.example")
            assert "dns:one.example" in await name_seen()
            security.reload()
            assert "dns:two.example" in await name_seen()
            key.write_bytes(issued("three.example").key.read_bytes())
            with pytest.raises(
                CertificateError, match=r"chain\.pem and its key can't be used: .*doesn't match"
            ):
                security.reload()
            assert "dns:two.example" in await name_seen()

    run(loop, main())


def test_the_oldest_handshake_gives_way(loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        security = server_tls(max_pending_handshakes=3)
        async with serving(Bytes, security) as pair:
            silent = [await asyncio.open_connection(*pair.address) for _ in range(5)]
            assert await asyncio.wait_for(silent[0][0].read(), 10) == b""
            assert await asyncio.wait_for(silent[1][0].read(), 10) == b""
            transport = await pair.connect(Bytes())  # one more has gone for it
            assert await asyncio.wait_for(silent[2][0].read(), 10) == b""
            accepted = await pair.accepted.get()  # a client's handshake is done before its server's
            transport.abort()
            accepted.transport.abort()
            assert len(security._pending) == 2
            for _, writer in silent:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    with caplog.at_level("INFO", "headrace.security"):
        run(loop, main())
    assert sum("the oldest gives way" in message for message in caplog.messages) == 3


def test_a_handshake_has_its_time_in_total(loop: headrace.EventLoop) -> None:
    """A peer that sends a byte now and then gets no more of it."""

    async def main() -> None:
        protocol = Bytes()
        async with serving(lambda: protocol, server_tls(handshake_timeout=0.3)) as pair:
            reader, writer = await asyncio.open_connection(*pair.address)
            sending = asyncio.create_task(slowly(writer))
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            sending.cancel()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            assert protocol.events == []

    run(loop, main())


async def slowly(writer: asyncio.StreamWriter) -> None:
    for byte in b"\x16\x03\x01\x02\x00" + bytes(500):
        writer.write(bytes([byte]))
        await asyncio.sleep(0.02)


def test_a_client_s_handshake_has_its_time(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with await loop.create_server(asyncio.Protocol, "127.0.0.1", 0) as server:
            with pytest.raises(HandshakeError, match=r"took longer than 0\.1 s"):
                await loop.create_connection(
                    Bytes,
                    *server.sockets[0].getsockname(),
                    security=client_tls(handshake_timeout=0.1),
                    server_hostname=NAME,
                )
            server.close_clients() if hasattr(server, "close_clients") else None

    run(loop, main())


def test_close_waits_for_the_peer_s_end_but_not_for_ever(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with serving(Bytes, server_tls(shutdown_timeout=0.2)) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            transport.pause_reading()  # it won't see the server's close_notify
            server = await pair.accepted.get()
            server.transport.close()
            await server.seen("lost")
            assert server.error is None
            transport.abort()

    run(loop, main())


def test_close_gives_up_on_a_peer_that_takes_nothing(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with serving(Bytes, server_tls(shutdown_timeout=0.2)) as pair:
            transport = await pair.connect(Bytes())
            transport.pause_reading()
            server = await pair.accepted.get()
            server.transport.write(bytes(20_000_000))
            server.transport.close()
            await server.seen("lost")
            assert isinstance(server.error, StalledError)
            transport.abort()

    run(loop, main())


def test_what_does_not_go_together_is_refused(loop: headrace.EventLoop) -> None:
    files = issued(NAME)
    context = ssl.create_default_context()
    for options, message in [
        ({"context": context, "ca": "x"}, "a context is used as it is: ca"),
        ({"context": context, "alpn": ["h2"]}, "alpn or client_certificate can't be added"),
        ({"certificate": "x", "certificates": {}}, "either certificate, or certificates"),
        ({"truncation": "never"}, "truncation must be"),
        ({"handshake_timeout": 0}, "handshake_timeout must be a positive"),
        ({"max_pending_handshakes": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            headrace.TLS(**options)  # type: ignore[arg-type]

    async def main() -> None:
        for security, error, message in [
            (headrace.TLS(), ValueError, "a TLS server needs certificate="),
            (headrace.TLS(certificate="/nowhere.pem"), CertificateError, "/nowhere.pem can't be read"),
            (
                server_tls(accept=headrace.AccessList(["dns:a"])),
                ValueError,
                "an access list needs clients with",
            ),
            (
                headrace.TLS(certificate=files.chain, private_key=issued("x.example").key),
                CertificateError,
                "match",
            ),
            (server_tls(client_certificate="required"), CertificateError, "whom to trust"),
        ]:
            with pytest.raises(error, match=message):
                await loop.create_server(Bytes, "127.0.0.1", 0, security=security)
        with pytest.raises(ValueError, match="doesn't go together with ssl"):
            await loop.create_server(Bytes, "127.0.0.1", 0, security=server_tls(), ssl=context)
        with pytest.raises(ValueError, match="server_hostname= is needed"):
            await loop.create_unix_connection(Bytes, "/nowhere", security=client_tls())

    run(loop, main())


def test_a_context_that_was_given_is_not_changed(loop: headrace.EventLoop) -> None:
    def state(context: ssl.SSLContext) -> Any:
        return (
            context.options,
            context.verify_flags,
            context.verify_mode,
            context.minimum_version,
            context.num_tickets,
            context.sni_callback,
            context.keylog_filename,
            context.check_hostname,
        )

    async def main() -> None:
        files = issued(NAME)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(files.chain, files.key)
        client = ssl.create_default_context(cafile=ca_file())
        before = state(server), state(client)
        async with serving(Bytes, headrace.TLS(context=server, certificate=files.chain)) as pair:
            transport = await pair.connect(Bytes(), headrace.TLS(context=client))
            accepted = await pair.accepted.get()
            assert accepted.transport.get_extra_info("security").channel_binding is not None
            transport.abort()
            accepted.transport.abort()
        assert (state(server), state(client)) == before

    run(loop, main())


def test_streams_over_tls(loop: headrace.EventLoop) -> None:
    """asyncio's own streams take ``security=`` as well."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100_000):
            writer.write(data)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0, security=server_tls())  # type: ignore[call-overload]
        async with server:
            reader, writer = await asyncio.open_connection(
                *server.sockets[0].getsockname(), security=client_tls(), server_hostname=NAME
            )
            sending = asyncio.create_task(send(writer))
            assert await reader.readexactly(len(BIG)) == BIG
            await sending
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()

    async def send(writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(BIG), 70_000):
            writer.write(BIG[start : start + 70_000])
            await writer.drain()

    run(loop, main())


def test_unix_sockets(loop: headrace.EventLoop, tmp_path: Any) -> None:
    async def main() -> None:
        path = str(tmp_path / "socket")
        server = await loop.create_unix_server(lambda: Leases(received=echo), path, security=server_tls())
        async with server:
            client = Leases()
            transport, _ = await loop.create_unix_connection(
                lambda: client, path, security=client_tls(), server_hostname=NAME
            )
            transport.write(b"hello")
            await client.until(lambda: client.data == b"hello")
            transport.close()
            await client.seen("lost")

    def echo(it: Recorder) -> None:
        it.transport.write(bytes(it.data))

    run(loop, main())


def test_start_tls_takes_our_own_settings(loop: headrace.EventLoop) -> None:
    """And serves a ``headrace.Protocol`` whose connection began without TLS."""

    async def main() -> None:
        near, far = Leases(), Leases()
        transport, peer = await connected(near)
        other, _ = await loop.connect_accepted_socket(lambda: far, peer)
        server, client = await asyncio.gather(
            loop.start_tls(transport, near, server_tls(), server_side=True),
            loop.start_tls(other, far, client_tls(), server_hostname=NAME),
        )
        assert isinstance(server, SecurityLayer)
        client.write(b"through TLS")
        await near.until(lambda: near.data == b"through TLS")
        client.close()
        await near.seen("lost")
        await far.seen("lost")
        assert near.events.count("made") == 1

    run(loop, main())


def test_the_keys_are_logged_only_when_asked_for(
    loop: headrace.EventLoop, tmp_path: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, environment = tmp_path / "asked", tmp_path / "environment"
    monkeypatch.setenv("SSLKEYLOGFILE", str(environment))

    async def main() -> None:
        async with serving(Bytes) as pair:
            for client in (client_tls(), client_tls(keylog=asked)):
                transport = await pair.connect(Bytes(), client)
                (await pair.accepted.get()).transport.abort()
                transport.abort()
                assert asked.exists() == (client._keylog is not None)

    with caplog.at_level("WARNING", "headrace.security"):
        run(loop, main())
    assert "CLIENT_TRAFFIC_SECRET_0" in asked.read_text()
    assert not environment.exists()
    assert [message for message in caplog.messages if "being written to" in message] != []


def test_writing_after_the_end_is_dropped_and_said(
    loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(Bytes) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            (await pair.accepted.get()).transport.abort()
            await client.seen("lost")
            assert transport.is_closing()
            for _ in range(10):
                transport.write(b"x")
            transport.close()
            transport.abort()
            assert transport.get_write_buffer_size() == 0

    run(loop, main())
    assert "SSL connection is closed" in caplog.messages


def test_items_that_are_not_bytes_are_refused(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with serving(Bytes) as pair:
            transport = await pair.connect(Bytes())
            server = await pair.accepted.get()
            with pytest.raises(TypeError, match="bytes-like"):
                transport.write("text")
            with pytest.raises(TypeError, match="bytes-like"):
                transport.writelines([b"a", 5])
            array = bytearray(b"snapshot")
            transport.write(array)
            array[:] = b"modified"
            transport.writelines([memoryview(b"-"), b"", b"end"])
            await server.until(lambda: server.data == b"snapshot-end")
            transport.abort()
            await server.seen("lost")

    run(loop, main())


def test_a_lease_goes_on_through_tls_though_it_was_let_go(loop: headrace.EventLoop) -> None:
    class Forward(Leases):
        def lease_received(self, lease: headrace.Lease) -> None:
            with lease:
                self.transport.write(lease)

    async def main() -> None:
        async with serving(Forward) as pair:
            client = Leases()
            transport = await pair.connect(client)
            transport.write(BIG)
            await client.until(lambda: len(client.data) == len(BIG))
            assert client.data == BIG
            transport.close()
            await client.seen("lost")

    run(loop, main())


def test_blocking_peers(loop: headrace.EventLoop) -> None:
    """CPython's own blocking TLS sockets, as client."""

    def converse(address: Any) -> bytes:
        import socket

        context = ssl.create_default_context(cafile=ca_file())
        with (
            socket.create_connection(address, timeout=20) as raw,
            context.wrap_socket(raw, server_hostname=NAME) as tls,
        ):
            data = os.urandom(200_000)
            tls.sendall(data)
            got = bytearray()
            while len(got) < len(data):
                got += tls.recv(65536)
            assert got == data
            return tls.unwrap().recv(1)

    async def main() -> None:
        async with serving(lambda: Bytes(received=echo_new)) as pair:
            assert await in_thread(converse, pair.address) == b""

    def echo_new(it: Recorder) -> None:
        it.transport.write(bytes(it.data))
        it.data.clear()

    run(loop, main())
