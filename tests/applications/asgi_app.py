"""An ASGI application without a framework, that shows all of a connection's sides."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from web import CHUNK, engine_of, payload

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The application that uvicorn is given."""
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "websocket":
        await websocket(receive, send)
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await ROUTES[scope["path"]](scope, receive, send)
        await send({"type": "http.response.body", "body": b""})


async def lifespan(receive: Receive, send: Send) -> None:
    """Says on stdout when it begins and ends."""
    for event in ("startup", "shutdown"):
        message = await receive()
        assert message["type"] == f"lifespan.{event}"
        print(event, flush=True)
        await send({"type": f"lifespan.{event}.complete"})


async def part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    answer = {"loop": engine_of(asyncio.get_running_loop()), "query": scope["query_string"].decode()}
    await part(send, json.dumps(answer).encode())


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers each piece of the body as it comes."""
    more = True
    while more:
        message = await receive()
        await part(send, message["body"])
        more = message["more_body"]


async def download(scope: Scope, receive: Receive, send: Send) -> None:
    for at in range(0, len(payload()), CHUNK):
        await part(send, payload()[at : at + CHUNK])


async def upload(scope: Scope, receive: Receive, send: Send) -> None:
    """The SHA-256 of a body that is never held as a whole."""
    seen, more = hashlib.sha256(), True
    while more:
        message = await receive()
        seen.update(message["body"])
        more = message["more_body"]
    await part(send, seen.hexdigest().encode())


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """Begins an answer, and goes on when the client is gone."""
    await part(send, b"begun")
    while (await receive())["type"] != "http.disconnect":
        pass


async def websocket(receive: Receive, send: Send) -> None:
    """Echoes text and bytes."""
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})


ROUTES = {"/": hello, "/echo": echo, "/download": download, "/upload": upload, "/silent": silent}
