"""Child processes: each is a descriptor that becomes readable when the process ends. No thread, no SIGCHLD.

A *pidfd* (``pidfd_open(2)``, Linux 5.3) is registered as a reader of the loop that started the process, whichever
thread that runs in, and the exit status is taken by ``waitid(P_PIDFD)`` (Linux 5.4): unlike a number, the descriptor
can't come to mean another process. asyncio's child watchers, deprecated since Python 3.12, aren't involved; one that
the program has installed itself is used all the same, as asyncio would.
"""

from __future__ import annotations

import asyncio
import asyncio.events
import asyncio.unix_events
import os
from asyncio.log import logger
from typing import Any

__all__ = ["ChildProcesses", "can_wait_on_pidfd", "program_has_child_watcher"]

# How asyncio reports a process whose status somebody else has taken, or that SIGCHLD is ignored for.
UNKNOWN_STATUS = 255


def can_wait_on_pidfd() -> bool:
    """Whether this kernel has what is needed, and allows it (seccomp): tried on this process itself.

    Each time: it's three system calls, against the thousands of a fork.
    """
    try:
        pidfd = os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        return False
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:  # understood: nobody is a child of its own
        return True
    except OSError:
        return False
    finally:
        os.close(pidfd)
    return False


def program_has_child_watcher() -> bool:
    """Whether the program has set a child watcher of its own, or a policy that brings one (Python 3.11 to 3.13).

    Reads what is there: asking the policy would create a watcher, and warn.
    """
    policy = asyncio.events._event_loop_policy  # type: ignore[attr-defined]
    method = getattr(type(policy), "get_child_watcher", None)
    if method is None:
        return False
    if method.__module__.partition(".")[0] != "asyncio":
        return True
    watcher = getattr(policy, "_watcher", None)
    # These two do what is done here; asyncio makes one of them by itself when somebody asks for the watcher.
    standard = [
        getattr(asyncio.unix_events, name, None) for name in ("ThreadedChildWatcher", "PidfdChildWatcher")
    ]
    return watcher is not None and type(watcher) not in standard


class ChildProcesses:
    """The child processes of one loop that haven't ended yet. Belongs to the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pidfds: set[int] = set()

    def __len__(self) -> int:
        return len(self._pidfds)

    async def start(self, *args: Any, **options: Any) -> asyncio.SubprocessTransport:
        """Starts a process, with the arguments of asyncio's transport; returns when its pipes are connected."""
        loop = self._loop
        waiter = loop.create_future()
        transport = asyncio.unix_events._UnixSubprocessTransport(  # type: ignore[attr-defined]
            loop, *args, waiter=waiter, **options
        )
        self._watch(transport)
        try:
            await waiter
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:
            transport.close()
            await transport._wait()
            raise
        return transport  # type: ignore[no-any-return]

    def _watch(self, transport: Any) -> None:
        try:
            pidfd = os.pidfd_open(transport.get_pid())
        except ProcessLookupError:  # SIGCHLD is ignored, and it has ended already
            self._loop.call_soon(exited, transport, None)
        except OSError as error:
            # Out of descriptors, most likely. The process runs: it gets the thread that asyncio would give it.
            logger.warning(
                "no pidfd for child process %d, a thread waits for it: %s", transport.get_pid(), error
            )
            watcher: Any = asyncio.unix_events.ThreadedChildWatcher()
            watcher.add_child_handler(transport.get_pid(), lambda _, status: exited(transport, status))
        else:
            self._pidfds.add(pidfd)
            self._loop.add_reader(pidfd, self._ended, pidfd, transport)

    def _ended(self, pidfd: int, transport: Any) -> None:
        self._loop.remove_reader(pidfd)
        self._pidfds.remove(pidfd)
        try:
            status = exit_status(pidfd)
        finally:
            os.close(pidfd)
        exited(transport, status)

    def close(self) -> None:
        """Lets go of the descriptors; for a loop that is being closed, or that a fork has copied."""
        for pidfd in self._pidfds:
            os.close(pidfd)
        self._pidfds.clear()


def exit_status(pidfd: int) -> int | None:
    """Takes the exit status of an ended process, as ``subprocess`` counts; None if it was taken before."""
    try:
        found = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return None
    assert found is not None  # only with WNOHANG
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def exited(transport: Any, status: int | None) -> None:
    """Tells the transport. A status that its own ``Popen`` has taken (``close`` polls it) isn't lost."""
    if status is None:
        status = transport._proc.returncode
    if status is None:
        status = UNKNOWN_STATUS
        logger.warning(
            "child process %d: its status was taken elsewhere, or SIGCHLD is ignored; its returncode will be %d",
            transport.get_pid(),
            status,
        )
    transport._process_exited(status)
