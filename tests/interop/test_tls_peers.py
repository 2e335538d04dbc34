"""headrace's TLS with other implementations of it: each as client and as server, TLS 1.2 and 1.3.

Each cell asserts version and cipher suite at both ends, the names in the peer's certificate, and the SHA-256 of every
byte both ways.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from peers import CLIENT, PATIENCE, PEERS, SERVER, Process, Task, free_port, listening

import headrace
from authorities import ca_file, issued

LARGE = 8 << 20  # bytes each way
DIGITS = bytes(48 + byte % 10 for byte in range(256))
SMALL = 3000  # for a network that takes a byte at a time


@pytest.fixture(params=PEERS, ids=lambda peer: peer.name)
def peer(request: pytest.FixtureRequest) -> Any:
    """Each implementation in turn; skipped where it isn't installed."""
    if reason := request.param.missing():
        pytest.skip(f"needs {reason}")
    return request.param


@pytest.fixture(params=["TLSv1.2", "TLSv1.3"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["client", "server"])
def role(request: pytest.FixtureRequest) -> str:
    """The peer's."""
    return str(request.param)


class Exchange(headrace.Protocol):
    """Sends a payload and takes as many bytes; then it closes."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.digest = hashlib.sha256()
        self.received = 0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.security: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.security = transport.get_extra_info("security")
        transport.write(self.payload)

    def lease_received(self, lease: headrace.Lease) -> None:
        with lease:
            self.digest.update(lease)
            self.received += len(lease)
        if self.received == len(self.payload):
            self.transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.lost.done():
            return  # the test has given up
        if exc is None:
            self.lost.set_result(None)
        else:
            self.lost.set_exception(exc)


def payload(size: int, seed: int) -> bytes:
    """Digits: programs with interactive commands take them for what they are."""
    return random.Random(seed).randbytes(size).translate(DIGITS)


def security(role_of_peer: str, mutual: bool) -> headrace.TLS:
    files = issued(SERVER if role_of_peer == "client" else CLIENT)
    own = {"certificate": files.chain, "private_key": files.key}
    if role_of_peer == "client":
        return headrace.TLS(**own, ca=ca_file(), client_certificate="required" if mutual else "none")
    return headrace.TLS(**(own if mutual else {}), ca=ca_file())


@contextmanager
def relay(port: int, how: str) -> Iterator[int]:
    """A port that leads to another one, byte by byte or in large lumps."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=carry, args=(listener, port, how), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
    thread.join(PATIENCE)
    assert not thread.is_alive()


def carry(listener: socket.socket, port: int, how: str) -> None:
    near, _ = listener.accept()
    with near, socket.create_connection(("127.0.0.1", port)) as far:
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=copy, args=(far, near, how), daemon=True)
        back.start()
        copy(near, far, how)
        back.join(PATIENCE)


def copy(source: socket.socket, target: socket.socket, how: str) -> None:
    try:
        while data := source.recv(1 << 20):
            if how == "joined":
                # What comes within a short while goes on as one.
                source.settimeout(0.02)
                try:
                    while more := source.recv(1 << 20):
                        data += more
                except TimeoutError:
                    pass
                source.settimeout(None)
                target.sendall(data)
            else:
                for byte in data:
                    target.sendall(bytes([byte]))
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one end has left, and the test will say whether it should have


def suite_of(name: str) -> str:
    """IANA's name of a cipher suite of TLS 1.2 as OpenSSL has it."""
    if "_WITH_" not in name:
        return name
    name = name.removeprefix("TLS_").replace("_WITH_", "-").replace("AES_", "AES").replace("_", "-")
    return name.removesuffix("-SHA256") if "CHACHA20" in name else name


def exchange(
    loop: headrace.EventLoop, peer: Any, task: Task, *, size: int, tmp_path: Path, how: str | None = None
) -> Exchange:
    """A connection with the peer, and all that it must have told."""
    ours, theirs = payload(size, 1), payload(size, 2)
    task.payload.write_bytes(theirs)

    async def main() -> Exchange:
        protocol = Exchange(ours)
        settings = security(task.role, task.mutual)
        if task.role == "client":
            async with await loop.create_server(
                lambda: protocol, "127.0.0.1", 0, security=settings
            ) as server:
                port = server.sockets[0].getsockname()[1]
                with relay(port, how) if how else contextless(port) as reached:
                    told = await told_by(
                        peer, Task(task.role, task.version, task.mutual, task.payload, reached)
                    )
                    await protocol.lost
        else:
            process = peer.start(task)
            try:
                port = await loop.run_in_executor(None, process.ready)
                with relay(port, how) if how else contextless(port) as reached:
                    await loop.create_connection(
                        lambda: protocol, "127.0.0.1", reached, security=settings, server_hostname=SERVER
                    )
                    await protocol.lost
                told = await loop.run_in_executor(None, peer.outcome, process)
            finally:
                process.kill() if process.process.poll() is None else None
        info = protocol.security
        assert (told.version, info.protocol) == (task.version, task.version)
        assert suite_of(told.cipher) == info.mechanism
        assert (told.received, protocol.received) == (len(ours), len(theirs))
        assert told.sha256 == hashlib.sha256(ours).hexdigest()
        assert protocol.digest.digest() == hashlib.sha256(theirs).digest()
        assert info.is_mutually_authenticated == task.mutual
        if task.mutual or task.role == "server":
            assert f"dns:{CLIENT if task.role == 'client' else SERVER}" in info.remote_identity.names
        else:
            assert info.remote_identity is None
        return protocol

    return loop.run_until_complete(asyncio.wait_for(main(), PATIENCE))


