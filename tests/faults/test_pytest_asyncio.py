"""A test suite that uses pytest-asyncio runs on headrace's loop by one hook."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
import functools
import headrace

def pytest_asyncio_loop_factories(config, item):
    return {{"headrace": functools.partial(headrace.new_event_loop, {engine!r})}}
"""

TESTS = """
import asyncio
import headrace
import pytest
import pytest_asyncio

@pytest_asyncio.fixture
async def address():
    async def echo(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()
    server.close()
    await server.wait_closed()

@pytest.mark.asyncio
async def test_engine():
    loop = asyncio.get_running_loop()
    assert isinstance(loop, headrace.EventLoop)
    assert loop.engine_name == {engine!r}

@pytest.mark.asyncio
@pytest.mark.parametrize("size", [1, 1000, 1_000_000])
async def test_echo(address, size):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(bytes(size))
    writer.write_eof()
    assert await reader.read() == bytes(size)
    writer.close()
    await writer.wait_closed()

@pytest.mark.asyncio
async def test_timeout():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()
"""


def test_suite_of_a_user(pytester: pytest.Pytester, engine_name: str) -> None:
    pytester.makeconftest(CONFTEST.format(engine=engine_name))
    pytester.makepyfile(TESTS.format(engine=engine_name))
    result = pytester.runpytest_subprocess(
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "-o",
        "asyncio_default_fixture_loop_scope=function",
        timeout=40,
    )
    result.assert_outcomes(passed=5)
