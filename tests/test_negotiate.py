"""``security=headrace.Negotiate(...)``: the layer around authentication and frames, over a toy mechanism."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import hashlib
import random
import struct
import threading
import time
import weakref
from typing import Any

import pytest

import headrace
import secured
from authorities import ca_file, issued
from headrace.errors import (
    AccessDenied,
    AuthenticationError,
    FramingError,
    HandshakeError,
    SecurityError,
    TruncatedError,
)
from headrace.security.identity import ImpersonationLevel, ProtectionLevel
from streams import KINDS, Bytes, Leases, Recorder
from toy_mechanism import Script, installed

BIG = random.Random(1).randbytes(3_000_000)
NAME = "server.example"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return installed(monkeypatch, Script())


def serving(protocol: Any, security: Any = None, client: Any = None) -> Any:
    return secured.serving(
        protocol, client or headrace.Negotiate(), NAME, security=security or headrace.Negotiate()
    )


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, 30))


async def raw(pair: secured.Pair) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*pair.address)


def frame(kind: int, token: bytes = b"") -> bytes:
    return struct.pack(">BBBH", kind, 1, 0, len(token)) + token


TOKEN = b'{"from": "client", "step": 1}'


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("protection", ProtectionLevel)
@pytest.mark.parametrize("kind", KINDS)
def test_all_bytes_both_ways(
    loop: headrace.EventLoop, script: Script, kind: str, protection: ProtectionLevel, rounds: int
) -> None:
    """Pieces of any size, on every kind of protocol; the hash is the same, and both ends close in order."""
    script.rounds, script.protection = rounds, protection
    pieces = [BIG[start : start + size] for start, size in cuts(len(BIG))]
    security = headrace.Negotiate(protection=protection)

    async def main() -> None:
        async with serving(KINDS[kind], security, security) as pair:
            client = KINDS[kind]()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            for piece in pieces:
                transport.write(piece)
            server.transport.writelines(pieces)
            await server.until(lambda: len(server.data) == len(BIG))
            await client.until(lambda: len(client.data) == len(BIG))
            assert hashlib.sha256(client.data).digest() == hashlib.sha256(BIG).digest()
            assert server.data == client.data
            info = server.transport.get_extra_info("security")
            assert (info.is_signed, info.is_encrypted) == (protection >= 1, protection == 2)
            assert info.remote_identity.name == script.user
            assert transport.get_extra_info("security").remote_identity.name == script.server
            transport.close()
            await client.seen("lost")
            await server.seen("lost")
            assert client.error is None
            assert server.error is None
            assert server.events[-2:] == ["eof", "lost"]

    run(loop, main())
    assert all(context.disposed for context in script.contexts)


def cuts(size: int) -> list[tuple[int, int]]:
    rng = random.Random(size)
    found = []
    position = 0
    while position < size:
        piece = rng.choice([1, 2, 100, 5000, 12_288, 12_289, 70_000, 500_000])
        found.append((position, piece))
        position += piece
    return found


def test_a_server_may_speak_first(loop: headrace.EventLoop, script: Script) -> None:
    """Its last token and its first frame are one segment; the client's step takes time meanwhile."""

    async def main() -> None:
        async with serving(lambda: Leases(made=lambda self: self.transport.write(b"welcome"))) as pair:
            script.gate, script.gated = threading.Event(), "client"
            script.gate.set()
            connecting = asyncio.ensure_future(pair.connect(client := Bytes()))
            while len(script.contexts) < 2:
                await asyncio.sleep(0.001)
            script.gate.clear()
            await asyncio.sleep(0.05)
            script.gate.set()
            transport = await connecting
            await client.until(lambda: client.data == b"welcome")
            transport.close()
            await client.seen("lost")

    run(loop, main())


def test_the_loop_goes_on_during_a_step(loop: headrace.EventLoop, script: Script) -> None:
    script.gate = threading.Event()

    async def main() -> None:
        async with serving(Leases) as pair:
            connecting = asyncio.ensure_future(pair.connect(Leases()))
            turns = 0
            while turns < 50:
                await asyncio.sleep(0.001)
                turns += 1
            assert not connecting.done()
            assert script.gate is not None
            script.gate.set()
            transport = await connecting
            (await pair.accepted.get()).transport.abort()
            transport.abort()

    run(loop, main())


