"""What somebody in between does to a Kerberos or NTLM connection: replays, changed frames, tickets that end.

See docs/threats-negotiate.md for the whole list.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import datetime
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

import headrace
import secured
from between import DONE, ERROR, IN_PROGRESS, Between, Frame, Heard, repeat, wire
from headrace.errors import AuthenticationError, FramingError, SecurityError, TruncatedError
from headrace.security import negotiate
from headrace.security.gss import GssProtection
from headrace.security.identity import ProtectionLevel
from headrace.security.mechanisms import client_context
from headrace.security.ntlm import NtlmProtection
from headrace.testing import Faults, simulated_run
from realm import Realm
from streams import Bytes, Leases
from test_mechanisms import CLIENT, SERVER, meet
from toy_mechanism import Script, installed

NAME = "localhost"
ORDER = b"pay a hundred to bob"
MESSAGE = b"twenty-one bytes here"  # an odd number: see test_kerberos_tokens.py
CALM = Faults(**dict.fromkeys(Faults.NAMES, 0))
SEALED, SIGNED, NONE = ProtectionLevel.ENCRYPT_AND_SIGN, ProtectionLevel.SIGN, ProtectionLevel.NONE

both_protections = pytest.mark.parametrize("protection", [SEALED, SIGNED], ids=["sealed", "signed"])


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, 60))


def with_ticket(realm: Realm, **options: Any) -> headrace.Negotiate:
    return headrace.Negotiate(credentials=headrace.Credentials(ccache=realm.ccache), **options)


async def connected(address: Any, protocol: Bytes, security: Any) -> Any:
    loop: Any = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(
        lambda: protocol, *address[:2], security=security, server_hostname=NAME
    )
    return transport


# ---- replays -------------------------------------------------------------------------------------------------


async def recorded(address: Any, security: headrace.Negotiate) -> bytes:
    """All that a client says in a connection that is accepted and whose order is taken."""
    async with Between(address) as between:
        client = Bytes()
        transport = await connected(between.address, client, security)
        transport.write(ORDER)
        transport.close()
        await client.seen("lost")
        assert client.error is None
    return between.said("client")


def first_frame(said: bytes) -> bytes:
    return said[: 5 + int.from_bytes(said[3:5], "big")]


def test_a_replay_in_the_same_process(
    loop: headrace.EventLoop, realm: Realm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No callback, whether all that the client said comes again or only its token."""
    heard = Heard()
    own = headrace.Credentials(keytab=realm.keytab, replay_cache=f"file2:{tmp_path}/replays")

    async def main() -> None:
        security = headrace.Negotiate(credentials=own)
        async with secured.serving(heard, with_ticket(realm), NAME, security=security) as pair:
            said = await recorded(pair.address, pair.client)
            await heard.made[0].seen("lost")
            assert heard.events == ["made", "received", "eof", "lost"]
            assert heard.made[0].data == ORDER
            for again in (said, first_frame(said), said + said):
                await repeat(pair.address, again)
            answer = await repeat(pair.address, first_frame(said))
            assert answer[0] == ERROR
            assert len(heard.made) == 5
            assert heard.events == ["made", "received", "eof", "lost"]

    with realm.applied(), caplog.at_level("INFO", "headrace.security"):
        run(loop, main())
    assert caplog.text.count("is a replay: it was accepted before") == 4


WORKER = """
import asyncio, logging, sys
import headrace

logging.basicConfig(level=logging.INFO, stream=sys.stdout)


class Tells(headrace.Protocol):
    def connection_made(self, transport):
        print("callback: made", flush=True)

    def lease_received(self, lease):
        with lease:
            print("callback: received", bytes(lease), flush=True)

    def eof_received(self):
        print("callback: eof", flush=True)

    def connection_lost(self, exc):
        print("callback: lost", flush=True)


async def main():
    loop = asyncio.get_running_loop()
    own = headrace.Credentials(keytab=sys.argv[2], replay_cache=sys.argv[3])
    server = await loop.create_server(
        Tells, "127.0.0.1", 0, security=headrace.Negotiate(credentials=own)
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until the test has had enough


with asyncio.Runner(loop_factory=lambda: headrace.new_event_loop(engine=sys.argv[1])) as runner:
    runner.run(main())
"""


