"""The core of the event loop: handles, timers, and the turn.

``EventLoop`` (in ``loop.py``) is ``class EventLoop(LoopCore, asyncio.SelectorEventLoop)``: this core comes first in
the order of methods and replaces what runs per event; everything that runs per connection, per process or per
program stays CPython's own, tested code.

A turn
------
1. flush: the transports that were written to submit their sends;
2. ``engine.wait``: one system call starts all that was submitted and waits for completions;
3. deliver: completions go to their transports and from there to the protocols;
4. the inherited selector is asked, if its descriptor was reported readable;
5. due timers join the ready queue, and what is in the ready queue *now* is run.

The inherited attributes that both sides use (``_ready``, ``_scheduled``, ``_stopping`` ...) are C fields of this class:
data descriptors of the type, which Python code reads and writes as ever.
"""
import asyncio
import heapq
import sys
from asyncio import format_helpers
from asyncio.log import logger

cimport cython
from cpython.contextvars cimport PyContext_CopyCurrent, PyContext_Enter, PyContext_Exit
from cpython.object cimport PyObject
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from headrace._engine cimport IDLE, POLL, Completion, Endpoint, Engine

from headrace.errors import EngineError

cdef extern from "Python.h":
    object PyObject_Call(object callable, object args, PyObject *kwargs)

cdef extern from *:
    """
    #include <time.h>
    static double headrace_loop_monotonic(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    }
    """
    double headrace_loop_monotonic() nogil

cdef object heappush = heapq.heappush
cdef object heappop = heapq.heappop
cdef object heapify = heapq.heapify

cdef enum:
    # Cancelled timers are thrown out of the heap when there are many, and many of all (as in asyncio).
    PRUNE_MINIMUM = 100
    # Bytes queued in one turn after which sends are started at once: large batches of freshly written memory
    # push it out of the caches, and freeing them in one go makes malloc give the memory back to the system.
    FLUSH_BYTES = 512 * 1024

cdef double PRUNE_FRACTION = 0.5
cdef double LONGEST_WAIT = 24 * 3600.0
cdef double IDLE_SECOND = 1.0


cdef inline object call_site():
    """Where the caller of call_soon and its kin stands, for debug mode."""
    return format_helpers.extract_stack(sys._getframe(0))


@cython.freelist(256)
cdef class Handle:
    """A callback that waits for its turn; what ``call_soon`` returns. Equal in use to ``asyncio.Handle``."""

    cdef public object _callback, _args, _context, _loop, _source_traceback, _repr
    cdef public bint _cancelled
    cdef object __weakref__

    @property
    def __class__(self):
        # isinstance(handle, asyncio.Handle) holds; a real subclass can't have C fields.
        return asyncio.Handle

    def cancel(self):
        """Makes the callback not be called; idempotent."""
        if not self._cancelled:
            self._cancelled = True
            if self._loop._debug:
                self._repr = repr(self)
            self._callback = None
            self._args = None

    def cancelled(self):
        """Whether ``cancel`` was called."""
        return self._cancelled

    def get_context(self):
        """The ``contextvars.Context`` that the callback runs in."""
        return self._context

    def _repr_info(self):
        info = ["Handle"]
        if self._cancelled:
            info.append("cancelled")
        if self._callback is not None:
            info.append(describe_callback(self))
        if self._source_traceback:
            frame = self._source_traceback[len(self._source_traceback) - 1]
            info.append(f"created at {frame[0]}:{frame[1]}")
        return info

    def __repr__(self):
        return self._repr if self._repr is not None else f"<{' '.join(self._repr_info())}>"

    def _run(self):
        run_handle(self)


