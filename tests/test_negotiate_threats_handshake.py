"""Who tries to be let in by Kerberos or NTLM and shouldn't be: relayers, downgraders, those who aren't on the list.

See docs/threats-negotiate.md for the whole list.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import headrace
import secured
from authorities import ca_file, issued
from between import DONE, ERROR, IN_PROGRESS, Between, Frame, Heard, RelayTLS, repeat, wire
from headrace.errors import AuthenticationError, FramingError
from headrace.framing.negotiate import LOGON_DENIED, REQUIREMENT_NOT_MET, error_code
from headrace.security import negotiate
from headrace.security.identity import ProtectionLevel
from headrace.security.mechanisms import ClientSettings, ServerSettings, client_context, server_context
from headrace.security.spnego import (
    ACCEPT_INCOMPLETE,
    KERBEROS,
    NTLM,
    NTLM_SIGNATURE,
    REQUEST_MIC,
    NegTokenResp,
    first_token,
    pack_init,
    pack_mechanisms,
    pack_resp,
    unpack_resp,
)
from headrace.testing import simulated_run
from realm import Realm
from streams import Bytes
from toy_mechanism import Script, ToyProtection, installed

NAME = "localhost"
ORDER = b"pay a hundred to bob"
SEALED, SIGNED, NONE = ProtectionLevel.ENCRYPT_AND_SIGN, ProtectionLevel.SIGN, ProtectionLevel.NONE
CHALLENGE = NTLM_SIGNATURE + b"\2"
UNSUPPORTED = 0x80090302

# How clients speak: which mechanism, and whether in SPNEGO.
WAYS = {
    "kerberos": ("kerberos", False),
    "kerberos in spnego": ("kerberos", True),
    "ntlm": ("ntlm", False),
    "ntlm in spnego": ("ntlm", True),
}
every_way = pytest.mark.parametrize("way", WAYS)


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, 60))


def client_of(
    realm: Realm, way: str, monkeypatch: pytest.MonkeyPatch | None = None, **options: Any
) -> headrace.Negotiate:
    mechanism, spnego = WAYS[way]
    if not spnego:
        assert monkeypatch is not None

        def raw(settings: ClientSettings, binding: bytes | None) -> Any:
            return client_context(replace(settings, spnego=False), binding)

        monkeypatch.setattr(negotiate, "client_context", raw)
    if mechanism == "ntlm":
        own = headrace.Credentials(principal=rf"{realm.ntlm_domain}\{realm.user}", password=realm.password)
        return headrace.Negotiate(mechanisms=["ntlm"], credentials=own, **options)
    return headrace.Negotiate(credentials=headrace.Credentials(ccache=realm.ccache), **options)


def server_of(way: str, **options: Any) -> headrace.Negotiate:
    return headrace.Negotiate(mechanisms=[WAYS[way][0]], **options)  # type: ignore[list-item]


async def refused(pair: secured.Pair, heard: Heard, address: Any, *, code: int) -> None:
    """A client of the pair's gets an error with this code, and no protocol hears of it."""
    loop: Any = asyncio.get_running_loop()
    client = Bytes()
    with pytest.raises(AuthenticationError) as told:
        await loop.create_connection(
            lambda: client, *address, security=pair.client, server_hostname=pair.name
        )
    assert told.value.code == code
    assert client.events == []
    assert heard.events == []


# ---- relays --------------------------------------------------------------------------------------------------


def server_tls(*names: str) -> headrace.TLS:
    files = issued(*names)
    return headrace.TLS(certificate=files.chain, private_key=files.key)


def relayer() -> RelayTLS:
    """Somebody with a certificate that the client trusts: for the same name, but another one."""
    files = issued(NAME, "relayer.example")
    towards_client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    towards_client.load_cert_chain(files.chain, files.key)
    return RelayTLS(towards_client, ssl.create_default_context(cafile=ca_file()), NAME)


# The client's channel_binding, the server's, whether somebody is between; whether the client is let in, and bound.
BINDINGS: dict[str, tuple[str, str, bool, bool, bool]] = {
    "none": ("never", "when-supported", False, True, False),
    "none is looked at": ("when-supported", "never", False, True, False),
    "matching": ("when-supported", "when-supported", False, True, True),
    "matching and required": ("require", "require", False, True, True),
    "mismatching": ("when-supported", "when-supported", True, False, False),
    "mismatching and required": ("require", "require", True, False, False),
    "required and none": ("never", "require", False, False, False),
    "none and relayed": ("never", "when-supported", True, True, False),
    "required, none and relayed": ("never", "require", True, False, False),
}


