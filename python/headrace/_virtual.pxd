# The world of a simulation: dice, clock, network. See _simulated for the virtual kernel on top of it.
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport realloc

from headrace._engine cimport Engine


cdef enum:
    NO_SLOT = 0xffffffff
    FIRST_DESCRIPTOR = 1 << 24


cdef enum EventKind:
    SEGMENT = 1      # bytes of a Pipe arrive
    FINISH = 2       # its FIN arrives
    ARRIVAL = 3      # a connection reaches a listener's backlog
    RESET = 4        # RST reaches a Socket
    FAULT = 5        # the network resets a connection
    WORK = 6         # an operation may make progress
    CANCEL = 7       # a cancel request reaches its operation


cdef class SeededRandom:
    # splitmix64: one word of state, the same numbers on every machine and in every version.
    cdef uint64_t state

    cdef uint64_t next(self) noexcept
    cdef uint64_t below(self, uint64_t limit) noexcept
    cdef bint chance(self, double probability) noexcept
    cdef double fraction(self) noexcept


cdef class Pipe:
    # One direction of a connection: the sender's buffer, the wire, the receiver's buffer. All bytes lie in one
    # ring; the three counters only rise, and taken <= arrived <= written.
    cdef char *memory
    cdef uint32_t mask
    cdef readonly uint64_t written     # bytes that the sender's side has accepted
    cdef readonly uint64_t arrived     # ... that reached the receiver's side
    cdef readonly uint64_t taken       # ... that were received
    cdef readonly uint32_t send_limit, receive_limit, segment
    cdef readonly bint shut            # the sender has ended it: FIN goes out after the last byte
    cdef readonly bint finished        # FIN has arrived
    cdef readonly str broken           # why it was reset, or None
    cdef bint moving                   # a SEGMENT or FINISH event is on its way
    cdef Socket writer, reader


cdef class Socket:
    # What a virtual descriptor refers to.
    cdef readonly int fd               # -1: not accepted yet, or closed
    cdef bint listening, closed
    cdef Pipe incoming, outgoing
    cdef uint32_t receive, send, poll  # slots of the operations on it; NO_SLOT: none
    cdef int error                     # a pending error, told once, to whoever looks first
    cdef readonly int told             # the last connection error that was told
    cdef bint reset_seen               # RST has arrived
    cdef readonly object address, peer_address
    cdef object backlog                # LISTENER: connections that wait to be accepted
    cdef int backlog_limit


cdef struct Event:
    double at
    uint64_t tie             # decides among events of the same moment
    uint32_t kind
    uint32_t slot, generation
    PyObject *target         # a Pipe or a Socket; a reference


cdef class VirtualWorld(Engine):
    cdef readonly unsigned long long seed
    cdef SeededRandom random
    cdef readonly object faults        # the Faults in force
    cdef double p_short_receive, p_short_send, p_no_buffers, p_accept_limit, p_reset, p_overflow
    cdef double p_cancel_race, p_early_end, p_would_block, max_latency, max_delay
    cdef bint calm                     # the faults were given: nothing about the world is drawn
    cdef double clock
    cdef Event *events                 # a heap
    cdef int event_count, event_capacity
    cdef bint reuse_descriptors
    cdef dict sockets                  # descriptor -> Socket
    cdef dict listeners                # address -> Socket
    cdef int next_fd, descriptor_limit, next_port
    cdef uint32_t default_send_limit, default_receive_limit, default_segment
    cdef readonly object violation     # the first ContractViolation: later steps raise it again
    cdef readonly dict injected        # fault name -> how often
    cdef readonly object trace         # None, or a deque of the last events as text
    cdef readonly unsigned long long digest
    cdef readonly long long steps      # events that have happened

    # what the kernel half does
    cdef int poke(self, Socket socket) except -1
    cdef int operation_event(self, Event *event) except -1
    cdef list held_back(self, int fd)
    # the network
    cdef Socket socket_of(self, int fd)
    cdef Socket install(self, Socket socket)
    cdef tuple make_pair(self, object near, object far)
    cdef Pipe make_pipe(self)
    cdef int move(self, Pipe pipe) except -1
    cdef int segment_arrives(self, Pipe pipe) except -1
    cdef int fin_arrives(self, Pipe pipe) except -1
    cdef int break_connection(self, Socket socket, str reason) except -1
    cdef int reset_arrives(self, Socket socket) except -1
    cdef int connection_arrives(self, Socket listener) except -1
    cdef int close_socket(self, Socket socket) except -1
    cdef int shut(self, Socket socket) except -1
    cdef uint32_t accept_bytes(self, Socket socket, const char *data, uint32_t length) except? 0
    # events
    cdef void drop_events(self) noexcept
    cdef int schedule(self, double delay, uint32_t kind, uint32_t slot, uint32_t generation, object target) except -1
    cdef Event pop_event(self) noexcept
    cdef int run_events(self, double until) except -1
    cdef int happen(self, Event *event) except -1
    cdef double latency(self) noexcept
    cdef double delay(self) noexcept
    # what a socket is ready for
    cdef bint can_receive(self, Socket socket) noexcept
    cdef bint can_send(self, Socket socket) noexcept
    cdef int32_t take_error(self, Socket socket) noexcept
    cdef int32_t send_error(self, Socket socket) noexcept
    # the book
    cdef int violated(self, str text) except -1
    cdef int inject(self, str name) except -1
    cdef int note(self, str text) except -1
    cdef int mix(self, uint64_t value) noexcept


cdef inline void *grow(void *array, int *capacity, size_t size) except NULL:
    cdef int wanted = capacity[0] * 2 if capacity[0] else 64
    cdef inline void *grown = realloc(array, wanted * size)
    if grown == NULL:
        raise MemoryError
    capacity[0] = wanted
    return grown
