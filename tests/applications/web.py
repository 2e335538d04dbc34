"""What the tests of web applications share: a run that must end clean, a server in a thread, TLS, payloads."""

from __future__ import annotations

import asyncio
import functools
import gc
import hashlib
import os
import random
import ssl
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import headrace

T = TypeVar("T")

PATIENCE = 30.0  # seconds; nothing below waits longer. It isn't a measure of speed: a test has a minute.
LARGE = 8 * 1024 * 1024 + 12_345  # bytes; more than sockets and transports hold, and no multiple of a buffer
CHUNK = 64 * 1024


def engine_of(loop: asyncio.AbstractEventLoop) -> str:
    """``"headrace uring"``: whose loop runs, and on what. Other packages' loops have no engine."""
    return f"{type(loop).__module__.split('.')[0]} {getattr(loop, 'engine_name', None)}"


@functools.cache
def payload(size: int = LARGE) -> bytes:
    """The same random bytes every time: no offset looks like another."""
    return random.Random(size).randbytes(size)


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    """The bytes piece by piece, as a body that is streamed."""
    for at in range(0, len(data), CHUNK):
        yield data[at : at + CHUNK]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.cache
def authority() -> Any:
    """A certificate authority of the tests' own."""
    import trustme

    return trustme.CA()


def server_context() -> ssl.SSLContext:
    """For a server on 127.0.0.1 or localhost."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


def certificate_file(folder: Path) -> Path:
    """The same for a server that wants a file: its key and certificate."""
    path = folder / "server.pem"
    authority().issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
    return path


def client_context() -> ssl.SSLContext:
    """Trusts that server and nobody else; names are checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    return context


async def until(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; for what tells nobody when it changes. ``TimeoutError`` after PATIENCE."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


async def tasks_ended() -> None:
    """Fails if another task doesn't end by itself; an application may still be closing."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    if rest:
        _, left = await asyncio.wait(rest, timeout=PATIENCE)
        assert not left, f"tasks left: {left}"


def descriptors() -> dict[str, str]:
    """The open descriptors of this process, and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that lists the directory
            pass
    return found


async def supervised(main: Callable[[], Coroutine[Any, Any, T]], engine: str, errors: list[str]) -> T:
    """Runs main: on the loop that is meant, with its loop's complaints noted, and to its last task."""
    loop = asyncio.get_running_loop()
    assert engine_of(loop) == f"headrace {engine}"
    loop.set_exception_handler(lambda _, context: errors.append(repr(context)))
    async with asyncio.timeout(PATIENCE):
        result = await main()
    await tasks_ended()
    return result


def run_supervised(main: Callable[[], Coroutine[Any, Any, T]], engine: str) -> T:
    """``headrace.run``; fails if the loop's exception handler was called, or a task is left."""
    errors: list[str] = []
    result = headrace.run(supervised(main, engine, errors), engine=engine)
    assert not errors, errors
    return result


async def nothing() -> None:
    """Runs a loop once."""


@contextmanager
def nothing_left(engine: str) -> Iterator[None]:
    """After the block no more descriptors are open than before, and the collector had nothing to close."""
    # A closed uring engine leaves its ring to the next one of the thread: a first loop makes that ring.
    headrace.run(nothing(), engine=engine)
    gc.collect()
    before = descriptors()
    with warnings.catch_warnings(record=True) as caught:
        # Beside pytest's "error": raised in a destructor, it would only be printed.
        warnings.filterwarnings("always", category=ResourceWarning)
        yield
        gc.collect()
    assert not caught, [str(warning.message) for warning in caught]
    after = descriptors()
    assert len(after) <= len(before), f"left open: { {k: v for k, v in after.items() if k not in before} }"


def clean_run(main: Callable[[], Coroutine[Any, Any, T]], engine: str) -> T:
    """``headrace.run``, after which no task and no descriptor is left, and nothing was closed by the collector.

    Neither may the loop's exception handler have been called. Nobody else may use the process meanwhile.
    """
    with nothing_left(engine):
        return run_supervised(main, engine)


@contextmanager
def in_thread(server: Callable[[], AbstractAsyncContextManager[T]], engine: str) -> Iterator[T]:
    """What the server's context manager gives, from a loop in a thread of its own; stopped at the end.

    What it raised is raised here.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, T]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with server() as value:
            started.set_result((asyncio.get_running_loop(), stop, value))
            await stop.wait()

    failures: list[BaseException] = []

    def body() -> None:
        try:
            run_supervised(serve, engine)
        except BaseException as failure:
            failures.append(failure)
            if not started.done():
                started.set_exception(failure)

    thread = threading.Thread(target=body, name="server")
    thread.start()
    try:
        loop, stop, value = started.result(PATIENCE)
        try:
            yield value
        finally:
            loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server doesn't stop"
    if failures:
        raise failures[0]
