"""What a loop tells about itself: its counters, asyncio's debug mode, and what tools look for."""

from __future__ import annotations

import _asyncio
import asyncio
import logging
import socket
import sys
import time
from typing import Any, get_type_hints

import pytest

import headrace
from headrace import stats, testing
from streams import PATIENCE, Bytes, connected, in_thread


async def turn() -> None:
    await asyncio.sleep(0)


# ---- counters --------------------------------------------------------------------------------------------------


def test_stats_are_what_their_type_says(loop: headrace.EventLoop) -> None:
    def check(found: Any, declared: type) -> None:
        hints = get_type_hints(declared)
        for name, value in found.items():
            if isinstance(value, dict):
                check(value, hints[name])
            else:
                assert type(value) is hints[name], name
        assert declared is stats.EngineStats or set(found) == set(hints)

    loop.run_until_complete(turn())
    check(loop.stats(), stats.LoopStats)


def test_every_engine_s_counters_are_declared() -> None:
    """A counter that an engine gets must be documented."""
    declared = set(get_type_hints(stats.EngineStats))
    counted: set[str] = set()
    for engine in (headrace._uring.UringEngine(), headrace._epoll.EpollEngine(), testing.SimulatedEngine(0)):
        counted |= set(engine.stats())
        engine.close()
    assert counted == declared


