"""The websockets package, its asyncio server and client, on headrace."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

websockets = pytest.importorskip("websockets")
pytest.importorskip("trustme")

from websockets.asyncio.client import connect  # noqa: E402
from websockets.asyncio.server import ServerConnection, broadcast, serve  # noqa: E402
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK  # noqa: E402

from web import (  # noqa: E402
    clean_run,
    client_context,
    digest,
    engine_of,
    in_thread,
    nothing_left,
    payload,
    run_supervised,
    server_context,
)

CLIENTS = 100
MESSAGES = 10  # of each client
MESSAGE = 4 * 1024 * 1024  # bytes
ABNORMAL_CLOSURE = 1006  # RFC 6455, section 7.4.1

Handler = Callable[[ServerConnection], Awaitable[None]]


class Site:
    """A server on 127.0.0.1, and how to reach it."""

    def __init__(self, tls: bool) -> None:
        self.tls = tls
        self.server_tls: ssl.SSLContext | None = server_context() if tls else None
        self.client_tls: ssl.SSLContext | None = client_context() if tls else None

    def serve(self, handler: Handler, **options: Any) -> Any:
        return serve(handler, "127.0.0.1", 0, ssl=self.server_tls, max_size=None, **options)

    def connect(self, server: Any, **options: Any) -> Any:
        return self.connect_to(server.sockets[0].getsockname()[1], **options)

    def connect_to(self, port: int, **options: Any) -> Any:
        scheme = "wss" if self.tls else "ws"
        return connect(
            f"{scheme}://127.0.0.1:{port}", ssl=self.client_tls, max_size=None, proxy=None, **options
        )


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def site(request: pytest.FixtureRequest) -> Site:
    return Site(request.param)


async def echo(connection: ServerConnection) -> None:
    """Says first which loop it runs on."""
    await connection.send(engine_of(asyncio.get_running_loop()))
    async for message in connection:
        await connection.send(message)


async def converse(connecting: Any, number: int) -> str:
    async with connecting as connection:
        loop = await connection.recv()
        for turn in range(MESSAGES):
            for message in (f"{number}.{turn}", payload(1000 * turn + number)):
                await connection.send(message)
                assert await connection.recv() == message
    assert connection.close_code == 1000
    return str(loop)


async def many(connecting: Callable[[], Any]) -> set[str]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(converse(connecting(), number)) for number in range(CLIENTS)]
    return {task.result() for task in tasks}


def test_many_clients(engine_name: str, site: Site) -> None:
    async def main() -> None:
        async with site.serve(echo) as server:
            assert await many(lambda: site.connect(server)) == {f"headrace {engine_name}"}

    clean_run(main, engine_name)


def test_server_in_another_thread(engine_name: str, site: Site) -> None:
    @asynccontextmanager
    async def serving() -> Any:
        async with site.serve(echo) as server:
            yield server.sockets[0].getsockname()[1]

    with nothing_left(engine_name), in_thread(serving, engine_name) as port:

        async def main() -> None:
            assert await many(lambda: site.connect_to(port)) == {f"headrace {engine_name}"}

        run_supervised(main, engine_name)


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_large_messages(engine_name: str, site: Site, compression: str | None) -> None:
    """In one frame and in several, from several clients at once."""

    async def one(server: Any, fragments: int) -> None:
        data = payload(MESSAGE + fragments)
        size = -(-len(data) // fragments)
        async with site.connect(server, compression=compression) as connection:
            await connection.recv()
            await connection.send(data[at : at + size] for at in range(0, len(data), size))
            assert digest(await connection.recv()) == digest(data)

    async def main() -> None:
        async with site.serve(echo, compression=compression) as server, asyncio.TaskGroup() as group:
            for fragments in (1, 2, 7):
                group.create_task(one(server, fragments))

    clean_run(main, engine_name)


def test_ping(engine_name: str, site: Site) -> None:
    """Of the application, answered by the peer's library; and kept alive by itself."""

    async def main() -> None:
        async with (
            site.serve(echo, ping_interval=0.02) as server,
            site.connect(server, ping_interval=0.02) as connection,
        ):
            await connection.recv()
            for _ in range(10):
                assert await (await connection.ping()) > 0
            while not connection.latency:  # set by the pong to a keep-alive ping
                await (await connection.ping())

    clean_run(main, engine_name)


