"""Both TLS pumps, each with each: what one end makes the other must understand, and errors must be the same ones."""

from __future__ import annotations

import array
import ctypes
import functools
import gc
import hashlib
import itertools
import logging
import os
import random
import ssl
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from certificates import tls_contexts
from headrace._pool import BufferPool
from headrace.errors import EngineUnavailable
from headrace.framing import pump as pump_module
from headrace.framing.pump import Pump, StdlibPump, make_pump

KINDS = ["stdlib", "native"]
VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}
HOST = "127.0.0.1"
FULL = 16384


@functools.cache
def maker(kind: str) -> Callable[..., Pump]:
    if kind == "stdlib":
        return StdlibPump
    if not pump_module.available():
        pytest.skip(f"no native pump: {pump_module.reason()}")
    from headrace._tls_pump import NativePump

    return NativePump


@dataclass
class Ends:
    """A server and a client of chosen kinds and version, not connected yet."""

    server_context: ssl.SSLContext
    client_context: ssl.SSLContext
    kinds: tuple[str, str]
    version: str

    def server(self) -> Pump:
        return maker(self.kinds[0])(self.server_context, True, None, None)

    def client(self, session: ssl.SSLSession | None = None, host: str = HOST) -> Pump:
        return maker(self.kinds[1])(self.client_context, False, host, session)

    def connected(self, session: ssl.SSLSession | None = None) -> tuple[Pump, Pump]:
        server, client = self.server(), self.client(session)
        shake(server, client)
        return server, client

    def client_of(self, kind: str) -> tuple[Pump, Pump]:
        """(a server, a client that speaks to it) of one kind."""
        return Ends(self.server_context, self.client_context, (self.kinds[0], kind), self.version).connected()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificate")
    tls_contexts(folder)
    return folder / "both.pem"


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[(one, other) for one in KINDS for other in KINDS], ids="-".join)
def ends(request: pytest.FixtureRequest, version: str, certificate: Path) -> Ends:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    client = ssl.create_default_context(cafile=str(certificate))
    client.minimum_version = client.maximum_version = VERSIONS[version]
    return Ends(server, client, request.param, version)


@pytest.fixture
def native(certificate: Path) -> Ends:
    """Two native pumps, TLS 1.3."""
    maker("native")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    client = ssl.create_default_context(cafile=str(certificate))
    return Ends(server, client, ("native", "native"), "TLSv1.3")


def shake(server: Pump, client: Pump, piece: int = 1 << 20) -> None:
    """The handshake, in pieces of so many bytes; the client has its session tickets afterwards."""
    done = {"server": False, "client": client.handshake(b"")}
    left_over: list[bytes] = []
    for _ in range(10):
        for name, one, other in (("server", server, client), ("client", client, server)):
            flight = other.outgoing()
            for start in range(0, len(flight), piece):
                data = flight[start : start + piece]
                if done[name]:
                    assert one.decrypt(data, left_over)
                else:
                    done[name] = one.handshake(data)
        if all(done.values()) and not (server.pending or client.pending):
            assert client.decrypt(b"", left_over)
            assert server.decrypt(b"", left_over)
            assert left_over == []
            return
    pytest.fail(f"no handshake: {done}")


def received(pump: Pump, records: Any) -> bytes:
    plaintext: list[bytes] = []
    assert pump.decrypt(records, plaintext)
    return b"".join(plaintext)


def openssl(name: str) -> Any:
    """A function of the OpenSSL that the interpreter uses."""
    import _ssl

    return getattr(ctypes.CDLL(_ssl.__file__), name)


def pointer(pump: Pump) -> ctypes.c_void_p:
    """The ``SSL *``: the second pointer behind the object's head."""
    inner = pump.ssl_object._sslobj  # type: ignore[attr-defined]
    return ctypes.c_void_p.from_address(id(inner) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p))


