"""PROXY headers that HAProxy sends, and those that it accepts: before servers of ours, and behind clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peers import CLIENT, SERVER, Process, free_port, listening

import headrace
from authorities import ca_file, issued
from headrace.framing.proxy import ALPN, CRC32C, NOOP
from streams import Leases, Recorder

PATIENCE = 30.0
HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")  # users have no sbin there
FOR_CLIENT, FOR_SERVER = ("198.51.100.7", 40000), ("203.0.113.9", 443)
FOR_CLIENT6, FOR_SERVER6 = ("2001:db8::7", 40000, 0, 0), ("2001:db8::9", 443, 0, 0)

CONFIGURATION = """
global
    maxconn 100
defaults
    mode tcp
    timeout connect 10s
    timeout client 30s
    timeout server 30s
    timeout check 10s
    unique-id-format id-%cp
{listens}
listen ready
    bind 127.0.0.1:{ready}
"""

LISTEN = """
listen tested
    bind {bind}
    server it {server}
"""


@pytest.fixture(autouse=True)
def _installed() -> None:
    if HAPROXY is None:
        pytest.skip("needs haproxy (the Debian package haproxy)")


@contextlib.contextmanager
def haproxy(folder: Path, bind: str, server: str) -> Iterator[None]:
    """It listens as ``bind`` says, and passes connections on to ``server``; in the configuration's words."""
    ready = free_port()  # bound last: then the others are
    listens = LISTEN.format(bind=bind, server=server)
    file = folder / "haproxy.cfg"
    file.write_text(CONFIGURATION.format(listens=listens, ready=ready))
    assert HAPROXY is not None
    process = Process([HAPROXY, "-db", "-f", str(file)])
    try:
        listening(process, ready)
        yield
    finally:
        process.kill()


@dataclass
class Behind:
    """A server of ours that HAProxy passes connections on to."""

    address: Any
    accepted: asyncio.Queue[Recorder]

    @property
    def target(self) -> str:
        if isinstance(self.address, tuple):
            return f"{self.address[0]}:{self.address[1]}"
        return f"unix@{self.address}"


@contextlib.asynccontextmanager
async def serving(*security: Any, path: Path | None = None) -> Any:
    loop: Any = asyncio.get_running_loop()
    accepted: asyncio.Queue[Recorder] = asyncio.Queue()
    stack = [headrace.ProxyProtocol(trusted=["127.0.0.0/8", "unix"]), *security]

    def made(recorder: Recorder) -> None:
        recorder.transport.write(b"hello")
        accepted.put_nowait(recorder)

    if path is None:
        server = await loop.create_server(lambda: Leases(made=made), "127.0.0.1", 0, security=stack)
    else:
        server = await loop.create_unix_server(lambda: Leases(made=made), str(path), security=stack)
    async with server:
        yield Behind(server.sockets[0].getsockname(), accepted)
    while loop.stats()["transports"]:  # health checks that HAProxy's end has ended
        await asyncio.sleep(0.001)


async def exchange(
    behind: Behind, host: str, port: int, security: Any = None
) -> tuple[Recorder, Recorder, Any]:
    """Data both ways through HAProxy: what the client and the server noted, and the client's own address."""
    loop: Any = asyncio.get_running_loop()
    named = {"server_hostname": SERVER} if security is not None else {}
    client = Leases()
    transport, _ = await loop.create_connection(lambda: client, host, port, security=security, **named)
    near = transport.get_extra_info("sockname")
    transport.write(b"data")
    server = await behind.accepted.get()
    await server.until(lambda: server.data == b"data")
    await client.until(lambda: client.data == b"hello")
    transport.close()
    await server.seen("lost")
    await client.seen("lost")
    return client, server, near


def header_of(recorder: Recorder) -> headrace.ProxyHeader:
    header: headrace.ProxyHeader = recorder.transport.get_extra_info("proxy")
    return header


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, PATIENCE))


# ---- it sends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize(
    "how", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"]
)
def test_headers_of_haproxys(loop: headrace.EventLoop, tmp_path: Path, how: str, host: str) -> None:
    async def main() -> None:
        port = free_port()
        async with serving() as behind:
            with haproxy(tmp_path, f"{host}:{port}", f"{behind.target} {how}"):
                _, server, near = await exchange(behind, host, port)
        header = header_of(server)
        assert header.version == (1 if how == "send-proxy" else 2)
        assert server.transport.get_extra_info("peername") == near == header.source
        assert server.transport.get_extra_info("sockname")[:2] == (host, port)
        assert server.transport.get_extra_info("proxy_peername")[0] == "127.0.0.1"
        assert header.unique_id == (f"id-{near[1]}".encode() if "unique-id" in how else None)

    run(loop, main())


