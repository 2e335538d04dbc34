"""uvicorn on headrace: by its ``--loop`` option in a process of its own, and inside ``headrace.run``."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")
pytest.importorskip("httptools")
pytest.importorskip("trustme")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")

from uvicorn_server import serving  # noqa: E402
from web import (  # noqa: E402
    PATIENCE,
    certificate_file,
    chunks,
    clean_run,
    client_context,
    digest,
    payload,
    until,
)

HERE = Path(__file__).parent
TASKS = 200
REQUESTS = 5  # of each task
CONNECTIONS = 50
RUNNING = re.compile(rb"running on https?://127\.0\.0\.1:(\d+)")

Client = Any  # aiohttp.ClientSession


@pytest.fixture(params=["h11", "httptools"])
def http(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def pem(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """The server's key and certificate, or None without TLS."""
    return certificate_file(tmp_path) if request.param else None


def client(port: int, tls: bool) -> Client:
    connector = aiohttp.TCPConnector(limit=CONNECTIONS, ssl=client_context() if tls else False)
    return aiohttp.ClientSession(f"http{'s' if tls else ''}://127.0.0.1:{port}", connector=connector)


@contextmanager
def program(engine: str, http: str, pem: Path | None) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """``uvicorn --loop headrace:new_event_loop``, and its port."""
    command = [sys.executable, "-m", "uvicorn", "asgi_app:app", "--app-dir", str(HERE)]
    command += ["--loop", "headrace:new_event_loop", "--http", http, "--port", "0", "--no-access-log"]
    if pem:
        command += ["--ssl-keyfile", str(pem), "--ssl-certfile", str(pem)]
    environment = {**os.environ, "HEADRACE_ENGINE": engine, "PYTHONDEVMODE": "1"}
    pipe = subprocess.PIPE
    # Unbuffered: what readline took beyond a line, communicate wouldn't see.
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment, bufsize=0) as process:
        assert process.stderr is not None
        try:
            said = []
            while not (match := RUNNING.search(line := process.stderr.readline())):
                said.append(line)
                assert line, b"".join(said).decode()  # it has ended
            yield process, int(match[1])
        finally:
            process.kill()


def ended_well(process: subprocess.Popen[bytes]) -> None:
    """After SIGTERM: lifespan done, nothing complained, and the signal passed on, as uvicorn does."""
    output, errors = process.communicate(timeout=PATIENCE)
    assert output.split() == [b"startup", b"shutdown"]
    assert not re.search(rb"Warning|Traceback|ERROR", errors), errors.decode()
    assert b"Finished server process" in errors
    assert process.returncode == -signal.SIGTERM


async def fetch(session: Client, number: int) -> str:
    """Some GETs and POSTs one after the other; which loop the server runs on."""
    loop = ""
    for turn in range(REQUESTS):
        async with session.get(f"/?{number}.{turn}") as response:
            assert response.status == 200
            answer = await response.json(content_type=None)
        assert answer["query"] == f"{number}.{turn}"
        loop = answer["loop"]
        body = payload(1000 + number)
        async with session.post("/echo", data=body) as response:
            assert await response.read() == body
    return loop


async def load(session: Client, engine: str) -> None:
    """Many small requests, and large bodies both ways; the server must run on headrace."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(fetch(session, number)) for number in range(TASKS)]
        for _ in range(2):
            group.create_task(download(session))
            group.create_task(upload(session))
    assert {task.result() for task in tasks} == {f"headrace {engine}"}


async def download(session: Client) -> None:
    async with session.get("/download") as response:
        assert digest(await response.read()) == digest(payload())


async def upload(session: Client) -> None:
    async with session.put("/upload", data=chunks(payload())) as response:
        assert await response.text() == digest(payload())


async def websockets(session: Client) -> None:
    async def converse(number: int) -> None:
        async with session.ws_connect("/", max_msg_size=0) as socket:
            for turn in range(10):
                await socket.send_str(f"{number}.{turn}")
                assert await socket.receive_str() == f"{number}.{turn}"
            await socket.send_bytes(payload(100_000 + number))
            assert await socket.receive_bytes() == payload(100_000 + number)

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(converse(number))


def inside(test: Callable[[Client], Awaitable[None]], engine: str, pem: Path | None, **options: Any) -> None:
    """Runs the test with server and client on one loop, which must end clean."""
    options |= {"ssl_keyfile": pem, "ssl_certfile": pem} if pem else {}

    async def main() -> None:
        async with serving(**options) as port, client(port, bool(pem)) as session:
            await test(session)

    clean_run(main, engine)


def test_program_under_load(engine_name: str, http: str, pem: Path | None) -> None:
    with program(engine_name, http, pem) as (process, port):

        async def main() -> None:
            async with client(port, bool(pem)) as session:
                await load(session, engine_name)
                await websockets(session)

        clean_run(main, engine_name)
        process.terminate()
        ended_well(process)


def test_sigterm_with_a_request_in_flight(engine_name: str, http: str, pem: Path | None) -> None:
    """It is answered to its end; new connections are refused meanwhile."""
    with program(engine_name, http, pem) as (process, port):

        async def main() -> None:
            stopping = asyncio.Event()

            async def body() -> AsyncIterator[bytes]:
                yield b"before "
                await stopping.wait()
                yield b"after"

            async with (
                client(port, bool(pem)) as session,
                session.post("/echo", data=body()) as response,
            ):
                assert await response.content.readany() == b"before "
                process.terminate()
                await refused(port)
                stopping.set()
                assert await response.read() == b"after"

        clean_run(main, engine_name)
        ended_well(process)


async def refused(port: int) -> None:
    """Returns when the server listens no longer."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.wait([asyncio.ensure_future(writer.wait_closed())])
            await asyncio.sleep(0.01)


def test_server_inside_a_run(engine_name: str, http: str, pem: Path | None) -> None:
    async def test(session: Client) -> None:
        await load(session, engine_name)

    inside(test, engine_name, pem, http=http)


def test_websockets_inside_a_run(engine_name: str, pem: Path | None) -> None:
    inside(websockets, engine_name, pem, ws="websockets-sansio")


def test_client_gone(engine_name: str, http: str) -> None:
    """The application is told of a client that is cancelled, and shutdown waits for nobody."""

    async def test(session: Client) -> None:
        async def read(begun: asyncio.Event) -> None:
            async with session.get("/silent") as response:
                assert await response.content.readany() == b"begun"
                begun.set()
                await response.content.read()

        for _ in range(10):
            begun = asyncio.Event()
            reading = asyncio.create_task(read(begun))
            await begun.wait()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        await fetch(session, 1)

    inside(test, engine_name, None, http=http)


def test_unix_socket(engine_name: str, http: str, tmp_path: Path) -> None:
    """``Config(uds=...)``."""
    import uvicorn

    from asgi_app import app

    async def main() -> None:
        where = str(tmp_path / "socket")
        server = uvicorn.Server(uvicorn.Config(app, uds=where, http=http, log_config=None))
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        connector = aiohttp.UnixConnector(where, limit=CONNECTIONS)
        async with aiohttp.ClientSession("http://unix", connector=connector) as session:
            await load(session, engine_name)
        server.should_exit = True
        await serving

    clean_run(main, engine_name)
