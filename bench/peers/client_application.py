"""Clients as peers: ``client_application.py LOOP APPLICATION CONNECTIONS ADDRESS...``; ``READY 0`` when connected.

For each line on standard input, a number of seconds, every connection makes requests one after the other for so long;
then a line of JSON says what a request cost this process. It ends with its input.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

Request = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def asyncpg(host: str, port: str, user: str) -> AsyncIterator[Request]:
    package = importlib.import_module("asyncpg")
    connection = await package.connect(host=host, port=int(port), user=user, database="postgres")
    statement = await connection.prepare("SELECT $1::int")
    yield lambda: statement.fetchval(7)
    await connection.close()


@asynccontextmanager
async def redis(host: str, port: str) -> AsyncIterator[Request]:
    client = importlib.import_module("redis.asyncio").Redis(
        host=host, port=int(port), single_connection_client=True
    )
    await client.set("key", b"x" * 64)
    yield lambda: client.get("key")
    await client.aclose()


@asynccontextmanager
async def httpx(host: str, port: str) -> AsyncIterator[Request]:
    async with importlib.import_module("httpx").AsyncClient() as client:
        url = f"http://{host}:{port}/"
        yield lambda: client.get(url)


APPLICATIONS: dict[str, Callable[..., Any]] = {"asyncpg": asyncpg, "redis": redis, "httpx": httpx}


async def repeat(request: Request, until: float) -> int:
    done = 0
    while time.perf_counter() < until:
        await request()
        done += 1
    return done


async def main(application: str, connections: int, address: list[str]) -> None:
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        requests = [
            await stack.enter_async_context(APPLICATIONS[application](*address)) for _ in range(connections)
        ]
        print("READY 0", flush=True)
        # Nothing runs between two measurements, so the loop may as well be blocked.
        for line in sys.stdin:
            began, cpu = time.perf_counter(), time.process_time()
            done = sum(await asyncio.gather(*[repeat(request, began + float(line)) for request in requests]))
            took, cpu = time.perf_counter() - began, time.process_time() - cpu
            print(
                json.dumps({"cpu_us_per_request": cpu / done * 1e6, "requests_per_second": done / took}),
                flush=True,
            )
    await loop.shutdown_asyncgens()


if __name__ == "__main__":
    name = sys.argv[1]
    factory = importlib.import_module(name).new_event_loop
    asyncio.Runner(loop_factory=factory).run(main(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