def test_broadcast(engine_name: str, site: Site) -> None:
    joined: set[ServerConnection] = set()

    async def join(connection: ServerConnection) -> None:
        joined.add(connection)
        await connection.send("joined")
        await connection.wait_closed()

    async def receive(server: Any, ready: asyncio.Barrier) -> None:
        async with site.connect(server) as connection:
            assert await connection.recv() == "joined"
            await ready.wait()
            for number in range(MESSAGES):
                assert await connection.recv() == payload(10_000 + number)

    async def main() -> None:
        joined.clear()
        ready = asyncio.Barrier(CLIENTS + 1)
        async with site.serve(join) as server, asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(receive(server, ready))
            await ready.wait()
            for number in range(MESSAGES):
                broadcast(joined, payload(10_000 + number), raise_exceptions=True)

    clean_run(main, engine_name)


def test_close_by_the_server(engine_name: str, site: Site) -> None:
    """Code and reason arrive behind the last message."""

    async def leave(connection: ServerConnection) -> None:
        await connection.send(payload())
        await connection.close(4001, "enough")

    async def main() -> None:
        async with site.serve(leave) as server, site.connect(server) as connection:
            assert digest(await connection.recv()) == digest(payload())
            with pytest.raises(ConnectionClosedError) as caught:
                await connection.recv()
            assert caught.value.rcvd is not None
            assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4001, "enough")

    clean_run(main, engine_name)


def test_shutdown_of_the_server(engine_name: str, site: Site) -> None:
    """Every client is told 1001, going away."""

    async def wait(server: Any, ready: asyncio.Barrier) -> int:
        async with site.connect(server) as connection:
            await connection.recv()
            await ready.wait()
            with pytest.raises(ConnectionClosedOK):
                await connection.recv()
        return int(connection.close_code)

    async def main() -> None:
        ready = asyncio.Barrier(CLIENTS + 1)
        async with site.serve(echo) as server, asyncio.TaskGroup() as group:
            waiting = [group.create_task(wait(server, ready)) for _ in range(CLIENTS)]
            await ready.wait()
            server.close()
            await server.wait_closed()
        assert {task.result() for task in waiting} == {1001}

    clean_run(main, engine_name)


def test_abrupt_disconnects(engine_name: str, site: Site) -> None:
    """Clients that drop the connection in the middle of messages; the server notices each, and serves on."""
    codes: asyncio.Queue[int | None] = asyncio.Queue()

    async def flood(connection: ServerConnection) -> None:
        try:
            while True:
                await connection.send(payload(100_000))
        except ConnectionClosedError:
            codes.put_nowait(connection.close_code)

    async def drop(server: Any) -> None:
        async with site.connect(server) as connection:
            await connection.recv()
            connection.transport.abort()
            await connection.wait_closed()
        assert connection.close_code == ABNORMAL_CLOSURE

    async def main() -> None:
        async with site.serve(flood, compression=None) as server:
            async with asyncio.TaskGroup() as group:
                for _ in range(20):
                    group.create_task(drop(server))
            assert {await codes.get() for _ in range(20)} == {ABNORMAL_CLOSURE}
        async with site.serve(echo) as server:
            assert await converse(site.connect(server), 1) == f"headrace {engine_name}"

    clean_run(main, engine_name)


def test_cancelled_receive(engine_name: str, site: Site) -> None:
    """It loses no message."""

    async def main() -> None:
        async with site.serve(echo) as server, site.connect(server) as connection:
            await connection.recv()
            for number in range(MESSAGES):
                receiving = asyncio.create_task(connection.recv())
                await asyncio.sleep(0)  # it waits now
                receiving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await receiving
                await connection.send(str(number))
                assert await connection.recv() == str(number)

    clean_run(main, engine_name)
