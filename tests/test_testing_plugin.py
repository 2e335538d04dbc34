"""The public pytest plugin, used as its users do: in test files of their own."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from headrace.testing.ledger import LeakFound, LeakLedger
from headrace.testing.load import Histogram, Load, run_load
from headrace.testing.serving import ServerFailed, ServerProcess

pytest_plugins = ["pytester"]

PLUGIN = "headrace.testing.plugin"
PROTOCOLS = """
import asyncio
import headrace


class Echo(headrace.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def lease_received(self, lease):
        self.transport.write(lease)


class BytesEcho(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)


class Shout(BytesEcho):
    def data_received(self, data):
        self.transport.write(data.upper())


class Raising(BytesEcho):
    def data_received(self, data):
        raise ValueError("a bug in the protocol")


class Silent(asyncio.Protocol):
    pass


class Stalling(BytesEcho):
    stalled = False  # its first reply takes 0.3 s, all others none

    def data_received(self, data):
        if not self.stalled:
            self.stalled = True
            asyncio.get_running_loop().call_later(0.3, self.transport.write, data)
        else:
            self.transport.write(data)


class Closing(asyncio.Protocol):
    def connection_made(self, transport):
        transport.close()


def factory_that_raises():
    raise RuntimeError("no protocol today")
"""


@pytest.fixture
def own_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A directory with protocols to import, whose pytest knows the plugin."""
    # Else pytest-benchmark takes it for a worker of ours, and measures nothing.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makepyfile(my_protocols=PROTOCOLS)
    pytester.makeini(
        "[pytest]\naddopts = -p no:cacheprovider -p no:asyncio\nfilterwarnings = error\npythonpath = .\n"
    )
    installed = {point.value for point in importlib.metadata.entry_points(group="pytest11")}
    if PLUGIN not in installed:
        pytester.plugins = [PLUGIN]
    return pytester


def run(own_tests: pytest.Pytester, source: str, *arguments: str) -> pytest.RunResult:
    own_tests.makepyfile(test_mine=source)
    return own_tests.runpytest_subprocess("-v", *arguments, timeout=50)


@pytest.fixture
def protocols(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """The same protocols for this process."""
    (tmp_path / "own_protocols.py").write_text(PROTOCOLS)
    monkeypatch.syspath_prepend(tmp_path)
    import own_protocols

    yield own_protocols
    del sys.modules["own_protocols"]


# ---- servers --------------------------------------------------------------------------------------------------


def test_server_and_load_on_each_engine(own_tests, engine_name):
    result = run(
        own_tests,
        f"""
        from my_protocols import Echo

        def test_echo(headrace_server, headrace_load):
            server = headrace_server(Echo, engine="{engine_name}")
            result = headrace_load(server, connections=20, size=3000, seconds=0.2, warmup=0.05)
            assert server.engine == "{engine_name}"
            assert result.errors == 0
            assert result.requests > 20
            assert result.bytes >= result.requests * 3000
            assert 0 < result.latency_p50 <= result.latency_p99 <= result.latency_p999
            assert result.cpu_per_request > 0
        """,
    )
    result.assert_outcomes(passed=1)


def test_workers_share_the_port(protocols):
    with ServerProcess(protocols.Echo, workers=3) as server:
        assert len(set(server.pids)) == 3
        with Load(server, connections=60) as load:
            assert load.run(requests=600).requests == 600
            assert sum(stats["pool"]["copies"] > 0 for stats in server.stats()) >= 2


def test_other_loops_serve_asyncio_protocols(protocols):
    with ServerProcess(protocols.BytesEcho, engine="asyncio") as server:
        assert server.engine == "asyncio"
        assert server.stats() == [{}]
        assert run_load(server, seconds=0.1).errors == 0


def test_a_factory_that_another_process_cannot_import(protocols):
    class Local(protocols.Echo):
        pass

    for factory in (Local, lambda: protocols.Echo()):
        with pytest.raises(TypeError, match="top of a module"):
            ServerProcess(factory)


def test_a_server_that_cannot_start_says_why(protocols, monkeypatch):
    monkeypatch.setattr(protocols.Echo, "__module__", "own_protocols_that_vanished")
    monkeypatch.setitem(sys.modules, "own_protocols_that_vanished", protocols)
    with pytest.raises(ServerFailed, match=r"ModuleNotFoundError.*own_protocols_that_vanished"):
        ServerProcess(protocols.Echo)


def test_what_a_protocol_raises_fails_the_test(own_tests):
    result = run(
        own_tests,
        """
        from my_protocols import Raising

        def test_raising(headrace_server, headrace_load):
            result = headrace_load(headrace_server(Raising), connections=2, seconds=0.1, warmup=0)
            assert result.errors == 2
        """,
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ServerFailed*", "*ValueError: a bug in the protocol*"])


def test_exceptions_of_a_server_are_bounded(protocols):
    server = ServerProcess(protocols.factory_that_raises)
    with Load(server, connections=30) as load:
        load.run(seconds=0.1)
    failures = server.failures()
    assert len(failures) == 21
    assert failures[-1] == "and 10 more"
    with pytest.raises(ServerFailed, match="no protocol today"):
        server.close()


def test_a_server_that_dies_is_noticed(protocols):
    server = ServerProcess(protocols.Echo)
    server.workers[0].process.kill()
    server.workers[0].process.wait()
    with pytest.raises(ServerFailed, match="has ended"):
        server.close()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"engine": "kqueue"}, "engine must be"), ({"workers": 0}, "1 to 256"), ({"workers": 257}, "1 to 256")],
)
def test_bad_servers(protocols, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        ServerProcess(protocols.Echo, **options)


# ---- load -----------------------------------------------------------------------------------------------------


def test_a_reply_of_ones_own(protocols):
    with ServerProcess(protocols.Shout) as server:
        assert run_load(server, request=b"hello", reply=b"HELLO", seconds=0.1).errors == 0
        result = run_load(server, request=b"hello", reply=b"HeLLO", connections=3, seconds=0.1)
        assert result.requests == 0
        assert result.error_kinds == {"wrong bytes": 3}


def test_a_pace_is_kept(protocols):
    with ServerProcess(protocols.Echo) as server, Load(server, connections=5, rate=500) as load:
        result = load.run(requests=100)
    assert result.requests == 100
    assert result.requests_per_second < 520  # 99 intervals of 2 ms: never faster, however quick the machine


def test_latency_counts_from_when_a_request_was_due(protocols):
    """A server that stalls once makes all requests late that fell due meanwhile, though they wait at the client."""
    with ServerProcess(protocols.Stalling) as server, Load(server, connections=1, rate=100) as load:
        result = load.run(requests=30)
    assert result.requests == 30
    assert result.latency_max >= 0.3
    assert result.latency_p50 >= 0.1  # the 15th was due 140 ms after the first, whose reply took 300 ms


def test_a_server_that_never_replies_does_not_hang_the_load(protocols, monkeypatch):
    monkeypatch.setattr("headrace.testing.load.GRACE", 0.2)
    with ServerProcess(protocols.Silent) as server, Load(server, connections=1) as load:
        result = load.run(requests=5)
    assert result.requests == 0
    assert result.error_kinds == {"no reply": 1}


def test_connections_that_the_server_closes_are_errors(protocols):
    with ServerProcess(protocols.Closing) as server:
        result = run_load(server, connections=4, seconds=5, warmup=0)
    assert result.errors == 4
    assert result.requests == 0
    assert result.cpu_per_request is None
    assert result.seconds < 5  # nothing left to wait for


def test_a_server_that_refuses(free_port):
    result = run_load(("127.0.0.1", free_port), connections=2, seconds=1, warmup=0)
    assert result.error_kinds == {"ConnectionRefusedError": 2}


@pytest.mark.parametrize(
    "options",
    [{"connections": 0}, {"connections": 50_001}, {"size": 0}, {"rate": 0}, {"request": b""}, {"reply": b""}],
)
def test_bad_loads(options):
    with pytest.raises(ValueError, match="must"):
        Load(("127.0.0.1", 1), **options)


def test_a_run_is_for_a_time_or_a_count():
    load = Load(("127.0.0.1", 1))
    with pytest.raises(ValueError, match="not both"):
        load.run()
    with pytest.raises(ValueError, match="not both"):
        load.run(seconds=1, requests=1)
    load.close()


def test_percentiles_are_right_within_a_percent():
    histogram = Histogram()
    for value in range(1, 100_001):
        histogram.add(value * 1000)
    for share in (0.001, 0.5, 0.9, 0.99, 0.999):
        assert histogram.percentile(share) == pytest.approx(share / 10, rel=0.01)
    assert histogram.largest == 100_000_000
    assert Histogram().percentile(0.5) == 0


# ---- benchmark ------------------------------------------------------------------------------------------------


def test_benchmark_fills_extra_info(own_tests):
    result = run(
        own_tests,
        """
        from my_protocols import Echo

        def test_speed(headrace_benchmark):
            result = headrace_benchmark(Echo, engine="epoll", connections=5, size=100, requests=200, rounds=3)
            assert result.requests == 200
        """,
        "--benchmark-json=figures.json",
    )
    result.assert_outcomes(passed=1)
    (figures,) = json.loads((own_tests.path / "figures.json").read_text())["benchmarks"]
    assert figures["stats"]["rounds"] == 3
    extra = figures["extra_info"]
    assert extra["engine"] == "epoll"
    assert extra["connections"] == 5
    assert extra["cpu_per_request"] > 0
    assert 0 < extra["latency_p50"] <= extra["latency_p99"] <= extra["latency_p999"]


def test_benchmark_without_pytest_benchmark(own_tests):
    result = run(
        own_tests,
        """
        def test_speed(headrace_benchmark):
            pass
        """,
        "-p",
        "no:benchmark",
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*needs pytest-benchmark*"])


# ---- leak ledger ----------------------------------------------------------------------------------------------

LEAKS = """
import asyncio
import os
import socket

import pytest

import headrace

class Keeper:
    pass

keeper = Keeper()
kept = []

@pytest.mark.leak_ledger
def test_loses_nothing():
    pool = headrace.BufferPool()
    pool._copy(b"released").release()
    pool._copy(b"dropped")
    with socket.socket():
        pass
    async def main():
        await asyncio.create_task(asyncio.sleep(0))
    headrace.run(main())

@pytest.mark.leak_ledger
def test_loses_a_lease():
    keeper.parts = [headrace.BufferPool()._copy(b"abc")]

@pytest.mark.leak_ledger
def test_loses_a_view():
    kept.append(memoryview(headrace.BufferPool()._copy(b"abcd")))

@pytest.mark.leak_ledger
def test_loses_a_socket():
    kept.append(socket.socket())

def test_loses_a_descriptor(leak_ledger):
    os.dup(0)

@pytest.mark.leak_ledger
def test_loses_a_task():
    loop = headrace.new_event_loop()
    kept.append(loop)
    async def waits_forever():
        await asyncio.Event().wait()
    kept.append(loop.create_task(waits_forever(), name="forgotten"))
    loop.run_until_complete(asyncio.sleep(0))

def test_checks_in_mid_test(leak_ledger):
    leak_ledger.check()
    mine = [headrace.BufferPool()._copy(b"mine")]
    with pytest.raises(AssertionError, match="1 lease"):
        leak_ledger.check()
    mine.pop().release()
    leak_ledger.check()

@pytest.mark.leak_ledger
def test_fails_by_itself():
    fd = os.dup(0)
    assert fd == "what the test says"
"""


def test_ledger_fails_tests_that_lose_something(own_tests):
    own_tests.makeini("[pytest]\naddopts = -p no:cacheprovider -p no:asyncio\npythonpath = .\n")
    result = run(own_tests, LEAKS)
    result.assert_outcomes(passed=2, failed=6)
    result.stdout.fnmatch_lines_random(
        [
            "*::test_loses_nothing PASSED*",
            "*::test_loses_a_lease FAILED*",
            "*lease: <Lease 3 bytes*held by a list of Keeper.parts",
            "*lease: <Lease 4 bytes*held by a memoryview of a list of test_mine.kept",
            "*descriptor: * -> socket:*made at *test_mine.py:* `kept.append(socket.socket())`*",
            "*::test_loses_a_descriptor FAILED*",
            "*task: forgotten of *waits_forever()*waits at *test_mine.py:*",
            "*::test_checks_in_mid_test PASSED*",
            "*AssertionError: assert * == 'what the test says'*",
        ]
    )


def test_servers_of_the_test_are_not_lost(own_tests):
    result = run(
        own_tests,
        """
        import pytest
        from my_protocols import Echo

        @pytest.mark.leak_ledger
        def test_with_a_server(headrace_server, headrace_load):
            assert not headrace_load(headrace_server(Echo), seconds=0.1).errors
        """,
    )
    result.assert_outcomes(passed=1)


def test_ledger_without_pytest():
    import headrace

    with LeakLedger():
        headrace.BufferPool()._copy(b"dropped")
    kept = []
    with pytest.raises(LeakFound) as caught, LeakLedger():
        kept.append(headrace.BufferPool()._copy(b"x" * 5))
    (leak,) = caught.value.leaks
    assert leak.kind == "lease"
    assert "<Lease 5 bytes" in leak.what
    assert leak.where.startswith("held by a list of")
    with pytest.raises(ZeroDivisionError), LeakLedger():  # the block's own exception goes first
        kept.append(headrace.BufferPool()._copy(b"y") and 1 / 0)
    with pytest.raises(RuntimeError, match="wasn't started"):
        LeakLedger().leaks()


# ---- the plugin itself ----------------------------------------------------------------------------------------


def test_the_plugin_costs_nothing_until_it_is_used(own_tests):
    result = run(
        own_tests,
        """
        import sys

        def test_nothing_was_imported():
            heavy = {"headrace.testing.serving", "headrace.testing.load", "headrace.testing.ledger"}
            assert not heavy & set(sys.modules)
        """,
    )
    result.assert_outcomes(passed=1)


def test_the_marker_is_registered(own_tests):
    result = own_tests.runpytest_subprocess("--markers", timeout=50)
    result.stdout.fnmatch_lines(["@pytest.mark.leak_ledger: *"])


def test_a_child_ends_with_its_parent(protocols, tmp_path):
    """However the parent ends: nothing serves on after it."""
    program = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
from own_protocols import Echo
from headrace.testing.serving import ServerProcess
server = ServerProcess(Echo)
print(server.pids[0], flush=True)
os._exit(0)
"""
    import psutil

    parent = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=50, check=True, text=True
    )
    pid = int(parent.stdout)
    try:
        psutil.Process(pid).wait(30)
    except psutil.NoSuchProcess:
        pass
    assert not psutil.pid_exists(pid)
