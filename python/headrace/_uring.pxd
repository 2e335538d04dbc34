from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from headrace._engine cimport Endpoint, Engine, Operation
from headrace._pool cimport Block, BufferPool


cdef extern from "uring_abi.h" nogil:
    struct hr_sqe:
        uint8_t opcode, flags
        uint16_t ioprio
        int32_t fd
        uint64_t off, addr
        uint32_t len, op_flags
        uint64_t user_data
        uint16_t buf_group
        uint32_t optlen
    struct hr_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags
    struct hr_ring:
        int fd
        uint32_t setup_flags
        uint32_t *sq_head
        uint32_t *sq_flags
        uint32_t *cq_head
        uint32_t *cq_tail
        uint32_t cq_mask
        uint32_t tail
        hr_cqe *cqes


cdef class Ring:
    # A kernel ring, bound to the thread that made it.
    cdef hr_ring raw
    cdef long pid
    cdef int tid
    cdef bint incremental    # provided buffers are consumed in pieces (6.12+)
    cdef bint capped         # a multishot receive takes limits (6.17+)


cdef struct Slot:
    Operation *operation     # NULL: free
    uint32_t generation
    uint32_t next            # the next free slot


cdef struct SilentSend:
    uint32_t slot, generation
    uint32_t sequence        # the SQ position right after it


cdef class UringEngine(Engine):
    cdef Ring ring
    cdef unsigned ring_entries, completion_entries
    cdef object want_incremental
    cdef Slot *slots
    cdef uint32_t slot_count, slot_capacity, free_slot
    cdef int in_flight           # slots in use
    cdef SilentSend *silent
    cdef int silent_count, silent_capacity
    cdef Operation **parked      # receives without a buffer, first come first served
    cdef int parked_length, parked_capacity
    cdef Operation **suspended
    cdef int suspended_length, suspended_capacity
    cdef int wake_fd
    cdef uint64_t wake_value     # what the kernel reads the eventfd into
    cdef bint wake_armed
    cdef bint wake_pending       # an eventfd write is on its way: no need for another
    cdef bint stopping
    cdef readonly long long no_buffers, overflows

    cdef hr_sqe *sqe(self) except NULL
    cdef int take_slot(self, Operation *operation) except -1
    cdef void release_slot(self, uint32_t slot) noexcept
    cdef int begin(self, Operation *operation) except -1
    cdef int fill(self, hr_sqe *sqe, Operation *operation) except -1
    cdef int park(self, Operation *operation) except -1
    cdef int suspend(self, Operation *operation) except -1
    cdef int unpark(self) except -1
    cdef void replenish(self) noexcept
    cdef int enter(self, unsigned minimum, bint reap, double timeout) except -1
    cdef int reap(self) except -1
    cdef int settle(self, hr_cqe *cqe) except -1
    cdef int finish(self, Operation *operation, uint32_t slot, int32_t result) except -1
    cdef int decide_silent(self) except -1
    cdef int arm_wake(self) except -1
    cdef int start_ring(self) except -1
    cdef int drop_ring(self) except -1
    cdef int check_patience(self, double waited) except -1