@every_way
@pytest.mark.parametrize("case", BINDINGS)
def test_channel_bindings(
    loop: headrace.EventLoop, realm: Realm, monkeypatch: pytest.MonkeyPatch, way: str, case: str
) -> None:
    """In TLS of each end's own. A relayer whom no binding keeps out has no key: it sees nothing but lengths."""
    theirs, ours, relayed, let_in, bound = BINDINGS[case]
    client_side = [headrace.TLS(ca=ca_file()), client_of(realm, way, monkeypatch, channel_binding=theirs)]
    server_side = [server_tls(NAME), server_of(way, channel_binding=ours)]
    heard = Heard()

    async def main() -> None:
        any_loop: Any = loop
        async with (
            secured.serving(heard, client_side, NAME, security=server_side) as pair,
            Between(pair.address, tls=relayer()) as between,
        ):
            address = between.address if relayed else pair.address
            if not let_in:
                await refused(pair, heard, address, code=LOGON_DENIED)
                return
            client = Bytes()
            transport, _ = await any_loop.create_connection(
                lambda: client, *address, security=client_side, server_hostname=NAME
            )
            server = await pair.accepted.get()
            assert server.transport.get_extra_info("security").channel_bound is bound
            assert transport.get_extra_info("security").channel_bound is (theirs != "never")
            transport.write(ORDER)
            await server.until(lambda: server.data == ORDER)
            transport.close()
            await server.seen("lost")
        assert any(frame.kind is None for frame in between.frames) is relayed
        assert not any(ORDER in frame.body for frame in between.frames)

    with realm.applied():
        run(loop, main())


@every_way
@pytest.mark.parametrize("case", ["not bound", "relayed"])
def test_unprotected_messages_need_a_binding(
    loop: headrace.EventLoop, realm: Realm, monkeypatch: pytest.MonkeyPatch, way: str, case: str
) -> None:
    """A relayer could speak where nothing protects the messages, so a server takes no client that isn't bound."""
    theirs = "never" if case == "not bound" else "when-supported"
    client_side: list[headrace.TLS | headrace.Negotiate] = [headrace.TLS(ca=ca_file())]
    client_side.append(client_of(realm, way, monkeypatch, protection=NONE, channel_binding=theirs))
    server_side = [server_tls(NAME), server_of(way, protection=NONE)]
    heard = Heard()

    async def main() -> None:
        async with (
            secured.serving(heard, client_side, NAME, security=server_side) as pair,
            Between(pair.address, tls=relayer()) as between,
        ):
            if case == "relayed":
                await refused(pair, heard, between.address, code=LOGON_DENIED)
            else:
                await refused(pair, heard, pair.address, code=REQUIREMENT_NOT_MET)

    with realm.applied():
        run(loop, main())


# ---- downgrades ----------------------------------------------------------------------------------------------


def ntlm_token() -> bytes:
    own = headrace.Credentials(principal=r"ANY\body", password="of no account")
    settings = ClientSettings(
        target="host@localhost", credentials=own, mechanisms=("ntlm",), mutual=False, spnego=False
    )
    token = client_context(settings).step(None)
    assert token is not None
    assert token.startswith(NTLM_SIGNATURE)
    return token


@pytest.mark.parametrize("wrapped", [True, False], ids=["in spnego", "raw"])
def test_an_ntlm_client_gets_no_challenge(loop: headrace.EventLoop, realm: Realm, wrapped: bool) -> None:
    """From a server that doesn't list NTLM: an error frame, and nothing else."""
    heard = Heard()
    token = ntlm_token()
    if wrapped:
        token = pack_init(pack_mechanisms(NTLM), token)

    async def main() -> None:
        async with secured.serving(heard, None, NAME, security=headrace.Negotiate()) as pair:
            answer = await repeat(pair.address, wire(IN_PROGRESS, token))
            assert answer[:5] == struct.pack(">BBBH", ERROR, 1, 0, 8)
            assert error_code(answer[5:]) == UNSUPPORTED
            assert len(answer) == 13

    with realm.applied():
        run(loop, main())
    assert heard.events == []