@contextmanager
def contextless(port: int) -> Iterator[int]:
    yield port


async def told_by(peer: Any, task: Task) -> Any:
    loop = asyncio.get_running_loop()
    process: Process = peer.start(task)
    return await loop.run_in_executor(None, peer.outcome, process)


@pytest.mark.parametrize("mutual", [False, True], ids=["server only", "mutual"])
def test_transfer(
    loop: headrace.EventLoop, peer: Any, role: str, version: str, mutual: bool, tmp_path: Path
) -> None:
    exchange(loop, peer, Task(role, version, mutual, tmp_path / "payload"), size=LARGE, tmp_path=tmp_path)


@pytest.mark.parametrize("how", ["bytes", "joined"])
def test_segmentation(loop: headrace.EventLoop, peer: Any, role: str, how: str, tmp_path: Path) -> None:
    """A network that hands over single bytes, and one that joins everything."""
    task = Task(role, "TLSv1.3", True, tmp_path / "payload")
    exchange(loop, peer, task, size=SMALL if how == "bytes" else 100_000, tmp_path=tmp_path, how=how)


class Answer(headrace.Protocol):
    """One HTTP response, and the end."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def lease_received(self, lease: headrace.Lease) -> None:
        body = payload(LARGE, 3)
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
        )
        self.transport.write(body)
        self.transport.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("mutual", [False, True], ids=["server only", "mutual"])
def test_curl(loop: headrace.EventLoop, version: str, mutual: bool, tmp_path: Path) -> None:
    files = issued(CLIENT)
    client = ["--cert", str(files.chain), "--key", str(files.key)] if mutual else []
    pinned = {"TLSv1.2": ["--tlsv1.2", "--tls-max", "1.2"], "TLSv1.3": ["--tlsv1.3"]}[version]
    out = tmp_path / "out"

    async def main() -> None:
        settings = security("client", mutual)
        async with await loop.create_server(Answer, "127.0.0.1", 0, security=settings) as server:
            port = server.sockets[0].getsockname()[1]
            command = [
                "curl",
                "--silent",
                "--show-error",
                "--verbose",
                "--cacert",
                str(ca_file()),
                "-o",
                str(out),
            ]
            command += [
                "--resolve",
                f"{SERVER}:{port}:127.0.0.1",
                f"https://{SERVER}:{port}/",
                *pinned,
                *client,
            ]
            program = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
            _, errors = await program.communicate()
            assert program.returncode == 0, errors.decode()
            assert f"SSL connection using {version}" in errors.decode()

    loop.run_until_complete(asyncio.wait_for(main(), PATIENCE))
    assert out.read_bytes() == payload(LARGE, 3)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
def test_resumption_by_openssl(loop: headrace.EventLoop, version: str, tmp_path: Path) -> None:
    """s_client resumes a session of ours; mutual TLS gives it none to resume."""
    kept = tmp_path / "session"

    async def reused(settings: headrace.TLS, *options: str) -> bool:
        protocol_of: list[Exchange] = []

        def factory() -> Exchange:
            protocol_of.append(Exchange(b"x" * 10))
            return protocol_of[-1]

        async with await loop.create_server(factory, "127.0.0.1", 0, security=settings) as server:
            port = server.sockets[0].getsockname()[1]
            files = issued(CLIENT)
            command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", str(ca_file())]
            command += ["-tls1_3" if version == "TLSv1.3" else "-tls1_2", "-servername", SERVER, "-ign_eof"]
            command += ["-cert", str(files.chain), "-key", str(files.key), *options]
            program = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            output, _ = await program.communicate(b"y" * 10)
            await protocol_of[0].lost
            assert (b"Reused, " + version.encode() in output) == protocol_of[0].security.resumed
            return bool(protocol_of[0].security.resumed)

    async def main() -> None:
        for mutual in (False, True):
            settings = security("client", mutual)
            kept.unlink(missing_ok=True)
            assert not await reused(settings, "-sess_out", str(kept))
            if kept.exists():
                assert await reused(settings, "-sess_in", str(kept)) == (not mutual or version == "TLSv1.2")

    loop.run_until_complete(asyncio.wait_for(main(), PATIENCE))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
def test_resumption_with_openssl(loop: headrace.EventLoop, version: str) -> None:
    """Our client resumes a session of s_server's."""

    async def main() -> list[bool]:
        files, port = issued(SERVER), free_port()
        command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(files.chain), "-www"]
        command += ["-key", str(files.key), "-tls1_3" if version == "TLSv1.3" else "-tls1_2"]
        process = Process(command)
        try:
            await loop.run_in_executor(None, listening, process, port)
            settings = security("server", False)
            found = []
            for _ in range(3):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, security=settings, server_hostname=SERVER
                )
                writer.write(b"GET / HTTP/1.0\r\n\r\n")
                page = await reader.read()
                info = writer.get_extra_info("security")
                assert info.protocol == version
                assert (b"Reused, " in page) == info.resumed
                found.append(info.resumed)
                writer.close()
                await writer.wait_closed()
        finally:
            process.kill()
        return found

    assert loop.run_until_complete(asyncio.wait_for(main(), PATIENCE)) == [False, True, True]
