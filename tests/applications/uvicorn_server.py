"""uvicorn inside a running loop, as an async context manager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from asgi_app import app
from web import until


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[int]:
    """Serves ``asgi_app`` on a free port of 127.0.0.1, which it gives, by ``Server.serve()``.

    ``options``: of ``uvicorn.Config``.
    """
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, **options))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(server.serve())
        await until(lambda: server.started or task.done())  # ``started`` is an attribute, no event
        if server.started:
            try:
                yield server.servers[0].sockets[0].getsockname()[1]
            finally:
                server.should_exit = True