def error_of(call: Callable[[], object]) -> tuple[Any, ...]:
    with pytest.raises(ssl.SSLError) as caught:
        call()
    error = caught.value
    return type(error), error.errno, error.library, error.reason, getattr(error, "verify_code", None)


# ---- handshakes


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_handshake_in_pieces(ends: Ends, piece: int) -> None:
    server, client = ends.server(), ends.client()
    shake(server, client, piece)
    client.encrypt(b"hello")
    assert received(server, client.outgoing()) == b"hello"


def test_the_ssl_object_answers_as_ever(ends: Ends) -> None:
    server, client = ends.connected()
    assert isinstance(client.ssl_object, ssl.SSLObject)
    assert client.ssl_object.version() == server.ssl_object.version() == ends.version
    assert client.ssl_object.cipher() == server.ssl_object.cipher()
    certificate = client.ssl_object.getpeercert()
    assert certificate is not None
    assert certificate["subjectAltName"] == (("IP Address", HOST),)
    assert client.ssl_object.server_hostname == HOST
    assert client.ssl_object.context is ends.client_context


def test_data_right_behind_the_handshake_is_kept(ends: Ends) -> None:
    server, client = ends.server(), ends.client()
    client.handshake(b"")
    server.handshake(client.outgoing())
    last, first = (client, server) if ends.version == "TLSv1.3" else (server, client)
    flight = server.outgoing()
    if last is server:
        assert not client.handshake(flight)
        flight = client.outgoing()
    assert last.handshake(flight)
    last.encrypt(b"early")
    flight = last.outgoing()
    assert first.handshake(flight[:-3])
    assert received(first, flight[-3:-1]) == b""
    assert received(first, flight[-1:]) == b"early"
    assert received(first, b"") == b""


def test_a_certificate_that_is_not_trusted(ends: Ends) -> None:
    ends.client_context = ssl.create_default_context()
    server, client = ends.server(), ends.client()
    client.handshake(b"")
    server.handshake(client.outgoing())
    flight = server.outgoing()
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        client.handshake(flight)
    assert caught.value.verify_code == 18
    assert caught.value.verify_message == "self-signed certificate"
    assert caught.value.reason == "CERTIFICATE_VERIFY_FAILED"
    alert = client.outgoing()
    assert (
        error_of(lambda: server.handshake(alert) and server.decrypt(b"", []))[3] == "TLSV1_ALERT_UNKNOWN_CA"
    )


def test_a_certificate_of_another_host(ends: Ends) -> None:
    server, client = ends.server(), ends.client(host="example.org")
    client.handshake(b"")
    server.handshake(client.outgoing())
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        client.handshake(server.outgoing())
    assert caught.value.verify_code == 62
    assert "not valid for 'example.org'" in caught.value.verify_message


def test_something_else_than_tls(ends: Ends) -> None:
    outcomes = set()
    for kind in KINDS:
        server = maker(kind)(ends.server_context, True, None, None)
        outcomes.add(error_of(lambda server=server: server.handshake(b"GET / HTTP/1.1\r\n\r\n")))  # type: ignore[misc]
    assert len(outcomes) == 1
    assert outcomes.pop()[3] == "HTTP_REQUEST"


def test_a_close_notify_in_the_handshake(ends: Ends) -> None:
    """It isn't taken for an invitation to wait, also when there was something to wait for before."""
    client = ends.client()
    assert not client.handshake(b"")
    with pytest.raises(ssl.SSLZeroReturnError):
        client.handshake(b"\x15\x03\x03\x00\x02\x01\x00")


def test_a_session_is_resumed(ends: Ends) -> None:
    server, client = ends.connected()
    session = client.ssl_object.session
    assert session is not None
    assert not client.ssl_object.session_reused
    server, client = ends.connected(session)
    assert client.ssl_object.session_reused
    assert server.ssl_object.session_reused
    client.encrypt(b"again")
    assert received(server, client.outgoing()) == b"again"


