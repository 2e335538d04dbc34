"""Finds what a piece of code lost: leases, descriptors, tasks.

Theory of operation
-------------------
A `LeakLedger` looks at the process twice, when it starts and when it is asked, each time after a full garbage
collection; what is there the second time and wasn't the first time is lost.

* *Leases* are extension objects that the collector doesn't list. But whoever keeps one, keeps it in something that
  the collector knows: a list, an instance, a coroutine. So all known containers are searched, and the holder,
  which is what one wants to know, is found on the way. Variables of functions that are running aren't
  containers: what only they refer to isn't lost.
* *Descriptors* are those of ``/proc/self/fd``, without the standard streams, which pytest exchanges, and
  io_uring's own: a thread keeps the ring of a closed loop for its next loop.
* *Tasks* are the ``asyncio.Task`` objects that aren't done.

While a ledger is open, `tracemalloc` runs, if it didn't already: it knows where sockets and tasks were made. It
would be wrong about leases, which are recycled: with ``HEADRACE_LEAKS=all`` in the environment their pools know
(``BufferPool.report``).
"""

from __future__ import annotations

import asyncio
import gc
import linecache
import os
import socket
import sysconfig
import tracemalloc
from collections import deque
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any, Self

from headrace.errors import HeadraceError

__all__ = ["Leak", "LeakFound", "LeakLedger"]

FRAMES = 10  # of each allocation: enough to get out of a library
SHOWN_FRAMES = 3
MOST_SHOWN = 20
PLAIN = (list, tuple, dict, set, frozenset, deque, memoryview)
DEPTH = 5  # a memoryview in a list in the dict of an instance: deeper than that, names wouldn't help anybody
LIBRARY = sysconfig.get_path("stdlib")
OWN = os.path.dirname(os.path.dirname(__file__))


class LeakFound(HeadraceError, AssertionError):  # noqa: N818 (what was found, as a failed assertion)
    """Something was lost; `leaks` lists it and the text describes each."""

    def __init__(self, leaks: list[Leak]) -> None:
        self.leaks = leaks
        shown = [f"  {leak}" for leak in leaks[:MOST_SHOWN]]
        if len(leaks) > MOST_SHOWN:
            shown.append(f"  and {len(leaks) - MOST_SHOWN} more")
        super().__init__("\n".join([f"lost: {summary(leaks)}", *shown]))


@dataclass(frozen=True)
class Leak:
    """One thing that was lost."""

    kind: str  # "lease", "descriptor" or "task"
    what: str
    where: str  # who holds it, where it was made

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}" + (f"; {self.where}" if self.where else "")


def summary(leaks: list[Leak]) -> str:
    """``2 leases, 1 task``."""
    kinds = [leak.kind for leak in leaks]
    return ", ".join(
        f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) > 1)}" for kind in dict.fromkeys(kinds)
    )


@dataclass(frozen=True)
class Snapshot:
    """What there is. Objects by their ids: a ledger mustn't keep alive what it watches."""

    leases: frozenset[int]
    descriptors: frozenset[tuple[int, str]]
    tasks: frozenset[int]


class LeakLedger:
    """Compares the process now with the process when the ledger was started.

    ``with LeakLedger():`` raises `LeakFound` at the block's end for every lease, descriptor or task that was made
    inside and is still there; not when the block itself raised. `start`, `check` and `stop` do the same by
    hand. For one thread at a time: what other threads open meanwhile counts as well.
    """

    def __init__(self) -> None:
        self.before: Snapshot | None = None
        self.tracing = False

    def start(self) -> None:
        """Remembers what there is; from now on, what is new is on the ledger."""
        self.tracing = not tracemalloc.is_tracing()
        if self.tracing:
            tracemalloc.start(FRAMES)
        gc.collect()
        self.before = Snapshot(
            frozenset(map(id, unreleased_leases())),
            frozenset(open_descriptors().items()),
            frozenset(map(id, pending_tasks())),
        )

    def leaks(self) -> list[Leak]:
        """What is new and still there, after a garbage collection."""
        if self.before is None:
            raise RuntimeError("the ledger wasn't started")
        gc.collect()
        leases = [each for each in unreleased_leases() if id(each) not in self.before.leases]
        found = [
            Leak("lease", repr(lease), f"held by {holder}")
            for lease, holder in zip(leases, describe_holders(leases), strict=True)
        ]
        for task in pending_tasks():
            if id(task) not in self.before.tasks:
                found.append(Leak("task", *describe_task(task)))
        for fd, target in open_descriptors().items():
            if (fd, target) not in self.before.descriptors:
                found.append(Leak("descriptor", *describe_descriptor(fd, target)))
        return found

    def check(self) -> None:
        """Raises `LeakFound` if there are any."""
        if leaks := self.leaks():
            raise LeakFound(leaks)

    def stop(self) -> None:
        """Ends the tracing of allocations. Idempotent."""
        self.before = None
        if self.tracing:
            tracemalloc.stop()
            self.tracing = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.stop()


# ---- what there is --------------------------------------------------------------------------------------------


def unreleased_leases() -> list[Any]:
    """All leases that are alive and not released."""
    from headrace import Lease

    known = referents(*gc.get_objects())
    found = {id(each): each for each in known if type(each) is Lease and not each.released}
    return list(found.values())


def referents(*containers: object) -> list[Any]:
    """``gc.get_referents``; of a module, only its namespace.

    CPython 3.12's ``_asyncio`` shows the collector a list of free memory. For collecting that does no harm, but
    ``get_referents`` makes references to it, gives them back, and so frees it again.
    """
    modules = [each for each in containers if isinstance(each, ModuleType)]
    others = [each for each in containers if not isinstance(each, ModuleType)]
    return gc.get_referents(*others) + [vars(module) for module in modules]


