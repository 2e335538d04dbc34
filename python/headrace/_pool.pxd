# What _pool offers to the other modules: blocks of receive memory, and leases on parts of them.
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t


cdef struct Block:
    char *memory
    uint32_t size
    uint32_t offset       # where the next received byte will be written (engines that fill a block in pieces)
    int32_t references    # one for the engine while it is posted, one for each completion and each lease
    uint16_t index        # its number in the pool, and its buffer id in a provided buffer ring
    uint32_t leases       # how many of the references are leases'; kept by the pool
    uint8_t posted        # an engine offers it to the kernel (its own bookkeeping)


cdef class Ledger:
    # Bytes of pool blocks that the leases of one connection hold. Small and untracked by the collector,
    # so that a lease needn't keep its transport alive.
    cdef readonly Py_ssize_t leased


cdef class BufferPool:
    cdef Block **blocks            # every slot that was ever allocated; blocks[i].index == i
    cdef Block **idle              # a stack: the block that came back last is the warmest
    cdef Block **bare              # a stack of the slots that have no memory
    cdef readonly int allocated    # blocks that have memory
    cdef int slots                 # blocks[] in use, with or without memory
    cdef readonly int free         # how many lie on the idle stack
    cdef readonly int target       # how many an engine keeps posted
    cdef readonly int maximum
    cdef readonly Py_ssize_t block_size
    cdef readonly int posted       # blocks that an engine has posted; the ENGINE counts it up and down
    cdef readonly int pinned       # blocks that leases hold, posted or not
    cdef int pin_limit             # half of what can be had: `pinned` reaches it -> low
    cdef int low                   # true: receives are to be copied out rather than leased
    cdef int starving              # set by an engine that waits for a block; a return then writes to wake_fd
    cdef int wake_fd               # an eventfd of the engine, or -1
    cdef readonly Py_ssize_t leased_bytes
    cdef readonly long long leases       # zero-copy leases made
    cdef readonly long long copies       # heap-backed leases made
    cdef readonly long long exhausted    # times no block could be had
    cdef readonly long long collected    # leases that were collected, not released
    cdef readonly int outstanding        # leases alive, not released
    cdef int leak_level
    cdef long long sample
    cdef dict sites                      # id -> (where made, where last used, size), of observed leases
    cdef set warned                      # sites that were logged already
    cdef Block *slab                     # all the Block structs; blocks[i] == &slab[i]
    cdef bint poison                     # fill a block when its last reference goes
    cdef object __weakref__

    # A block with one reference, the caller's; NULL when the pool is at its limit.
    cdef Block *take(self) noexcept
    # Gives one reference back; the last one puts the block on the idle stack.
    cdef void drop(self, Block *block) noexcept
    # Bytes data[:size] of block, as a lease. TAKES OVER one reference of the caller's to the block.
    cdef Lease lease(self, Block *block, char *data, Py_ssize_t size, Ledger ledger)
    # The same bytes in memory of their own. The caller keeps its reference to the block, if any.
    cdef Lease copy(self, const char *data, Py_ssize_t size)
    # A lease on a bytes object's memory. Nobody writes to it any more.
    cpdef Lease adopt(self, bytes heap)
    # Returns idle memory beyond `target` blocks to the system; called when a loop goes idle.
    cdef void trim(self) noexcept


cdef class Lease:
    cdef const char *data
    cdef Py_ssize_t size
    cdef Block *block          # NULL: the bytes are in `heap`
    cdef BufferPool pool
    cdef bytes heap
    cdef Ledger ledger
    cdef int exports           # memoryviews and other buffers that look at the bytes
    cdef int pins              # sends that the kernel isn't done with
    cdef bint released         # as the user sees it; with pins the memory goes back later
    cdef bint observed         # by the leak detector
    cdef bint sent             # it was pinned once: then its last reference is as good as release()

    # A transport that sends the bytes pins them: release() by the user then takes effect at the last unpin.
    cdef void pin(self) noexcept
    cdef void unpin(self) noexcept
