"""Both ends of secured connections, in one loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from streams import Recorder

__all__ = ["Pair", "serving"]


class Pair:
    """Both ends of a connection through a server of this loop."""

    def __init__(self, server: asyncio.Server, client: Any, name: str) -> None:
        self.server = server
        self.client = client
        self.name = name
        self.accepted: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def address(self) -> Any:
        return self.server.sockets[0].getsockname()

    async def connect(self, protocol: Recorder, security: Any = None) -> Any:
        loop: Any = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(
            lambda: protocol, *self.address, security=security or self.client, server_hostname=self.name
        )
        return transport


@contextlib.asynccontextmanager
async def serving(
    protocol: Callable[[], Recorder], client: Any, name: str, **options: Any
) -> AsyncIterator[Pair]:
    """A server with ``options``; ``client`` and ``name`` are for connections to it."""
    loop: Any = asyncio.get_running_loop()

    def factory() -> Recorder:
        made = protocol()
        made.on.setdefault("made", pair_of[0].accepted.put_nowait)
        return made

    pair_of: list[Pair] = []
    server = await loop.create_server(factory, "127.0.0.1", 0, **options)
    pair_of.append(Pair(server, client, name))
    async with server:
        yield pair_of[0]
