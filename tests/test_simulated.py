"""The simulated engine, its loop, and headrace's real transports in its world."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import datetime
import errno
import os
import pathlib
import ssl
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from headrace import BufferPool, Protocol
from headrace._driver import Driver
from headrace._model import ModelLoop, ModelTransport
from headrace.testing import (
    NO_FAULTS,
    ContractViolation,
    Deadlock,
    Faults,
    SeededRandom,
    SimulatedEngine,
    SimulatedLoop,
    run_scenario,
    run_seeds,
    simulated_loop,
    simulated_run,
)
from headrace.testing.scenarios import KINDS

LOOP_SEEDS = int(os.environ.get("HEADRACE_SEEDS", "1000")) // 4


# ---- the dice ------------------------------------------------------------------------------------------------


def test_random_numbers_are_splitmix64() -> None:
    # The first outputs for seed 0 as published with the algorithm (Vigna, splitmix64.c).
    dice = SeededRandom(0)
    top = (1 << 63) - 1
    assert [dice.integer(0, top) for _ in range(3)] == [
        0xE220A8397B1DCDAF % (1 << 63),
        0x6E789E6AA1B965F4 % (1 << 63),
        0x06C45D188009454F % (1 << 63),
    ]


def test_random_numbers_stay_in_their_bounds() -> None:
    dice = SeededRandom(7)
    assert {dice.integer(3, 5) for _ in range(200)} == {3, 4, 5}
    assert all(0.25 <= dice.uniform(0.25, 0.5) < 0.5 for _ in range(200))
    assert not any(dice.likely(0.0) for _ in range(50))
    assert all(dice.likely(1.0) for _ in range(50))
    with pytest.raises(ValueError, match="below"):
        dice.integer(2, 1)


def test_faults_have_names() -> None:
    assert Faults(reset=0.5).replace(overflow=0.1).reset == 0.5
    with pytest.raises(TypeError, match="lightning"):
        Faults(lightning=1.0)
    assert "reset=0.5" in repr(Faults(reset=0.5))


def test_a_seed_draws_its_faults_and_names_overrule_them() -> None:
    drawn = {SimulatedEngine(seed).faults.overflow for seed in range(40)}
    assert 0.0 in drawn
    assert len(drawn) > 2
    assert SimulatedEngine(1, overflow=0.125).faults.overflow == 0.125
    assert repr(SimulatedEngine(3).faults) == repr(SimulatedEngine(3).faults)


# ---- the virtual network -------------------------------------------------------------------------------------


def calm(**options: object) -> SimulatedEngine:
    engine = SimulatedEngine(1, faults=NO_FAULTS, **options)
    engine.start()
    return engine


def test_bytes_cross_in_virtual_time_and_in_order() -> None:
    engine = calm()
    near, far = engine.socketpair()
    assert min(near, far) >= 1 << 20
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(near)
    before = engine.time()
    assert engine.write(near, b"one ") == 4
    assert engine.write(near, b"two") == 3
    with pytest.raises(BlockingIOError):
        engine.read(far)
    engine.advance(0.001)
    assert engine.time() == pytest.approx(before + 0.001)
    assert engine.read(far, 5) == b"one t"
    assert engine.read(far) == b"wo"


def test_buffers_are_bounded_and_the_window_opens_again() -> None:
    engine = calm(send_limit=1000, receive_limit=500)
    near, far = engine.socketpair()
    assert engine.write(near, bytes(5000)) == 1000
    with pytest.raises(BlockingIOError):
        engine.write(near, b"x")
    engine.advance(0.01)
    assert engine.write(near, bytes(5000)) == 500
    assert len(engine.read(far)) == 500
    engine.advance(0.01)
    assert len(engine.read(far)) == 500


def test_fin_comes_after_the_last_byte() -> None:
    engine = calm(segment=10)
    near, far = engine.socketpair()
    engine.write(near, bytes(100))
    engine.close_virtual(near)
    received = 0
    while True:
        engine.advance(0.001)
        try:
            data = engine.read(far)
        except BlockingIOError:
            continue
        if not data:
            break
        received += len(data)
    assert received == 100


def test_closing_with_unread_bytes_resets() -> None:
    engine = calm()
    near, far = engine.socketpair()
    engine.write(far, b"never read")
    engine.advance(0.001)
    engine.close_virtual(near)
    engine.advance(0.001)
    with pytest.raises(ConnectionResetError):
        engine.read(far)
    # The error is told once; after it comes the end of the stream.
    assert engine.read(far) == b""
    with pytest.raises(BrokenPipeError):
        engine.write(far, b"x")


def test_bytes_for_a_closed_socket_bring_a_reset() -> None:
    engine = calm()
    near, far = engine.socketpair()
    engine.close_virtual(near)
    engine.advance(0.001)
    assert engine.read(far) == b""
    assert engine.write(far, b"too late") == 8
    engine.advance(0.001)
    # EPIPE, not ECONNRESET: FIN had come before.
    with pytest.raises(BrokenPipeError):
        engine.write(far, b"x")


def test_listening_connecting_and_being_refused() -> None:
    engine = calm()
    with pytest.raises(ConnectionRefusedError):
        engine.connect("nowhere")
    listener = engine.listen("somewhere", backlog=2)
    with pytest.raises(OSError, match="in use"):
        engine.listen("somewhere")
    clients = [engine.connect("somewhere") for _ in range(2)]
    with pytest.raises(TimeoutError):
        engine.connect("somewhere")
    engine.close_virtual(listener)
    engine.advance(0.001)
    for client in clients:
        with pytest.raises(ConnectionResetError):
            engine.read(client)
    assert engine.descriptors() == clients


def test_descriptors_are_bounded() -> None:
    engine = calm(descriptors=3)
    engine.socketpair()
    with pytest.raises(OSError) as error:
        engine.socketpair()
    assert error.value.errno == errno.EMFILE


def test_closed_descriptors_are_refused() -> None:
    engine = calm()
    near, _ = engine.socketpair()
    engine.close_virtual(near)
    with pytest.raises(OSError, match="Bad file descriptor"):
        engine.write(near, b"x")
    with pytest.raises(ContractViolation, match=r"isn't open \[seed 1\]"):
        engine.close_virtual(near)


# ---- what it finds -------------------------------------------------------------------------------------------


def test_a_standstill_is_a_deadlock_with_seed_and_operations() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_server(asyncio.Protocol, "server", 1)
        await loop.create_future()

    with pytest.raises(Deadlock, match=r"accept on descriptor \d+(.|\n)*\[seed 42\]") as error:
        simulated_run(main(), 42)
    assert error.value.seed == 42


def test_patience_waits_for_threads() -> None:
    async def main() -> int:
        return await asyncio.get_running_loop().run_in_executor(None, lambda: 6 * 7)

    assert simulated_run(main(), 1, patience=20.0) == 42


def test_a_runaway_scenario_keeps_its_seed() -> None:
    async def main() -> None:
        raise LookupError("lost")

    with pytest.raises(LookupError) as error:
        simulated_run(main(), 1234)
    assert "seed 1234" in error.value.__notes__[0]


def test_a_violation_is_raised_again_when_a_callback_swallowed_it() -> None:
    engine = SimulatedEngine(5, faults=NO_FAULTS)
    loop = ModelLoop(engine)
    near, _ = engine.socketpair()

    ModelTransport(loop, near, asyncio.Protocol())
    with pytest.raises(ContractViolation, match="closed under its receive"):
        engine.close_virtual(near)
    with pytest.raises(ContractViolation, match="closed under its receive"):
        engine.check()
    with pytest.raises(ContractViolation, match="closed under its receive"):
        loop.run(lambda: False, 1.0)


def test_memory_that_changes_while_it_is_sent_is_a_violation() -> None:
    engine = calm(send_limit=16, receive_limit=16)
    driver = Driver(engine)
    near, far = engine.socketpair()
    data = bytes(bytearray(1000))
    driver.send(near, data)
    driver.wait(0)
    # Nobody but a test writes into a bytes object.
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    assert address is not None
    ctypes.memset(address + 900, 1, 1)
    with pytest.raises(ContractViolation, match=r"memory of send of \d+ bytes .* was changed"):
        for _ in range(1000):
            driver.wait(1e-3)
            with contextlib.suppress(BlockingIOError):
                engine.read(far)


def test_operations_on_closed_busy_or_wrong_descriptors_are_violations() -> None:
    def rig() -> tuple[Driver, int, int]:
        engine = calm()
        near, gone = engine.socketpair()
        engine.close_virtual(gone)
        return Driver(engine), near, gone

    driver, _, gone = rig()
    with pytest.raises(ContractViolation, match=r"receive on descriptor .* on a closed descriptor"):
        driver.receive(gone)
    driver, near, _ = rig()
    driver.receive(near)
    with pytest.raises(ContractViolation, match="two receive operations at a time"):
        driver.receive(near)
    driver, near, _ = rig()
    driver.send(near, b"one")
    with pytest.raises(ContractViolation, match="two send operations at a time"):
        driver.send(near, b"two")
    driver, near, _ = rig()
    with pytest.raises(ContractViolation, match="accept on the wrong kind of descriptor"):
        driver.accept(near)
    driver, _, _ = rig()
    with pytest.raises(ContractViolation, match="only a poll may be on a real descriptor"):
        driver.receive(0)


# ---- repeatability -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["model", "loop"])
def test_the_same_seed_gives_the_same_run(world: str) -> None:
    def digest(seed: int) -> tuple[int, dict[str, int]]:
        engine = run_scenario(seed, world=world)
        return engine.digest, engine.stats()

    first = [digest(seed) for seed in range(30)]
    assert [digest(seed) for seed in range(30)] == first
    assert len({value for value, _ in first}) == 30


# ---- headrace's loop and transports --------------------------------------------------------------------------


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


def test_time_is_virtual_from_the_beginning() -> None:
    with simulated_loop(3) as loop:
        began = loop.time()
        seen: list[float] = []
        loop.call_later(3600.0, lambda: seen.append(loop.time()))
        loop.call_later(7200.0, loop.stop)
        loop.run_forever()
        assert seen[0] == pytest.approx(began + 3600.0, abs=1e-3)
        assert loop.time() == pytest.approx(began + 7200.0, abs=1e-3)


def test_asyncio_streams_over_a_hard_world() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def main() -> bytes:
        server = await asyncio.start_server(serve, "echo", 7)
        async with server:
            reader, writer = await asyncio.open_connection("echo", 7)
            sent = bytes(range(256)) * 100
            writer.write(sent)
            writer.write_eof()
            received = await reader.read()
            assert received == sent
            writer.close()
            await writer.wait_closed()
        return received

    for seed in range(20):
        assert len(simulated_run(main(), seed, reset=0)) == 25600


def test_names_and_sockets_of_virtual_connections() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[Echo] = loop.create_future()

        class Server(Echo):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                accepted.set_result(self)

        server = await loop.create_server(Server, "server", 80)
        transport, _ = await loop.create_connection(Echo, "server", 80)
        other = await accepted
        assert transport.get_extra_info("peername") == ("server", 80)
        assert other.transport.get_extra_info("sockname") == ("server", 80)
        assert other.transport.get_extra_info("peername") == transport.get_extra_info("sockname")
        assert transport.get_extra_info("socket").fileno() >= 1 << 20
        transport.abort()
        other.transport.abort()
        server.close()
        await asyncio.sleep(0.1)
        assert isinstance(loop, SimulatedLoop)
        assert loop.engine_name == "simulated"
        assert loop.simulated.descriptors() == []

    simulated_run(main(), 1)


def test_leases_reach_a_headrace_protocol() -> None:
    class Sink(Protocol):
        def __init__(self) -> None:
            self.data = b""

        def lease_received(self, lease: object) -> None:
            with lease:  # type: ignore[attr-defined]
                self.data += bytes(lease)  # type: ignore[call-overload]

    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        sink = Sink()
        server = await loop.create_server(lambda: sink, "sink", 9)
        transport, _ = await loop.create_connection(asyncio.Protocol, "sink", 9)
        transport.write(b"drop by drop")
        await asyncio.sleep(0)
        transport.close()
        await asyncio.sleep(1.0)
        server.close()
        return sink.data

    for seed in range(20):
        assert simulated_run(main(), seed, reset=0) == b"drop by drop"


def self_signed(path: pathlib.Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's context, for the virtual host "echo"."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "echo")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("echo")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(pem))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


def test_tls_over_a_hard_world(tmp_path: pathlib.Path) -> None:
    server_context, client_context = self_signed(tmp_path / "echo.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "echo", 7, ssl=server_context)
        reader, writer = await asyncio.open_connection("echo", 7, ssl=client_context)
        sent = bytes(range(256)) * 100
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
        writer.close()
        server.close()
        await asyncio.sleep(60.0)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        assert loop.simulated.descriptors() == []

    for seed in range(20):
        simulated_run(main(), seed, reset=0)


# Where a seed alone seldom goes: hardly a block, hardly a descriptor, hardly a byte at a time, and all faults at once.
EXTREMES: dict[str, Callable[[], dict[str, Any]]] = {
    "one block": lambda: {"pool": BufferPool(block_size=4096, target=1, maximum=1)},
    "large blocks": lambda: {
        "pool": BufferPool(block_size=262144, target=4, maximum=64),
        "send_limit": 65536,
        "receive_limit": 65536,
        "segment": 65536,
    },
    "four descriptors": lambda: {"descriptors": 4},
    "narrow pipes": lambda: {"send_limit": 16, "receive_limit": 16, "segment": 5},
    "every fault": lambda: {
        "faults": Faults(**(dict.fromkeys(Faults.NAMES, 0.4) | {"latency": 2e-3, "delay": 1e-3}))
    },
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_real_transports_in_extreme_worlds(extreme: str) -> None:
    report = run_seeds(
        0, 40, lambda seed: run_scenario(seed, world="loop", **EXTREMES[extreme]()), stop_after=3
    )
    assert report.failures == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_real_transports_over_many_seeds(kind: str | None) -> None:
    report = run_seeds(0, LOOP_SEEDS, lambda seed: run_scenario(seed, world="loop", kind=kind), stop_after=5)
    assert report.failures == []
