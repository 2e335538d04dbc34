"""Floods of Kerberos and NTLM handshakes, KDCs and peers that don't answer; keys, clocks and names that change.

See docs/threats-negotiate.md for the whole list.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import headrace
import secured
from between import DONE, IN_PROGRESS, Heard, wire
from headrace.errors import AuthenticationError, HandshakeError, StalledError
from headrace.framing.negotiate import LOGON_DENIED
from headrace.security import steps
from headrace.security.identity import ImpersonationLevel
from headrace.security.spnego import (
    ACCEPT_INCOMPLETE,
    KERBEROS,
    REQUEST_MIC,
    NegTokenResp,
    pack_init,
    pack_mechanisms,
    pack_resp,
    unpack_resp,
)
from headrace.security.steps import CLIENTS, SERVERS, StepThreads
from headrace.testing import Faults, simulated_run
from realm import Realm
from streams import Bytes, Leases, reports
from toy_mechanism import Script, installed

NAME = "localhost"
ORDER = b"pay a hundred to bob"
TOKEN = wire(IN_PROGRESS, b'{"from": "client", "step": 1}')
CALM = Faults(**dict.fromkeys(Faults.NAMES, 0))


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, 120))


class Peer(asyncio.Protocol):
    """Says what it's told to, a byte a second or at once, and nothing else whatever comes."""

    transport: Any = None

    def __init__(self, say: bytes = b"", *, slowly: bool = False) -> None:
        self.say, self.slowly = say, slowly
        self.lost = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self.slowly:
            self.more()
        else:
            transport.write(self.say)

    async def connect(self, address: Any) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, *address)

    def more(self) -> None:
        if self.say and not self.lost.is_set():
            self.transport.write(self.say[:1])
            self.say = self.say[1:]
            asyncio.get_running_loop().call_later(1.0, self.more)

    def data_received(self, data: bytes) -> None:
        pass

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set()


# ---- floods --------------------------------------------------------------------------------------------------


async def crowd(server: Any, address: Any, security: headrace.Negotiate, clients: int, say: bytes) -> None:
    """Clients that don't authenticate, of which only so many stay; a good one is let in all the same."""
    loop: Any = asyncio.get_running_loop()
    limit = security.max_pending_handshakes
    peers = [Peer(say) for _ in range(clients)]
    for peer in peers:
        await peer.connect(address)
        assert len(security._pending) <= limit
    for peer in peers[: clients - limit]:
        await peer.lost.wait()
    assert len(security._pending) == limit
    assert not any(peer.lost.is_set() for peer in peers[clients - limit :])
    good = Bytes()
    transport, _ = await loop.create_connection(
        lambda: good, *address, security=headrace.Negotiate(), server_hostname=NAME
    )
    assert transport.get_extra_info("security").mechanism == "kerberos"
    await peers[clients - limit].lost.wait()  # the oldest gave way to the good one, and nobody else did
    assert sum(peer.lost.is_set() for peer in peers) == clients - limit + 1
    for peer in peers:
        peer.transport.abort()
    transport.abort()
    await good.seen("lost")
    server.close()


@pytest.mark.parametrize("say", [b"", TOKEN[:3], TOKEN[:-1]], ids=["silent", "half a header", "half a token"])
def test_three_thousand_who_do_not_authenticate(monkeypatch: pytest.MonkeyPatch, say: bytes) -> None:
    """From one address, with the limit that there is by default."""
    installed(monkeypatch, Script())

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        heard = Heard()
        security = headrace.Negotiate()
        assert security.max_pending_handshakes == 1024
        server = await loop.create_server(heard, "toy", 1, security=security)
        await crowd(server, ("toy", 1), security, 3000, say)
        await asyncio.sleep(60)
        assert [each.events[0] for each in heard.made if each.events] == ["made"]

    simulated_run(main(), 1, faults=CALM, descriptors=7000)