cdef class TimerHandle(Handle):
    """A callback that waits for its time; what ``call_later`` and ``call_at`` return."""

    cdef public double _when
    cdef public bint _scheduled

    @property
    def __class__(self):
        return asyncio.TimerHandle

    def cancel(self):
        """Makes the callback not be called; idempotent."""
        if not self._cancelled:
            self._loop._timer_handle_cancelled(self)
        Handle.cancel(self)

    def when(self):
        """The loop time, in seconds, at which the callback is due."""
        return self._when

    def _repr_info(self):
        info = Handle._repr_info(self)
        info[0] = "TimerHandle"
        info.insert(2 if self._cancelled else 1, f"when={self._when}")
        return info

    def __hash__(self):
        return hash(self._when)

    def __lt__(self, other):
        return self._when < (<TimerHandle?>other)._when

    def __le__(self, other):
        return self._when <= (<TimerHandle?>other)._when

    def __gt__(self, other):
        return self._when > (<TimerHandle?>other)._when

    def __ge__(self, other):
        return self._when >= (<TimerHandle?>other)._when

    def __eq__(self, other):
        cdef TimerHandle that
        if type(other) is not TimerHandle:
            return NotImplemented
        that = other
        return (self._when == that._when and self._callback == that._callback
                and self._args == that._args and self._cancelled == that._cancelled)


cdef str describe_callback(Handle handle):
    if sys.version_info >= (3, 13):
        return format_helpers._format_callback_source(handle._callback, handle._args, debug=handle._loop._debug)
    return format_helpers._format_callback_source(handle._callback, handle._args)


cdef int run_handle(Handle handle) except -1:
    cdef object context = handle._context
    try:
        PyContext_Enter(context)
        try:
            PyObject_Call(handle._callback, handle._args, NULL)
        finally:
            PyContext_Exit(context)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as exc:
        report = {
            "message": f"Exception in callback {describe_callback(handle)}",
            "exception": exc,
            "handle": handle,
        }
        if handle._source_traceback:
            report["source_traceback"] = handle._source_traceback
        handle._loop.call_exception_handler(report)
    return 0


cdef class SelectorWatch(Endpoint):
    """Polls the descriptor of the inherited selector (an epoll): one shot, re-armed after each look into it.

    That is exactly level-triggered, and keeps every descriptor that the user registered out of the ring. It has no
    reference to the loop, so a loop that nobody closed can still be collected.
    """

    cdef int complete(self, Completion *completion) except -1:
        self.ready = completion.result >= 0
        return 0


@cython.final
cdef class ReadWait(Endpoint):
    """Polls a descriptor that the user owns, once, for the coroutine that awaits ``future``.

    Nothing is received here: whoever is cancelled between the completion and the resumption has lost nothing.
    """
    cdef Engine engine
    cdef Operation poll
    cdef readonly object future

    cdef int complete(self, Completion *completion) except -1:
        # An error too: the system call that follows says which one.
        if not self.future.done():
            self.future.set_result(None)
        return 0

    def cancel(self):
        """To be called when ``future`` isn't awaited any more; the descriptor is let go within the turn."""
        if self.poll.state != IDLE:
            self.engine.cancel(&self.poll)


