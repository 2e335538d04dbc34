from headrace._engine cimport Completion, Endpoint, Operation
from headrace._loop cimport LoopCore


cdef class Listener(Endpoint):
    cdef LoopCore loop
    cdef Operation accept
    cdef object factory, sock, server, context
    cdef int family, type, proto
    cdef int backlog
    cdef double retry_delay      # seconds; grows while descriptors are short
    cdef double report_after     # loop time; a shortage was reported shortly before
    cdef object retry
    cdef bint stopped

    cdef int arm(self) except -1
    cdef int connection(self, int fd) except -1
    cdef int connection_watched(self, int fd) except -1
    cdef int refused(self, int error) except -1
