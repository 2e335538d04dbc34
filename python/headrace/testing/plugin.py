"""A pytest plugin for people who write protocols: servers, load, figures, a leak ledger.

It is loaded by its entry point and costs nothing until one of its fixtures is asked for::

    from headrace.testing.serving import ServerProcess

    def test_my_protocol(headrace_server, headrace_load):
        server = headrace_server(MyProtocol, engine="uring")
        result = headrace_load(server, connections=100, size=1024, seconds=1)
        assert not result.errors

    def test_how_fast_it_is(headrace_benchmark):
        headrace_benchmark(MyProtocol, connections=100, size=64)

    @pytest.mark.leak_ledger
    def test_that_it_keeps_nothing():
        ...

``headrace_server(protocol_factory, *, engine=None, workers=1)``
    A server in its own process; see `headrace.testing.serving.ServerProcess`. Stopped at the test's end; then an
    exception that had reached its loop fails the test.

``headrace_load(server, *, connections=10, size=64, rate=None, seconds=1, warmup=0.1, request=None, reply=None)``
    Requests and their latencies; see `headrace.testing.load.run_load`.

``headrace_benchmark(protocol_factory, *, engine=None, workers=1, connections=10, size=64, requests=2000, rounds=5,
request=None, reply=None)``
    Server, load and pytest-benchmark (which must be installed) in one: a round is that many requests. CPU per
    request and latency percentiles of the round in the middle go to ``benchmark.extra_info`` and are returned, as a
    `LoadResult`.

``leak_ledger`` (fixture) and ``@pytest.mark.leak_ledger``
    The test fails when it loses a lease, a descriptor or a task. The fixture's ``check()`` looks in mid-test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Generator

    from headrace.testing.ledger import LeakLedger
    from headrace.testing.load import LoadResult
    from headrace.testing.serving import ServerProcess

    ProtocolFactory = Callable[[], asyncio.BaseProtocol]

__all__ = ["headrace_benchmark", "headrace_load", "headrace_server", "leak_ledger"]

LEDGER = "leak_ledger"
_servers = pytest.StashKey[ExitStack]()
_ledger = pytest.StashKey["LeakLedger"]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{LEDGER}: fail the test when it loses a lease, a descriptor or a task (headrace)"
    )


# ---- servers and load -----------------------------------------------------------------------------------------


@pytest.fixture
def headrace_server(request: pytest.FixtureRequest) -> Iterator[Callable[..., ServerProcess]]:
    """``headrace_server(protocol_factory, *, engine=None, workers=1)``: starts a `ServerProcess`."""
    from headrace.testing.serving import ServerProcess

    with ExitStack() as servers:
        request.node.stash[_servers] = servers

        def start(
            protocol_factory: ProtocolFactory, *, engine: str | None = None, workers: int = 1
        ) -> ServerProcess:
            server = ServerProcess(protocol_factory, engine=engine, workers=workers)
            servers.callback(server.close)
            return server

        yield start


@pytest.fixture
def headrace_load() -> Callable[..., LoadResult]:
    """``headrace_load(server, *, connections=10, size=64, rate=None, seconds=1, ...)``: see `run_load`."""
    from headrace.testing.load import run_load

    return run_load


@pytest.fixture
def headrace_benchmark(
    request: pytest.FixtureRequest, headrace_server: Callable[..., ServerProcess]
) -> Callable[..., LoadResult]:
    """``headrace_benchmark(protocol_factory, *, engine=None, connections=10, size=64, requests=2000, rounds=5)``."""
    from headrace.testing.load import Load

    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.fail("headrace_benchmark needs pytest-benchmark: pip install pytest-benchmark", pytrace=False)
    benchmark: Any = request.getfixturevalue("benchmark")

    def run(
        protocol_factory: ProtocolFactory,
        *,
        engine: str | None = None,
        workers: int = 1,
        connections: int = 10,
        size: int = 64,
        requests: int = 2000,
        rounds: int = 5,
        request: bytes | None = None,
        reply: bytes | None = None,
    ) -> LoadResult:
        server = headrace_server(protocol_factory, engine=engine, workers=workers)
        with Load(server, connections=connections, size=size, request=request, reply=reply) as load:
            load.run(requests=requests)  # warm-up: connections accepted, code paths warm
            results: list[LoadResult] = []
            benchmark.pedantic(lambda: results.append(load.run(requests=requests)), rounds=rounds)
        best = median_result(results)
        benchmark.extra_info.update(best.as_dict(), engine=server.engine, size=size)
        return best

    return run


def median_result(results: list[LoadResult]) -> LoadResult:
    """The round in the middle, by the server's cost: one round's figures that belong together."""
    ordered = sorted(results, key=lambda result: (bool(result.errors), result.cpu_per_request or 0.0))
    failed = [result for result in ordered if result.errors]
    return failed[-1] if failed else ordered[len(ordered) // 2]


# ---- the ledger -----------------------------------------------------------------------------------------------


@pytest.fixture
def leak_ledger(request: pytest.FixtureRequest) -> LeakLedger:
    """The `LeakLedger` that watches this test; it is started just before the test and checked just after."""
    return ledger_of(request.node)


def ledger_of(item: pytest.Item) -> LeakLedger:
    """The item's ledger, made on the first call."""
    from headrace.testing.ledger import LeakLedger

    if _ledger not in item.stash:
        item.stash[_ledger] = LeakLedger()
    return item.stash[_ledger]


def is_watched(item: pytest.Item) -> bool:
    return item.get_closest_marker(LEDGER) is not None or LEDGER in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Watches the test itself, not its fixtures: what they open before it and close after it isn't lost.

    A test that failed isn't checked: its traceback keeps its locals alive.
    """
    if not is_watched(item):
        return (yield)
    from headrace.testing.ledger import LeakFound

    ledger = ledger_of(item)
    ledger.start()
    try:
        result = yield
        if _servers in item.stash:
            item.stash[_servers].close()  # servers that the test started: ours to close, not lost
        lost = ledger.leaks()
        if lost:
            pytest.fail(str(LeakFound(lost)), pytrace=False)
        return result
    finally:
        ledger.stop()
