"""Child processes: waited for by pidfd, from any thread's loop, many at once, and gone with the loop."""

from __future__ import annotations

import asyncio
import asyncio.unix_events
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import headrace
from conftest import descriptors
from headrace import subprocesses


def children() -> set[int]:
    """This process's children, the dead that nobody has waited for among them."""
    with open(f"/proc/self/task/{threading.get_native_id()}/children", encoding="ascii") as file:
        return {int(pid) for pid in file.read().split()}


async def shell(command: str, **options: Any) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_shell(command, **options)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread may be started: asyncio's own way on 3.11 is one for each process."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail(f"{self} was started"))


def replace_pidfd_open(monkeypatch: pytest.MonkeyPatch, replacement: Callable[[int], int]) -> None:
    """For child processes; this process's own is what the loop tries whether it works."""
    real = os.pidfd_open
    monkeypatch.setattr(os, "pidfd_open", lambda pid: real(pid) if pid == os.getpid() else replacement(pid))


@pytest.fixture
def policy_watcher() -> Iterator[None]:
    """Restores the policy, with its child watcher."""
    before = asyncio.events._event_loop_policy  # type: ignore[attr-defined]
    asyncio.events._event_loop_policy = None  # type: ignore[attr-defined]
    yield
    asyncio.events._event_loop_policy = before  # type: ignore[attr-defined]


def test_this_kernel_has_pidfds() -> None:
    """Else the tests below would say nothing."""
    if not subprocesses.can_wait_on_pidfd():
        pytest.skip("needs pidfd_open and waitid(P_PIDFD)")
    assert asyncio.events._event_loop_policy is None or not subprocesses.program_has_child_watcher()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_threads", "policy_watcher")
def test_no_thread_no_policy_no_warning(loop: headrace.EventLoop) -> None:
    async def main() -> int:
        return await (await shell("exit 7")).wait()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loop.run_until_complete(main()) == 7
    assert asyncio.events._event_loop_policy is None  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_is_a_negative_returncode(loop: headrace.EventLoop, number: signal.Signals) -> None:
    async def main() -> None:
        process = await shell("exec sleep 100")
        process.send_signal(number)
        assert await process.wait() == -number

    loop.run_until_complete(main())


@pytest.mark.usefixtures("no_threads")
def test_200_at_once(loop: headrace.EventLoop) -> None:
    async def one(index: int) -> None:
        process = await shell("read line; exit $line", stdin=subprocess.PIPE)
        running.append(process)
        if len(running) == 200:
            all_run.set()
        await all_run.wait()
        await process.communicate(b"%d\n" % (index % 128))
        assert process.returncode == index % 128

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(200):
                group.create_task(one(index))

    running: list[asyncio.subprocess.Process] = []
    all_run = asyncio.Event()
    loop.run_until_complete(main())
    assert not {process.pid for process in running} & children()