def test_ntlm_s_token_before_a_list_with_kerberos(loop: headrace.EventLoop, realm: Realm) -> None:
    """SPNEGO whose optimistic token is NTLM's: Kerberos is chosen, and NTLM's messages are none of its."""
    heard = Heard()
    first = pack_init(pack_mechanisms(NTLM, KERBEROS[0]), ntlm_token())
    second = pack_resp(NegTokenResp(ACCEPT_INCOMPLETE, None, ntlm_token()))

    async def main() -> None:
        async with secured.serving(heard, None, NAME, security=headrace.Negotiate()) as pair:
            reader, writer = await asyncio.open_connection(*pair.address)
            writer.write(wire(IN_PROGRESS, first))
            kind, _, _, size = struct.unpack(">BBBH", await reader.readexactly(5))
            answer = await reader.readexactly(size)
            assert kind == IN_PROGRESS
            chosen = unpack_resp(answer)
            assert (chosen.state, chosen.mechanism) == (REQUEST_MIC, KERBEROS[0])
            writer.write(wire(IN_PROGRESS, second))
            rest = await reader.read()
            assert rest[0] == ERROR
            assert CHALLENGE not in answer + rest
            writer.close()

    with realm.applied():
        run(loop, main())
    assert heard.events == []


@pytest.mark.parametrize("raw", [False, True], ids=["in spnego", "raw"])
def test_a_server_that_answers_kerberos_with_ntlm(loop: headrace.EventLoop, realm: Realm, raw: bool) -> None:
    """A client that lists both has begun with Kerberos, and nothing that comes makes it send an NTLM response."""
    theirs = server_context(ServerSettings(mechanisms=("ntlm",)))
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, _, _, size = struct.unpack(">BBBH", await reader.readexactly(5))
        first = first_token(await reader.readexactly(size))
        assert not isinstance(first, str)
        assert first.mechanisms[0] == KERBEROS[0]
        challenge = theirs.step(ntlm_token())
        assert challenge is not None
        answer = challenge if raw else pack_resp(NegTokenResp(ACCEPT_INCOMPLETE, NTLM, challenge))
        writer.write(wire(IN_PROGRESS, answer))
        received.append(await reader.read())
        writer.close()

    async def main() -> None:
        any_loop: Any = loop
        client = Bytes()
        own = headrace.Credentials(ccache=realm.ccache)
        both = headrace.Negotiate(mechanisms=["kerberos", "ntlm"], credentials=own)
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            with pytest.raises(AuthenticationError):
                await any_loop.create_connection(
                    lambda: client, *server.sockets[0].getsockname(), security=both, server_hostname=NAME
                )
            while not received:
                await asyncio.sleep(0.001)
        assert client.events == []

    with realm.applied():
        run(loop, main())
    assert NTLM_SIGNATURE not in received[0]
    assert received[0][:1] in (b"", bytes([ERROR]))


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_list_s_mic_is_removed(
    loop: headrace.EventLoop, realm: Realm, caplog: pytest.LogCaptureFixture, side: str
) -> None:
    """Somebody who has changed the list of mechanisms must remove what signs it: that's noticed by both sides."""
    heard = Heard()
    removed: list[bytes] = []

    def change(frame: Frame) -> bytes:
        if frame.side != side or frame.kind is None or not frame.body.startswith(b"\xa1"):
            return frame.wire
        told = unpack_resp(frame.body)
        if told.mic is None:
            return frame.wire
        removed.append(told.mic)
        return wire(frame.kind, pack_resp(replace(told, mic=None)))

    async def main() -> None:
        any_loop: Any = loop
        client = Bytes()
        security = client_of(realm, "ntlm in spnego")
        async with (
            secured.serving(heard, security, NAME, security=server_of("ntlm")) as pair,
            Between(pair.address, change) as between,
        ):
            with pytest.raises(AuthenticationError):
                await any_loop.create_connection(
                    lambda: client, *between.address, security=security, server_hostname=NAME
                )
            assert client.events == []
            if side == "server":  # which has been convinced
                server = await pair.accepted.get()
                await server.seen("lost")
                assert server.data == b""
            else:
                assert heard.events == []

    with realm.applied(), caplog.at_level("INFO", "headrace.security"):
        run(loop, main())
    assert len(removed) == 1
    assert "doesn't sign SPNEGO's list of mechanisms" in caplog.text


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=NAME)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        client_hello(),  # its type is that of a handshake frame
        wire(DONE, b""),
        wire(DONE, b"a token"),
        wire(ERROR, bytes(8)),
        wire(IN_PROGRESS, b"\x60"),
    ],
    ids=["HTTP", "TLS", "done", "done with a token", "error", "no token"],
)
def test_what_is_no_authentication(loop: headrace.EventLoop, realm: Realm, said: bytes) -> None:
    """It ends the connection; the protocol doesn't hear of it."""
    heard = Heard()

    async def main() -> None:
        async with secured.serving(heard, None, NAME, security=headrace.Negotiate()) as pair:
            answer = await repeat(pair.address, said + wire(None, ORDER))
            assert answer[:1] in (b"", bytes([ERROR]))

    with realm.applied():
        run(loop, main())
    assert heard.events == []


