"""What every test may ask for: an engine's name, a loop on it, a free port."""

from __future__ import annotations

import functools
import gc
import os
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from cells import is_left_out
from realm import realm, realms  # noqa: F401  # fixtures for everybody

if TYPE_CHECKING:
    from headrace import EventLoop

# A shell's background job ignores SIGINT, and so would every program that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_left_out(item)]


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is there by now stays: a collection in a test, of which each has some, needn't walk through all tests."""
    gc.collect()
    gc.freeze()


@functools.cache
def why_not(name: str) -> str | None:
    """Why an engine can't run on this machine, or None."""
    from headrace._epoll import EpollEngine
    from headrace._uring import UringEngine
    from headrace.errors import EngineUnavailable

    engine = {"uring": UringEngine, "epoll": EpollEngine}[name]()
    try:
        engine.start()
    except EngineUnavailable as error:
        return str(error)
    else:
        engine.stop()
    finally:
        engine.close()
    return None


def descriptors() -> dict[int, str]:
    """The open descriptors of this process, and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that lists the directory
            pass
    return found


@pytest.fixture(params=["uring", "epoll"])
def engine_name(request: pytest.FixtureRequest) -> str:
    """Each engine of the real kernel in turn; skipped, saying why, where the kernel lacks it."""
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(f"needs io_uring: {reason}" if request.param == "uring" else reason)
    return str(request.param)


@pytest.fixture
def loop(engine_name: str) -> Iterator[EventLoop]:
    """A loop on that engine, which the fixture closes; then no descriptor may be left open."""
    import headrace

    # A closed uring engine leaves its ring to the next one of the thread: a first loop makes that ring.
    with_ring = headrace.new_event_loop(engine=engine_name)
    with_ring.run_until_complete(nothing())
    with_ring.close()
    gc.collect()
    before = descriptors()
    loop = headrace.new_event_loop(engine=engine_name)
    try:
        yield loop
    finally:
        if not loop.is_closed():
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
    del loop
    gc.collect()
    after = descriptors()
    left = {fd: what for fd, what in after.items() if fd not in before}
    assert len(after) <= len(before), f"descriptors left open: {left}"


async def nothing() -> None:
    """Runs a loop once."""


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