cdef class LoopCore:
    """What of the event loop runs per event. Not used by itself: see ``headrace.EventLoop``."""

    def __cinit__(self, *args, **kwargs):
        self.dirty = []
        self.turn_end = []
        self.accept_starved = []
        self.slow_callback_duration = 0.1

    def __dealloc__(self):
        free(self.transports)

    # ---- handles and timers ---------------------------------------------------------------------------------

    def call_soon(self, callback, *args, context=None):
        """Calls ``callback(*args)`` in the next turn, after everything that waits already."""
        cdef Handle handle
        if self._closed or self._forked:
            self._check_closed()
        handle = Handle.__new__(Handle)
        if self._debug:
            self._check_thread()
            self._check_callback(callback, "call_soon")
            handle._source_traceback = call_site()
        handle._callback = callback
        handle._args = args
        handle._loop = self
        handle._context = context if context is not None else PyContext_CopyCurrent()
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(self, callback, *args, context=None):
        """``call_soon`` from any thread; wakes the loop."""
        cdef Handle handle
        if self._closed or self._forked:
            self._check_closed()
        handle = Handle.__new__(Handle)
        if self._debug:
            self._check_callback(callback, "call_soon_threadsafe")
            handle._source_traceback = call_site()
        handle._callback = callback
        handle._args = args
        handle._loop = self
        handle._context = context if context is not None else PyContext_CopyCurrent()
        self._ready.append(handle)
        self._write_to_self()
        return handle

    def call_later(self, delay, callback, *args, context=None):
        """Calls ``callback(*args)`` in ``delay`` seconds."""
        if delay is None:
            raise TypeError("delay must not be None")
        return self.add_timer(self.time() + delay, callback, args, context, "call_later")

    def call_at(self, when, callback, *args, context=None):
        """Calls ``callback(*args)`` at the loop time ``when``, in seconds."""
        if when is None:
            raise TypeError("when cannot be None")
        return self.add_timer(when, callback, args, context, "call_at")

    cdef add_timer(self, double when, callback, tuple args, context, str method):
        cdef TimerHandle handle
        if self._closed or self._forked:
            self._check_closed()
        handle = TimerHandle.__new__(TimerHandle)
        if self._debug:
            self._check_thread()
            self._check_callback(callback, method)
            handle._source_traceback = call_site()
        handle._when = when
        handle._callback = callback
        handle._args = args
        handle._loop = self
        handle._context = context if context is not None else PyContext_CopyCurrent()
        handle._scheduled = True
        heappush(self._scheduled, handle)
        return handle

    def _timer_handle_cancelled(self, handle):
        if handle._scheduled:
            self._timer_cancelled_count += 1

    def time(self):
        """The loop's clock, in seconds: CLOCK_MONOTONIC, or the simulator's virtual time."""
        return self.clock()

    cdef double clock(self) noexcept:
        return self.engine.now() if self.engine is not None else headrace_loop_monotonic()

    def _check_closed(self):
        if self._forked:
            raise EngineError("this event loop belongs to the parent process; make a new one in the child")
        if self._closed:
            raise RuntimeError("Event loop is closed")

    def _write_to_self(self):
        # Without an engine the loop hasn't run: there is nobody to wake.
        if self.engine is not None:
            self.engine.wake()

    # ---- the turn -------------------------------------------------------------------------------------------

    def _run_once(self):
        """One turn. Called by the inherited ``run_forever``."""
        cdef Engine engine = self.engine
        cdef double timeout, now
        if self._forked:
            self._check_closed()
        self.turns += 1
        self.prune_timers()
        if self.turn_end:
            self.call_turn_end()
        if self.dirty:
            self.flush_marked()
        now = self.clock()
        self.turn_ends(now)
        timeout = self.next_timeout(now)
        self.wait(timeout)
        # What didn't sleep needs no second look at the clock: a busy loop pays for one a turn.
        self.woken = now if timeout == 0 else self.clock()
        engine.deliver()
        if self.watch.ready:
            self.run_selector()
        if self._scheduled:
            self.run_timers()
        self.run_ready()

    cdef int prune_timers(self) except -1:
        cdef TimerHandle handle
        cdef Py_ssize_t count = len(self._scheduled)
        if count > PRUNE_MINIMUM and self._timer_cancelled_count > PRUNE_FRACTION * count:
            alive = []
            for handle in self._scheduled:
                if handle._cancelled:
                    handle._scheduled = False
                else:
                    alive.append(handle)
            heapify(alive)
            self._scheduled = alive
            self._timer_cancelled_count = 0
            return 0
        while self._scheduled and (<TimerHandle>self._scheduled[0])._cancelled:
            self._timer_cancelled_count -= 1
            handle = heappop(self._scheduled)
            handle._scheduled = False
        return 0

    cdef void turn_ends(self, double now) noexcept:
        """Counts the time since the last wait: what the loop did instead of looking at its connections."""
        cdef double seconds = now - self.woken
        if not self.woken:
            return
        self.woken = 0
        self.busy += seconds
        if seconds > self.longest_turn:
            self.longest_turn = seconds
        if seconds >= self.slow_callback_duration:
            self.slow_turns += 1

    cdef double next_timeout(self, double now) except? -2:
        cdef double timeout
        if self._ready or self._stopping or self.dirty or self.turn_end:
            return 0
        if self._scheduled:
            timeout = (<TimerHandle>self._scheduled[0])._when - now
            return 0 if timeout < 0 else min(timeout, LONGEST_WAIT)
        return -1

    cdef int wait(self, double timeout) except -1:
        """Waits for completions. A pool that has grown makes a long wait be a second, and shrinks after an idle one."""
        cdef Engine engine = self.engine
        # What trim() would give back: a loop that has nothing to give back isn't woken.
        cdef bint grown = engine.pool.free > engine.pool.target
        if grown and (timeout < 0 or timeout > IDLE_SECOND):
            engine.wait(IDLE_SECOND)
            if engine.first == engine.last:
                engine.pool.trim()
            return 0
        return engine.wait(timeout)

    cdef int run_selector(self) except -1:
        self.watch.ready = False
        try:
            self._process_events(self._selector.select(0))
        finally:
            if self.watch.poll.state == IDLE:
                self.engine.submit(&self.watch.poll)
        return 0

    cdef int run_timers(self) except -1:
        cdef TimerHandle handle
        cdef double due = self.clock() + 1e-9
        while self._scheduled:
            handle = self._scheduled[0]
            if handle._when >= due:
                break
            heappop(self._scheduled)
            handle._scheduled = False
            self._ready.append(handle)
        return 0

    cdef int run_ready(self) except -1:
        """Runs what is ready now; what gets ready meanwhile waits for the next turn, after another look at I/O."""
        cdef Py_ssize_t _i, count = len(self._ready)
        cdef object popleft
        if not count:
            return 0
        popleft = self._ready.popleft
        for _i in range(count):
            handle = popleft()
            if self._debug:
                self.run_watched(handle)
            elif type(handle) is Handle or type(handle) is TimerHandle:
                if not (<Handle>handle)._cancelled:
                    run_handle(<Handle>handle)
            elif not handle._cancelled:    # made by inherited code, or by another library
                handle._run()
            if self._forked:
                self._check_closed()
        return 0

    cdef run_watched(self, handle):
        if handle._cancelled:
            return
        self._current_handle = handle
        cdef double began = self.clock()
        try:
            handle._run()
        finally:
            self._current_handle = None
        cdef double seconds = self.clock() - began
        if seconds >= self.slow_callback_duration:
            self.was_slow(asyncio.base_events._format_handle(handle), seconds)

    cdef int was_slow(self, object what, double seconds) except -1:
        self.slow_callbacks += 1
        logger.warning("Executing %s took %.3f seconds", what, seconds)
        return 0

    def _poll_readable(self, int fd):
        """A ReadWait on ``fd``, or None where the inherited selector has to do."""
        cdef ReadWait wait
        if not self.engine.polls_freely:
            return None
        wait = ReadWait.__new__(ReadWait)
        wait.engine = self.engine
        wait.future = self.create_future()
        wait.poll.owner = <PyObject *>wait
        wait.poll.kind = POLL
        wait.poll.fd = fd
        self.engine.submit(&wait.poll)
        return wait

    # ---- what transports need -------------------------------------------------------------------------------

    cdef int mark(self, Endpoint endpoint, Py_ssize_t size) except -1:
        self.dirty.append(endpoint)
        self.dirty_bytes += size
        if self.dirty_bytes >= FLUSH_BYTES:
            self.flush_now()
        return 0

    cdef int flush_now(self) except -1:
        self.flush_marked()
        if self.engine is not None and self.engine.running:
            self.engine.flush()
        return 0

    cdef int flush_marked(self) except -1:
        cdef list dirty = self.dirty
        cdef Py_ssize_t i = 0
        self.dirty_bytes = 0
        self.dirty = []
        try:
            while i < len(dirty):
                i += 1
                (<Endpoint>dirty[i - 1]).flush()
        finally:
            if i < len(dirty):
                self.dirty.extend(dirty[i:])
        return 0

    def _at_turn_end(self, callback):
        """Calls ``callback()`` once, when this turn's callbacks have run and before what they wrote is sent.

        For layers above a transport that want to send what is written in a turn together.
        """
        self.turn_end.append(callback)

    cdef int call_turn_end(self) except -1:
        """What these callbacks ask for in their turn waits for the next one: a turn must end."""
        cdef list callbacks = self.turn_end
        cdef Py_ssize_t i = 0
        self.turn_end = []
        try:
            while i < len(callbacks):
                i += 1
                callbacks[i - 1]()
        finally:
            if i < len(callbacks):
                self.turn_end = callbacks[i:] + self.turn_end
        return 0

    cdef int remember(self, int fd, Endpoint transport) except -1:
        cdef int size
        cdef PyObject **grown
        if fd >= self.transports_size:
            size = max(64, self.transports_size)
            while size <= fd:
                size *= 2
            if size > 1 << 24:
                return 0    # a virtual descriptor: no real one is that large, and nobody can collide with it
            grown = <PyObject **>realloc(self.transports, size * sizeof(PyObject *))
            if grown == NULL:
                raise MemoryError
            memset(grown + self.transports_size, 0, (size - self.transports_size) * sizeof(PyObject *))
            self.transports = grown
            self.transports_size = size
        self.transports[fd] = <PyObject *>transport
        return 0

    cdef int forget(self, int fd) except -1:
        if 0 <= fd < self.transports_size:
            self.transports[fd] = NULL
        return 0

    cdef int descriptor_closed(self) except -1:
        """Listeners that ran out of descriptors try again."""
        cdef Endpoint listener
        cdef list starved
        if self.accept_starved:
            starved = self.accept_starved
            self.accept_starved = []
            for listener in starved:
                listener.flush()
        return 0

    def _ensure_fd_no_transport(self, fd):
        fileno = fd if isinstance(fd, int) else None
        if fileno is None:
            try:
                fileno = int(fd.fileno())
            except (AttributeError, TypeError, ValueError):
                raise ValueError(f"Invalid file object: {fd!r}") from None
        transport = self._transports.get(fileno)    # inherited: datagrams of other families
        if transport is None and 0 <= fileno < self.transports_size and self.transports[<int>fileno] != NULL:
            transport = <object>self.transports[<int>fileno]
        if transport is not None and not transport.is_closing():
            raise RuntimeError(f"File descriptor {fd!r} is used by transport {transport!r}")

    # ---- the engine's life, for loop.py ---------------------------------------------------------------------

    def _engine_start(self, Engine engine):
        """Starts ``engine`` in this thread and makes it the loop's."""
        cdef SelectorWatch watch
        engine.start()
        self.engine = engine
        if self.watch is None:
            watch = SelectorWatch()
            watch.poll.owner = <PyObject *>watch
            watch.poll.kind = POLL
            watch.poll.fd = self._selector.fileno()
            self.watch = watch
        if self.watch.poll.state == IDLE:
            engine.submit(&self.watch.poll)

    def _engine_stop(self):
        """Sends off what was written, and leaves nothing in flight."""
        if self._forked or self.engine is None or not self.engine.running:
            return
        try:
            self.call_turn_end()
            self.flush_now()
        finally:
            self.turn_ends(self.clock())    # the time between two runs is no turn's
            self.engine.stop()

    def _engine_close(self):
        if self.engine is not None and not self.engine.closed:
            self.engine.close()

    def _engine_forked(self):
        """In a child, from an at-fork hook: the loop can't be used here; the parent's is untouched."""
        self._forked = True
        self._closed = True
        if self.engine is not None:
            self.engine.forked()
        self.dirty = []
        self.turn_end = []

    @property
    def _engine(self):
        return self.engine

    def _counters(self):
        """The loop's own part of ``stats()``."""
        return {
            "turns": self.turns,
            "busy": self.busy,
            "longest_turn": self.longest_turn,
            "slow_turns": self.slow_turns,
            "slow_callbacks": self.slow_callbacks,
            "ready": len(self._ready),
            "timers": {"scheduled": len(self._scheduled), "cancelled": self._timer_cancelled_count},
            "transports": self.transports_open,
        }