# ---- less protection than demanded -----------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize(("asked", "demanded"), [(NONE, SIGNED), (NONE, SEALED), (SIGNED, SEALED)])
def test_less_protection_is_refused(
    loop: headrace.EventLoop,
    realm: Realm,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    asked: ProtectionLevel,
    demanded: ProtectionLevel,
) -> None:
    """A client that doesn't ask for confidentiality, or for anything."""
    heard = Heard()

    async def main() -> None:
        client = client_of(realm, way, monkeypatch, protection=asked)
        async with secured.serving(heard, client, NAME, security=server_of(way, protection=demanded)) as pair:
            await refused(pair, heard, pair.address, code=REQUIREMENT_NOT_MET)

    with realm.applied():
        run(loop, main())


TOKEN = b'{"from": "client", "step": 1}'


@pytest.mark.parametrize("protection", ProtectionLevel)
@pytest.mark.parametrize("early", [True, False], ids=["with the token", "later"])
def test_data_without_frames(
    loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch, protection: ProtectionLevel, early: bool
) -> None:
    """It's taken where nothing was negotiated to protect it, and nowhere else."""
    installed(monkeypatch, Script(protection=protection))
    heard = Heard()

    async def main() -> None:
        security = headrace.Negotiate(protection=protection)
        async with secured.serving(heard, None, NAME, security=security) as pair:
            reader, writer = await asyncio.open_connection(*pair.address)
            writer.write(wire(IN_PROGRESS, TOKEN) + (ORDER if early else b""))
            assert (await reader.readexactly(5))[0] == DONE
            if not early:
                await heard.made[0].seen("made")
                writer.write(ORDER)
            if protection == NONE:
                await heard.made[0].until(lambda: heard.made[0].data == ORDER)
                writer.transport.abort()
                return
            await reader.read()
            if not early:
                await heard.made[0].seen("lost")
                assert isinstance(heard.made[0].error, FramingError)
            assert "received" not in heard.events
            writer.transport.abort()

    run(loop, main())


# ---- who is let in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [True, False, None], ids=["yes", "no", "never"])
def test_nothing_is_heard_before_the_list_has_said_yes(
    monkeypatch: pytest.MonkeyPatch, answer: bool | None
) -> None:
    """However slow it is, whatever has come by then, and whatever the network does. Without an answer: never."""
    installed(monkeypatch, Script())
    protection = ToyProtection(True)
    early = b"".join(wire(None, protection.wrap(ORDER)) for _ in range(3))

    async def main() -> list[str]:
        loop: Any = asyncio.get_running_loop()
        order: list[str] = []

        async def decide(identity: headrace.Identity) -> bool:
            order.append("asked")
            await asyncio.sleep(3 if answer is not None else 3600)
            order.append("answered")
            return bool(answer)

        def note(event: str) -> Callable[[Any], None]:
            return lambda it: order.append(event)

        heard = Heard(on={event: note(event) for event in ("made", "received", "eof", "lost")})
        security = headrace.Negotiate(accept=headrace.AccessList(decide=decide))
        server = await loop.create_server(heard, "toy", 1, security=security)
        peer = Bytes(made=lambda it: it.transport.write(wire(IN_PROGRESS, TOKEN) + early))
        transport, _ = await loop.create_connection(lambda: peer, "toy", 1)
        if answer:
            while not heard.made:
                await asyncio.sleep(0.1)
            await heard.made[0].until(lambda: len(heard.made[0].data) == 3 * len(ORDER))
            transport.close()
        await peer.seen("lost")
        server.close()
        await asyncio.sleep(60)
        return order

    expected = {True: ["asked", "answered", "made"], False: ["asked", "answered"], None: ["asked"]}[answer]
    for seed in range(40):
        order = simulated_run(main(), seed, reset=0.0)
        assert order[: len(expected)] == expected
        assert (len(order) > len(expected)) is bool(answer)


