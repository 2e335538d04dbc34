"""What hostile peers do once a TLS connection stands, and how it ends. See docs/threats-tls.md for the whole list."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import headrace
from authorities import ca_file, issued
from headrace.errors import FramingError, StalledError, TruncatedError
from headrace.testing import Faults, simulated_run
from hostile import FIN, RST, V12, V13, ByHand, Records, TLSPeer, client_context, server_context
from streams import Bytes, Leases, Recorder

NAME = "server.example"
KEY_UPDATES = 10_000
SILENT_LIMIT = 32  # records in a row without data that are borne
TURN_LIMIT = 64  # small records of one connection that one turn works off
VERSIONS = [V12, V13]


def server_tls(**options: Any) -> headrace.TLS:
    files = issued(NAME)
    return headrace.TLS(certificate=files.chain, private_key=files.key, **options)


def client_tls(**options: Any) -> headrace.TLS:
    return headrace.TLS(ca=ca_file(), **options)


@contextlib.asynccontextmanager
async def serving(factory: Callable[[], Any], **options: Any) -> AsyncIterator[Any]:
    """The address of a server."""
    loop: Any = asyncio.get_running_loop()
    server = await loop.create_server(factory, "127.0.0.1", 0, **options)
    async with server:
        yield server.sockets[0].getsockname()


@contextlib.asynccontextmanager
async def victim_and_peer(
    side: str, peer: Any, protocol: Recorder, security: headrace.TLS | None = None, **asyncio_s: Any
) -> AsyncIterator[Any]:
    """Connects ``protocol``, on this side, with a hostile peer on the other; gives the protocol's transport."""
    loop: Any = asyncio.get_running_loop()
    options = asyncio_s or {"security": security or (server_tls() if side == "server" else client_tls())}
    if side == "server":
        async with serving(lambda: protocol, **options) as address:
            await loop.create_connection(lambda: peer, *address)
            await protocol.seen("made")
            yield protocol.transport
            peer.transport.abort()
            await protocol.seen("lost")
            await peer.lost.wait()
    else:
        async with serving(lambda: peer) as address:
            transport, _ = await loop.create_connection(
                lambda: protocol, *address, server_hostname=NAME, **options
            )
            yield transport
            peer.transport.abort()
            await protocol.seen("lost")
            await peer.lost.wait()


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(main)


def count_key_updates(context: ssl.SSLContext) -> list[bytes]:
    """The key updates that OpenSSL has worked off, as they come: its message callback sees each."""
    seen: list[bytes] = []

    def note(conn: Any, direction: str, version: Any, content_type: Any, kind: Any, data: bytes) -> None:
        if direction == "read" and int(content_type) == 22 and int(kind) == 24:
            seen.append(data)

    context._msg_callback = note  # type: ignore[attr-defined]  # the standard library's own, for its tests
    return seen


# ---- records without data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["security", "ssl"])
@pytest.mark.parametrize("side", ["server", "client"])
def test_key_update_flood(loop: headrace.EventLoop, tmp_path: Path, side: str, how: str) -> None:
    """10,000 key updates, each of which wants an answer, of a peer that doesn't read: at most 64 are worked off."""

    async def main() -> None:
        context = server_context(NAME) if side == "server" else client_context()
        seen = count_key_updates(context)
        peer = ByHand(tmp_path, server_name=NAME, server_side=side == "client")
        protocol = Bytes()
        options: Any = {"ssl": context} if how == "ssl" else {"security": headrace.TLS(context=context)}
        async with victim_and_peer(side, peer, protocol, **options):
            records = await peer.records()
            peer.transport.pause_reading()
            before = peer.wire_bytes
            peer.send_wire(b"".join(records.key_update() for _ in range(KEY_UPDATES)))
            await protocol.seen("lost")
            assert isinstance(protocol.error, FramingError)
            assert SILENT_LIMIT < len(seen) <= 64
            peer.transport.resume_reading()
            await peer.lost.wait()
            assert peer.wire_bytes - before <= 64 * 1024
            assert not protocol.data

    run(loop, main())