# ---- who is let in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "permitted"),
    [
        (headrace.AccessList(["principal:alice@TOY"]), True),
        (headrace.AccessList(["realm:TOY"]), True),
        (headrace.AccessList(["realm:TOY"], ["principal:alice@TOY"]), False),
        (headrace.AccessList(["principal:ALICE@TOY"]), False),
        (headrace.AccessList([]), False),
        (headrace.AccessList(decide=lambda identity: identity.name == "alice@TOY"), True),
        (headrace.AccessList(decide=lambda identity: False), False),
        (headrace.AccessList(deny=["realm:TOY"], decide=lambda identity: True), False),
    ],
)
def test_access_lists(
    loop: headrace.EventLoop, script: Script, access: headrace.AccessList, permitted: bool
) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Leases())
        return made[-1]

    async def main() -> None:
        async with serving(factory, headrace.Negotiate(accept=access)) as pair:
            client = Bytes()
            if permitted:
                (await pair.connect(client)).abort()
                await client.seen("lost")
            else:
                with pytest.raises(AuthenticationError, match="the logon was denied"):
                    await pair.connect(client)
                assert client.events == []
                assert made[-1].events == []

    run(loop, main())


@pytest.mark.parametrize("answer", [True, False])
def test_a_decision_may_take_time(loop: headrace.EventLoop, script: Script, answer: bool) -> None:
    """The peer's data has come by then; nobody has seen it."""
    seen: list[str] = []

    async def decide(identity: headrace.Identity) -> bool:
        await asyncio.sleep(0.02)
        seen.append(identity.name)
        return answer

    async def main() -> None:
        security = headrace.Negotiate(accept=headrace.AccessList(decide=decide))
        async with serving(Leases, security) as pair:
            reader, writer = await raw(pair)
            protection = headrace_toy()
            early = protection.wrap(b"early")
            writer.write(frame(0x16, TOKEN) + struct.pack("<I", len(early)) + early)
            head = await reader.readexactly(5)
            assert seen == ["alice@TOY"]
            if answer:
                assert head[0] == 0x14
                server = await pair.accepted.get()
                await server.until(lambda: server.data == b"early")
                server.transport.abort()
            else:
                assert head[0] == 0x15
                assert pair.accepted.empty()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    run(loop, main())


def headrace_toy() -> Any:
    from toy_mechanism import ToyProtection

    return ToyProtection(True)


def test_a_decision_that_fails_keeps_the_peer_out(loop: headrace.EventLoop, script: Script) -> None:
    reported: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reported.append(context))

    async def decide(identity: headrace.Identity) -> bool:
        raise LookupError("the directory is down")

    async def main() -> None:
        security = headrace.Negotiate(accept=headrace.AccessList(decide=decide))
        async with serving(Leases, security) as pair:
            with pytest.raises((SecurityError, ConnectionError)):
                await pair.connect(Bytes())
            assert pair.accepted.empty()

    run(loop, main())
    assert isinstance(reported[0]["exception"], LookupError)


def test_an_access_list_that_changes_closes_who_is_denied(loop: headrace.EventLoop, script: Script) -> None:
    access = headrace.AccessList(["principal:alice@TOY", "principal:bob@TOY"])

    async def main() -> None:
        async with serving(Leases, headrace.Negotiate(accept=access)) as pair:
            alice, bob = Bytes(), Bytes()
            await pair.connect(alice)
            alice_there = await pair.accepted.get()
            script.user = "bob@TOY"
            transport = await pair.connect(bob)
            bob_there = await pair.accepted.get()
            with pytest.raises(ValueError, match="isn't a rule"):
                access.update(["nonsense"])
            await asyncio.to_thread(access.update, ["principal:bob@TOY"])  # from any thread
            await alice.seen("lost")
            await alice_there.seen("lost")
            assert isinstance(alice_there.error, AccessDenied)
            assert "lost" not in bob_there.events
            transport.close()
            await bob_there.seen("lost")

    run(loop, main())


