"""An aiohttp application that shows all of a connection's sides; as a program it serves on a port it prints.

``python aiohttp_app.py ENGINE`` ends with status 0 after SIGTERM, when the requests in flight are answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

import headrace
from web import CHUNK, chunks, engine_of, payload


@dataclass
class State:
    """What the server has seen, for tests of the same process."""

    peers: set[Any] = field(default_factory=set)
    written: int = 0  # bytes of /endless
    transport: Any = None  # of /endless
    streaming: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # /endless has lost its client


STATE = web.AppKey("state", State)
FILE = web.AppKey("file", Path)


async def hello(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.app[STATE].peers.add(request.transport.get_extra_info("peername"))
    return web.json_response({"loop": engine_of(asyncio.get_running_loop()), "query": request.query_string})


async def echo(request: web.Request) -> web.Response:
    return web.Response(body=await request.read())


async def download(request: web.Request) -> web.StreamResponse:
    """The payload, chunked."""
    response = web.StreamResponse()
    await response.prepare(request)
    async for chunk in chunks(payload()):
        await response.write(chunk)
    await response.write_eof()
    return response


async def upload(request: web.Request) -> web.Response:
    """The SHA-256 of a body that is never held as a whole."""
    seen = hashlib.sha256()
    async for chunk in request.content.iter_chunked(CHUNK):
        seen.update(chunk)
    return web.Response(text=seen.hexdigest())


async def endless(request: web.Request) -> web.StreamResponse:
    """Writes until the client is gone."""
    state = request.app[STATE]
    response = web.StreamResponse()
    await response.prepare(request)
    state.transport = request.transport
    try:
        while True:
            await response.write(bytes(CHUNK))
            state.written += CHUNK
            state.streaming.set()
    finally:
        state.ended.set()


async def file(request: web.Request) -> web.FileResponse:
    return web.FileResponse(request.app[FILE])


async def websocket(request: web.Request) -> web.WebSocketResponse:
    """Echoes text and bytes."""
    socket = web.WebSocketResponse(max_msg_size=0)
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


def application(path: Path) -> web.Application:
    """All of the above; ``path`` is the file that /file sends."""
    app = web.Application()
    app[STATE] = State()
    app[FILE] = path
    app.add_routes(
        [
            web.get("/", hello),
            web.post("/echo", echo),
            web.get("/download", download),
            web.put("/upload", upload),
            web.get("/endless", endless),
            web.get("/file", file),
            web.get("/websocket", websocket),
        ]
    )
    return app


@asynccontextmanager
async def serving(app: web.Application, **site: Any) -> AsyncIterator[int]:
    """Serves on a free port of 127.0.0.1, which it gives; cleans up at the end. ``site``: of ``TCPSite``."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, **site).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def main() -> None:
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)  # connections wait in its backlog
    web.run_app(
        application(Path(__file__)),
        sock=listener,
        loop=headrace.new_event_loop(engine=sys.argv[1]),
        print=None,
        access_log=None,
    )


if __name__ == "__main__":
    main()