def test_arguments_are_those_of_wrap_bio(ends: Ends) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match="server_hostname"):
            maker(kind)(ends.client_context, False, "", None)
        with pytest.raises(ssl.SSLError, match="PROTOCOL_TLS_SERVER"):
            maker(kind)(ends.server_context, False, HOST, None)


# ---- data


@pytest.mark.parametrize("size", [0, 1, 64, FULL - 1, FULL, FULL + 1, 5 * FULL, 1 << 20])
def test_data_both_ways(ends: Ends, size: int) -> None:
    server, client = ends.connected()
    data = random.Random(size).randbytes(size)
    for sender, receiver in ((client, server), (server, client)):
        assert sender.encrypt(data) == size
        pending = sender.pending
        records = sender.outgoing()
        assert len(records) == pending
        assert (sender.pending, sender.outgoing()) == (0, b"")
        got = received(receiver, records)
        assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


def test_full_records_and_a_rest(ends: Ends) -> None:
    _, client = ends.connected()
    client.encrypt(bytes(2 * FULL + 100))
    records, plain = client.outgoing(), []
    while records:
        length = int.from_bytes(records[3:5], "big")
        plain.append(length)
        records = records[5 + length :]
    overhead = plain[0] - FULL
    assert plain == [FULL + overhead, FULL + overhead, 100 + overhead]


def test_records_of_several_calls_go_out_together(ends: Ends) -> None:
    server, client = ends.connected()
    messages = [bytes([n]) * (n * 37) for n in range(1, 200)]
    for message in messages:
        assert client.encrypt(message) == len(message)
    assert received(server, client.outgoing()) == b"".join(messages)


def test_all_records_of_a_call_become_one_object(native: Ends) -> None:
    server, client = native.connected()
    for n in range(20):
        client.encrypt(b"x" * n)
    plaintext: list[bytes] = []
    server.decrypt(client.outgoing(), plaintext)
    assert plaintext == [b"x" * 190]


def test_a_record_in_pieces_becomes_one_object(native: Ends) -> None:
    server, client = native.connected()
    client.encrypt(b"x" * FULL)
    records = client.outgoing()
    for cut in (3, 5, 100, FULL, len(records) - 1):
        plaintext: list[bytes] = []
        assert server.decrypt(records[:cut], plaintext)
        assert server.decrypt(records[cut:], plaintext)
        assert plaintext == [b"x" * FULL]
        client.encrypt(b"x" * FULL)
        records = client.outgoing()


@pytest.mark.parametrize("sizes", [(1, 1), (1, 8), (1, 40000), (FULL, FULL + 60)])
def test_records_cut_anywhere(ends: Ends, sizes: tuple[int, int]) -> None:
    server, client = ends.connected()
    dice = random.Random(repr(sizes))
    data = dice.randbytes(3000 if sizes[1] < 10 else 300_000)
    for start in range(0, len(data), 50_000):
        client.encrypt(data[start : start + 50_000])
    records, plaintext = memoryview(client.outgoing()), []
    while records:
        size = dice.randint(*sizes)
        assert server.decrypt(records[:size], plaintext)
        records = records[size:]
    assert b"".join(plaintext) == data
    assert all(plaintext)


def test_buffers_of_every_kind(ends: Ends) -> None:
    server, client = ends.connected()
    numbers = array.array("I", range(10_000))
    pool = BufferPool()
    lease = pool._copy(b"lease")
    for data in (bytearray(b"bytearray"), memoryview(b"memoryview")[3:], numbers, lease):
        assert client.encrypt(data) == memoryview(data).nbytes
        records = bytearray(client.outgoing())
        assert received(server, records) == bytes(data)
        records.clear()  # it's looked at no more
    lease.release()
    for pump in (server, client):
        for use in (pump.encrypt, pump.handshake, functools.partial(pump.decrypt, plaintext=[])):
            with pytest.raises(TypeError):
                use("text")  # type: ignore[arg-type]
        with pytest.raises((BufferError, TypeError)):
            pump.encrypt(memoryview(b"abcdef")[::2])
    client.encrypt(b"and on")
    assert received(server, client.outgoing()) == b"and on"


