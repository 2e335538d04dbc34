# The simulated engine: a virtual kernel behind the engine contract.
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from headrace._engine cimport Endpoint, Engine, Operation
from headrace._pool cimport Block, BufferPool
from headrace._virtual cimport Event, SeededRandom, Socket, VirtualWorld


cdef struct Slot:
    Operation *operation     # NULL: free
    uint32_t generation
    uint32_t next            # the next free slot
    uint64_t checksum        # SEND: of its memory, at submit
    uint32_t progress        # SEND with ALL: bytes that are out
    uint8_t stage
    uint8_t scheduled        # a WORK event is on its way
    PyObject *socket         # the Socket, or NULL for a real descriptor; a reference


cdef struct RawCompletion:
    uint32_t slot, generation
    int32_t result
    uint32_t flags
    Block *block
    char *data


cdef class SimulatedEngine(VirtualWorld):
    cdef double turn_cost
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
    cdef int32_t *known                # scratch of check_blocks: references that are accounted for, by block
    cdef int known_capacity
    cdef bint incremental
    cdef bint woken, stopping
    cdef int real_polls                # operations on real descriptors
    cdef int planted
    cdef readonly long long overflows, no_buffers
    cdef readonly double patience

    # operations
    cdef int take_slot(self, Operation *operation, object socket) except -1
    cdef int release_slot(self, uint32_t slot) except -1
    cdef int begin(self, Operation *operation) except -1
    cdef int execute(self) except -1
    cdef int arm(self, uint32_t slot) except -1
    cdef int poke_slot(self, uint32_t slot, bint ready) except -1
    cdef int work(self, uint32_t slot, bint last) except -1
    cdef int work_receive(self, uint32_t slot, Socket socket, bint last) except -1
    cdef int work_accept(self, uint32_t slot, Socket socket, bint last) except -1
    cdef int work_send(self, uint32_t slot, Socket socket) except -1
    cdef int send_silently(self, uint32_t slot) except -1
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
    cdef int check_blocks(self) except -1
    cdef void count_block(self, Block *block) noexcept
