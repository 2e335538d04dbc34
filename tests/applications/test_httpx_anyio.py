"""httpx and anyio on headrace: the client against uvicorn, and anyio's own streams and task groups."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

anyio = pytest.importorskip("anyio")
httpx = pytest.importorskip("httpx")
pytest.importorskip("trustme")
pytest.importorskip("uvicorn")

from anyio.streams.tls import TLSListener, TLSStream  # noqa: E402

import headrace  # noqa: E402
from uvicorn_server import serving  # noqa: E402
from web import (  # noqa: E402
    LARGE,
    certificate_file,
    chunks,
    clean_run,
    client_context,
    digest,
    nothing_left,
    payload,
    server_context,
    supervised,
)

T = TypeVar("T")

TASKS = 50
REQUESTS = 3  # of each task
CONNECTIONS = 10

Client = Any  # httpx.AsyncClient


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def pem(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """The server's key and certificate, or None without TLS."""
    return certificate_file(tmp_path) if request.param else None


def check(test: Callable[[Client], Awaitable[None]], engine: str, pem: Path | None) -> None:
    """Runs the test with httpx and uvicorn on one loop, which must end clean."""

    async def main() -> None:
        options = {"ssl_keyfile": pem, "ssl_certfile": pem} if pem else {}
        limits = httpx.Limits(max_connections=CONNECTIONS)
        async with (
            serving(**options) as port,
            httpx.AsyncClient(
                base_url=f"http{'s' if pem else ''}://127.0.0.1:{port}",
                verify=client_context() if pem else False,
                limits=limits,
                timeout=None,
                trust_env=False,
            ) as client,
        ):
            await test(client)

    clean_run(main, engine)


def test_many_tasks_share_the_pool(engine_name: str, pem: Path | None) -> None:
    ports: set[Any] = set()

    async def fetch(client: Client, number: int) -> None:
        for turn in range(REQUESTS):
            response = await client.get(f"/?{number}.{turn}")
            assert response.json() == {"loop": f"headrace {engine_name}", "query": f"{number}.{turn}"}
            stream = response.extensions["network_stream"]
            ports.add(stream.get_extra_info("client_addr"))
            body = payload(1000 + number)
            assert (await client.post("/echo", content=body)).content == body

    async def test(client: Client) -> None:
        async with anyio.create_task_group() as group:
            for number in range(TASKS):
                group.start_soon(fetch, client, number)
        assert 0 < len(ports) <= CONNECTIONS, "a connection wasn't kept alive"

    check(test, engine_name, pem)


def test_streams_both_ways(engine_name: str, pem: Path | None) -> None:
    async def download(client: Client) -> None:
        async with client.stream("GET", "/download") as response:
            body = b"".join([part async for part in response.aiter_bytes()])
        assert digest(body) == digest(payload())

    async def upload(client: Client) -> None:
        response = await client.put("/upload", content=chunks(payload()))
        assert response.text == digest(payload())

    async def test(client: Client) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(download, client)
                group.start_soon(upload, client)

    check(test, engine_name, pem)


def test_read_timeout(engine_name: str, pem: Path | None) -> None:
    """A server that begins an answer and says no more; the pool serves on."""

    async def test(client: Client) -> None:
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/silent", timeout=httpx.Timeout(None, read=0.05))
        assert (await client.get("/")).status_code == 200

    check(test, engine_name, pem)


def test_cancelled_by_move_on_after(engine_name: str, pem: Path | None) -> None:
    """In the middle of responses, all connections of the pool at once; the pool serves on."""

    async def read(client: Client) -> None:
        # httpcore 1.0 doesn't close a connection whose TLS handshake is cancelled: here none is.
        async with client.stream("GET", "/silent") as response:
            parts = response.aiter_bytes()
            assert await anext(parts) == b"begun"
            with anyio.move_on_after(0.05) as scope:
                await anext(parts)
            assert scope.cancelled_caught

    async def test(client: Client) -> None:
        for _ in range(3):
            async with anyio.create_task_group() as group:
                for _ in range(CONNECTIONS):
                    group.start_soon(read, client)
        assert (await client.get("/")).status_code == 200

    check(test, engine_name, pem)


def test_connection_refused(engine_name: str, free_port: int) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(f"http://127.0.0.1:{free_port}")

    clean_run(main, engine_name)


def anyio_run(main: Callable[[], Coroutine[Any, Any, T]], engine: str) -> T:
    """``anyio.run`` on headrace, by the option that anyio has for it; it must end clean."""
    errors: list[str] = []
    factory = functools.partial(headrace.new_event_loop, engine=engine)
    with nothing_left(engine):
        result = anyio.run(supervised, main, engine, errors, backend_options={"loop_factory": factory})
    assert not errors, errors
    return result


async def echo(stream: Any) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)
        await end_of_stream(stream)


