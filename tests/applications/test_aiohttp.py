"""aiohttp's server and client on headrace: under load, over TLS, interrupted, and closing cleanly."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")
pytest.importorskip("trustme")

from aiohttp_app import STATE, State, application, serving  # noqa: E402
from web import (  # noqa: E402
    CHUNK,
    PATIENCE,
    chunks,
    clean_run,
    client_context,
    digest,
    engine_of,
    in_thread,
    nothing_left,
    payload,
    run_supervised,
    server_context,
    until,
)

TASKS = 200
REQUESTS = 5  # of each task
CONNECTIONS = 50

Client = Any  # aiohttp.ClientSession
Test = Callable[[Client, State], Awaitable[None]]


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file that the application sends."""
    path = tmp_path / "large"
    path.write_bytes(payload())
    return path


def client(port: int, tls: bool, **options: Any) -> Client:
    """A session for that server."""
    connector = aiohttp.TCPConnector(limit=CONNECTIONS, ssl=client_context() if tls else False)
    scheme = "https" if tls else "http"
    return aiohttp.ClientSession(f"{scheme}://127.0.0.1:{port}", connector=connector, **options)


@asynccontextmanager
async def both(path: Path, tls: bool) -> AsyncIterator[tuple[Client, State]]:
    """Server and client on one loop."""
    app = application(path)
    async with (
        serving(app, ssl_context=server_context() if tls else None) as port,
        client(port, tls) as session,
    ):
        yield session, app[STATE]


def check(test: Test, engine: str, path: Path, tls: bool) -> None:
    """Runs the test with server and client on one loop, which must end clean."""

    async def main() -> None:
        async with both(path, tls) as (session, state):
            await test(session, state)

    clean_run(main, engine)


async def fetch(session: Client, number: int) -> str:
    """Some GETs and POSTs one after the other; which loop the server runs on."""
    loop = ""
    for turn in range(REQUESTS):
        async with session.get(f"/?{number}.{turn}") as response:
            assert response.status == 200
            answer = await response.json()
        assert answer["query"] == f"{number}.{turn}"
        loop = answer["loop"]
        body = payload(1000 + number)
        async with session.post("/echo", data=body) as response:
            assert await response.read() == body
    return loop


async def many(session: Client) -> set[str]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(fetch(session, number)) for number in range(TASKS)]
    return {task.result() for task in tasks}


def test_many_tasks_share_kept_connections(engine_name: str, path: Path, tls: bool) -> None:
    async def test(session: Client, state: State) -> None:
        assert await many(session) == {f"headrace {engine_name}"}
        assert 0 < len(state.peers) <= CONNECTIONS, "a connection wasn't kept alive"

    check(test, engine_name, path, tls)


def test_server_in_another_thread(engine_name: str, path: Path, tls: bool) -> None:
    app = application(path)
    context = server_context() if tls else None

    with (
        nothing_left(engine_name),
        in_thread(lambda: serving(app, ssl_context=context), engine_name) as port,
    ):

        async def main() -> None:
            async with client(port, tls) as session:
                assert await many(session) == {f"headrace {engine_name}"}

        run_supervised(main, engine_name)
    assert len(app[STATE].peers) <= CONNECTIONS


def test_server_in_another_process(engine_name: str) -> None:
    """aiohttp's own ``run_app``, which ends after SIGTERM."""
    program = Path(__file__).with_name("aiohttp_app.py")
    command = [sys.executable, "-X", "dev", "-W", "error", str(program), engine_name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())

        async def main() -> None:
            async with client(port, tls=False) as session:
                assert await many(session) == {f"headrace {engine_name}"}

        try:
            clean_run(main, engine_name)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert errors == b""
    assert process.returncode == 0


def test_download_and_upload(engine_name: str, path: Path, tls: bool) -> None:
    """Streamed both ways at once, several times; sendfile among them."""

    async def download(session: Client, url: str) -> None:
        async with session.get(url) as response:
            body = b"".join([chunk async for chunk in response.content.iter_any()])
        assert digest(body) == digest(payload())

    async def upload(session: Client, body: Any) -> None:
        async with session.put("/upload", data=body) as response:
            assert await response.text() == digest(payload())

    async def test(session: Client, state: State) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(download(session, "/download"))
            group.create_task(download(session, "/file"))
            group.create_task(upload(session, chunks(payload())))
            with path.open("rb") as file:
                await upload(session, file)

    check(test, engine_name, path, tls)


