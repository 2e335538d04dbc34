# The simulated engine: a virtual kernel, a virtual network and a virtual clock behind the engine contract.
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from headrace._engine cimport Endpoint, Engine, Operation
from headrace._pool cimport Block, BufferPool


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


cdef struct Slot:
    Operation *operation     # NULL: free
    uint32_t generation
    uint32_t next            # the next free slot
    uint64_t checksum        # SEND: of its memory, at submit
    uint32_t progress        # SEND with ALL: bytes that are out
    uint8_t stage
    uint8_t scheduled        # a WORK event is on its way
    PyObject *socket         # the Socket, or NULL for a real descriptor; a reference


cdef struct Event:
    double at
    uint64_t tie             # decides among events of the same moment
    uint32_t kind
    uint32_t slot, generation
    PyObject *target         # a Pipe or a Socket; a reference


cdef struct RawCompletion:
    uint32_t slot, generation
    int32_t result
    uint32_t flags
    Block *block
    char *data


cdef class SimulatedEngine(Engine):
    cdef readonly unsigned long long seed
    cdef SeededRandom random
    cdef readonly object faults        # the Faults in force
    cdef double p_short_receive, p_short_send, p_no_buffers, p_accept_limit, p_reset, p_overflow
    cdef double p_cancel_race, p_early_end, p_would_block, max_latency, max_delay
    cdef double clock, turn_cost
    cdef Event *events
    cdef int event_count, event_capacity
    cdef Slot *slots
    cdef uint32_t slot_capacity, free_slot
    cdef readonly int in_flight
    cdef uint32_t *submissions         # slots that the "kernel" hasn't seen yet
    cdef int submission_count, submission_capacity, submission_limit
    cdef uint64_t *silent              # slot | generation << 32 of silent sends that aren't decided
    cdef int silent_count, silent_capacity
    cdef RawCompletion *raw            # the completion queue, raw[:visible], and behind it the overflow list
    cdef int raw_count, raw_capacity, visible, visible_limit
    cdef Operation **parked
    cdef int parked_length, parked_capacity
    cdef Operation **suspended
    cdef int suspended_length, suspended_capacity
    cdef Block **posted                # first in, first filled
    cdef int posted_count, posted_capacity
    cdef bint incremental, reuse_descriptors
    cdef dict sockets                  # descriptor -> Socket
    cdef dict listeners                # address -> Socket
    cdef int next_fd, descriptor_limit, next_port
    cdef uint32_t default_send_limit, default_receive_limit, default_segment
    cdef bint woken, stopping
    cdef int real_polls                # operations on real descriptors
    cdef int planted
    cdef readonly object violation     # the first ContractViolation: later steps raise it again
    cdef readonly dict injected        # fault name -> how often
    cdef readonly object trace         # None, or a deque of the last events as text
    cdef readonly unsigned long long digest
    cdef readonly long long overflows, no_buffers, steps
    cdef readonly double patience

    # the network
    cdef Socket install(self, Socket socket)
    cdef Socket socket_of(self, int fd)
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
    cdef int schedule(self, double delay, uint32_t kind, uint32_t slot, uint32_t generation, object target) except -1
    cdef Event pop_event(self) noexcept
    cdef int run_events(self, double until) except -1
    cdef int happen(self, Event *event) except -1
    cdef double latency(self) noexcept
    cdef double delay(self) noexcept
    # operations
    cdef int take_slot(self, Operation *operation, object socket) except -1
    cdef int release_slot(self, uint32_t slot) except -1
    cdef list held_back(self, int fd)
    cdef int begin(self, Operation *operation) except -1
    cdef int execute(self) except -1
    cdef int arm(self, uint32_t slot) except -1
    cdef int poke(self, Socket socket) except -1
    cdef int poke_slot(self, uint32_t slot, bint ready) except -1
    cdef bint can_receive(self, Socket socket) noexcept
    cdef bint can_send(self, Socket socket) noexcept
    cdef int work(self, uint32_t slot, bint last) except -1
    cdef int work_receive(self, uint32_t slot, Socket socket, bint last) except -1
    cdef int work_accept(self, uint32_t slot, Socket socket, bint last) except -1
    cdef int work_send(self, uint32_t slot, Socket socket) except -1
    cdef int send_silently(self, uint32_t slot) except -1
    cdef int32_t take_error(self, Socket socket) noexcept
    cdef int32_t send_error(self, Socket socket) noexcept
    cdef uint32_t take_from(self, Operation *operation, uint32_t offset, uint32_t wanted, Socket socket) except? 0
    cdef int cancelled(self, uint32_t slot, bint now) except -1
    # completions
    cdef int post(self, uint32_t slot, int32_t result, uint32_t flags, Block *block, char *data) except -1
    cdef int promote(self) except -1
    cdef int reap(self) except -1
    cdef int collect(self) except -1
    cdef int reap_all(self) except -1
    cdef int settle(self, RawCompletion *raw) except -1
    cdef int decide_silent(self) except -1
    cdef int park(self, Operation *operation) except -1
    cdef int suspend(self, Operation *operation) except -1
    cdef int unpark(self) except -1
    cdef int replenish(self) except -1
    cdef int poll_real(self, int milliseconds) except -1
    cdef int idle(self) except -1
    # checks
    cdef int violated(self, str text) except -1
    cdef int check_blocks(self) except -1
    cdef int inject(self, str name) except -1
    cdef int note(self, str text) except -1
    cdef int mix(self, uint64_t value) noexcept