@every_way
@pytest.mark.parametrize("let_in", [True, False], ids=["yes", "no"])
def test_the_list_is_asked_by_what_was_authenticated(
    loop: headrace.EventLoop, realm: Realm, monkeypatch: pytest.MonkeyPatch, way: str, let_in: bool
) -> None:
    """Once, by a finished context, before the client hears of success; by a function that takes its time."""
    heard = Heard()
    asked: list[tuple[str, ...]] = []
    connecting: list[Any] = []

    async def decide(identity: headrace.Identity) -> bool:
        asked.append(identity.names)
        for _ in range(50):
            await asyncio.sleep(0)
            assert heard.events == []
            assert not connecting[0].done()
        return let_in

    async def main() -> None:
        security = server_of(way, accept=headrace.AccessList(decide=decide))
        async with secured.serving(
            heard, client_of(realm, way, monkeypatch), NAME, security=security
        ) as pair:
            client = Bytes()
            connecting.append(asyncio.ensure_future(pair.connect(client)))
            if let_in:
                transport = await connecting[0]
                server = await pair.accepted.get()
                transport.close()
                await server.seen("lost")
            else:
                with pytest.raises(AuthenticationError) as told:
                    await connecting[0]
                assert told.value.code == LOGON_DENIED
                assert heard.events == []
                assert client.events == []

    with realm.applied():
        run(loop, main())
    me = rf"user:{realm.ntlm_domain}\{realm.user}"
    names = (me, f"domain:{realm.ntlm_domain}")
    if WAYS[way][0] == "kerberos":
        names = (f"principal:{realm.principal}", f"realm:{realm.name}")
    assert asked == [names]


# A rule of Kerberos' or NTLM's, the peer's names, whether it fits exactly, and without regard to case.
ALICE = ("principal:alice@A.EXAMPLE", "realm:A.EXAMPLE", "sid:S-1-5-21-1-2-3-1105", "sid:S-1-5-21-1-2-3-513")
BOB = (r"user:DOMAIN\bob", "domain:DOMAIN")
PAIRS = [
    ("realm:A.EXAMPLE", ALICE, True, True),
    ("realm:a.example", ALICE, False, True),
    ("realm:A.EXAMPLE.", ALICE, False, False),
    ("realm:EXAMPLE", ALICE, False, False),
    ("realm:B.A.EXAMPLE", ALICE, False, False),
    ("realm: A.EXAMPLE", ALICE, False, False),
    ("domain:A.EXAMPLE", ALICE, False, False),
    ("user:alice@A.EXAMPLE", ALICE, False, False),
    ("email:alice@A.EXAMPLE", ALICE, False, False),
    ("principal:alice@A.EXAMPLE", ALICE, True, True),
    ("principal:alice@A.EXAMPLE ", ALICE, False, False),
    ("principal:alice@A.EXAMPLE@A.EXAMPLE", ALICE, False, False),
    ("principal:alice/@A.EXAMPLE", ALICE, False, False),
    ("principal:\u0430lice@A.EXAMPLE", ALICE, False, False),  # a Cyrillic a
    ("principal:al\u0131ce@A.EXAMPLE", ALICE, False, False),  # a dotless i
    ("principal:al\u0130ce@A.EXAMPLE", ALICE, False, False),  # a dotted capital I
    ("principal:ALICE@A.EXAMPLE", ALICE, False, True),
    ("sid:S-1-5-21-1-2-3-513", ALICE, True, True),
    ("sid:S-1-5-21-1-2-3-51", ALICE, False, False),
    ("sid:S-1-5-21-1-2-3-5130", ALICE, False, False),
    ("sid:s-1-5-21-1-2-3-513", ALICE, False, True),
    ("sid:S-1-5-21-1-2-3-0513", ALICE, False, False),
    (r"user:DOMAIN\bob", BOB, True, True),
    (r"user:domain\bob", BOB, False, True),
    (r"user:DOMAIN\\bob", BOB, False, False),
    ("user:DOMAIN/bob", BOB, False, False),
    ("user:bob", BOB, False, False),
    ("user:bob@DOMAIN", BOB, False, False),
    ("domain:DOMAIN", BOB, True, True),
    ("domain:DOMAI\u0274", BOB, False, False),  # a small capital N
    ("realm:DOMAIN", BOB, False, False),
    ("principal:bob@DOMAIN", BOB, False, False),
]


@pytest.mark.parametrize(("rule", "names", "exact", "folded"), PAIRS)
def test_names_of_kerberos_and_ntlm(rule: str, names: tuple[str, ...], exact: bool, folded: bool) -> None:
    """As a rule that lets in, and as one that keeps out; the kinds that TLS has are in test_access.py."""
    identity = headrace.Identity(names[0].partition(":")[2], names)
    for casefold, fits in ((False, exact), (True, folded)):
        assert headrace.AccessList([rule], casefold=casefold).permits(identity) is fits
        assert headrace.AccessList(names, [rule], casefold=casefold).permits(identity) is not fits
        assert not headrace.AccessList([rule], names, casefold=casefold).permits(identity)