def test_part_of_a_file(engine_name: str, path: Path, tls: bool) -> None:
    async def test(session: Client, state: State) -> None:
        async with session.get("/file", headers={"Range": "bytes=1000001-3000000"}) as response:
            assert response.status == 206
            assert await response.read() == payload()[1_000_001:3_000_001]

    check(test, engine_name, path, tls)


def test_websocket(engine_name: str, path: Path, tls: bool) -> None:
    async def converse(session: Client, number: int) -> None:
        async with session.ws_connect("/websocket", max_msg_size=0) as socket:
            for turn in range(20):
                await socket.send_str(f"{number}.{turn}")
                assert await socket.receive_str() == f"{number}.{turn}"
            await socket.ping()
            data = payload(100_000 + number)
            await socket.send_bytes(data)
            assert await socket.receive_bytes() == data
            await socket.close()
            assert socket.close_code == 1000

    async def test(session: Client, state: State) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CONNECTIONS):
                group.create_task(converse(session, number))

    check(test, engine_name, path, tls)


def test_large_websocket_message(engine_name: str, path: Path, tls: bool) -> None:
    async def test(session: Client, state: State) -> None:
        async with session.ws_connect("/websocket", max_msg_size=0) as socket:
            await socket.send_bytes(payload())
            assert digest(await socket.receive_bytes()) == digest(payload())

    check(test, engine_name, path, tls)


def test_slow_reader_holds_the_server_back(engine_name: str, path: Path, tls: bool) -> None:
    """A client that doesn't read pauses the writer, and its memory stays within the transport's limits."""

    async def test(session: Client, state: State) -> None:
        async with session.get("/endless") as response:
            await state.streaming.wait()
            await until(lambda: state.transport.get_protocol().writing_paused)
            written, held = state.written, state.transport.get_write_buffer_size()
            assert 0 < held <= state.transport.get_write_buffer_limits()[1] + 2 * CHUNK
            received = 0
            while received < written + 4 * CHUNK:  # it goes on as soon as the client reads
                received += len(await response.content.readany())
            assert state.written > written
        await asyncio.wait_for(state.ended.wait(), PATIENCE)

    check(test, engine_name, path, tls)


def test_cancelled_in_the_middle_of_a_response(engine_name: str, path: Path, tls: bool) -> None:
    """The server learns of it, and the session serves on."""

    async def read(session: Client, begun: asyncio.Event) -> None:
        async with session.get("/endless") as response:
            while True:
                await response.content.readany()
                begun.set()

    async def test(session: Client, state: State) -> None:
        for _ in range(10):
            begun = asyncio.Event()
            reading = asyncio.create_task(read(session, begun))
            await begun.wait()
            state.ended.clear()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await asyncio.wait_for(state.ended.wait(), PATIENCE)
        await fetch(session, 1)

    check(test, engine_name, path, tls)


def test_client_timeout(engine_name: str, path: Path) -> None:
    """A server that accepts and says nothing."""

    async def main() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        async with server, client(server.sockets[0].getsockname()[1], tls=False) as session:
            with pytest.raises(aiohttp.ServerTimeoutError):
                async with session.get("/", timeout=aiohttp.ClientTimeout(sock_read=0.05)):
                    pytest.fail("nobody answered")

    clean_run(main, engine_name)


def test_unix_socket(engine_name: str, path: Path, tmp_path: Path) -> None:
    async def main() -> None:
        where = str(tmp_path / "socket")
        runner = aiohttp.web.AppRunner(application(path), access_log=None)
        await runner.setup()
        await aiohttp.web.UnixSite(runner, where).start()
        connector = aiohttp.UnixConnector(where, limit=CONNECTIONS)
        try:
            async with aiohttp.ClientSession("http://unix", connector=connector) as session:
                assert await many(session) == {engine_of(asyncio.get_running_loop())}
                async with session.get("/file") as response:
                    assert digest(await response.read()) == digest(payload())
        finally:
            await runner.cleanup()

    clean_run(main, engine_name)


def test_shutdown_with_idle_and_busy_connections(engine_name: str, path: Path, tls: bool) -> None:
    """The server goes first: idle kept connections are closed, and one that never ends is cut after a time."""

    async def main() -> None:
        app = application(path)
        runner = aiohttp.web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await runner.setup()
        context = server_context() if tls else None
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        async with client(runner.addresses[0][1], tls) as session:
            await asyncio.gather(*(fetch(session, number) for number in range(10)))
            async with session.get("/endless") as response:
                await app[STATE].streaming.wait()
                await runner.cleanup()
                with pytest.raises(aiohttp.ClientError):
                    while await response.content.readany():
                        pass
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get("/")

    clean_run(main, engine_name)