def test_slow_turns_are_counted_without_debug_mode(
    loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    loop.slow_callback_duration = 1e9
    loop.run_until_complete(turn())
    assert loop.stats()["slow_turns"] == 0
    loop.slow_callback_duration = 0.02
    before = loop.stats()
    loop.call_soon(time.sleep, 0.03)
    loop.run_until_complete(turn())
    after = loop.stats()
    assert after["slow_turns"] > before["slow_turns"]
    assert after["longest_turn"] >= 0.03
    assert after["busy"] - before["busy"] >= 0.03
    assert after["slow_callbacks"] == 0
    assert not caplog.records


def test_a_slow_last_turn_of_a_run_is_counted(loop: headrace.EventLoop) -> None:
    loop.slow_callback_duration = 0.02

    def last() -> None:
        time.sleep(0.03)
        loop.stop()

    loop.call_soon(last)
    loop.run_forever()
    assert loop.stats()["slow_turns"] >= 1


def test_waiting_is_not_busy() -> None:
    """On the simulated clock, which hardly moves while callbacks run."""

    async def main() -> headrace.stats.LoopStats:
        await asyncio.sleep(1000)
        return loop.stats()

    with testing.simulated_loop(1) as loop:
        told = loop.run_until_complete(main())
    assert loop.time() >= 1000
    assert told["longest_turn"] <= told["busy"] < 1
    assert told["slow_turns"] == 0


def test_timers_and_ready_callbacks(loop: headrace.EventLoop) -> None:
    timers = [loop.call_later(1000, print) for _ in range(10)]
    for timer in timers[:4]:
        timer.cancel()
    assert loop.stats()["timers"] == {"scheduled": 10, "cancelled": 4}
    loop.call_soon(print)
    assert loop.stats()["ready"] == 1
    loop.run_until_complete(turn())
    assert loop.stats()["ready"] == 0
    for timer in timers:
        timer.cancel()
    loop.run_until_complete(turn())
    loop.run_until_complete(turn())
    assert loop.stats()["timers"] == {"scheduled": 0, "cancelled": 0}


def test_what_is_open(loop: headrace.EventLoop) -> None:
    def counts() -> tuple[int, int, int]:
        told = loop.stats()
        return told["transports"], told["listeners"], told["processes"]

    async def main() -> None:
        assert counts() == (0, 0, 0)
        server = await asyncio.start_server(lambda reader, writer: writers.append(writer), "127.0.0.1", 0)
        assert counts() == (0, 1, 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        while not writers:
            await asyncio.sleep(0)
        assert counts() == (2, 1, 0)
        process = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE)
        assert counts() == (2, 1, 1)
        await process.communicate(b"")
        server.close()
        for end in (writer, *writers):
            end.close()
            await end.wait_closed()
        assert counts() == (0, 0, 0)

    writers: list[asyncio.StreamWriter] = []
    loop.run_until_complete(main())


def test_a_transport_that_nobody_closed_is_not_counted_for_ever(engine_name: str) -> None:
    loop = headrace.new_event_loop(engine_name)
    near, far = socket.socketpair()
    loop.run_until_complete(loop.connect_accepted_socket(asyncio.Protocol, near))
    assert loop.stats()["transports"] == 1
    far.close()
    loop.run_until_complete(in_thread(time.sleep, 0))
    while loop.stats()["transports"]:
        loop.run_until_complete(turn())
    loop.close()


# ---- debug mode ------------------------------------------------------------------------------------------------


def test_debug_mode_names_a_slow_protocol(loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    """It's called for a completion, not as a callback of the ready queue; it must be told all the same."""
    loop.slow_callback_duration = 0.02

    async def main() -> None:
        protocol = Bytes(received=lambda _: time.sleep(0.03))
        transport, peer = await connected(protocol)
        peer.sendall(b"x")
        await protocol.seen("received")
        assert caplog.messages == []
        assert loop.stats()["slow_callbacks"] == 0
        loop.set_debug(True)
        peer.sendall(b"x")
        await protocol.seen("received", 2)
        transport.close()
        await protocol.seen("lost")
        peer.close()

    with caplog.at_level(logging.WARNING, "asyncio"):
        loop.run_until_complete(main())
    slow = [line for line in caplog.messages if "Bytes object" in line and "StreamTransport fd=" in line]
    assert slow
    assert slow[0].startswith("Executing <")
    assert slow[0].endswith(" seconds")
    assert loop.stats()["slow_callbacks"] >= 1


def test_debug_mode_names_a_slow_factory(loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    """Whose protocols are made as a completion, too: that of an accept."""

    def dawdling_factory() -> asyncio.Protocol:
        time.sleep(0.03)
        return Bytes(made=lambda recorder: recorder.transport.close())

    async def main() -> None:
        server = await loop.create_server(dawdling_factory, "127.0.0.1", 0)
        peer = await in_thread(socket.create_connection, server.sockets[0].getsockname(), PATIENCE)
        assert await in_thread(peer.recv, 1) == b""
        peer.close()
        server.close()

    loop.set_debug(True)
    loop.slow_callback_duration = 0.02
    with caplog.at_level(logging.WARNING, "asyncio"):
        loop.run_until_complete(main())
    assert any("dawdling_factory" in line and "took" in line for line in caplog.messages)


def test_debug_mode_names_a_slow_task(loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    async def dawdle() -> None:
        time.sleep(0.03)

    loop.set_debug(True)
    loop.slow_callback_duration = 0.02
    with caplog.at_level(logging.WARNING, "asyncio"):
        loop.run_until_complete(loop.create_task(dawdle(), name="the slow one"))
    assert any("name='the slow one'" in line and "dawdle() done" in line for line in caplog.messages)
    assert loop.stats()["slow_callbacks"] >= 1


def test_debug_mode_tracks_where_coroutines_come_from(engine_name: str) -> None:
    """As long as the loop runs, and no longer."""

    async def main() -> None:
        assert sys.get_coroutine_origin_tracking_depth() > 0
        coroutine: Any = turn()
        assert coroutine.cr_origin[0][0] == __file__
        await coroutine
        loop = asyncio.get_running_loop()
        loop.set_debug(False)
        await asyncio.sleep(0)  # another callback puts it in force
        assert sys.get_coroutine_origin_tracking_depth() == 0
        loop.set_debug(True)
        await asyncio.sleep(0)
        assert sys.get_coroutine_origin_tracking_depth() > 0

    assert sys.get_coroutine_origin_tracking_depth() == 0
    headrace.run(main(), engine=engine_name, debug=True)
    assert sys.get_coroutine_origin_tracking_depth() == 0


def test_debug_mode_comes_from_the_environment(engine_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    loop = headrace.new_event_loop(engine_name)
    assert loop.get_debug()
    loop.close()


# ---- what tools look for ---------------------------------------------------------------------------------------


def test_tools_find_the_tasks(loop: headrace.EventLoop) -> None:
    """``python -m asyncio ps`` (3.14) reads the C structures of asyncio's tasks and the thread's running loop from
    outside; ``asyncio.all_tasks`` and debuggers read the same. They are asyncio's own here."""

    async def main() -> None:
        me = asyncio.current_task()
        waiting = loop.create_task(asyncio.sleep(1000), name="waiting")
        assert type(me) is type(waiting) is _asyncio.Task
        assert asyncio.all_tasks() == asyncio.all_tasks(loop) == {me, waiting}
        assert _asyncio.get_running_loop() is _asyncio._get_running_loop() is loop  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        assert waiting.get_stack()
        waiting.cancel()

    loop.run_until_complete(main())
    assert asyncio._get_running_loop() is None
    assert asyncio.all_tasks(loop) == set()