def test_to_a_unix_socket(loop: headrace.EventLoop, tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        async with serving(path=tmp_path / "socket") as behind:
            with haproxy(tmp_path, f"127.0.0.1:{port}", f"{behind.target} send-proxy-v2"):
                _, server, near = await exchange(behind, "127.0.0.1", port)
        assert server.transport.get_extra_info("peername") == near
        assert server.transport.get_extra_info("proxy_peername") == ""

    run(loop, main())


@pytest.mark.parametrize("how", ["send-proxy", "send-proxy-v2"])
def test_health_checks(loop: headrace.EventLoop, tmp_path: Path, how: str) -> None:
    """They are for HAProxy's own sake: the real addresses count. And a server that answers them is in use."""

    async def main() -> None:
        port = free_port()
        check = "check check-send-proxy inter 20ms fall 1 rise 1"
        async with serving() as behind:
            with haproxy(tmp_path, f"127.0.0.1:{port}", f"{behind.target} {how} {check}"):
                for _ in range(3):
                    server = await behind.accepted.get()
                    header = header_of(server)
                    real = server.transport.get_extra_info("proxy_peername")
                    # Version 1 can't say LOCAL: HAProxy says that the connection is its own.
                    local = how != "send-proxy"
                    assert (header.is_local, header.source) == (local, None if local else real)
                    assert server.transport.get_extra_info("peername") == real
                    assert server.transport.get_extra_info("sockname") == behind.address
                loop_: Any = asyncio.get_running_loop()
                client = Leases()
                transport, _ = await loop_.create_connection(lambda: client, "127.0.0.1", port)
                await client.until(lambda: client.data == b"hello")
                near = transport.get_extra_info("sockname")
                while header_of(server := await behind.accepted.get()).source != near:
                    pass
                transport.close()
                await server.seen("lost")
                await client.seen("lost")

    run(loop, main())


@pytest.mark.parametrize("how", ["send-proxy", "send-proxy-v2"])
def test_tls_through_it(loop: headrace.EventLoop, tmp_path: Path, how: str) -> None:
    """HAProxy passes TLS on as it is, behind its header."""
    files = issued(SERVER)

    async def main() -> None:
        port = free_port()
        tls = headrace.TLS(certificate=files.chain, private_key=files.key)
        async with serving(tls) as behind:
            with haproxy(tmp_path, f"127.0.0.1:{port}", f"{behind.target} {how}"):
                _, server, near = await exchange(behind, "127.0.0.1", port, headrace.TLS(ca=ca_file()))
        assert header_of(server).source == near

    run(loop, main())


@pytest.mark.parametrize("mutual", [False, True])
def test_what_it_tells_of_tls(loop: headrace.EventLoop, tmp_path: Path, mutual: bool) -> None:
    """HAProxy ends TLS, and says in TLVs what it was."""
    server_files, client_files = issued(SERVER), issued(CLIENT)
    pem = tmp_path / "server.pem"
    pem.write_bytes(server_files.chain.read_bytes() + server_files.key.read_bytes())
    own = {"certificate": client_files.chain, "private_key": client_files.key} if mutual else {}

    async def main() -> None:
        port = free_port()
        bind = f"127.0.0.1:{port} ssl crt {pem} alpn h2,ours ca-file {ca_file()} verify optional"
        told = "proxy-v2-options ssl,cert-cn,ssl-cipher,cert-sig,cert-key,authority,crc32c"
        security = headrace.TLS(ca=ca_file(), alpn=["ours"], truncation="eof", **own)
        async with serving() as behind:
            with haproxy(tmp_path, bind, f"{behind.target} send-proxy-v2 {told}"):
                _, server, near = await exchange(behind, "127.0.0.1", port, security)
        header = header_of(server)
        assert (header.source, header.alpn, header.authority) == (near, b"ours", SERVER)
        tls = header.ssl
        assert tls is not None
        assert (tls.is_tls, tls.is_certificate_of_connection, tls.is_verified) == (True, mutual, mutual)
        assert tls.version == "TLSv1.3"
        assert tls.cipher is not None
        assert tls.cipher.startswith("TLS_")
        assert tls.signature_algorithm
        assert tls.key_algorithm

    run(loop, main())


# ---- it accepts ----------------------------------------------------------------------------------------------

# (Not version 2's UNSPEC: HAProxy resets such a connection.)
SENT = {
    "v1": headrace.ProxyHeader(FOR_CLIENT, FOR_SERVER, version=1),
    "v1 over IPv6": headrace.ProxyHeader(FOR_CLIENT6, FOR_SERVER6, version=1),
    "v2": headrace.ProxyHeader(FOR_CLIENT, FOR_SERVER),
    "v2 over IPv6": headrace.ProxyHeader(FOR_CLIENT6, FOR_SERVER6),
    "v2 with TLVs": headrace.ProxyHeader(
        FOR_CLIENT, FOR_SERVER, tlvs=((ALPN, b"h2"), (NOOP, b""), (CRC32C, bytes(4)))
    ),
    "unknown": headrace.ProxyHeader(version=1),
    "local": headrace.ProxyHeader(is_local=True),
}


@pytest.mark.parametrize("header", SENT.values(), ids=SENT.keys())
def test_headers_of_ours(loop: headrace.EventLoop, tmp_path: Path, header: headrace.ProxyHeader) -> None:
    """HAProxy tells the server behind it what it was told."""

    async def main() -> None:
        port = free_port()
        sent = headrace.ProxyProtocol(header=header)
        async with serving() as behind:
            with haproxy(tmp_path, f"127.0.0.1:{port} accept-proxy", f"{behind.target} send-proxy-v2"):
                _, server, near = await exchange(behind, "127.0.0.1", port, sent)
        real = near, ("127.0.0.1", port)
        wanted = real if header.source is None else (header.source, header.destination)
        told = header_of(server)
        assert (told.source, told.destination) == wanted
        assert server.transport.get_extra_info("peername") == wanted[0]

    run(loop, main())


def test_a_header_before_tls_of_ours(loop: headrace.EventLoop, tmp_path: Path) -> None:
    """HAProxy takes the header off, and the server has TLS with the client behind HAProxy's own."""
    files = issued(SERVER)

    async def main() -> None:
        port = free_port()
        tls = headrace.TLS(certificate=files.chain, private_key=files.key)
        security = [headrace.ProxyProtocol(header=SENT["v2"]), headrace.TLS(ca=ca_file())]
        async with serving(tls) as behind:
            with haproxy(tmp_path, f"127.0.0.1:{port} accept-proxy", f"{behind.target} send-proxy"):
                _, server, _ = await exchange(behind, "127.0.0.1", port, security)
        assert server.transport.get_extra_info("peername") == FOR_CLIENT
        assert header_of(server).version == 1

    run(loop, main())
