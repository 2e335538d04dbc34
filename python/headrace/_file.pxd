from cpython.buffer cimport Py_buffer
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from headrace._engine cimport Endpoint, FileCall, Operation
from headrace._loop cimport LoopCore
from headrace._pool cimport Block, BufferPool


cdef enum Target:
    NOWHERE = 0     # no bytes come back
    BYTES = 1       # a bytes object
    BUFFER = 2      # the caller's own
    LEASE = 3       # a block of the pool, or a bytes object, as a lease


cdef class FileOperation(Endpoint):
    cdef public bint _asyncio_future_blocking
    cdef Operation operation
    cdef FileCall call
    cdef LoopCore loop
    cdef Descriptor descriptor     # None: a call on a path
    cdef object keep               # paths, the memory for a stat
    cdef object filename, filename2
    cdef Py_buffer view            # of the caller's buffer
    cdef bint viewed
    cdef PyObject *heap            # a bytes object that is being filled: nobody else has seen it
    cdef BufferPool pool
    cdef Block *block
    cdef Target target
    cdef char *start               # where the bytes are, or go
    cdef long long offset          # in the file; -1: a stream's own
    cdef Py_ssize_t total, moved
    cdef Py_ssize_t expected       # a short read that ends here has met the end of the file
    cdef bint whole                # go on until `total`
    cdef int opened                # a descriptor that nobody has taken yet, or -1
    cdef bint ended, cancelling, cancelled
    cdef object message            # of the cancellation
    cdef object failure            # what ends it in place of its own result
    cdef object value, error
    cdef list callbacks

    cdef int begin(self) except -1
    cdef int arm(self) noexcept
    cdef bint goes_on(self, int result) noexcept
    cdef int end(self, int result) except -1
    cdef int judge(self, int result) except -1
    cdef object outcome(self, int result)
    cdef object filled(self)
    cdef int let_go(self) noexcept
    cdef int schedule(self) except -1


cdef class Descriptor:
    cdef LoopCore loop
    cdef readonly int fd           # -1: closed
    cdef bint owned                # to be closed by this object
    cdef set ops                   # in flight
    cdef FileOperation closing

    cdef FileOperation operation(self, uint8_t opcode)
    cdef FileOperation started(self, FileOperation operation)
    cdef FileOperation reading(self, FileOperation operation, char *start, Py_ssize_t size, long long offset)
    cdef int shut(self) except -1
    cdef int ended(self, FileOperation operation) except -1
