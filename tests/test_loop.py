"""The loop's core on both engines: the order of callbacks, timers, threads, debug mode, stopping and closing."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import headrace
from streams import reports


def run_turns(loop: headrace.EventLoop, count: int = 1) -> None:
    """A turn each: what is ready, and the completions that are there."""
    for _ in range(count):
        loop.call_soon(loop.stop)
        loop.run_forever()


# ---- call_soon -----------------------------------------------------------------------------------------------


def test_callbacks_run_in_the_order_of_their_calls(loop: headrace.EventLoop) -> None:
    seen: list[int] = []
    for number in range(1000):
        loop.call_soon(seen.append, number)
    run_turns(loop)
    assert seen == list(range(1000))


def test_what_is_called_by_a_callback_waits_for_the_next_turn(loop: headrace.EventLoop) -> None:
    """So I/O is looked at in between, however busy the callbacks are."""
    seen: list[tuple[str, int]] = []

    def first() -> None:
        loop.call_soon(second)
        seen.append(("first", loop.turns))

    def second() -> None:
        seen.append(("second", loop.turns))

    loop.call_soon(first)
    run_turns(loop, 2)
    assert [name for name, _ in seen] == ["first", "second"]
    assert seen[1][1] == seen[0][1] + 1


def test_a_cancelled_callback_is_not_called_and_lets_go(loop: headrace.EventLoop) -> None:
    class Argument:
        pass

    argument = Argument()
    gone = weakref.ref(argument)
    handle = loop.call_soon(pytest.fail, argument)
    later = loop.call_later(0, pytest.fail, argument)
    del argument
    for each in (handle, later):
        each.cancel()
        each.cancel()
        assert each.cancelled()
    assert gone() is None
    run_turns(loop, 2)


def test_callbacks_may_cancel_each_other_and_themselves(loop: headrace.EventLoop) -> None:
    found = reports(loop)
    handles: list[asyncio.Handle] = []
    handles.append(loop.call_soon(lambda: handles[1].cancel()))
    handles.append(loop.call_soon(pytest.fail))

    def itself() -> None:
        handles[2].cancel()
        raise ZeroDivisionError

    handles.append(loop.call_soon(itself))
    run_turns(loop)
    assert [type(context["exception"]) for context in found] == [ZeroDivisionError]


def test_an_exception_is_reported_with_its_handle_and_the_loop_goes_on(loop: headrace.EventLoop) -> None:
    found = reports(loop)
    seen: list[int] = []

    def fail() -> None:
        raise ZeroDivisionError

    handle = loop.call_soon(fail)
    timer = loop.call_later(0, fail)
    loop.call_soon(seen.append, 1)
    run_turns(loop, 2)
    assert seen == [1]
    assert [context["handle"] for context in found] == [handle, timer]
    assert all("Exception in callback" in context["message"] for context in found)
    assert all(isinstance(context["exception"], ZeroDivisionError) for context in found)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_loop_and_the_other_callbacks_wait(
    loop: headrace.EventLoop, kind: type[BaseException]
) -> None:
    def fail() -> None:
        raise kind

    seen: list[int] = []
    loop.call_soon(fail)
    loop.call_soon(seen.append, 1)
    with pytest.raises(kind):
        loop.run_forever()
    assert not loop.is_running()
    assert seen == []
    run_turns(loop)
    assert seen == [1]


def test_each_callback_has_its_context(loop: headrace.EventLoop) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    def look(new: str) -> None:
        seen.append(variable.get())
        variable.set(new)

    mine = contextvars.copy_context()
    variable.set("now")
    loop.call_soon(look, "lost")
    loop.call_soon(look, "kept", context=mine)
    loop.call_later(0, look, "", context=mine)
    loop.call_soon_threadsafe(look, "", context=contextvars.Context())
    variable.set("later")
    run_turns(loop, 3)
    assert sorted(seen) == ["kept", "now", "unset", "unset"]
    assert mine[variable] == ""
    assert variable.get() == "later"


def test_a_context_that_is_entered_already_is_reported(
    loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    found = reports(loop)
    context = contextvars.copy_context()
    loop.call_soon(pytest.fail, context=context)
    context.run(run_turns, loop)
    # Since 3.12 asyncio calls the handler in the same context, can't, and logs instead.
    assert "is already entered" in "".join(str(report["exception"]) for report in found) + caplog.text


# ---- handles -------------------------------------------------------------------------------------------------


def test_handles_are_asyncio_s_in_use(loop: headrace.EventLoop) -> None:
    handle = loop.call_soon(print, 1)
    early, late = loop.call_at(loop.time() + 1e6, print), loop.call_at(loop.time() + 2e6, print)
    assert isinstance(handle, asyncio.Handle)
    assert not isinstance(handle, asyncio.TimerHandle)
    assert isinstance(early, asyncio.TimerHandle)
    assert early < late
    assert early <= late
    assert late > early
    assert late >= early
    assert early != late
    assert hash(early) == hash(early.when())
    # Since 3.13 arguments are told in debug mode only: they may be secrets.
    assert repr(handle) == repr(asyncio.Handle(print, (1,), loop))
    assert f"when={late.when()}" in repr(late)
    assert weakref.ref(handle)() is handle
    if sys.version_info >= (3, 12):
        assert isinstance(handle.get_context(), contextvars.Context)
    for each in (handle, early, late):
        each.cancel()
        assert "cancelled" in repr(each)


# ---- timers --------------------------------------------------------------------------------------------------


def test_timers_run_in_the_order_of_their_times_and_never_early(loop: headrace.EventLoop) -> None:
    seen: list[tuple[float, float]] = []

    def note(when: float) -> None:
        seen.append((when, loop.time()))

    now = loop.time()
    times = [now + offset / 1000 for offset in (30, 5, 20, 0, 10, 15, 1, 25)]
    for when in times:
        loop.call_at(when, note, when)
    loop.call_at(max(times) + 0.001, loop.stop)
    loop.run_forever()
    assert [when for when, _ in seen] == sorted(times)
    assert all(ran >= when - 1e-9 for when, ran in seen)


def test_a_timer_that_is_due_waits_for_the_ready_callbacks_no_more_than_a_turn(
    loop: headrace.EventLoop,
) -> None:
    """A program that always has something ready doesn't keep its timers waiting."""
    turns = 0

    def busy() -> None:
        nonlocal turns
        turns += 1
        if not timer_ran:
            loop.call_soon(busy)

    timer_ran: list[int] = []
    loop.call_soon(busy)
    loop.call_later(0.001, timer_ran.append, 1)
    loop.call_later(0.002, loop.stop)
    loop.run_forever()
    assert timer_ran
    assert turns >= 1