def test_an_access_list_forgets_connections_that_are_gone(loop: headrace.EventLoop, script: Script) -> None:
    access = headrace.AccessList(["realm:TOY"])

    async def main() -> None:
        async with serving(Leases, headrace.Negotiate(accept=access)) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            assert len(access._watching) == 1
            transport.close()
            await server.seen("lost")
            assert len(access._watching) == 0

    run(loop, main())


# ---- what is demanded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "client", "changes"),
    [
        ({}, {"protection": ProtectionLevel.SIGN}, {"protection": ProtectionLevel.SIGN}),
        ({}, {"protection": ProtectionLevel.NONE}, {"protection": ProtectionLevel.NONE}),
        (
            {"protection": ProtectionLevel.SIGN},
            {"protection": ProtectionLevel.NONE},
            {"protection": ProtectionLevel.NONE},
        ),
        ({"impersonation": ImpersonationLevel.DELEGATION}, {}, {}),
        ({"channel_binding": "require"}, {}, {}),
    ],
)
def test_a_server_demands(
    loop: headrace.EventLoop,
    script: Script,
    server: dict[str, Any],
    client: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    vars(script).update(changes)

    async def main() -> None:
        async with serving(Leases, headrace.Negotiate(**server), headrace.Negotiate(**client)) as pair:
            with pytest.raises(AuthenticationError, match="demand for protection or impersonation") as info:
                await pair.connect(Bytes())
            assert info.value.code == 1790
            assert pair.accepted.empty()

    run(loop, main())


@pytest.mark.parametrize(
    ("client", "changes", "message"),
    [
        ({}, {"mutual": False}, "hasn't shown who it is"),
        ({}, {"protection": ProtectionLevel.SIGN}, "doesn't encrypt"),
        ({"protection": ProtectionLevel.SIGN}, {"protection": ProtectionLevel.NONE}, "doesn't sign"),
    ],
)
def test_a_client_demands(
    loop: headrace.EventLoop, script: Script, client: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    vars(script).update(changes)

    async def main() -> None:
        security = headrace.Negotiate(protection=ProtectionLevel.NONE)
        async with serving(Leases, security, headrace.Negotiate(**client)) as pair:
            protocol = Bytes()
            with pytest.raises(AuthenticationError, match=message):
                await pair.connect(protocol)
            assert protocol.events == []

    run(loop, main())


@pytest.mark.parametrize("which", ["client", "server"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_step_that_fails(loop: headrace.EventLoop, script: Script, which: str, at: int) -> None:
    script.rounds = 3
    setattr(script, f"{which}_fails_at", at)

    async def main() -> None:
        async with serving(Leases) as pair:
            client = Bytes()
            with pytest.raises(
                AuthenticationError, match="toy's client" if which == "client" else "0x80090308"
            ):
                await pair.connect(client)
            assert client.events == []
            await asyncio.sleep(0.01)
            assert pair.accepted.empty()

    run(loop, main())
    assert all(context.disposed for context in script.contexts)


def test_a_mistake_in_a_step_is_reported(
    loop: headrace.EventLoop, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reported.append(context))
    monkeypatch.setattr("toy_mechanism.ToyContext.result", lambda self: 1 / 0)

    async def main() -> None:
        async with serving(Leases) as pair:
            with pytest.raises(AuthenticationError, match="its own security system failed"):
                await pair.connect(Bytes())

    run(loop, main())
    assert isinstance(reported[0]["exception"], ZeroDivisionError)


# ---- time ----------------------------------------------------------------------------------------------------


def test_the_deadline_does_not_wait_for_a_step(loop: headrace.EventLoop, script: Script) -> None:
    """As with a KDC that doesn't answer: the connection goes, the step stays until it returns."""
    script.gate = threading.Event()

    async def main() -> None:
        security = headrace.Negotiate(handshake_timeout=0.1)
        async with serving(Leases, None, security) as pair:
            began = time.monotonic()
            with pytest.raises(HandshakeError, match=r"took longer than 0\.1 s"):
                await pair.connect(Bytes())
            assert time.monotonic() - began < 5
            assert script.contexts[0].disposed == 0
            assert script.gate is not None
            script.gate.set()
            while not script.contexts[0].disposed:
                await asyncio.sleep(0.001)

    run(loop, main())


def test_a_loop_closes_while_a_step_is_being_done(loop: headrace.EventLoop, script: Script) -> None:
    script.gate = threading.Event()

    async def main() -> None:
        async with serving(Leases) as pair:
            connecting = asyncio.ensure_future(pair.connect(Bytes()))
            while not script.contexts:
                await asyncio.sleep(0.001)
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting

    run(loop, main())
    began = time.monotonic()
    loop.close()
    assert time.monotonic() - began < 5
    script.gate.set()
    while not script.contexts[0].disposed:
        time.sleep(0.001)


def test_a_silent_peer_goes_in_time(loop: headrace.EventLoop, script: Script) -> None:
    async def main() -> None:
        async with serving(Leases, headrace.Negotiate(handshake_timeout=0.1)) as pair:
            reader, writer = await raw(pair)
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()

    run(loop, main())


def test_the_oldest_handshake_gives_way(
    loop: headrace.EventLoop, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        security = headrace.Negotiate(max_pending_handshakes=3)
        async with serving(Leases, security) as pair:
            silent = [await raw(pair) for _ in range(5)]
            assert await asyncio.wait_for(silent[0][0].read(), 10) == b""
            assert await asyncio.wait_for(silent[1][0].read(), 10) == b""
            assert len(security._pending) == 3
            for _, writer in silent:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    with caplog.at_level("INFO", "headrace.security"):
        run(loop, main())
    assert sum("the oldest gives way" in message for message in caplog.messages) == 2


def in_seconds(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


def test_a_ticket_ends_and_the_connection_with_it(loop: headrace.EventLoop, script: Script) -> None:
    async def main() -> None:
        script.expires_at = in_seconds(0.3)
        async with serving(Leases, None, headrace.Negotiate(on_expiry="ignore")) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            assert transport.get_extra_info("security").expires_at == script.expires_at
            await server.seen("lost")
            assert in_seconds(0) >= script.expires_at
            assert isinstance(server.error, SecurityError)
            assert "the client's ticket ended" in str(server.error)
            await client.seen("lost")

    run(loop, main())


def test_a_protocol_may_be_told_that_the_ticket_ends(loop: headrace.EventLoop, script: Script) -> None:
    class Told(Leases):
        def security_expired(self) -> None:
            self.note("expired")

    async def main() -> None:
        script.expires_at = in_seconds(0.1)
        async with serving(Told, headrace.Negotiate(on_expiry="notify")) as pair:
            client = Bytes()
            transport = await pair.connect(client, headrace.Negotiate(on_expiry="ignore"))
            server = await pair.accepted.get()
            await server.seen("expired")
            transport.write(b"still here")
            await server.until(lambda: server.data == b"still here")
            transport.close()
            await server.seen("lost")

    run(loop, main())


# ---- ends ----------------------------------------------------------------------------------------------------


def test_half_closed(loop: headrace.EventLoop, script: Script) -> None:
    async def main() -> None:
        patient = headrace.Negotiate(shutdown_timeout=3600)  # nobody waits for that
        async with serving(lambda: Leases(eof=lambda self: True), patient, patient) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            transport.write(b"question")
            transport.write_eof()
            await server.seen("eof")
            assert server.data == b"question"
            server.transport.write(b"answer")
            server.transport.close()
            await client.seen("lost")
            assert client.data == b"answer"
            await server.seen("lost")
            assert (client.error, server.error) == (None, None)

    run(loop, main())


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 20])
def test_an_end_within_a_frame_is_an_error(loop: headrace.EventLoop, script: Script, cut: int) -> None:
    async def main() -> None:
        async with serving(Leases) as pair:
            reader, writer = await raw(pair)
            writer.write(frame(0x16, TOKEN))
            await reader.readexactly(5)
            toy = headrace_toy()
            first, second = toy.wrap(b"whole"), toy.wrap(b"cut off before its end")
            writer.write(
                struct.pack("<I", len(first)) + first + (struct.pack("<I", len(second)) + second)[:cut]
            )
            writer.write_eof()
            server = await pair.accepted.get()
            await server.seen("lost")
            assert server.data == b"whole"
            assert isinstance(server.error, TruncatedError)
            assert "eof" not in server.events
            writer.close()

    run(loop, main())


@pytest.mark.parametrize("bit", range(0, 8 * 17, 5))
def test_a_changed_frame_ends_the_connection(loop: headrace.EventLoop, script: Script, bit: int) -> None:
    async def main() -> None:
        async with serving(Leases) as pair:
            reader, writer = await raw(pair)
            writer.write(frame(0x16, TOKEN))
            await reader.readexactly(5)
            token = bytearray(headrace_toy().wrap(b"a message"))
            token[bit // 8] ^= 1 << bit % 8
            writer.write(struct.pack("<I", len(token)) + token)
            server = await pair.accepted.get()
            await server.seen("lost")
            assert server.data == b""
            assert isinstance(server.error, FramingError)
            writer.close()

    run(loop, main())


def test_the_peer_leaves_in_the_handshake(loop: headrace.EventLoop, script: Script) -> None:
    async def main() -> None:
        listener = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        async with listener:
            any_loop: Any = loop
            with pytest.raises(ConnectionResetError, match="in the handshake"):
                await any_loop.create_connection(
                    Bytes,
                    *listener.sockets[0].getsockname(),
                    security=headrace.Negotiate(),
                    server_hostname=NAME,
                )

    run(loop, main())


# ---- in TLS, and later -----------------------------------------------------------------------------------------


def tls_pair() -> tuple[headrace.TLS, headrace.TLS]:
    files = issued(NAME)
    return headrace.TLS(certificate=files.chain, private_key=files.key), headrace.TLS(ca=ca_file())


@pytest.mark.parametrize("kind", KINDS)
def test_inside_tls(loop: headrace.EventLoop, script: Script, kind: str) -> None:
    server_tls, client_tls = tls_pair()

    async def main() -> None:
        server_side = [server_tls, headrace.Negotiate()]
        async with serving(KINDS[kind], server_side, [client_tls, headrace.Negotiate()]) as pair:
            client = KINDS[kind]()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            transport.write(BIG)
            server.transport.write(BIG)
            await server.until(lambda: len(server.data) == len(BIG))
            await client.until(lambda: len(client.data) == len(BIG))
            assert client.data == server.data == BIG
            info = server.transport.get_extra_info("security")
            assert info.protocol == "NegotiateStream"
            assert info.channel.protocol == "TLSv1.3"
            assert script.bindings[0] == script.bindings[1] == info.channel.channel_binding
            assert info.channel.channel_binding is not None
            transport.close()
            await client.seen("lost")
            await server.seen("lost")
            assert (client.error, server.error) == (None, None)

    run(loop, main())


def test_tls_that_fails_around_it(loop: headrace.EventLoop, script: Script) -> None:
    server_tls, _ = tls_pair()

    async def main() -> None:
        server_side = [server_tls, headrace.Negotiate()]
        nobody = [headrace.TLS(), headrace.Negotiate()]
        async with serving(Leases, server_side, nobody) as pair:
            client = Bytes()
            with pytest.raises(OSError, match="certificate verify failed"):
                await pair.connect(client)
            assert client.events == []

    run(loop, main())
    assert script.contexts == []


def test_unprotected_messages_in_tls_need_a_binding(loop: headrace.EventLoop, script: Script) -> None:
    server_tls, client_tls = tls_pair()
    script.protection = ProtectionLevel.NONE
    security = headrace.Negotiate(protection=ProtectionLevel.NONE)

    async def main() -> None:
        async with serving(Leases, [server_tls, security], [client_tls, security]) as pair:
            with pytest.raises(AuthenticationError):
                await pair.connect(Bytes())
            script.bound = True
            transport = await pair.connect(client := Bytes())
            (await pair.accepted.get()).transport.abort()
            transport.abort()
            await client.seen("lost")

    run(loop, main())


def test_a_client_that_requires_a_binding_needs_tls(loop: headrace.EventLoop, script: Script) -> None:
    async def main() -> None:
        async with serving(Leases, None, headrace.Negotiate(channel_binding="require")) as pair:
            with pytest.raises(HandshakeError, match="needs a TLS channel"):
                await pair.connect(Bytes())

    run(loop, main())


def test_an_upgrade_in_mid_connection(loop: headrace.EventLoop, script: Script) -> None:
    """Both begin in plain text; the client's first token may come with the plain text's end."""
    security = headrace.Negotiate()
    any_loop: Any = loop

    async def main() -> None:
        accepted: asyncio.Queue[Bytes] = asyncio.Queue()
        server = await loop.create_server(lambda: Bytes(made=accepted.put_nowait), "127.0.0.1", 0)
        async with server:
            client = Bytes()
            transport, _ = await loop.create_connection(lambda: client, *server.sockets[0].getsockname())
            there = await accepted.get()
            transport.write(b"plain")
            await there.until(lambda: there.data == b"plain")
            new_there, new_client = await asyncio.gather(
                any_loop.start_security(there.transport, there, security, server_side=True),
                any_loop.start_security(transport, client, security, server_hostname=NAME),
            )
            new_client.write(BIG)
            new_there.write(b"welcome")
            await there.until(lambda: len(there.data) == 5 + len(BIG))
            await client.until(lambda: client.data == b"welcome")
            assert there.data[5:] == BIG
            new_client.close()
            await client.seen("lost")
            await there.seen("lost")

    run(loop, main())


# ---- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frame_size": 0}, "frame_size"),
        ({"frame_size": 64_513}, "frame_size"),
        ({"on_expiry": "explode"}, "on_expiry"),
        ({"handshake_timeout": 0}, "handshake_timeout"),
        ({"max_pending_handshakes": 0}, "max_pending_handshakes"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        headrace.Negotiate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mechanisms": ("kerberos", "ntlm"), "mutual": True}, "NTLM"),
        ({"mechanisms": ()}, "mechanisms"),
        ({"target": "host/127.0.0.1"}, "IP address"),
        ({"allowed_targets": ["host/a"]}, "allowed_targets"),
        ({"channel_binding": "perhaps"}, "channel_binding"),
    ],
)
def test_a_clients_arguments(loop: headrace.EventLoop, arguments: dict[str, Any], message: str) -> None:
    any_loop: Any = loop
    with pytest.raises(ValueError, match=message):
        run(loop, any_loop.create_connection(Bytes, "localhost", 1, security=headrace.Negotiate(**arguments)))


def test_an_address_is_no_name(loop: headrace.EventLoop) -> None:
    any_loop: Any = loop
    with pytest.raises(ValueError, match="names an IP address"):
        run(loop, any_loop.create_connection(Bytes, "127.0.0.1", 1, security=headrace.Negotiate()))


def test_what_is_no_security(loop: headrace.EventLoop) -> None:
    any_loop: Any = loop
    for nonsense in (object(), [], [None], "tls"):
        with pytest.raises(TypeError, match="security= takes"):
            run(loop, any_loop.create_server(Bytes, "127.0.0.1", 0, security=nonsense))


# ---- what is left ------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_connection(loop: headrace.EventLoop, script: Script) -> None:
    async def main() -> list[Any]:
        async with serving(Leases) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            left = [weakref.ref(transport), weakref.ref(server.transport)]
            transport.close()
            await server.seen("lost")
            await client.seen("lost")
            return left

    left = run(loop, main())
    script.contexts.clear()
    run(loop, asyncio.sleep(0))
    gc.collect()
    assert [reference() for reference in left] == [None, None]
