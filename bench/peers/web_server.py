"""Web applications as peers: ``web_server.py LOOP PORT APPLICATION`` prints ``READY <port>`` when it listens.

Every loop runs the same application with the package's default settings, without an access log.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

BODY = b"x" * 64
BACKLOG = 1024


async def aiohttp(listener: socket.socket) -> None:
    from aiohttp import web

    async def hello(_request: web.Request) -> web.Response:
        return web.Response(body=BODY)

    app = web.Application()
    app.router.add_get("/", hello)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, listener, backlog=BACKLOG).start()
    ready(listener)
    await asyncio.Event().wait()


async def uvicorn(listener: socket.socket) -> None:
    import uvicorn as server

    length = str(len(BODY)).encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", length)]

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": BODY})

    config = server.Config(app, http="httptools", lifespan="off", access_log=False, log_config=None)
    ready(listener)  # connections wait in its backlog
    await server.Server(config).serve([listener])


async def websockets(listener: socket.socket) -> None:
    from websockets.asyncio.server import ServerConnection, serve

    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(echo, sock=listener):
        ready(listener)
        await asyncio.Event().wait()


APPLICATIONS: dict[str, Callable[[socket.socket], Awaitable[None]]] = {
    "aiohttp": aiohttp,
    "uvicorn": uvicorn,
    "websockets": websockets,
}


def ready(listener: socket.socket) -> None:
    print("READY", listener.getsockname()[1], flush=True)


def new_loop(name: str) -> asyncio.AbstractEventLoop:
    """That package's loop; a table row must not show another engine than its name says."""
    loop: Any = importlib.import_module(name).new_event_loop()
    wanted = os.environ.get("HEADRACE_ENGINE")
    if name == "headrace" and wanted != loop.engine_name:
        raise SystemExit(f"runs on {loop.engine_name}, not on {wanted}: {loop.engine_reason}")
    assert isinstance(loop, asyncio.AbstractEventLoop)
    return loop


async def main(application: str, port: int) -> None:
    # The protocol is named because asyncio sets TCP_NODELAY only where it is: without it, Nagle's algorithm
    # would make uvicorn's second segment wait for the client's delayed acknowledgement.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
        await APPLICATIONS[application](listener)


if __name__ == "__main__":
    loop_name, port_text, application_name = sys.argv[1:]
    with asyncio.Runner(loop_factory=lambda: new_loop(loop_name)) as runner:
        runner.run(main(application_name, int(port_text)))
