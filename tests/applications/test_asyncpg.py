"""asyncpg against a real PostgreSQL, on each engine: queries, COPY, notifications, a pool under load, cancellation."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import pytest

from servers import Postgres, postgres_cluster
from web import clean_run, payload, until

asyncpg = pytest.importorskip("asyncpg")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with postgres_cluster() as cluster:
        yield cluster


async def connect(postgres: Postgres, **options: Any) -> Any:
    where = {
        "host": postgres.host,
        "port": postgres.port,
        "user": postgres.user,
        "database": postgres.database,
    }
    return await asyncpg.connect(**(where | options))


def test_queries_and_types(postgres: Postgres, engine_name: str) -> None:
    async def main() -> None:
        connection = await connect(postgres)
        row = await connection.fetchrow(
            "SELECT $1::int AS i, $2::text AS t, $3::bytea AS b, $4::timestamptz AS at, $5::int[] AS many",
            42, "grün", payload(100_000), datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), list(range(1000)),
        )  # fmt: skip
        assert (row["i"], row["t"], row["b"]) == (42, "grün", payload(100_000))
        assert row["at"] == datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
        assert row["many"] == list(range(1000))
        double = await connection.prepare("SELECT 2 * $1::int")
        assert [await double.fetchval(number) for number in range(200)] == list(range(0, 400, 2))
        rows = await connection.fetch("SELECT generate_series(1, 100000) AS n")
        assert sum(row["n"] for row in rows) == 5_000_050_000
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.fetchval("SELECT 1 / 0")
        assert await connection.fetchval("SELECT 'still there'") == "still there"
        await connection.close()

    clean_run(main, engine_name)


def test_transactions_and_cursors(postgres: Postgres, engine_name: str) -> None:
    async def main() -> None:
        connection = await connect(postgres)
        await connection.execute("CREATE TEMP TABLE numbers (n int)")
        with pytest.raises(ZeroDivisionError):
            async with connection.transaction():
                await connection.execute("INSERT INTO numbers VALUES (1)")
                raise ZeroDivisionError
        assert await connection.fetchval("SELECT count(*) FROM numbers") == 0
        async with connection.transaction():
            await connection.executemany("INSERT INTO numbers VALUES ($1)", [(n,) for n in range(5000)])
            savepoint = connection.transaction()
            await savepoint.start()
            await connection.execute("DELETE FROM numbers")
            await savepoint.rollback()
            seen = [
                row["n"] async for row in connection.cursor("SELECT n FROM numbers ORDER BY n", prefetch=70)
            ]
        assert seen == list(range(5000))
        await connection.close()

    clean_run(main, engine_name)


def test_copy_in_and_out(postgres: Postgres, engine_name: str) -> None:
    """12 MB each way, byte by byte the same."""
    lines = b"".join(b"%d\t%064d\n" % (n, n * n) for n in range(170_000))

    async def main() -> None:
        connection = await connect(postgres)
        await connection.execute("CREATE TEMP TABLE copied (n int, t text)")
        assert await connection.copy_to_table("copied", source=io.BytesIO(lines)) == "COPY 170000"
        received = hashlib.sha256()

        async def take(data: bytes) -> None:
            received.update(data)

        await connection.copy_from_query("SELECT * FROM copied ORDER BY n", output=take)
        assert received.digest() == hashlib.sha256(lines).digest()
        await connection.close()

    assert len(lines) > 10_000_000
    clean_run(main, engine_name)


def test_notifications(postgres: Postgres, engine_name: str) -> None:
    async def main() -> None:
        listener, sender = await connect(postgres), await connect(postgres)
        heard: list[str] = []

        def hear(_connection: Any, _pid: int, _channel: str, text: str) -> None:
            heard.append(text)

        await listener.add_listener("news", hear)
        for number in range(300):
            await sender.execute("SELECT pg_notify('news', $1)", str(number))
        await until(lambda: len(heard) == 300)
        assert heard == [str(number) for number in range(300)]
        await listener.remove_listener("news", hear)
        await asyncio.gather(listener.close(), sender.close())

    clean_run(main, engine_name)


def test_a_pool_of_10_under_200_tasks(postgres: Postgres, engine_name: str) -> None:
    async def main() -> None:
        pool = await asyncpg.create_pool(
            host=postgres.host, port=postgres.port, user=postgres.user, database=postgres.database,
            min_size=10, max_size=10,
        )  # fmt: skip

        async def work(task: int) -> int:
            total = 0
            for number in range(20):
                async with pool.acquire() as connection:
                    total += await connection.fetchval("SELECT $1::int * $2::int", task, number)
            return total

        async with pool:
            results = await asyncio.gather(*[work(task) for task in range(200)])
        assert results == [190 * task for task in range(200)]

    clean_run(main, engine_name)


def test_cancelled_queries_leave_the_connection_usable(postgres: Postgres, engine_name: str) -> None:
    async def main() -> None:
        connection, other = await connect(postgres), await connect(postgres)
        pid = connection.get_server_pid()
        sleeping = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'"
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await connection.fetchval("SELECT pg_sleep(60)", timeout=0.05)
            task = asyncio.create_task(connection.fetchval("SELECT pg_sleep(60)"))
            while not await other.fetchval(sleeping, pid):
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await connection.fetchval("SELECT 7") == 7
        await asyncio.gather(connection.close(), other.close())

    clean_run(main, engine_name)


def test_a_backend_that_is_ended_is_an_error(postgres: Postgres, engine_name: str) -> None:
    async def main() -> None:
        victim, other = await connect(postgres), await connect(postgres)
        waiting = asyncio.create_task(victim.fetchval("SELECT pg_sleep(60)"))
        pid = victim.get_server_pid()
        query = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND state = 'active'"
        while not await other.fetchval(query, pid):
            await asyncio.sleep(0.01)
        await other.execute("SELECT pg_terminate_backend($1)", pid)
        with pytest.raises((asyncpg.AdminShutdownError, asyncpg.ConnectionDoesNotExistError)):
            await waiting
        await until(victim.is_closed)
        await other.close()

    clean_run(main, engine_name)


def test_over_a_unix_socket(postgres: Postgres, engine_name: str) -> None:
    async def main() -> None:
        connection = await connect(postgres, host=postgres.folder)
        assert await connection.fetchval("SELECT inet_client_addr()") is None
        assert await connection.fetchval("SELECT $1::bytea", payload()) == payload()
        await connection.close()

    clean_run(main, engine_name)