class Hasty(ByHand):
    """Sends key updates in the same segment as the last flight of its handshake."""

    def flush(self) -> None:
        flight = self.outgoing.read()
        if self.handshake_done.is_set() and flight:
            cipher = self.tls.cipher()
            assert cipher is not None
            records = Records(cipher[0], self.keylog)
            flight += b"".join(records.key_update() for _ in range(KEY_UPDATES // 20))
        self.send_wire(flight)


def test_key_update_flood_behind_the_handshake(loop: headrace.EventLoop, tmp_path: Path) -> None:
    """What comes in one segment with the end of the handshake counts no less: here 500 key updates."""

    async def main() -> None:
        context = server_context(NAME)
        seen = count_key_updates(context)
        protocol = Bytes()
        peer = Hasty(tmp_path, server_name=NAME)
        async with serving(lambda: protocol, security=headrace.TLS(context=context)) as address:
            await loop.create_connection(lambda: peer, *address)
            await protocol.seen("lost")
            await peer.lost.wait()
        assert isinstance(protocol.error, FramingError)
        assert 0 < len(seen) <= 64 + SILENT_LIMIT
        assert peer.wire_bytes <= 64 * 1024

    run(loop, main())


@pytest.mark.parametrize("in_pieces", [False, True], ids=["together", "one by one"])
def test_empty_record_flood(loop: headrace.EventLoop, tmp_path: Path, in_pieces: bool) -> None:
    """Records of no bytes, which are no key updates, fall under the same limit; so do those that come alone."""

    async def main() -> None:
        peer = ByHand(tmp_path, server_name=NAME)
        protocol = Bytes()
        async with victim_and_peer("server", peer, protocol):
            records = await peer.records()
            flood = [records.data(b"") for _ in range(1000)]
            if in_pieces:
                for each in flood:
                    peer.send_wire(each)
                    await asyncio.sleep(0)
            else:
                peer.send_wire(b"".join(flood))
            await protocol.seen("lost")
            # OpenSSL has a limit of its own for empty records, and may meet it first.
            assert isinstance(protocol.error, (FramingError, ssl.SSLError))

    run(loop, main())


def test_key_updates_below_the_limit_are_borne(loop: headrace.EventLoop, tmp_path: Path) -> None:
    """As many in a row as the limit allows, again and again, as long as data comes between them."""

    async def main() -> None:
        peer = ByHand(tmp_path, server_name=NAME)
        protocol = Bytes()
        async with victim_and_peer("server", peer, protocol):
            records = await peer.records()
            for _ in range(20):
                updates = [records.key_update() for _ in range(SILENT_LIMIT)]
                peer.send_wire(b"".join(updates) + records.data(b"x"))
            await protocol.until(lambda: len(protocol.data) == 20)
            protocol.transport.write(b"still here")
            await peer.until(lambda: peer.data == b"still here")
            assert "lost" not in protocol.events

    run(loop, main())


def test_key_update_answers_pile_up(loop: headrace.EventLoop, tmp_path: Path) -> None:
    """A peer that sends data between its key updates, but reads no answer: reading stops, what is queued is bounded."""

    async def main() -> None:
        peer = ByHand(tmp_path, server_name=NAME)
        protocol = Bytes()
        async with victim_and_peer("server", peer, protocol) as transport:
            ours = transport.get_extra_info("socket")
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            records = await peer.records()
            peer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.transport.pause_reading()
            rounds = 500
            flood = (records.key_update() for _ in range(SILENT_LIMIT * rounds))
            peer.send_wire(
                b"".join(b"".join(islice(flood, SILENT_LIMIT)) + records.data(b"x") for _ in range(rounds))
            )
            largest = unchanged = 0
            while unchanged < 200:  # turns
                before = len(protocol.data), transport.get_write_buffer_size()
                await asyncio.sleep(0)
                now = len(protocol.data), transport.get_write_buffer_size()
                largest = max(largest, now[1])
                unchanged = unchanged + 1 if now == before else 0
            assert 0 < len(protocol.data) < rounds  # it doesn't read any more
            assert largest > 64 * 1024  # for this reason
            # The high-water mark, the answers' limit, and the answers to what one receive brought.
            assert largest <= 64 * 1024 + 64 * 1024 + 256 * 1024
            assert "lost" not in protocol.events
            peer.transport.resume_reading()
            await protocol.until(lambda: len(protocol.data) == rounds)

    run(loop, main())


class Counting(Bytes):
    """Notes how many bytes come in each turn."""

    def __init__(self, loop: Any, **on: Any) -> None:
        super().__init__(**on)
        self.loop = loop
        self.count = 0
        self.by_turn: dict[int, int] = {}

    def data_received(self, data: bytes) -> None:
        self.count += len(data)
        self.by_turn[self.loop.turns] = self.by_turn.get(self.loop.turns, 0) + len(data)
        self.changed.set()


def test_tiny_records_are_fair(loop: headrace.EventLoop, tmp_path: Path) -> None:
    """One peer floods with records of one byte; no turn works off more than its budget, and 100 others get through.

    Counted is how many records of the flood come between a message and its echo; measuring times would say more about
    the machine.
    """
    flood_size = 20_000

    async def main() -> None:
        victims: list[Counting] = []

        def victim() -> Counting:
            victims.append(Counting(loop))
            return victims[-1]

        async with serving(victim, security=server_tls()) as flooded:
            flooder = ByHand(tmp_path, server_name=NAME)
            await loop.create_connection(lambda: flooder, *flooded)
            records = await flooder.records()
            while not victims or "made" not in victims[0].events:
                await asyncio.sleep(0)
            echo = lambda: Bytes(received=lambda it: it.transport.write(bytes(it.data[-5:])))  # noqa: E731
            async with serving(echo, security=server_tls()) as address:
                clients = [TLSPeer(client_context(), server_hostname=NAME) for _ in range(100)]
                for client in clients:
                    await loop.create_connection(lambda client=client: client, *address)
                    await client.handshake_done.wait()
                flooder.send_wire(b"".join(records.data(b"x") for _ in range(flood_size)))
                await victims[0].until(lambda: victims[0].count > 0)
                before = victims[0].count
                for client in clients:
                    client.write(b"hello")
                for client in clients:
                    await client.until(lambda client=client: client.data == b"hello")
                between = victims[0].count - before
                await victims[0].until(lambda: victims[0].count == flood_size)
                for client in clients:
                    client.transport.abort()
            flooder.transport.abort()
            await victims[0].seen("lost")
        # What one call works off, and the call that one turn may begin with for what came in the turn before.
        assert max(victims[0].by_turn.values()) <= 2 * (TURN_LIMIT + SILENT_LIMIT)
        assert between <= flood_size // 4

    run(loop, main())


# ---- the end of the stream -------------------------------------------------------------------------------------

SAID = [b"the first record ", b"the second ", b"and the last"]
MESSAGE = b"".join(SAID)
AT_A_TIME = 25  # connections


class Telling(TLSPeer):
    """Says three records and its close_notify, as far as it may."""

    complete = False  # nothing of that was cut off

    def advance(self) -> None:
        had = self.handshake_done.is_set()
        super().advance()
        if self.handshake_done.is_set() and not had and self.error is None:
            for each in SAID:
                self.write(each)
            self.close_notify()
            self.complete = not self.cut_off


async def flight_size(context: ssl.SSLContext) -> int:
    """How many bytes a server says from its ServerHello to its close_notify."""
    peers: list[Telling] = []

    def factory() -> Telling:
        peers.append(Telling(context, server_side=True, at_most=1 << 20))
        return peers[-1]

    async with serving(factory) as address:
        protocol = Bytes()
        await asyncio.get_running_loop().create_connection(  # type: ignore[call-overload]
            lambda: protocol, *address, security=client_tls(), server_hostname=NAME
        )
        await protocol.seen("lost")
        assert protocol.data == MESSAGE
        assert protocol.error is None
    left = peers[0].left
    assert left is not None
    return (1 << 20) - left


async def cut_off(context: ssl.SSLContext, at_most: int, end: str, **options: Any) -> tuple[Telling, Bytes]:
    """One connection to a server that says so many bytes and no more."""
    peer = Telling(context, server_side=True, at_most=at_most, end=end)
    protocol = Bytes()
    loop: Any = asyncio.get_running_loop()
    async with serving(lambda: peer) as address:
        try:
            await loop.create_connection(lambda: protocol, *address, server_hostname=NAME, **options)
        except (OSError, headrace.HeadraceError) as exc:
            protocol.error = exc
            assert protocol.events == []
        else:
            await protocol.seen("lost")
        peer.transport.abort()
        await peer.lost.wait()
    return peer, protocol


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("end", [FIN, RST])
def test_truncation_at_every_byte(loop: headrace.EventLoop, end: str, version: ssl.TLSVersion) -> None:
    """Wherever a server's flight and data are cut: what was received is a beginning of what was said, and an error."""

    async def main() -> None:
        context = server_context(NAME, version)
        size = await flight_size(context)
        security = client_tls(resumption=False)
        established = 0
        for start in range(0, size, AT_A_TIME):
            offsets = range(start, min(start + AT_A_TIME, size))
            runs = [cut_off(context, offset, end, security=security) for offset in offsets]
            for peer, protocol in await asyncio.gather(*runs):
                assert MESSAGE.startswith(protocol.data)
                if (
                    peer.complete
                ):  # a signature may be a byte or two shorter than in the flight that was measured
                    continue
                assert "eof" not in protocol.events
                assert protocol.error is not None
                if protocol.events:
                    established += 1
                    kind = TruncatedError if end == FIN else ConnectionResetError
                    assert isinstance(protocol.error, kind)
        assert established > len(MESSAGE)  # offsets in the data were among them

    run(loop, main())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", ["security", "ssl"])
def test_truncation_taken_as_an_end(loop: headrace.EventLoop, how: str, version: ssl.TLSVersion) -> None:
    """``truncation="eof"`` takes a FIN as the end, and asyncio's ``ssl=`` always has; but not one in the handshake."""

    async def main() -> None:
        context = server_context(NAME, version)
        size = await flight_size(context)
        options: Any = {"security": client_tls(truncation="eof", resumption=False)}
        if how == "ssl":
            options = {"ssl": client_context()}
        ends = 0
        for offset in range(0, size - 4, 3):
            _, protocol = await cut_off(context, offset, FIN, **options)
            assert MESSAGE.startswith(protocol.data)
            if protocol.events:
                ends += 1
                assert protocol.error is None
                assert protocol.events[-2:] == ["eof", "lost"]
            else:
                assert protocol.error is not None
        assert ends > len(MESSAGE) // 3

    run(loop, main())


class Pausing(Bytes):
    """Doesn't read from its first bytes on, until somebody says so."""

    def data_received(self, data: bytes) -> None:
        if not self.data:
            self.transport.pause_reading()
        super().data_received(data)


@pytest.mark.parametrize("pauses", [False, True], ids=["reads", "pauses"])
@pytest.mark.parametrize("how", ["eof", "ssl"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "whole"])
def test_what_a_peer_that_left_is_told(loop: headrace.EventLoop, how: str, cut: bool, pauses: bool) -> None:
    """asyncio says nothing to a peer that has left without a word; headrace.TLS ends its own stream all the same."""

    async def main() -> None:
        context = server_context(NAME)
        size = await flight_size(context)
        within_close_notify = size - 12
        peer = Telling(context, server_side=True, at_most=within_close_notify if cut else None)
        options: Any = (
            {"ssl": client_context()} if how == "ssl" else {"security": client_tls(truncation="eof")}
        )
        protocol = Pausing() if pauses else Bytes()
        async with serving(lambda: peer) as address:
            transport, _ = await loop.create_connection(
                lambda: protocol, *address, server_hostname=NAME, **options
            )
            if pauses:
                await peer.until(lambda: peer.ended or peer.complete)
                for _ in range(5):
                    await asyncio.sleep(0)
                transport.resume_reading()
            await protocol.seen("lost")
            await peer.lost.wait()
        assert protocol.data == MESSAGE
        assert peer.closed_by_peer is not (cut and how == "ssl")

    run(loop, main())


@pytest.mark.parametrize("how", ["security", "eof", "ssl"])
def test_truncation_in_streams(loop: headrace.EventLoop, how: str) -> None:
    """A reader gets what came, and then TruncatedError; where truncations are ends, ``b""``."""

    async def main() -> None:
        context = server_context(NAME)
        size = await flight_size(context)
        peer = Telling(context, server_side=True, at_most=size - 24)  # the close_notify and a few bytes more
        options: Any = {"security": client_tls(truncation="error" if how == "security" else "eof")}
        if how == "ssl":
            options = {"ssl": client_context()}
        async with serving(lambda: peer) as address:
            reader, writer = await asyncio.open_connection(*address, server_hostname=NAME, **options)
            said = MESSAGE[: -len(SAID[-1])]
            assert await reader.readexactly(len(said)) == said
            if how == "security":
                with pytest.raises(TruncatedError):
                    await reader.read()
            else:
                assert await reader.read() in (b"", SAID[-1])
            writer.close()
            with contextlib.suppress(TruncatedError):
                await writer.wait_closed()

    run(loop, main())


def test_truncation_on_a_faulty_network() -> None:
    """Over the simulated engine, which resets, delays and cuts as it likes: a clean end means that everything came."""
    outcomes = {"clean": 0, "cut": 0, "never": 0}
    message = bytes(range(256)) * 400

    async def main() -> str:
        loop: Any = asyncio.get_running_loop()

        def tell(it: Recorder) -> None:
            it.transport.write(message)
            it.transport.close()

        security = server_tls()
        server = await loop.create_server(lambda: Bytes(made=tell), "tls", 443, security=security)
        protocol = Bytes()
        try:
            await loop.create_connection(
                lambda: protocol, "tls", 443, security=client_tls(), server_hostname=NAME
            )
        except (OSError, headrace.HeadraceError, ssl.SSLError):
            assert protocol.events == []
            return "never"
        else:
            await protocol.seen("lost")
        finally:
            server.close()
            await asyncio.sleep(30)  # of virtual time: what the server still waits for is over by then
        assert message.startswith(protocol.data)
        if "eof" in protocol.events:
            assert protocol.data == message
            return "clean"
        assert protocol.error is not None
        return "cut"

    for seed in range(150):
        outcomes[simulated_run(main(), seed, reset=0.02 if seed % 2 else 0.0)] += 1
    assert outcomes["clean"]
    assert outcomes["cut"]


@pytest.mark.parametrize("in_pieces", [False, True], ids=["in one segment", "later"])
@pytest.mark.parametrize("kind", [Bytes, Leases])
@pytest.mark.parametrize("garbage", [False, True], ids=["records", "garbage"])
def test_bytes_after_close_notify(
    loop: headrace.EventLoop, tmp_path: Path, kind: type[Recorder], in_pieces: bool, garbage: bool
) -> None:
    """None is delivered, and none is an error."""

    async def main() -> None:
        peer = ByHand(tmp_path, server_name=NAME)
        protocol = kind(eof=lambda _: True)  # stays open, so that more could come
        async with victim_and_peer("server", peer, protocol):
            records = await peer.records()
            said = records.data(b"before") + records.close_notify()
            behind = [records.data(b"behind") for _ in range(100)]
            if garbage:
                behind = [b"GET / HTTP/1.1\r\n" for _ in range(100)]
            if in_pieces:
                peer.send_wire(said)
                await protocol.seen("eof")
                for each in behind:
                    peer.send_wire(each)
                    await asyncio.sleep(0)
            else:
                peer.send_wire(said + b"".join(behind))
                await protocol.seen("eof")
            protocol.transport.write(b"our half is open")
            await peer.until(lambda: peer.data == b"our half is open")
            protocol.transport.close()
            await protocol.seen("lost")
            assert protocol.data == b"before"
            assert protocol.events == ["made", "received", "eof", "lost"]
            assert protocol.error is None

    run(loop, main())


# ---- a peer that doesn't let go --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["security", "ssl"])
def test_shutdown_hang(loop: headrace.EventLoop, how: str) -> None:
    """The peer reads our close_notify and never answers: over when the time limit says."""

    async def main() -> None:
        peer = TLSPeer(client_context(), server_hostname=NAME)
        protocol = Bytes()
        options: Any = {"security": server_tls(shutdown_timeout=0.05)}
        if how == "ssl":
            options = {"ssl": server_context(NAME), "ssl_shutdown_timeout": 0.05}
        async with victim_and_peer("server", peer, protocol, **options) as transport:
            transport.close()
            await peer.until(lambda: peer.closed_by_peer)
            await protocol.seen("lost")
            if how == "security":
                assert protocol.error is None
            else:
                assert isinstance(protocol.error, TimeoutError)

    run(loop, main())


def test_shutdown_hang_in_virtual_time() -> None:
    """By default it's over after 5 s, not before, whatever the network does."""

    async def main() -> float:
        loop: Any = asyncio.get_running_loop()
        protocol = Bytes(made=lambda it: it.transport.close())
        server = await loop.create_server(lambda: protocol, "tls", 443, security=server_tls())
        peer = TLSPeer(client_context(), server_hostname=NAME)
        await loop.create_connection(lambda: peer, "tls", 443)
        await protocol.seen("made")
        began = loop.time()
        await protocol.seen("lost")
        assert protocol.error is None
        peer.transport.abort()
        server.close()
        return float(loop.time() - began)

    calm = Faults(**dict.fromkeys(Faults.NAMES, 0))
    for seed in range(20):
        assert 5 <= simulated_run(main(), seed, faults=calm) < 6


def test_shutdown_hang_with_bytes_queued(loop: headrace.EventLoop) -> None:
    """The peer doesn't even read: what is queued doesn't keep the connection, and the protocol hears of it."""

    async def main() -> None:
        peer = TLSPeer(client_context(), server_hostname=NAME)
        protocol = Bytes()
        security = server_tls(shutdown_timeout=0.05)
        async with victim_and_peer("server", peer, protocol, security=security) as transport:
            await peer.handshake_done.wait()
            peer.transport.pause_reading()
            for _ in range(32):
                transport.write(bytes(1 << 20))
            await protocol.seen("pause")
            transport.close()
            await protocol.seen("lost")
            assert isinstance(protocol.error, StalledError)

    run(loop, main())


@pytest.mark.parametrize("how", ["security", "ssl"])
@pytest.mark.parametrize("queued", [0, 32 << 20], ids="with {} bytes queued".format)
def test_abort_waits_for_nobody(loop: headrace.EventLoop, how: str, queued: int) -> None:
    """After ``abort`` the connection is lost within a few turns, also in the middle of a shutdown that hangs."""

    async def main() -> None:
        peer = TLSPeer(client_context(), server_hostname=NAME)
        protocol = Bytes()
        options: Any = {"security": server_tls()}
        if how == "ssl":
            options = {"ssl": server_context(NAME)}
        async with victim_and_peer("server", peer, protocol, **options) as transport:
            await peer.handshake_done.wait()
            peer.transport.pause_reading()
            transport.write(bytes(queued))
            transport.close()
            await asyncio.sleep(0)
            turn = loop.turns
            transport.abort()
            await protocol.seen("lost")
            assert loop.turns - turn <= 10
            assert protocol.error is None

    run(loop, main())