def pending_tasks() -> list[asyncio.Task[Any]]:
    """All tasks of all loops that aren't done, but for the one that is running this."""
    try:
        running = asyncio.current_task()
    except RuntimeError:
        running = None
    tasks = (each for each in gc.get_objects() if isinstance(each, asyncio.Task))
    return [task for task in tasks if not task.done() and task is not running]


def open_descriptors() -> dict[int, str]:
    """The descriptors of this process and what they are open on; see the top for which aren't counted."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one that lists the directory
        if int(name) > 2 and "[io_uring]" not in target:
            found[int(name)] = target
    return found


# ---- what it is, and where from -------------------------------------------------------------------------------


def made_at(thing: object) -> str:
    """Where an object was made, by tracemalloc: the innermost lines that aren't of a library."""
    trace = tracemalloc.get_object_traceback(thing) if tracemalloc.is_tracing() else None
    lines = []
    for frame in reversed(trace or ()):
        if not frame.filename.startswith((LIBRARY, OWN, "<")) and "site-packages" not in frame.filename:
            source = linecache.getline(frame.filename, frame.lineno).strip()
            lines.append(f"{frame.filename}:{frame.lineno} `{source}`")
    return "made at " + " < ".join(lines[:SHOWN_FRAMES]) if lines else ""


def joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


Holders = dict[int, list[Any]]  # id of a thing -> what refers to it


def holders_of(things: list[Any], searched: Holders) -> Holders:
    """What refers to each of the things; without `things` itself, and what was found before."""
    wanted = set(map(id, things))
    asked = tuple(things)  # from 3.13 on, get_referrers finds the tuple of its own arguments
    ours = {id(things), id(asked), id(searched), *map(id, searched.values())}
    holders: Holders = {}
    for container in gc.get_referrers(*asked):
        if id(container) in ours or (
            isinstance(container, FrameType) and container.f_code.co_filename == __file__
        ):
            continue
        for each in referents(container):
            if id(each) in wanted:
                holders.setdefault(id(each), []).append(container)
    return holders


def describe_holders(leases: list[Any]) -> list[str]:
    """For each lease, who holds it: ``a list of Keeper.parts`` or, at worst, ``C code``."""
    holders: Holders = {}
    level = leases
    for _ in range(DEPTH):
        if not level:
            break
        found = holders_of(level, holders)
        holders.update(found)
        level = [each for several in found.values() for each in several if is_plain(each)]
    return [describe_holder(lease, holders) for lease in leases]


def describe_holder(thing: object, holders: Holders) -> str:
    """The first holder of a thing, in words."""
    for holder in holders.get(id(thing), ()):
        if isinstance(holder, ModuleType):
            return holder.__name__
        if isinstance(holder, FrameType):
            return f"{holder.f_code.co_qualname}() at {holder.f_code.co_filename}:{holder.f_lineno}"
        if type(holder).__name__ == "managedbuffer":  # between a memoryview and what it is a view of
            return describe_holder(holder, holders)
        if not is_plain(holder):
            return type(holder).__qualname__ + attribute_of(holder, thing)
        if isinstance(holder, dict) and (owner := owner_of(holder, holders)) is not None:
            names = [key for key, value in holder.items() if value is thing]
            return ".".join([owner, *names[:1]])
        return f"a {type(holder).__name__} of {describe_holder(holder, holders)}"
    return "C code"


def is_plain(holder: object) -> bool:
    """Whether its own holder says more than it does."""
    return isinstance(holder, PLAIN) or type(holder).__name__ == "managedbuffer"


def owner_of(container: dict[Any, Any], holders: Holders) -> str | None:
    """The name of the module, or of the instance's class, whose namespace a dict is; None for a mere dict."""
    for owner in holders.get(id(container), ()):
        if getattr(owner, "__dict__", None) is container:
            return owner.__name__ if isinstance(owner, ModuleType) else type(owner).__qualname__
    return None


def attribute_of(holder: object, thing: object) -> str:
    """``.name`` of the attribute that a thing is; empty for what has no name, such as a closure's cell."""
    slots = [name for kind in type(holder).__mro__ for name in getattr(kind, "__slots__", ())]
    for name in [*getattr(holder, "__dict__", ()), *slots]:
        if getattr(holder, name, None) is thing:
            return f".{name}"
    return ""


def describe_task(task: asyncio.Task[Any]) -> tuple[str, str]:
    """Name, coroutine and the line it is suspended at; where it was made."""
    coroutine = task.get_coro()
    name = getattr(coroutine, "__qualname__", repr(coroutine))
    stack = task.get_stack(limit=1)
    at = f"waits at {stack[-1].f_code.co_filename}:{stack[-1].f_lineno}" if stack else "never started"
    return f"{task.get_name()} of {name}()", joined(at, made_at(task))


def describe_descriptor(fd: int, target: str) -> tuple[str, str]:
    """The number, what it is open on (for a socket its addresses), and where its Python object was made."""
    what = f"{fd} -> {target}"
    if target.startswith("socket:"):
        what += addresses(fd)
    owners = (each for each in gc.get_objects() if isinstance(each, socket.socket) and each.fileno() == fd)
    owner = next(owners, None)
    return what, made_at(owner) if owner is not None else ""


def addresses(fd: int) -> str:
    """`` 127.0.0.1:80 with 127.0.0.1:4711``, as far as the socket knows."""
    with socket.socket(fileno=os.dup(fd)) as copy:
        parts = []
        for ask, word in ((copy.getsockname, ""), (copy.getpeername, "with ")):
            try:
                name = ask()
            except OSError:
                continue
            parts.append(word + (f"{name[0]}:{name[1]}" if isinstance(name, tuple) else name or "unnamed"))
    return " " + " ".join(parts) if parts else ""
