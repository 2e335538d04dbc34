from cpython.object cimport PyObject

from headrace._engine cimport Endpoint, Engine, Operation


cdef class SelectorWatch(Endpoint):
    cdef Operation poll
    cdef bint ready        # the selector has events


cdef class LoopCore:
    # BaseEventLoop's own attributes, as C fields: its Python code and this module work on the same storage.
    cdef public object _ready          # a collections.deque of handles
    cdef public list _scheduled        # a heap of timer handles
    cdef public object _selector
    cdef public bint _stopping, _closed, _debug
    cdef public Py_ssize_t _timer_cancelled_count
    cdef public object _current_handle
    cdef public double slow_callback_duration

    cdef Engine engine                 # None until the first run
    cdef SelectorWatch watch
    cdef list dirty                    # endpoints to flush at the end of this turn
    cdef Py_ssize_t dirty_bytes        # queued by them since the last flush
    cdef list turn_end                 # what layers above transports want called before that
    cdef list accept_starved           # listeners that wait for a descriptor
    cdef PyObject **transports         # by descriptor; borrowed
    cdef int transports_size
    cdef readonly bint _forked         # this is a child, and the loop its parent's
    cdef readonly long long turns
    cdef double woken                  # when the wait of this turn ended; 0: no turn is under way
    cdef double busy, longest_turn     # seconds
    cdef long long slow_turns, slow_callbacks
    cdef Py_ssize_t transports_open    # kept by the transports themselves
    cdef object __weakref__

    # To be flushed at the end of the turn; `size` more bytes are queued.
    cdef int mark(self, Endpoint endpoint, Py_ssize_t size) except -1
    # Flushes what is marked, and starts it.
    cdef int flush_now(self) except -1
    cdef int flush_marked(self) except -1
    cdef int call_turn_end(self) except -1
    cdef int remember(self, int fd, Endpoint transport) except -1
    # The descriptor was closed, or will be.
    cdef int forget(self, int fd) except -1
    cdef int descriptor_closed(self) except -1
    cdef double clock(self) noexcept
    cdef int run_ready(self) except -1
    cdef int run_timers(self) except -1
    cdef double next_timeout(self, double now) except? -2
    cdef void turn_ends(self, double now) noexcept
    cdef int prune_timers(self) except -1
    cdef int run_selector(self) except -1
    cdef int wait(self, double timeout) except -1
    cdef add_timer(self, double when, callback, tuple args, context, str method)
    cdef run_watched(self, handle)
    # For debug mode: counts and logs that `what` has kept the loop for so many seconds.
    cdef int was_slow(self, object what, double seconds) except -1