class Worker:
    """A server in a process of its own."""

    def __init__(self, engine: str, realm: Realm, replay_cache: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, engine, str(realm.keytab), replay_cache],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=realm.environment(),
            text=True,
        )
        assert self._process.stdout is not None
        self.address = ("127.0.0.1", int(self._process.stdout.readline()))

    def ended(self) -> str:
        """All that it has printed; it ends with this."""
        printed, _ = self._process.communicate("", timeout=60)
        assert self._process.returncode == 0
        return printed

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def workers(engine_name: str, realm: Realm, tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    """Starts workers that share keys and a replay cache."""
    started: list[Worker] = []

    def start() -> Worker:
        started.append(Worker(engine_name, realm, f"file2:{tmp_path}/replays"))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.mark.parametrize("when", ["at the same time", "after a restart"])
def test_a_replay_to_another_process(
    loop: headrace.EventLoop, realm: Realm, workers: Callable[[], Worker], when: str
) -> None:
    """Another worker, or the same server after a restart, knows what the first one has accepted."""
    first = workers()
    other = workers() if when == "at the same time" else None

    async def main() -> None:
        nonlocal other
        said = await recorded(first.address, with_ticket(realm))
        printed = await asyncio.to_thread(first.ended)
        assert printed.count("callback") == 4
        assert ORDER.decode() in printed
        other = other or workers()
        for again in (said, first_frame(said)):
            await repeat(other.address, again)
        printed = await asyncio.to_thread(other.ended)
        assert printed.count("callback") == 0
        assert printed.count("is a replay: it was accepted before") == 2

    with realm.applied():
        run(loop, main())


def test_a_replay_without_a_replay_cache(
    loop: headrace.EventLoop, realm: Realm, caplog: pytest.LogCaptureFixture
) -> None:
    """It's warned about, and a replay is stopped by the keys of messages only; so it's refused where there are none."""
    heard = Heard()
    own = headrace.Credentials(keytab=realm.keytab, replay_cache="none:")

    async def main() -> None:
        with pytest.raises(ValueError, match="the replay cache is off"):
            security = headrace.Negotiate(credentials=own, protection=NONE)
            await loop.create_server(heard, "127.0.0.1", 0, security=security)
        assert caplog.text == ""
        security = headrace.Negotiate(credentials=own)
        async with secured.serving(heard, with_ticket(realm), NAME, security=security) as pair:
            assert "the replay cache is off" in caplog.text
            said = await recorded(pair.address, pair.client)
            await heard.made[0].seen("lost")
            await repeat(pair.address, said)
            assert heard.made[1].events == []  # its order came with its token, and was found wrong at once
            reader, writer = await asyncio.open_connection(*pair.address)
            writer.write(first_frame(said))
            assert (await reader.readexactly(5))[0] == DONE
            replayed = heard.made[2]
            await replayed.seen("made")
            writer.write(said[len(first_frame(said)) :])
            await replayed.seen("lost")
            writer.transport.abort()
            assert replayed.events == ["made", "lost"]
            assert isinstance(replayed.error, FramingError)

    with realm.applied(), caplog.at_level("WARNING", "headrace.security"):
        run(loop, main())


# ---- changed frames ------------------------------------------------------------------------------------------


def flipped(data: bytes) -> Iterator[bytes]:
    """Every change of one bit."""
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def cut(data: bytes) -> Iterator[bytes]:
    """Every beginning, every end, and some that are longer."""
    for size in range(len(data)):
        yield data[:size]
        yield data[size + 1 :]
    yield from (data + bytes(more) for more in (1, 4, 16))


@both_protections
@pytest.mark.parametrize("enctype", ["camellia128", "camellia256"])
def test_every_flipped_bit_and_cut_of_gssapi_s_tokens(
    realms: Callable[[str], Realm], enctype: str, protection: ProtectionLevel
) -> None:
    """Of both sides, where messages are GSSAPI's own: for encryption types that we have no code for."""
    with realms(enctype).applied():
        pair = meet(replace(CLIENT, protection=protection), replace(SERVER, protection=protection))
    one, other = pair.client.protection, pair.server.protection
    for sender, receiver in ((one, other), (other, one)):
        assert isinstance(sender, GssProtection)
        assert isinstance(receiver, GssProtection)
        assert sender.sealed is (protection == SEALED)
        token = sender.wrap(MESSAGE)
        for changed in (*flipped(token), *cut(token)):
            victim = copy.copy(receiver)  # the first failure is a connection's last
            with pytest.raises(FramingError):
                victim.unwrap(changed)
            with pytest.raises(FramingError, match="lost"):
                victim.unwrap(token)
        assert receiver.unwrap(token) == MESSAGE
        with pytest.raises(FramingError, match="repeated"):
            copy.copy(receiver).unwrap(token)


def test_gssapi_s_unsealed_token_on_a_sealed_connection(realms: Callable[[str], Realm]) -> None:
    """It's genuine, and GSSAPI takes it."""
    import gssapi.raw as g

    with realms("camellia256").applied():
        pair = meet()
    client, server = pair.client.protection, pair.server.protection
    assert isinstance(client, GssProtection)
    assert isinstance(server, GssProtection)
    unsealed = g.wrap(client._context, ORDER, False).message
    with pytest.raises(FramingError, match="not as protected as agreed"):
        server.unwrap(unsealed)
    assert g.unwrap(server._context, unsealed).message == ORDER


@both_protections
def test_every_flipped_bit_and_cut_of_ntlm_s_tokens(protection: ProtectionLevel) -> None:
    def side(*, initiator: bool) -> NtlmProtection:
        return NtlmProtection(bytes(range(16)), initiator=initiator, sealed=protection == SEALED)

    for to_server in (True, False):
        token = side(initiator=to_server).wrap(MESSAGE)
        for changed in (*flipped(token), *cut(token)):
            victim = side(initiator=not to_server)
            with pytest.raises(FramingError):
                victim.unwrap(changed)
            with pytest.raises(FramingError, match="lost"):
                victim.unwrap(token)
        assert side(initiator=not to_server).unwrap(token) == MESSAGE
        # The other kind, made with the same key; and one's own, sent back.
        unlike = NtlmProtection(bytes(range(16)), initiator=to_server, sealed=protection != SEALED)
        for wrong in (unlike.wrap(MESSAGE), side(initiator=not to_server).wrap(MESSAGE)):
            with pytest.raises(FramingError):
                side(initiator=not to_server).unwrap(wrong)


def changes(whole: bytes) -> list[bytes]:
    """Samples of what may be done to a frame of data on its way; whole lists are gone through above."""
    body = whole[4:]
    changed: list[bytes] = []
    # Its size (smaller, larger, too large); where a Kerberos token has its kind, flags, EC, RRC and number; the end.
    for at, bit in (
        (0, 0),
        (0, 1),
        (1, 0),
        (3, 7),
        (4, 0),
        (6, 1),
        (6, 2),
        (9, 0),
        (11, 3),
        (19, 0),
        (25, 6),
    ):
        flip = bytearray(whole)
        flip[at] ^= 1 << bit
        changed.append(bytes(flip))
    changed.append(whole[:-1] + bytes([whole[-1] ^ 0x80]))
    changed += [wire(None, body[:size]) for size in (0, 1, 15, 16, len(body) // 2, len(body) - 1)]
    changed.append(wire(None, body + b"\0"))
    changed += [wire(None, ORDER), ORDER]  # the message, unprotected
    changed.append(whole + whole)  # once too often: the first of them is right
    return changed


CHANGES = len(changes(bytes(64)))


def of_path(path: str, realm: Realm, **options: Any) -> tuple[headrace.Negotiate, headrace.Negotiate]:
    """A server's and a client's settings for Kerberos or NTLM."""
    if path != "ntlm":
        return headrace.Negotiate(**options), with_ticket(realm, **options)
    own = headrace.Credentials(principal=rf"{realm.ntlm_domain}\{realm.user}", password=realm.password)
    options["mechanisms"] = ["ntlm"]
    return headrace.Negotiate(**options), headrace.Negotiate(credentials=own, **options)


@both_protections
@pytest.mark.parametrize(
    "path", ["aes128-sha1", "aes256-sha1", "aes128-sha256", "aes256-sha384", "camellia256", "ntlm"]
)
def test_a_changed_frame_on_its_way(
    loop: headrace.EventLoop, realms: Callable[[str], Realm], path: str, protection: ProtectionLevel
) -> None:
    """The server's protocol gets no byte of it, nor of what follows, and hears that the connection failed."""
    realm = realms("aes256-sha1" if path == "ntlm" else path)
    heard = Heard()

    async def attempt(pair: secured.Pair, number: int) -> None:
        def change(frame: Frame) -> bytes:
            return changes(frame.wire)[number] if frame.is_first_data("client") else frame.wire

        async with Between(pair.address, change) as between:
            client = Bytes()
            transport = await connected(between.address, client, pair.client)
            server = await pair.accepted.get()
            transport.write(ORDER)
            await asyncio.sleep(0)  # two frames
            transport.write(b"the next frame")
            transport.close()
            await server.seen("lost")
            await client.seen("lost")
        assert server.data == (ORDER if number == CHANGES - 1 else b"")
        assert isinstance(server.error, (FramingError, TruncatedError))
        assert client.data == b""

    async def main() -> None:
        ours, theirs = of_path(path, realm, protection=protection)
        async with secured.serving(heard, theirs, NAME, security=ours) as pair:
            for number in range(CHANGES):
                await attempt(pair, number)

    with realm.applied():
        run(loop, main())


def test_truncation_on_a_faulty_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the simulated engine, which resets, delays and cuts as it likes. A reset takes what was on its way; an end
    that isn't an error has all that was sent before it."""
    installed(monkeypatch, Script())
    message = bytes(range(256)) * 400
    outcomes = dict.fromkeys(("clean", "cut", "never"), 0)

    async def main() -> str:
        loop: Any = asyncio.get_running_loop()

        def tell(it: Any) -> None:
            it.transport.write(message)
            it.transport.close()

        server = await loop.create_server(
            lambda: Bytes(made=tell), "toy", 1, security=headrace.Negotiate(frame_size=1000)
        )
        protocol = Bytes()
        try:
            await loop.create_connection(lambda: protocol, "toy", 1, security=headrace.Negotiate())
        except OSError:  # headrace's own errors are such
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
    assert outcomes["clean"] >= 75
    assert outcomes["cut"]


# ---- tickets that end ----------------------------------------------------------------------------------------


class Told(Leases):
    """Notes when its ticket's end comes, and the connection's."""

    def __init__(self, **on: Callable[[Any], Any]) -> None:
        super().__init__(**on)
        self.at: dict[str, float] = {}

    def note(self, event: str) -> Any:
        self.at.setdefault(event, time.time())
        return super().note(event)

    def security_expired(self) -> None:
        self.note("expired")


LATE = 5.0  # seconds that a busy machine may take to get round to it; virtual time below has none of that


def test_a_ticket_of_four_seconds(loop: headrace.EventLoop, realm: Realm) -> None:
    """At its end, and not before: ``on_expiry`` of each kind; nobody comes in with it any more."""
    kinds: list[Literal["close", "notify", "ignore"]] = ["close", "notify", "ignore"]

    async def main() -> None:
        own = headrace.Credentials(ccache=realm.kinit(lifetime=4))
        client = headrace.Negotiate(credentials=own, on_expiry="ignore")
        kept = client_context(replace(CLIENT, target="host@localhost", credentials=own)).step(None)
        assert kept is not None
        async with contextlib.AsyncExitStack() as stack:
            there: list[tuple[Any, Any]] = []
            for kind in kinds:
                serving = secured.serving(Told, client, NAME, security=headrace.Negotiate(on_expiry=kind))
                pair = await stack.enter_async_context(serving)
                there.append((await pair.connect(Bytes()), await pair.accepted.get()))
            ends = there[0][0].get_extra_info("security").expires_at.timestamp()
            assert time.time() < ends
            closed, notified, _ = (server for _, server in there)
            await closed.seen("lost")
            await notified.seen("expired")
            assert ends <= closed.at["lost"] < ends + LATE
            assert ends <= notified.at["expired"] < ends + LATE
            assert isinstance(closed.error, SecurityError)
            assert "the client's ticket ended at" in str(closed.error)
            await over(pair, ends, kept)
            for kind, (transport, server) in zip(kinds[1:], there[1:], strict=True):
                transport.write(b"still here")
                await server.until(lambda server=server: server.data == b"still here")
                transport.close()
                await server.seen("lost")
                assert ("expired" in server.events) is (kind == "notify")
                assert server.error is None

    with realm.applied():
        run(loop, main())


async def over(pair: secured.Pair, ends: float, kept: bytes) -> None:
    """A ticket that is over: a client says so itself; one who has kept a token is refused, though MIT takes it."""
    while time.time() < ends + 1.2:  # MIT looks at whole seconds, by a clock that's some milliseconds late
        await asyncio.sleep(0.1)
    with pytest.raises(AuthenticationError, match="the ticket has expired: get a new one"):
        await pair.connect(Bytes())
    answer = await repeat(pair.address, wire(IN_PROGRESS, kept))
    assert answer[0] == ERROR
    assert pair.accepted.empty()


EPOCH = 1_700_000_000.0


class Clock:
    """The one that tickets go by: in virtual time here, and it can be set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loop: Any) -> None:
        self._loop = loop
        self._began = loop.time()
        self.ahead = 0.0
        monkeypatch.setattr(negotiate, "time", self)

    def time(self) -> float:
        return float(EPOCH + self._loop.time() - self._began + self.ahead)


@pytest.mark.parametrize("left", [0.25, 4.0, 59.9, 60.0, 86_400.5])
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_ticket_s_end_in_virtual_time(monkeypatch: pytest.MonkeyPatch, side: str, left: float) -> None:
    """To the microsecond, however long the ticket lasts."""
    script = installed(monkeypatch, Script())

    async def main() -> float:
        loop: Any = asyncio.get_running_loop()
        clock = Clock(monkeypatch, loop)
        lost: list[float] = []
        watching, other = headrace.Negotiate(), headrace.Negotiate(on_expiry="ignore")

        def factory() -> Bytes:
            return Bytes(lost=lambda _: lost.append(clock.time()))

        server = await loop.create_server(
            factory,
            "toy",
            1,
            security=watching if side == "server" else other,
        )
        client = Bytes(lost=lambda _: lost.append(clock.time()))
        ends = clock.time() + left
        script.expires_at = datetime.datetime.fromtimestamp(ends, datetime.UTC)
        await loop.create_connection(
            lambda: client, "toy", 1, security=watching if side == "client" else other
        )
        await client.seen("lost")
        server.close()
        await asyncio.sleep(1)
        return min(lost) - ends

    for seed in range(5):
        assert 0 <= simulated_run(main(), seed, faults=CALM) < 1e-5


def test_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead: the end is noticed within a minute. Back: it isn't too early."""
    script = installed(monkeypatch, Script())

    async def main(jump: float) -> float:
        loop: Any = asyncio.get_running_loop()
        clock = Clock(monkeypatch, loop)
        began = loop.time()
        script.expires_at = datetime.datetime.fromtimestamp(EPOCH + 3600, datetime.UTC)
        server = await loop.create_server(Bytes, "toy", 1, security=headrace.Negotiate())
        client = Bytes()
        await loop.create_connection(
            lambda: client, "toy", 1, security=headrace.Negotiate(on_expiry="ignore")
        )
        await asyncio.sleep(600)
        clock.ahead = jump
        await client.seen("lost")
        server.close()
        return float(loop.time() - began)

    assert 600 <= simulated_run(main(7200), 1, faults=CALM) < 661
    assert 3700 <= simulated_run(main(-100), 1, faults=CALM) < 3701