def test_records_are_read_from_a_lease_in_place(ends: Ends) -> None:
    server, client = ends.connected()
    client.encrypt(b"leased" * 1000)
    pool = BufferPool(65536, 1, 2)
    lease = pool._take_bytes(client.outgoing())
    assert lease is not None
    assert not lease.copied
    assert received(server, lease) == b"leased" * 1000
    lease.release()
    assert pool.outstanding == 0


# ---- ends


def test_close_notify_both_ways_with_data_before_it(ends: Ends) -> None:
    server, client = ends.connected()
    server.encrypt(b"unread ")
    unread = server.outgoing()
    client.encrypt(b"last words")
    client.close()
    client.close()
    flight = client.outgoing()
    plaintext: list[bytes] = []
    assert not server.decrypt(flight + b"garbage behind the end", plaintext)
    assert plaintext == [b"last words"]
    assert not server.decrypt(b"more garbage", plaintext)
    assert plaintext == [b"last words"]
    server.encrypt(b"and mine")
    server.close()
    plaintext.clear()
    assert client.decrypt(unread, plaintext)
    assert not client.decrypt(server.outgoing(), plaintext)
    assert b"".join(plaintext) == b"unread and mine"
    assert client.outgoing() == b""


def test_closing_while_data_and_close_notify_lie_unread(ends: Ends) -> None:
    server, client = ends.server(), ends.client()
    client.handshake(b"")
    server.handshake(client.outgoing())
    last, first = (client, server) if ends.version == "TLSv1.3" else (server, client)
    flight = server.outgoing()
    if last is server:
        client.handshake(flight)
        flight = client.outgoing()
    assert last.handshake(flight)
    last.encrypt(b"unread")
    last.close()
    assert first.handshake(last.outgoing())
    first.close()
    plaintext: list[bytes] = []
    assert not first.decrypt(b"", plaintext)
    assert plaintext == [b"unread"]
    assert not last.decrypt(first.outgoing(), plaintext)
    assert plaintext == [b"unread"]


def test_closing_before_the_end_of_the_handshake_is_an_error(ends: Ends) -> None:
    outcomes = set()
    for kind in KINDS:
        client = maker(kind)(ends.client_context, False, HOST, None)
        outcomes.add(error_of(client.close))
        client.handshake(b"")
        outcomes.add(error_of(client.close))
    assert {outcome[3] for outcome in outcomes} == {"SHUTDOWN_WHILE_IN_INIT"}
    assert len(outcomes) == 1


def test_sending_after_close_is_an_error(ends: Ends) -> None:
    outcomes = set()
    for kind in KINDS:
        _, client = ends.client_of(kind)
        client.close()
        flight = client.outgoing()
        assert flight
        outcomes.add(error_of(lambda client=client: client.encrypt(b"late")))  # type: ignore[misc]
        assert client.outgoing() == b""
    assert {outcome[3] for outcome in outcomes} == {"PROTOCOL_IS_SHUTDOWN"}
    assert len(outcomes) == 1


# ---- errors


def test_a_bad_record_is_the_same_error(ends: Ends) -> None:
    outcomes = set()
    for kind in KINDS:
        server, client = ends.client_of(kind)
        server.encrypt(b"good")
        good = server.outgoing()
        server.encrypt(b"bad")
        bad = bytearray(server.outgoing())
        bad[-1] ^= 1
        plaintext: list[bytes] = []
        decrypt = functools.partial(client.decrypt, good + bad + good, plaintext)
        outcomes.add(error_of(decrypt))
        assert plaintext == [b"good"]
        alert = client.outgoing()
        assert error_of(lambda: server.decrypt(alert, []))[3] == "SSLV3_ALERT_BAD_RECORD_MAC"  # noqa: B023
        for use in (client.close, functools.partial(client.encrypt, b"x"), decrypt):
            outcome = error_of(use)
            assert issubclass(outcome[0], ssl.SSLError)
        assert plaintext == [b"good"]
    assert len(outcomes) == 1
    assert outcomes.pop()[2:4] == ("SSL", "DECRYPTION_FAILED_OR_BAD_RECORD_MAC")