@pytest.mark.parametrize(
    ("call", "message"), [("call_later", "delay must not be None"), ("call_at", "when cannot be None")]
)
def test_times_that_are_none(loop: headrace.EventLoop, call: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        getattr(loop, call)(None, print)


def test_cancelled_timers_are_thrown_out(loop: headrace.EventLoop) -> None:
    """A server that sets a timeout per request, and cancels it, holds no more of them than it has requests."""
    kept = [loop.call_later(1000 + number, pytest.fail) for number in range(10)]
    for handle in [loop.call_later(10 + number, pytest.fail) for number in range(10_000)]:
        handle.cancel()
    run_turns(loop)
    assert len(loop._scheduled) <= 100 + len(kept)
    assert set(kept) <= set(loop._scheduled)
    # One that was the next to come isn't waited for either.
    first = loop.call_later(5, pytest.fail)
    first.cancel()
    run_turns(loop)
    assert first not in loop._scheduled
    loop.call_later(0, loop.stop)
    loop.run_forever()


def test_cancelling_a_timer_that_ran_counts_for_nothing(loop: headrace.EventLoop) -> None:
    for handle in [loop.call_later(0, lambda: None) for _ in range(200)]:
        run_turns(loop)
        handle.cancel()
    assert loop._timer_cancelled_count == 0


def test_far_timers_do_not_overflow(loop: headrace.EventLoop) -> None:
    for when in (1e12, 1e300, float("inf")):
        loop.call_at(when, pytest.fail)
    loop.call_later(0.001, loop.stop)
    loop.run_forever()


# ---- threads -------------------------------------------------------------------------------------------------


def test_another_thread_wakes_a_sleeping_loop(loop: headrace.EventLoop) -> None:
    seen: list[int] = []
    step = threading.Semaphore(0)

    def call() -> None:
        for number in range(100):
            step.acquire()  # the loop has nothing to do but to sleep, then
            loop.call_soon_threadsafe(ran, number)

    def ran(number: int) -> None:
        seen.append(number)
        if number == 99:
            loop.stop()
        step.release()

    thread = threading.Thread(target=call)
    thread.start()
    step.release()
    loop.run_forever()
    thread.join()
    assert seen == list(range(100))


def test_many_threads_at_once_lose_no_call(loop: headrace.EventLoop) -> None:
    count = 0

    def ran() -> None:
        nonlocal count
        count += 1
        if count == 8 * 500:
            loop.stop()

    def call() -> None:
        for _ in range(500):
            loop.call_soon_threadsafe(ran)

    threads = [threading.Thread(target=call) for _ in range(8)]
    loop.call_soon(lambda: [thread.start() for thread in threads])
    loop.run_forever()
    for thread in threads:
        thread.join()
    assert count == 8 * 500


def test_a_call_from_a_thread_between_two_runs_is_served_by_the_next(loop: headrace.EventLoop) -> None:
    run_turns(loop)
    thread = threading.Thread(target=loop.call_soon_threadsafe, args=(loop.stop,))
    thread.start()
    thread.join()
    loop.run_forever()


# ---- debug mode ----------------------------------------------------------------------------------------------


def test_debug_mode_names_slow_callbacks(loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    loop.set_debug(True)
    loop.slow_callback_duration = 0.01
    loop.call_soon(time.sleep, 0.02)
    with caplog.at_level(logging.WARNING, "asyncio"):
        run_turns(loop)
    assert any("Executing" in line and "sleep" in line and "took" in line for line in caplog.messages)


def test_debug_mode_refuses_calls_from_other_threads(loop: headrace.EventLoop) -> None:
    loop.set_debug(True)
    caught: list[BaseException] = []

    def call() -> None:
        for function in (loop.call_soon, lambda callback: loop.call_later(1, callback)):
            try:
                function(print)
            except RuntimeError as error:
                caught.append(error)
        loop.call_soon_threadsafe(loop.stop)

    thread = threading.Thread(target=call)
    loop.call_soon(thread.start)
    loop.run_forever()
    thread.join()
    assert len(caught) == 2
    assert all("Non-thread-safe operation" in str(error) for error in caught)


def test_debug_mode_knows_where_a_callback_was_made(loop: headrace.EventLoop) -> None:
    loop.set_debug(True)
    found = reports(loop)

    def fail() -> None:
        raise ZeroDivisionError

    handles: list[Any] = [loop.call_soon(fail), loop.call_later(0, fail), loop.call_soon_threadsafe(fail)]
    for handle in handles:
        assert handle._source_traceback[-1].filename == __file__
        assert os.path.basename(__file__) in repr(handle)
    run_turns(loop, 2)
    assert len(found) == 3
    assert all(report["source_traceback"][-1].filename == __file__ for report in found)
    with pytest.raises(TypeError, match="coroutines cannot be used with call_soon"):
        loop.call_soon(asyncio.sleep)


# ---- running, stopping, closing ------------------------------------------------------------------------------


def test_run_until_complete_again_and_again(loop: headrace.EventLoop) -> None:
    async def answer(number: int) -> int:
        await asyncio.sleep(0)
        return number

    assert [loop.run_until_complete(answer(number)) for number in range(50)] == list(range(50))
    with pytest.raises(ZeroDivisionError):
        loop.run_until_complete(failing())
    assert loop.run_until_complete(answer(1)) == 1


async def failing() -> None:
    raise ZeroDivisionError


def test_stop_ends_the_turn_that_is_under_way(loop: headrace.EventLoop) -> None:
    seen: list[str] = []
    loop.stop()  # before a run: that run is one turn
    loop.call_soon(seen.append, "ready")
    loop.call_soon(lambda: loop.call_soon(seen.append, "next"))
    loop.run_forever()
    assert seen == ["ready"]
    run_turns(loop)
    assert seen == ["ready", "next"]


def test_a_running_loop_refuses_to_run_or_close(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        coroutine = failing()
        with pytest.raises(RuntimeError, match="already running"):
            loop.run_until_complete(coroutine)
        coroutine.close()
        with pytest.raises(RuntimeError, match="already running"):
            loop.run_forever()
        with pytest.raises(RuntimeError, match="Cannot close a running event loop"):
            loop.close()

    loop.run_until_complete(main())


def test_a_closed_loop_says_so(loop: headrace.EventLoop) -> None:
    run_turns(loop)
    loop.close()
    loop.close()
    assert loop.is_closed()
    calls: list[Callable[[], object]] = [
        lambda: loop.call_soon(print),
        lambda: loop.call_soon_threadsafe(print),
        lambda: loop.call_later(0, print),
        lambda: loop.call_at(0, print),
        loop.run_forever,
        lambda: loop.add_reader(0, print),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            call()


def test_a_loop_that_never_ran_can_be_closed(engine_name: str) -> None:
    loop = headrace.EventLoop(engine_name)
    assert loop.engine_name is None
    stats = loop.stats()
    assert (stats["turns"], stats["engine"], stats["pool"]) == (0, {}, {})
    loop.close()
    with pytest.raises(ValueError, match="engine must be one of"):
        headrace.EventLoop("kqueue")


def test_a_loop_that_nobody_closed_warns_and_goes(engine_name: str) -> None:
    loops = [headrace.new_event_loop(engine=engine_name)]
    run_turns(loops[0])
    gone = weakref.ref(loops[0])

    def forget() -> None:
        loops.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed event loop"):
        forget()
    assert gone() is None


def test_the_default_executor_and_async_generators_are_shut_down(engine_name: str) -> None:
    ended: list[str] = []

    async def numbers() -> Any:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(0)
            ended.append("generator")

    async def main() -> None:
        generator = numbers()
        assert await anext(generator) == 1
        main.generator = generator  # type: ignore[attr-defined]  # so that it isn't collected before
        assert await asyncio.to_thread(threading.current_thread) is not threading.main_thread()

    before = threading.active_count()
    headrace.run(main(), engine=engine_name)
    assert ended == ["generator"]
    assert threading.active_count() == before


def test_stats_count(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"x")
        await reader.readexactly(1)
        writer.close()
        await writer.wait_closed()

    class Echo(headrace.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def lease_received(self, lease: headrace.Lease) -> None:
            self.transport.write(lease)

    server = loop.run_until_complete(loop.create_server(Echo, "127.0.0.1", 0))
    address = server.sockets[0].getsockname()
    before = loop.stats()
    loop.run_until_complete(main())
    after = loop.stats()
    server.close()
    assert after["turns"] > before["turns"]
    for counter in ("waits", "calls", "submitted", "completed", "silent_sends"):
        assert after["engine"][counter] > before["engine"][counter], counter
    assert after["pool"]["copies"] >= before["pool"]["copies"] + 1
    assert after["pool"]["outstanding"] == 0
    assert loop.engine_reason == "it was asked for"


def test_a_subclass_of_the_loop_works(engine_name: str) -> None:
    class Counting(headrace.EventLoop):
        calls = 0

        def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
            self.calls += 1
            return super().call_soon(callback, *args, context=context)

    loop = Counting(engine_name)
    loop.run_until_complete(asyncio.sleep(0))
    assert loop.calls
    loop.close()


def test_an_idle_loop_makes_no_system_calls(loop: headrace.EventLoop) -> None:
    """A loop that waits for a timer turns once for it, not again and again."""
    server = loop.run_until_complete(loop.create_server(asyncio.Protocol, "127.0.0.1", 0))
    run_turns(loop, 3)
    before = loop.turns
    loop.call_later(0.2, loop.stop)
    loop.run_forever()
    assert loop.turns - before <= 5
    server.close()


def test_running_it_leaves_the_process_s_other_loop_alone(loop: headrace.EventLoop) -> None:
    """Ours in a thread, asyncio's in this one: `get_running_loop` tells each its own."""
    seen: list[asyncio.AbstractEventLoop] = []

    async def look() -> None:
        seen.append(asyncio.get_running_loop())

    async def main() -> None:
        await asyncio.to_thread(loop.run_until_complete, look())
        await look()
        seen.append(asyncio.get_running_loop())

    asyncio.run(main())
    assert seen[0] is loop
    assert seen[1] is seen[2] is not loop