async def end_of_stream(stream: Any) -> None:
    """TLS has no half-close in anyio."""
    if not isinstance(stream, TLSStream):
        await stream.send_eof()


async def exchange(stream: Any, data: bytes) -> None:
    """Sends and receives at once; what comes back must be the same."""
    received = bytearray()

    async def send() -> None:
        async for chunk in chunks(data):
            await stream.send(chunk)
        await end_of_stream(stream)

    async with stream, anyio.create_task_group() as group:
        group.start_soon(send)
        while len(received) < len(data):
            received += await stream.receive()
    assert digest(bytes(received)) == digest(data)


async def serve_and_exchange(listener: Any, connect: Callable[[], Awaitable[Any]]) -> None:
    """Many small exchanges at a time, then a large one."""
    async with listener, anyio.create_task_group() as servers:
        servers.start_soon(listener.serve, echo)

        async def one(number: int) -> None:
            await exchange(await connect(), payload(10_000 + number))

        async with anyio.create_task_group() as clients:
            for number in range(TASKS):
                clients.start_soon(one, number)
        await exchange(await connect(), payload(LARGE))
        servers.cancel_scope.cancel()


def test_tcp_streams(engine_name: str) -> None:
    async def main() -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        await serve_and_exchange(listener, lambda: anyio.connect_tcp("127.0.0.1", port))

    anyio_run(main, engine_name)


def test_tls_streams(engine_name: str) -> None:
    async def main() -> None:
        tcp = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = tcp.extra(anyio.abc.SocketAttribute.local_port)
        listener = TLSListener(tcp, server_context(), standard_compatible=False)
        context = client_context()

        async def connect() -> Any:
            return await anyio.connect_tcp(
                "127.0.0.1",
                port,
                ssl_context=context,
                tls_hostname="127.0.0.1",
                tls_standard_compatible=False,
            )

        await serve_and_exchange(listener, connect)

    anyio_run(main, engine_name)


def test_unix_streams(engine_name: str, tmp_path: Path) -> None:
    async def main() -> None:
        where = str(tmp_path / "socket")
        listener = await anyio.create_unix_listener(where)
        await serve_and_exchange(listener, lambda: anyio.connect_unix(where))

    anyio_run(main, engine_name)


def test_udp(engine_name: str) -> None:
    async def main() -> None:
        async with await anyio.create_udp_socket(local_host="127.0.0.1") as server:
            address = ("127.0.0.1", server.extra(anyio.abc.SocketAttribute.local_port))
            async with await anyio.create_connected_udp_socket(*address) as client:
                for number in range(100):
                    await client.send(payload(1000 + number))
                    data, sender = await server.receive()
                    await server.sendto(data, *sender)
                    assert await client.receive() == payload(1000 + number)

    anyio_run(main, engine_name)


def test_a_failing_task_cancels_the_group_s_receives(engine_name: str) -> None:
    async def main() -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        waiting = 0

        async def receive(ready: Any) -> None:
            nonlocal waiting
            async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                waiting += 1
                if waiting == TASKS:
                    ready.set()
                await stream.receive()

        async def fail(ready: Any) -> None:
            await ready.wait()
            raise LookupError("enough")

        async with listener, anyio.create_task_group() as servers:
            servers.start_soon(listener.serve, echo)
            with pytest.raises(ExceptionGroup) as caught:
                async with anyio.create_task_group() as group:
                    ready = anyio.Event()
                    group.start_soon(fail, ready)
                    for _ in range(TASKS):
                        group.start_soon(receive, ready)
            assert [type(each) for each in caught.value.exceptions] == [LookupError]
            servers.cancel_scope.cancel()

    anyio_run(main, engine_name)


def test_threads_and_processes(engine_name: str) -> None:
    """Work in anyio's worker threads that calls back into the loop, and a child process."""

    async def main() -> None:
        seen: list[str] = []

        async def note(text: str) -> str:
            seen.append(text)
            return text.upper()

        def work(number: int) -> str:
            return str(anyio.from_thread.run(note, f"n{number}"))

        async with anyio.create_task_group() as group:
            for number in range(TASKS):
                group.start_soon(anyio.to_thread.run_sync, work, number)
        assert sorted(seen) == sorted(f"n{number}" for number in range(TASKS))
        result = await anyio.run_process(["cat"], input=payload(100_000))
        assert result.stdout == payload(100_000)

    anyio_run(main, engine_name)


def test_asyncgens_of_anyio_are_closed(engine_name: str) -> None:
    """``anyio.run`` shuts generators down as ``asyncio.run`` does."""
    closed: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            closed.append("closed")

    async def main() -> AsyncIterator[int]:
        generator = numbers()
        assert await anext(generator) == 1
        return generator

    anyio_run(main, engine_name)
    assert closed == ["closed"]