def test_three_thousand_over_a_kernel(loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer where a process may not have so many descriptors."""
    installed(monkeypatch, Script())
    clients = min(3000, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200) // 2)
    security = headrace.Negotiate(max_pending_handshakes=min(1024, clients // 3))
    heard = Heard()

    async def main() -> None:
        async with secured.serving(heard, None, NAME, security=security) as pair:
            await crowd(pair.server, pair.address, security, clients, TOKEN[:-1])
            while security._pending:
                await asyncio.sleep(0.001)

    run(loop, main())
    assert [each.events[0] for each in heard.made if each.events] == ["made"]


@pytest.mark.parametrize(
    "say", [TOKEN, wire(IN_PROGRESS, bytes(65_535)), b""], ids=["slow", "slower", "silent"]
)
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_byte_a_second(monkeypatch: pytest.MonkeyPatch, side: str, say: bytes) -> None:
    """One time limit for the whole handshake, whichever side takes its time."""
    installed(monkeypatch, Script(rounds=2))

    async def main() -> float:
        loop: Any = asyncio.get_running_loop()
        peers: list[Peer] = []

        def factory() -> Peer:
            peers.append(Peer(say, slowly=True))
            return peers[-1]

        protocol = Bytes()
        if side == "server":
            server = await loop.create_server(lambda: protocol, "toy", 1, security=headrace.Negotiate())
            began = loop.time()
            await loop.create_connection(factory, "toy", 1)
        else:
            server = await loop.create_server(factory, "toy", 1)
            began = loop.time()
            with pytest.raises(HandshakeError, match="took longer than 10 s"):
                await loop.create_connection(lambda: protocol, "toy", 1, security=headrace.Negotiate())
        await peers[0].lost.wait()
        server.close()
        ended = loop.time()
        await asyncio.sleep(5)
        assert protocol.events == []
        return float(ended - began)

    for seed in range(5):
        assert 10 <= simulated_run(main(), seed, faults=CALM) < 11


# ---- those who don't answer -----------------------------------------------------------------------------------

BLOCKED = 50
SILENT_KDC = """
import asyncio, atexit, sys
import headrace
from headrace.security.steps import CLIENTS, SERVERS, StepThreads

BLOCKED = 50
engine, ccache, principal, password = sys.argv[1:]


def busy():
    return CLIENTS._threads - CLIENTS._idle


class Echo(headrace.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def lease_received(self, lease):
        self.transport.write(lease)


async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", 0, security=headrace.Negotiate())
    address = server.sockets[0].getsockname()
    good = headrace.Negotiate(credentials=headrace.Credentials(ccache=ccache))
    nobody = headrace.Credentials(principal=principal, password=password)
    asking = headrace.Negotiate(credentials=nobody, handshake_timeout=2.0)
    connecting = [
        asyncio.ensure_future(
            loop.create_connection(asyncio.Protocol, *address, security=asking, server_hostname="localhost")
        )
        for _ in range(BLOCKED)
    ]
    while busy() < BLOCKED:
        await asyncio.sleep(0.001)
    for number in range(20):
        reader, writer = await asyncio.open_connection(*address, security=good, server_hostname="localhost")
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()
        await writer.wait_closed()
    assert busy() == BLOCKED, "the KDC has answered"
    print("others go on")
    ended = await asyncio.gather(*connecting, return_exceptions=True)
    print(*{f"{type(each).__name__}: {each}" for each in ended})
    server.close()


loop = headrace.new_event_loop(engine=engine)
loop.run_until_complete(main())
loop.close()
print("the loop is closed,", busy(), "wait")
atexit.register(lambda: print("the interpreter ends,", busy(), "wait"))
"""


@contextlib.contextmanager
def silent_kdcs(realm: Realm, count: int = 4) -> Iterator[Path]:
    """A configuration whose KDCs take what is sent to them, by UDP and TCP, and say nothing."""
    with contextlib.ExitStack() as stack:
        lines: list[str] = []
        while len(lines) < count:
            tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
            udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            with contextlib.suppress(OSError):  # another process has the port
                udp.bind(tcp.getsockname())
                lines.append(f"kdc = 127.0.0.1:{tcp.getsockname()[1]}")
        text = Path(realm.env["KRB5_CONFIG"]).read_text(encoding="utf-8")
        path = realm.path("krb5.conf")
        path.write_text(text.replace(f"kdc = 127.0.0.1:{realm.port}", "\n".join(lines)), encoding="utf-8")
        yield path


def test_a_kdc_that_is_silent(engine_name: str, realm: Realm) -> None:
    """50 clients ask it: others go on, their connections end in time, and neither loop nor interpreter waits for it."""
    ccache = realm.kinit()
    realm.kvno("host/localhost", ccache=ccache)
    with silent_kdcs(realm) as configuration:
        done = subprocess.run(
            [sys.executable, "-c", SILENT_KDC, engine_name, str(ccache), realm.principal, realm.password],
            env=realm.environment(KRB5_CONFIG=str(configuration)),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "others go on",
        "HandshakeError: the authentication took longer than 2 s",
        "the loop is closed, 50 wait",
        "the interpreter ends, 50 wait",
    ]
    assert done.stderr == ""


def gated(monkeypatch: pytest.MonkeyPatch, side: str) -> tuple[Script, threading.Event]:
    """A mechanism whose steps on that side block until the event."""
    gate = threading.Event()
    return installed(monkeypatch, Script(gate=gate, gated=side)), gate


def initiators(script: Script) -> int:
    """Clients' contexts that have been made, which is in their first step."""
    return sum(context.initiator for context in list(script.contexts))


async def under_way(threads: StepThreads, steps: int) -> None:
    """So many are being done, and the rest waits."""
    expected = min(steps, threads._most), max(0, steps - threads._most)
    while (threads._threads - threads._idle, len(threads._jobs)) != expected:
        await asyncio.sleep(0.001)


def toy_server() -> Any:
    return secured.serving(Leases, headrace.Negotiate(), NAME, security=headrace.Negotiate())


def test_steps_that_nobody_waits_for_are_not_begun(
    loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a KDC answers again, nobody queues behind those who have given up."""
    script, gate = gated(monkeypatch, "client")
    begun, queued = CLIENTS._most, 20

    async def main() -> None:
        async with toy_server() as pair:
            hasty = headrace.Negotiate(handshake_timeout=0.5)
            connecting = [pair.connect(Bytes(), hasty) for _ in range(begun + queued)]
            for each in await asyncio.gather(*connecting, return_exceptions=True):
                assert isinstance(each, HandshakeError)
            gate.set()
            client = Bytes()
            (await pair.connect(client)).abort()
            await client.seen("lost")
            assert initiators(script) == begun + 1

    run(loop, main())


def test_clients_steps_that_wait_are_bounded(
    loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond that, a connection fails at once."""
    monkeypatch.setattr(steps, "WAITING_LIMIT", 5)
    _, gate = gated(monkeypatch, "client")
    found = reports(loop)

    async def main() -> None:
        async with toy_server() as pair:
            connecting = []
            for number in range(CLIENTS._most + 5):
                connecting.append(asyncio.ensure_future(pair.connect(Bytes())))
                await under_way(CLIENTS, number + 1)
            client = Bytes()
            with pytest.raises(HandshakeError, match="wait for a thread already"):
                await pair.connect(client)
            assert client.events == []
            assert not any(each.done() for each in connecting)
            monkeypatch.setattr(steps, "WAITING_LIMIT", 10_000)  # the server's steps come all at once
            gate.set()
            for each in connecting:
                (await each).abort()

    run(loop, main())
    assert found == []


def test_servers_steps_that_wait_are_bounded(
    loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(steps, "WAITING_LIMIT", 5)
    _, gate = gated(monkeypatch, "server")
    found = reports(loop)

    async def main() -> None:
        async with toy_server() as pair:
            peers = [Peer(TOKEN) for _ in range(SERVERS._most + 6)]
            for number, peer in enumerate(peers[:-1]):
                await peer.connect(pair.address)
                await under_way(SERVERS, number + 1)
            await peers[-1].connect(pair.address)
            await peers[-1].lost.wait()
            assert not any(peer.lost.is_set() for peer in peers[:-1])
            gate.set()
            for peer in peers[:-1]:
                await pair.accepted.get()
                peer.transport.abort()

    with caplog.at_level("INFO", "headrace.security"):
        run(loop, main())
    assert caplog.text.count("authentications wait for a thread already") == 1
    assert found == []


# ---- peers that don't read -------------------------------------------------------------------------------------


async def zero_window(address: Any) -> socket.socket:
    """A client that has authenticated, and reads nothing more."""
    loop = asyncio.get_running_loop()
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    peer.setblocking(False)
    await loop.sock_connect(peer, address)
    await loop.sock_sendall(peer, TOKEN)
    assert (await loop.sock_recv(peer, 1))[0] == DONE
    return peer


class Source(Leases):
    """Writes as long as it may, and whatever comes is echoed."""

    def connection_made(self, transport: Any) -> None:
        lower = transport.get_extra_info("socket")
        lower.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)

    def go(self) -> None:
        while "pause" not in self.events:
            self.transport.write(bytes(16 * 1024))


def test_peers_that_do_not_read(loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is queued for each of them is bounded by the flow control, others go on, and closing takes its time only."""
    installed(monkeypatch, Script())
    peers_count = min(500, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200) // 2)
    # The high-water mark; what is encrypted at a time; what was written before the protocol was paused.
    bound = 64 * 1024 + 64 * 1024 + 16 * 1024

    async def main() -> None:
        security = headrace.Negotiate(shutdown_timeout=0.2)
        async with secured.serving(Source, headrace.Negotiate(), NAME, security=security) as pair:
            peers = [await zero_window(pair.address) for _ in range(peers_count)]
            servers = [await pair.accepted.get() for _ in peers]
            for server in servers:
                server.go()
            for _ in range(20):
                await asyncio.sleep(0.001)
                assert max(server.transport.get_write_buffer_size() for server in servers) <= bound
            assert min(server.transport.get_write_buffer_size() for server in servers) > 0
            client = Bytes()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            server.transport.write(b"you read")
            await client.until(lambda: client.data == b"you read")
            transport.close()
            for each in servers:
                each.transport.close()
            for each in servers:
                await each.seen("lost")
                assert isinstance(each.error, StalledError)
            for peer in peers:
                peer.close()

    run(loop, main())


# ---- keys, clocks, names, addresses ------------------------------------------------------------------------------


def with_cache(ccache: Path, **options: Any) -> headrace.Negotiate:
    return headrace.Negotiate(credentials=headrace.Credentials(ccache=ccache), **options)


async def echoed(pair: secured.Pair, security: Any = None) -> None:
    """One connection through which a message goes both ways."""
    client = Bytes()
    transport = await pair.connect(client, security)
    server = await pair.accepted.get()
    transport.write(ORDER)
    await server.until(lambda: server.data == ORDER)
    server.transport.write(ORDER)
    await client.until(lambda: client.data == ORDER)
    transport.close()
    await client.seen("lost")


async def denied(pair: secured.Pair, security: Any) -> None:
    with pytest.raises(AuthenticationError) as told:
        await pair.connect(Bytes(), security)
    assert told.value.code == LOGON_DENIED
    assert pair.accepted.empty()


def test_keys_rotate_under_load(
    engine_name: str, loop: headrace.EventLoop, realm: Realm, caplog: pytest.LogCaptureFixture
) -> None:
    """Old tickets go on working while the old key is in the keytab, new ones from then on that the new one is."""
    service = f"{engine_name}/localhost"
    realm.add(service)
    keytab = realm.export(service, keytab=realm.path("keytab"))
    old = realm.kinit()
    realm.kvno(service, ccache=old)
    with_old = with_cache(old, target=service)
    connections = 0
    stop = asyncio.Event()

    async def load(pair: secured.Pair) -> None:
        nonlocal connections
        while not stop.is_set():
            await echoed(pair, with_old)
            connections += 1

    async def main() -> None:
        security = headrace.Negotiate(credentials=headrace.Credentials(keytab=keytab))
        async with secured.serving(Leases, with_old, NAME, security=security) as pair:
            loads = [asyncio.ensure_future(load(pair)) for _ in range(4)]
            await asyncio.to_thread(realm.rotate, service, export=False)
            with_new = with_cache(await asyncio.to_thread(realm.kinit), target=service)
            await asyncio.to_thread(realm.export, service, keytab=keytab)
            await echoed(pair, with_new)
            seen = connections
            while connections < seen + 8:
                await asyncio.sleep(0.001)
            stop.set()
            await asyncio.gather(*loads)
            await asyncio.to_thread(realm.admin, "ktremove", "-k", str(keytab), service, "old")
            caplog.clear()
            await denied(pair, with_old)
            assert "the server hasn't the key (its version) that the ticket is made with" in caplog.text
            assert "kvno 1 not found" in caplog.text
            await echoed(pair, with_new)

    with realm.applied(), caplog.at_level("INFO", "headrace.security"):
        run(loop, main())


def test_two_targets_in_a_keytab(loop: headrace.EventLoop, realm: Realm) -> None:
    """A server may be asked for by any of its names, or by those that it allows."""

    async def main() -> None:
        host, test = (with_cache(realm.ccache, target=f"{each}/localhost") for each in ("host", "test"))
        async with secured.serving(Leases, host, NAME, security=headrace.Negotiate()) as pair:
            await echoed(pair, host)
            await echoed(pair, test)
        only = headrace.Negotiate(allowed_targets=["test/localhost"])
        async with secured.serving(Leases, host, NAME, security=only) as pair:
            await echoed(pair, test)
            await denied(pair, host)

    with realm.applied():
        run(loop, main())


def shifted(realm: Realm, seconds: int) -> Path:
    """Tickets in a cache which says that the KDC's clock is ahead by so much: MIT goes by that clock (its file format's
    header, tag 1), so it's as if the client's own were wrong."""
    fresh = realm.kinit()  # a client whose clock is late takes an older ticket for a valid one
    realm.kvno("host/localhost", ccache=fresh)
    data = fresh.read_bytes()
    assert data[:2] == b"\x05\x04"
    header = struct.pack(">HHii", 1, 8, seconds, 0)
    path = realm.path("ccache")
    path.write_bytes(
        data[:2] + struct.pack(">H", len(header)) + header + data[4 + int.from_bytes(data[2:4]) :]
    )
    return path


TOO_FAR = "the clocks of client and server (or KDC) differ too much"
# Behind the KDC, a client can't use its own ticket; what a server says then is in test_mechanisms.py.
SKEWS = [(-6, "the ticket isn't valid yet: check the clocks"), (-4, ""), (0, ""), (4, ""), (6, TOO_FAR)]


@pytest.mark.parametrize(("minutes", "said"), SKEWS)
def test_clock_skew(
    loop: headrace.EventLoop, realm: Realm, caplog: pytest.LogCaptureFixture, minutes: int, said: str
) -> None:
    """Kerberos allows five minutes; beyond them the error says that it's the clocks."""

    async def main() -> None:
        security = with_cache(shifted(realm, 60 * minutes))
        async with secured.serving(Leases, security, NAME, security=headrace.Negotiate()) as pair:
            if said:
                await denied(pair, security)
            else:
                await echoed(pair)

    with realm.applied(), caplog.at_level("INFO", "headrace.security"):
        run(loop, main())
    assert said in caplog.text
    assert bool(caplog.text) is bool(said)


def test_ipv6(loop: headrace.EventLoop, realm: Realm) -> None:
    """The address is no name; the target is, and is asked for whatever the address."""
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")

    async def main() -> None:
        any_loop: Any = loop
        accepted: asyncio.Queue[Leases] = asyncio.Queue()
        server = await any_loop.create_server(
            lambda: Leases(made=accepted.put_nowait), "::1", 0, security=headrace.Negotiate()
        )
        async with server:
            address = server.sockets[0].getsockname()[:2]
            client = Bytes()
            transport, _ = await any_loop.create_connection(
                lambda: client, *address, security=with_cache(realm.ccache, target="host/localhost")
            )
            there = await accepted.get()
            assert there.transport.get_extra_info("security").remote_identity.name == realm.principal
            transport.close()
            await client.seen("lost")

    with realm.applied():
        run(loop, main())


def test_a_forwarded_ticket_opens_the_next_door(loop: headrace.EventLoop, realm: Realm) -> None:
    """The second hop is made with what the connection says was forwarded, and is the client's."""
    import gssapi.raw as g

    async def main() -> None:
        wanted = ImpersonationLevel.DELEGATION
        client_side = with_cache(realm.ccache, impersonation=wanted)
        security = headrace.Negotiate(impersonation=wanted)
        async with secured.serving(Leases, client_side, NAME, security=security) as pair:
            client = Bytes()
            transport = await pair.connect(client)
            info = (await pair.accepted.get()).transport.get_extra_info("security")
            assert info.impersonation_level is wanted
            name = g.import_name(b"test@localhost", g.NameType.hostbased_service)
            first = await asyncio.to_thread(g.init_sec_context, name, info.delegated)
            accepting = g.acquire_cred_from(None, None, mechs=None, usage="accept").creds
            door = g.accept_sec_context(first.token or b"", accepting)
            assert g.display_name(door.initiator_name, name_type=False).name.decode() == realm.principal
            transport.close()
            await client.seen("lost")

    with realm.applied():
        run(loop, main())


async def frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    kind, _, _, size = struct.unpack(">BBBH", await reader.readexactly(5))
    return kind, await reader.readexactly(size)


def test_a_client_that_reselects(loop: headrace.EventLoop, realm: Realm) -> None:
    """Its first choice isn't ours: SPNEGO goes on with Kerberos and signs its list, which uses up a number."""
    import gssapi.raw as g

    krb5 = g.OID.from_int_seq("1.2.840.113554.1.2.2")
    listed = pack_mechanisms(bytes.fromhex("2b0601040182370202ff01"), KERBEROS[0])

    async def main() -> None:
        async with secured.serving(Leases, None, NAME, security=headrace.Negotiate()) as pair:
            reader, writer = await asyncio.open_connection(*pair.address)
            writer.write(wire(IN_PROGRESS, pack_init(listed, b"not for you")))
            chosen = unpack_resp((await frame(reader))[1])
            assert (chosen.state, chosen.mechanism) == (REQUEST_MIC, KERBEROS[0])
            name = g.import_name(b"host@localhost", g.NameType.hostbased_service)
            began = g.init_sec_context(name, None, None, krb5, [0x3E])
            writer.write(wire(IN_PROGRESS, pack_resp(NegTokenResp(token=began.token))))
            kind, body = await frame(reader)
            assert kind == IN_PROGRESS
            answer = unpack_resp(body).token
            any_context: Any = g.init_sec_context(
                name, None, began.context, krb5, [0x3E], input_token=answer
            ).context
            mic = g.get_mic(any_context, listed)
            writer.write(wire(IN_PROGRESS, pack_resp(NegTokenResp(ACCEPT_INCOMPLETE, mic=mic))))
            assert (await frame(reader))[0] == DONE
            writer.write(wire(None, g.wrap(any_context, ORDER, True).message))
            server = await pair.accepted.get()
            await server.until(lambda: server.data == ORDER)
            assert server.transport.get_extra_info("security").mechanism == "kerberos"
            writer.close()
            await server.seen("lost")

    with realm.applied():
        run(loop, main())