def test_a_record_of_another_version(ends: Ends) -> None:
    outcomes = set()
    for kind in KINDS:
        server, client = ends.client_of(kind)
        server.encrypt(b"good")
        bad = bytearray(server.outgoing())
        bad[1] = 9
        outcomes.add(error_of(functools.partial(client.decrypt, bad, [])))
    assert len(outcomes) == 1
    assert outcomes.pop()[3] == "WRONG_VERSION_NUMBER"


def test_what_others_left_in_the_error_queue_is_not_this_connections(native: Ends) -> None:
    server, client = native.connected()
    client.encrypt(b"unharmed")
    records = client.outgoing()
    stale = openssl("BIO_new_file")
    plaintext: list[bytes] = []
    assert not stale(b"/nonexistent/file", b"r")
    assert server.decrypt(records[:10], plaintext)
    assert not stale(b"/nonexistent/file", b"r")
    assert server.decrypt(records[10:], plaintext)
    assert not stale(b"/nonexistent/file", b"r")
    assert server.encrypt(b"back") == 4
    assert not stale(b"/nonexistent/file", b"r")
    server.close()
    assert plaintext == [b"unharmed"]
    assert not client.decrypt(server.outgoing(), plaintext)
    assert plaintext == [b"unharmed", b"back"]


@pytest.mark.parametrize("use", ["decrypt", "encrypt", "close"])
def test_what_a_callback_raises_comes_out(native: Ends, use: str) -> None:
    armed = False

    def fail(*_: object) -> None:
        if armed:
            raise ZeroDivisionError

    native.client_context._msg_callback = fail  # type: ignore[attr-defined]
    server, client = native.connected()
    server.encrypt(b"hello")
    plaintext: list[bytes] = []
    uses: dict[str, Callable[[], object]] = {
        "decrypt": functools.partial(client.decrypt, server.outgoing(), plaintext),
        "encrypt": functools.partial(client.encrypt, b"hello"),
        "close": client.close,
    }
    armed = True
    with pytest.raises(ZeroDivisionError):
        uses[use]()
    armed = False
    # The callback had nothing to say about the data: they aren't lost.
    if use == "decrypt":
        assert plaintext == [b"hello"]
    else:
        server.decrypt(client.outgoing(), plaintext)
        assert plaintext == ([b"hello"] if use == "encrypt" else [])


def test_a_callback_must_not_use_its_pump(native: Ends) -> None:
    client: Pump | None = None

    def use(*_: object) -> None:
        if client is not None:
            client.outgoing()

    native.client_context._msg_callback = use  # type: ignore[attr-defined]
    server, made = native.connected()
    client = made
    with pytest.raises(RuntimeError, match="callback"):
        made.encrypt(b"hello")
    client = None
    assert received(server, made.outgoing()) == b"hello"


# ---- what OpenSSL sends by itself


@pytest.mark.parametrize("version", ["TLSv1.3"], indirect=True)
def test_keys_are_updated(ends: Ends) -> None:
    server, client = ends.connected()
    for sender, receiver in ((client, server), (server, client)):
        assert openssl("SSL_key_update")(pointer(sender), 1) == 1  # and the peer is asked for an update too
        sender.encrypt(b"new key")
        receiver.encrypt(b"before")
        assert received(receiver, sender.outgoing()) == b"new key"
        receiver.encrypt(b" and after")
        assert received(sender, receiver.outgoing()) == b"before and after"
        sender.encrypt(b"still there")
        assert received(receiver, sender.outgoing()) == b"still there"


