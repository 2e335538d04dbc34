import asyncio
import selectors
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple, final

from _typeshed import FileDescriptorLike
from typing_extensions import disjoint_base

from headrace._engine import Endpoint, Engine
from headrace.stats import LoopCounters

_Arguments = TypeVarTuple("_Arguments")

# In truth C classes whose `__class__` answers with asyncio's.
@disjoint_base
class Handle(asyncio.Handle): ...

@disjoint_base
class TimerHandle(asyncio.TimerHandle): ...

@disjoint_base
class SelectorWatch(Endpoint): ...

@final
class ReadWait(Endpoint):
    @property
    def future(self) -> asyncio.Future[None]: ...
    def cancel(self) -> None: ...

@disjoint_base
class LoopCore:
    slow_callback_duration: float
    _closed: bool
    _current_handle: asyncio.Handle | None
    _debug: bool
    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _selector: selectors.BaseSelector | None
    _stopping: bool
    _timer_cancelled_count: int
    @property
    def _engine(self) -> Engine | None: ...
    @property
    def _forked(self) -> bool: ...
    @property
    def turns(self) -> int: ...
    def _counters(self) -> LoopCounters: ...
    def call_soon(
        self,
        callback: Callable[[*_Arguments], object],
        *args: *_Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle: ...
    def call_soon_threadsafe(
        self,
        callback: Callable[[*_Arguments], object],
        *args: *_Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle: ...
    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Arguments], object],
        *args: *_Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle: ...
    def call_at(
        self,
        when: float,
        callback: Callable[[*_Arguments], object],
        *args: *_Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle: ...
    def time(self) -> float: ...
    def _check_closed(self) -> None: ...
    def _ensure_fd_no_transport(self, fd: FileDescriptorLike) -> None: ...
    def _engine_start(self, engine: Engine) -> None: ...
    def _engine_stop(self) -> None: ...
    def _engine_close(self) -> None: ...
    def _at_turn_end(self, callback: Callable[[], object]) -> None: ...
    def _poll_readable(self, fd: int) -> ReadWait | None: ...
    def _engine_forked(self) -> None: ...
    def _run_once(self) -> None: ...
    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None: ...
    def _write_to_self(self) -> None: ...
