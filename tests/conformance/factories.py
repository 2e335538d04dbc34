"""Loop factories for the conformance runner that keep count of what really ran.

A suite that passes proves nothing of an engine that was never used: the base class could have made the loop,
or a fallback could have happened. Each factory forces one engine, and each loop it made reports, when it is
closed, which engine it ended up with and how many turns that engine ran. The worker hands these counts to the
runner.
"""

from __future__ import annotations

import collections
import os
from typing import Any

import headrace

# By engine name, or "none" for a loop that was never run. A forked child counts in a copy, which is lost.
made: collections.Counter[str] = collections.Counter()
turns: collections.Counter[str] = collections.Counter()


class CountedLoop(headrace.EventLoop):
    """An event loop that adds its turns to this module's counters when it is closed."""

    def close(self) -> None:
        if not self.is_closed():
            engine = self.engine_name or "none"
            made[engine] += 1
            turns[engine] += self.stats()["turns"]
        super().close()


def uring() -> CountedLoop:
    """A loop on io_uring, or an error."""
    return CountedLoop(engine="uring")


def epoll() -> CountedLoop:
    """A loop on epoll."""
    return CountedLoop(engine="epoll")


# The engine that each factory is to be seen running; looptest.py compares.
FORCED = {"uring": "uring", "epoll": "epoll"}


def counts() -> dict[str, Any]:
    """What ran in this process so far."""
    return {"pid": os.getpid(), "made": dict(made), "turns": dict(turns)}