@pytest.mark.parametrize("version", ["TLSv1.2"], indirect=True)
def test_a_renegotiation_makes_sending_wait(ends: Ends) -> None:
    server, client = ends.connected()
    assert openssl("SSL_renegotiate")(pointer(server)) == 1
    assert server.encrypt(b"hello") == 5
    plaintext: list[bytes] = []
    assert client.decrypt(server.outgoing(), plaintext)  # the request, which it answers
    assert client.encrypt(b"later") == 0
    for _ in range(4):
        assert server.decrypt(client.outgoing(), plaintext)
        assert client.decrypt(server.outgoing(), plaintext)
    assert plaintext == [b"hello"]
    assert client.encrypt(b"later") == 5
    assert received(server, client.outgoing()) == b"later"


# ---- life and memory


def test_the_ssl_object_may_outlive_the_pump(ends: Ends) -> None:
    server, client = ends.connected()
    client.encrypt(b"never sent")
    kept = client.ssl_object
    del client
    gc.collect()
    assert kept.version() == ends.version
    assert kept.getpeercert() is not None
    with pytest.raises(ssl.SSLWantReadError):
        kept.read(10)
    if ends.kinds[1] == "native":
        with pytest.raises(ssl.SSLError):
            kept.write(b"to nobody")
        with pytest.raises(ssl.SSLError):
            kept.unwrap()
    del kept
    gc.collect()
    server.encrypt(b"unharmed")


def test_what_the_user_does_with_the_ssl_object_goes_through_the_pump(ends: Ends) -> None:
    server, client = ends.connected()
    with pytest.raises(ssl.SSLWantReadError):
        client.ssl_object.read(10)
    client.encrypt(b"one ")
    client.ssl_object.write(b"two ")
    client.encrypt(b"three")
    assert received(server, client.outgoing()) == b"one two three"


class MallInfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Bytes that malloc has given out. The process's size wouldn't tell: it holds what was free before."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("needs mallinfo2 (glibc 2.33)")
    mallinfo2.restype = MallInfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def growth(cycle: Callable[[], object], times: int) -> float:
    """Bytes that a cycle leaves behind: of three tries the best, since OpenSSL keeps something now and then."""
    sizes = []
    for _ in range(4):
        for _ in range(times):
            cycle()
        gc.collect()
        sizes.append(allocated())
    return min(after - before for before, after in itertools.pairwise(sizes)) / times


def test_connections_leave_nothing_behind(ends: Ends) -> None:
    def cycle() -> None:
        server, client = ends.connected()
        client.encrypt(bytes(20_000))
        server.decrypt(client.outgoing()[:-10], [])
        client.encrypt(bytes(1000))  # and that isn't sent
        ends.client().handshake(b"")

    assert growth(cycle, 50) < 50


def test_pumps_that_are_never_used_leave_nothing_behind(native: Ends) -> None:
    assert growth(native.server, 500) < 50


def test_an_idle_pump_holds_no_buffer(native: Ends) -> None:
    server, client = native.connected()
    data = bytes(8 << 20)
    tracemalloc.start()
    try:
        client.encrypt(data)
        client.encrypt(b"and a little more")
        assert tracemalloc.get_traced_memory()[0] > len(data)
        records = client.outgoing()
        assert len(records) > len(data)
        assert tracemalloc.get_traced_memory()[0] < len(records) + 65536
        server.decrypt(records, [])
        del records
        assert tracemalloc.get_traced_memory()[0] < 65536
    finally:
        tracemalloc.stop()


