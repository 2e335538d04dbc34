"""redis-py's asyncio client against a real Redis, on each engine: commands, pipelines, pub/sub, pools, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from servers import redis_instance
from web import clean_run, payload

redis = pytest.importorskip("redis.asyncio")


@pytest.fixture(scope="module")
def redis_port() -> Iterator[int]:
    with redis_instance() as port:
        yield port


@asynccontextmanager
async def client(port: int, **options: Any) -> AsyncIterator[Any]:
    connection = redis.Redis(host="127.0.0.1", port=port, **options)
    try:
        await connection.flushall()
        yield connection
    finally:
        await connection.aclose()


async def blocked(server: Any) -> list[str]:
    """The clients that wait in a blocking command, by their ids."""
    return [each["id"] for each in await server.client_list() if "b" in each["flags"]]


def test_commands_and_pipelines(redis_port: int, engine_name: str) -> None:
    async def main() -> None:
        async with client(redis_port) as server:
            assert await server.set("key", "value")
            assert await server.get("key") == b"value"
            assert await server.get("no such key") is None
            await server.set("large", payload())
            assert await server.get("large") == payload()
            async with server.pipeline() as pipeline:
                for number in range(5000):
                    pipeline.set(f"key:{number}", number)
                    pipeline.get(f"key:{number}")
                results = await pipeline.execute()
            assert results[1::2] == [b"%d" % number for number in range(5000)]
            with pytest.raises(redis.ResponseError):
                await server.incr("key")
            assert sum([1 async for _ in server.scan_iter("key:*", count=500)]) == 5000

    clean_run(main, engine_name)


def test_publish_and_subscribe(redis_port: int, engine_name: str) -> None:
    async def main() -> None:
        async with client(redis_port) as server, server.pubsub() as subscriber:
            await subscriber.subscribe("news")
            assert (await subscriber.get_message(timeout=10))["type"] == "subscribe"

            async def publish() -> None:
                for number in range(500):
                    assert await server.publish("news", number) == 1

            publishing = asyncio.create_task(publish())
            heard = []
            async for message in subscriber.listen():
                heard.append(int(message["data"]))
                if len(heard) == 500:
                    break
            await publishing
            assert heard == list(range(500))

    clean_run(main, engine_name)


def test_200_tasks_share_a_pool(redis_port: int, engine_name: str) -> None:
    async def main() -> None:
        pool = redis.BlockingConnectionPool(host="127.0.0.1", port=redis_port, max_connections=20, timeout=20)
        server = redis.Redis(connection_pool=pool)
        await server.flushall()

        async def work(task: int) -> None:
            for number in range(25):
                await server.incrby("sum", task)
                assert await server.echo(f"{task}:{number}") == f"{task}:{number}".encode()

        await asyncio.gather(*[work(task) for task in range(200)])
        assert int(await server.get("sum")) == 25 * sum(range(200))
        await server.aclose()
        await pool.disconnect()

    clean_run(main, engine_name)


def test_a_cancelled_blocking_pop_takes_nothing(redis_port: int, engine_name: str) -> None:
    async def main() -> None:
        async with client(redis_port) as server, client(redis_port) as other:
            for number in range(5):
                task = asyncio.create_task(server.blpop("queue", timeout=30))
                while not await blocked(other):
                    await asyncio.sleep(0.005)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                while await blocked(other):
                    await asyncio.sleep(0.005)
                await other.rpush("queue", number)
                assert await server.blpop("queue", timeout=10) == (b"queue", b"%d" % number)

    clean_run(main, engine_name)


def test_a_connection_that_the_server_drops_is_made_anew(redis_port: int, engine_name: str) -> None:
    async def main() -> None:
        async with client(redis_port) as server, client(redis_port) as other:
            for number in range(5):
                waiting = asyncio.create_task(server.blpop("queue", timeout=30))
                while not (popping := await blocked(other)):
                    await asyncio.sleep(0.005)
                await other.client_kill_filter(_id=popping[0])
                await other.rpush("queue", number)
                assert await waiting == (b"queue", b"%d" % number)

    clean_run(main, engine_name)
