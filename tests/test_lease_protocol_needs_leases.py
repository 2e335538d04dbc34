"""A headrace.Protocol where no leases come from is refused, with a reason, before any byte is lost."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest

import headrace


def test_tls_refuses_a_lease_protocol(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        async with server:
            with pytest.raises(TypeError, match="brings no leases"):
                await loop.create_connection(
                    headrace.Protocol,
                    *server.sockets[0].getsockname(),
                    ssl=ssl.create_default_context(),
                    server_hostname="localhost",
                )

    reported: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reported.append(context))
    loop.run_until_complete(main())
    assert [context["message"] for context in reported] == ["TLS can't be served"]