def test_a_pump_is_made_once(native: Ends) -> None:
    from headrace._tls_pump import NativePump

    server, _ = native.connected()
    with pytest.raises(RuntimeError, match="another connection"):
        NativePump.__init__(server, native.server_context, True, None, None)  # type: ignore[arg-type]
    hollow = NativePump.__new__(NativePump)
    assert hollow.pending == 0
    for use in (hollow.close, hollow.outgoing, functools.partial(hollow.encrypt, b"x")):
        with pytest.raises(RuntimeError, match="initialised"):
            use()


# ---- the choice


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(pump_module, "_maker", None)
    monkeypatch.delenv("HEADRACE_TLS_PUMP", raising=False)
    return monkeypatch


@pytest.mark.parametrize("choice", ["", "stdlib", "native"])
def test_the_environment_chooses(
    undecided: pytest.MonkeyPatch, native: Ends, caplog: pytest.LogCaptureFixture, choice: str
) -> None:
    undecided.setenv("HEADRACE_TLS_PUMP", choice)
    caplog.set_level(logging.DEBUG, "headrace")
    for _ in range(2):
        made = make_pump(native.client_context, False, HOST)
        assert isinstance(made, maker(choice or "native"))  # type: ignore[arg-type]
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    assert ("MemoryBIO" in caplog.text) == (choice == "stdlib")


def test_a_pump_that_there_is_not(undecided: pytest.MonkeyPatch, native: Ends) -> None:
    undecided.setenv("HEADRACE_TLS_PUMP", "fast")
    with pytest.raises(ValueError, match="must be 'stdlib' or 'native', not 'fast'"):
        make_pump(native.client_context, False, HOST)


def test_without_the_native_pump(
    undecided: pytest.MonkeyPatch, native: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    undecided.setattr(pump_module, "_reason", "the moon is full")
    caplog.set_level(logging.DEBUG, "headrace")
    assert not pump_module.available()
    assert isinstance(make_pump(native.client_context, False, HOST), StdlibPump)
    assert "the moon is full" in caplog.text
    undecided.setattr(pump_module, "_maker", None)
    undecided.setenv("HEADRACE_TLS_PUMP", "native")
    with pytest.raises(EngineUnavailable, match="the moon is full"):
        make_pump(native.client_context, False, HOST)


def test_a_context_with_objects_of_its_own_gets_the_stdlibs_pump(
    undecided: pytest.MonkeyPatch, native: Ends
) -> None:
    class Other(ssl.SSLContext):
        def wrap_bio(self, *_: Any, **__: Any) -> Any:
            return "an object of another kind"

    made = make_pump(Other(ssl.PROTOCOL_TLS_SERVER), True)
    assert isinstance(made, StdlibPump)
    assert made.ssl_object == "an object of another kind"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("pass", ""),
        ("import sys; sys.version_info = (3, 15)", "it knows CPython 3.11 to 3.13"),
        ("import _ssl; del _ssl.__file__", "part of the interpreter's executable"),
        ("import _ssl; _ssl.__file__ = 'other.so'", "other.so isn't loaded"),
        ("import _ssl, _struct; _ssl.__file__ = _struct.__file__", "isn't visible in"),
        ("import ssl; ssl.OPENSSL_VERSION = 'AnotherSSL 1'", "it knows OpenSSL 1.1.1 to 3"),
        ("import ssl; ssl.OPENSSL_VERSION_NUMBER += 1", "isn't the one that it uses"),
        ("import _ssl; _ssl._SSLSocket = int", "another layout"),
        ("import headrace.framing.pump as p; p.StdlibPump.encrypt = lambda *_: 0", "differ"),
    ],
)
def test_why_there_is_no_native_pump(change: str, why: str) -> None:
    """Each in a process of its own: what was found can't be lost again."""
    maker("native")
    program = f"import headrace.framing.pump, sys\nassert 'headrace._tls_pump' not in sys.modules\n{change}\n"
    program += "print(headrace.framing.pump.reason())"
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert why in run.stdout
    assert bool(why) == bool(run.stdout.strip())