def test_in_another_thread_s_loop(engine_name: str) -> None:
    async def main() -> None:
        process = await shell("cat; exit 4", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert await process.communicate(b"through") == (b"through", None)
        codes.append(process.returncode)

    codes: list[int | None] = []
    threads = [
        threading.Thread(target=headrace.run, args=(main(),), kwargs={"engine": engine_name})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [4, 4, 4]


def test_a_process_that_has_ended_before_it_is_looked_at(
    loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pidfd_open

    def late(pid: int) -> int:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return real(pid)

    async def main() -> int:
        return await (await shell("exit 9")).wait()

    replace_pidfd_open(monkeypatch, late)
    assert loop.run_until_complete(main()) == 9


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_status_that_somebody_else_took(
    loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    """255 and a warning, as with asyncio; whether it's gone before the pidfd is opened, or after."""
    real = os.pidfd_open

    def late(pid: int) -> int:
        pidfd = real(pid) if moment == "after" else -1
        os.waitpid(pid, 0)
        return pidfd if moment == "after" else real(pid)

    async def main() -> int:
        return await (await shell("exit 9")).wait()

    replace_pidfd_open(monkeypatch, late)
    assert loop.run_until_complete(main()) == 255
    assert "its status was taken elsewhere" in caplog.text


def test_an_ignored_sigchld(loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> int:
        process = await shell("read line; exit 9", stdin=subprocess.PIPE)
        await process.communicate(b"\n")
        assert process.returncode is not None
        return process.returncode

    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert loop.run_until_complete(main()) == 255
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert "its status was taken elsewhere, or SIGCHLD is ignored" in caplog.text


def test_a_real_255_is_no_warning(loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> int:
        return await (await shell("exit 255")).wait()

    caplog.set_level(logging.WARNING)
    assert loop.run_until_complete(main()) == 255
    assert not caplog.records


def test_closing_the_transport_keeps_the_status_it_polled(
    loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    """``close`` asks its Popen whether the process still runs, which takes the status: asyncio then reports 255."""

    class Protocol(asyncio.SubprocessProtocol):
        def process_exited(self) -> None:
            ended.set_result(None)

    async def main() -> int | None:
        transport, _ = await loop.subprocess_shell(
            Protocol, "read line; exit 9", stdin=subprocess.PIPE, stdout=None, stderr=None
        )
        transport.get_pipe_transport(0).write(b"\n")
        os.waitid(os.P_PID, transport.get_pid(), os.WEXITED | os.WNOWAIT)
        transport.close()
        await ended
        return transport.get_returncode()

    ended = loop.create_future()
    assert loop.run_until_complete(main()) == 9
    assert not caplog.records


def test_cancelling_the_start_kills_and_reaps(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        starting = loop.create_task(shell("exec sleep 100", stdin=subprocess.PIPE))
        await asyncio.sleep(0)  # it has forked, and connects its pipes
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    before = children()
    loop.run_until_complete(main())
    assert children() == before


def test_cancelling_a_wait_leaves_the_process_alone(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        process = await shell("read line; exit 3", stdin=subprocess.PIPE)
        waiting = loop.create_task(process.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert process.returncode is None
        await process.communicate(b"\n")
        assert process.returncode == 3

    loop.run_until_complete(main())


def test_a_program_that_is_not_there(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await asyncio.create_subprocess_exec("/no/such/program")

    loop.run_until_complete(main())


def test_a_loop_closed_while_a_child_runs_leaves_no_descriptor(engine_name: str) -> None:
    async def main() -> Any:
        transport, _ = await loop.subprocess_exec(
            asyncio.SubprocessProtocol, "sleep", "100", stdin=None, stdout=None, stderr=None
        )
        return transport

    warm = headrace.new_event_loop(engine_name)
    warm.run_until_complete(asyncio.sleep(0))
    warm.close()
    before = descriptors()
    loop = headrace.new_event_loop(engine_name)
    transport = loop.run_until_complete(main())
    assert "pidfd" in "".join(what for fd, what in descriptors().items() if fd not in before)
    loop.close()
    assert "pidfd" not in "".join(what for fd, what in descriptors().items() if fd not in before)
    process = transport.get_extra_info("subprocess")
    transport.close()  # kills it
    assert process.wait() == -signal.SIGKILL


def test_out_of_descriptors_a_thread_waits(
    loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(pid: int) -> int:
        raise OSError(24, "Too many open files")

    async def main() -> int:
        return await (await shell("exit 5")).wait()

    assert subprocesses.can_wait_on_pidfd()
    replace_pidfd_open(monkeypatch, full)
    assert loop.run_until_complete(main()) == 5
    assert "a thread waits for it: [Errno 24]" in caplog.text


# ---- asyncio's way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["pidfd_open", "waitid"])
def test_a_kernel_or_filter_without_pidfds(
    loop: headrace.EventLoop, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """asyncio's own way then."""

    def denied(*args: Any) -> Any:
        raise PermissionError(1, "Operation not permitted")

    async def main() -> int:
        return await (await shell("exit 6")).wait()

    used: list[bool] = []
    monkeypatch.setattr(os, missing, denied)
    monkeypatch.setattr(loop._child_processes, "start", lambda *args, **options: used.append(True))
    assert not subprocesses.can_wait_on_pidfd()
    assert loop.run_until_complete(main()) == 6
    assert not used


@pytest.mark.usefixtures("policy_watcher")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_watcher_of_the_program_s_own_is_used(loop: headrace.EventLoop) -> None:
    class Watcher(asyncio.unix_events.ThreadedChildWatcher):
        def add_child_handler(self, pid: int, callback: Any, *args: Any) -> None:
            watched.append(pid)
            super().add_child_handler(pid, callback, *args)

    async def main() -> int:
        process = await shell("exit 8")
        assert watched == [process.pid]
        return await process.wait()

    watched: list[int] = []
    asyncio.set_child_watcher(Watcher())
    assert loop.run_until_complete(main()) == 8


@pytest.mark.usefixtures("policy_watcher")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_policy_that_brings_a_watcher(loop: headrace.EventLoop) -> None:
    class Policy(asyncio.DefaultEventLoopPolicy):
        def get_child_watcher(self) -> Any:
            asked.append(True)
            return asyncio.unix_events.ThreadedChildWatcher()

    async def main() -> int:
        return await (await shell("exit 8")).wait()

    asked: list[bool] = []
    asyncio.set_event_loop_policy(Policy())
    assert loop.run_until_complete(main()) == 8
    assert asked


@pytest.mark.usefixtures("policy_watcher")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_asyncio_s_default_watcher_is_none_of_the_program_s() -> None:
    """asyncio makes one by itself when somebody asks, and uses it for its own loops."""
    asyncio.get_event_loop_policy().get_child_watcher()
    assert not subprocesses.program_has_child_watcher()


def test_a_fork_closes_the_child_s_copies(engine_name: str) -> None:
    """The child of a fork has copies of the parent's pidfds; its hook closes them, the parent's go on."""
    program = """
import asyncio, os, sys, headrace

def pidfds():
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            pass
    return sum("pidfd" in link for link in links)

async def main():
    process = await asyncio.create_subprocess_shell("read line; exit 3", stdin=asyncio.subprocess.PIPE)
    before = pidfds()
    child = os.fork()
    if not child:
        os._exit(pidfds())
    _, status = os.waitpid(child, 0)
    await process.communicate(b"\\n")
    print(before, os.waitstatus_to_exitcode(status), process.returncode)

headrace.run(main(), engine=sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, engine_name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["1", "0", "3"], done.stderr
