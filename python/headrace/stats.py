"""What ``loop.stats()`` answers, as types."""

from __future__ import annotations

from typing import TypedDict

__all__ = ["EngineStats", "LoopCounters", "LoopStats", "PoolStats", "TimerStats"]


class TimerStats(TypedDict):
    """Timers of the loop, now."""

    scheduled: int
    """``call_later`` and ``call_at`` handles that are kept, the cancelled ones among them."""
    cancelled: int
    """Those of them that were cancelled: thrown out when they are the next, or when they are many."""


class EngineStats(TypedDict, total=False):
    """Counters since the engine was made. Empty before the first run."""

    waits: int
    """Times the engine looked for completions, with or without a system call."""
    calls: int
    """System calls."""
    submitted: int
    """Operations."""
    completed: int
    """Completions; more than operations, because a multishot operation completes many times."""
    parked: int
    """Receives that found no free buffer."""
    silent_sends: int
    """Sends that went out whole without a completion."""
    silent_failures: int
    """Sends meant to be silent that didn't."""
    overflows: int
    """Completions that the queue shared with the kernel had no room for (``uring``)."""
    no_buffers: int
    """Completions that said the buffers had run out (``uring``)."""
    in_flight: int
    """Operations under way now (``uring``)."""
    parked_now: int
    """Receives that wait for a buffer now (``epoll``)."""
    left_over: int
    """Ready descriptors that are served in the next turn (``epoll``)."""
    posted: int
    """Completions posted (``simulated``)."""
    steps: int
    """Steps of the simulation (``simulated``)."""


class PoolStats(TypedDict, total=False):
    """The pool of receive memory: see :meth:`headrace.BufferPool.stats`. Empty before the first run."""

    block_size: int
    maximum: int
    allocated: int
    free: int
    posted: int
    pinned: int
    leased: int
    outstanding: int
    leases: int
    copies: int
    exhausted: int
    collected_not_released: int


class LoopCounters(TypedDict):
    """The loop's own counters, which begin with the loop; seconds are of the loop's clock."""

    turns: int
    busy: float
    """Seconds spent in turns and not in waiting: in callbacks, in protocols, in the loop itself."""
    longest_turn: float
    """The longest time, in seconds, that no connection was looked at."""
    slow_turns: int
    """Turns that took ``loop.slow_callback_duration`` (0.1 s) or more. Counted always."""
    slow_callbacks: int
    """Callbacks, and calls of a protocol for one completion, that took as long. Counted, and logged by name, in debug
    mode only: that needs two looks at the clock for each."""
    ready: int
    """Callbacks that wait for the next turn."""
    timers: TimerStats
    transports: int
    """Stream transports that own a descriptor."""


class LoopStats(LoopCounters):
    """What :meth:`headrace.EventLoop.stats` returns."""

    listeners: int
    """Listening sockets that are served."""
    processes: int
    """Child processes that are waited for by pidfd."""
    engine: EngineStats
    pool: PoolStats
