"""Threads for the steps of authentications, which may block: a client asks its KDC, a server locks its replay cache.

Rules
-----
* Not the loop's default executor: that one resolves names, and a dead KDC mustn't hold up ``getaddrinfo``.
* Clients and servers have threads of their own, for the whole process: fifty clients that wait for a dead KDC don't
  keep a server from accepting. Each kind has a limit of threads and one of waiting steps.
* The threads are daemons, and nobody joins them: neither a loop's close nor the interpreter's exit waits for a KDC.
  (``concurrent.futures`` joins its threads at exit whatever is asked of it.)
* A thread that has had nothing to do for IDLE_SECONDS ends.
* A job that nobody waits for any more is done all the same, if it has begun: it has the context.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from headrace.errors import HandshakeError

__all__ = ["CLIENTS", "SERVERS", "StepThreads"]

IDLE_SECONDS = 10.0
WAITING_LIMIT = 10_000  # steps; each belongs to a connection, and those have limits of their own


class StepThreads:
    """Some daemon threads, started when there's something to do. Thread-safe."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._most = limit
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """The threads stay in the parent process."""
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._threads = 0
        self._idle = 0

    def submit(self, job: Callable[[], None]) -> None:
        """Has ``job`` done; it mustn't raise.

        Raises :class:`headrace.errors.HandshakeError` when too many wait already.
        """
        with self._changed:
            if len(self._jobs) >= WAITING_LIMIT:
                raise HandshakeError(
                    f"{WAITING_LIMIT} authentications wait for a thread already: is the KDC answering?"
                )
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._changed.notify()
                return
            if self._threads >= self._most:
                return
            self._threads += 1
        threading.Thread(target=self._work, name=f"headrace-{self._name}", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._idle += 1
                    self._changed.wait_for(lambda: bool(self._jobs), IDLE_SECONDS)
                    self._idle -= 1
                    if not self._jobs:
                        self._threads -= 1
                        return
                job = self._jobs.popleft()
            job()
            del job  # a context shouldn't live on in an idle thread


# Steps of clients mostly wait; those of servers mostly compute.
CLIENTS = StepThreads("client-steps", 64)
SERVERS = StepThreads("server-steps", min(32, (os.cpu_count() or 1) + 4))
