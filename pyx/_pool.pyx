# cython: auto_pickle=False
"""Receive memory that belongs to the loop, and leases on the received parts of it.

A *block* is a piece of memory that an engine posts for the kernel to fill. It is reference counted: one
reference for the engine while the block is posted, one for each completion that isn't delivered yet, and one
for each lease. The last one to go puts the block back on the idle stack. Nothing else decides when memory may
be written again, so bytes that somebody can still see never change.

Nobody can starve anybody:

* The pool grows by doubling, from nothing to ``maximum`` blocks, and then says so: ``take()`` returns NULL.
* One lease of a byte pins a whole block. So the pool counts the blocks that leases hold, and when they are
  half of what there can be it is ``low``: receives are then delivered as copies (``copy()``) until leases
  come back. The other half keeps circulating between the engine and the transports, however long leases are
  held. A pool of one block is always low.
* A ``Ledger`` counts the bytes that one connection's leases hold; a transport copies when it is over its
  budget.

Everything here happens under the GIL: leases may be used and released in any thread.
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_STRIDES, PyBUF_WRITABLE,
    PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.number cimport PyNumber_AsSsize_t
from cpython.slice cimport PySlice_Check
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memmove, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport write

import logging
import os
import sys

cdef extern from "Python.h":
    # cpython.slice declares neither as what they are: one may fail, the other can't.
    int PySlice_Unpack(object slice, Py_ssize_t *start, Py_ssize_t *stop, Py_ssize_t *step) except -1
    Py_ssize_t PySlice_AdjustIndices(Py_ssize_t length, Py_ssize_t *start, Py_ssize_t *stop, Py_ssize_t step)

cdef enum:
    PAGE = 4096
    LARGEST_BLOCK = 1 << 30
    MOST_BLOCKS = 1 << 15      # a provided buffer ring has at most this many entries (io_uring, kernel 5.19)
    POISON = 0xDB
    SAMPLING = 128             # "sampled" observes one lease in so many
    FRAMES = 4                 # of the traceback, in the site of a lease under observation

cdef enum LeakLevel:
    LEAKS_OFF = 0
    LEAKS_SAMPLED = 1
    LEAKS_ALL = 2

cdef dict LEAK_LEVELS = {"off": LEAKS_OFF, "sampled": LEAKS_SAMPLED, "all": LEAKS_ALL}
cdef object logger = logging.getLogger("headrace.pool")
cdef object getframe = sys._getframe

cdef char *FORMAT = b"B"
cdef bytes NOTHING = b""


cdef class Ledger:
    """The bytes of pool memory that one connection's leases hold (``leased``)."""


# Untracked by the collector: nothing it refers to can refer to it. So it can never be cleared under a live
# lease.
@cython.no_gc
cdef class BufferPool:
    """Blocks of receive memory, shared by all connections of a loop.

    :param block_size: bytes per block; a multiple of 4,096, from 4 KiB to 1 GiB.
    :param target: blocks that an engine keeps posted.
    :param maximum: blocks in all; ``target <= maximum <= 32768``. No memory is allocated before it is needed.
    :param leak_level: which leases are observed: ``"off"``, ``"sampled"`` (one in 128) or ``"all"``; by
        default what the environment variable ``HEADRACE_LEAKS`` says, else off. An observed lease remembers
        where it was made and last used, shows in :meth:`report`, and when it is collected without having been
        released that is logged on ``headrace.pool``, once per site.
    :raises ValueError: for arguments outside these bounds.

    With ``HEADRACE_POISON=1`` in the environment a block is filled with 0xDB when its last reference goes, so
    that a use of stale memory shows.
    """

    def __cinit__(
        self, Py_ssize_t block_size=262144, Py_ssize_t target=8, Py_ssize_t maximum=256, leak_level=None
    ):
        cdef int i
        self.wake_fd = -1
        if not PAGE <= block_size <= LARGEST_BLOCK or block_size % PAGE:
            raise ValueError(f"block_size must be a multiple of 4096 up to 1073741824, not {block_size}")
        if not 1 <= maximum <= MOST_BLOCKS:
            raise ValueError(f"maximum must be 1 to {MOST_BLOCKS} blocks, not {maximum}")
        if not 1 <= target <= maximum:
            raise ValueError(f"target must be 1 to maximum ({maximum}) blocks, not {target}")
        self.leak_level = chosen_leak_level(leak_level)
        self.poison = os.environ.get("HEADRACE_POISON", "") not in ("", "0")
        self.block_size = block_size
        self.target = <int>target
        self.maximum = <int>maximum
        self.pin_limit = self.maximum // 2
        self.low = self.pin_limit == 0
        self.sites = {}
        self.warned = set()
        self.slab = <Block *>calloc(maximum, sizeof(Block))
        self.blocks = <Block **>calloc(maximum, sizeof(Block *))
        self.idle = <Block **>calloc(maximum, sizeof(Block *))
        self.bare = <Block **>calloc(maximum, sizeof(Block *))
        if self.slab == NULL or self.blocks == NULL or self.idle == NULL or self.bare == NULL:
            raise MemoryError(f"no memory to describe {maximum} blocks")
        for i in range(self.maximum):
            self.slab[i].index = <uint16_t>i
            self.blocks[i] = &self.slab[i]
            self.bare[self.maximum - 1 - i] = &self.slab[i]    # the lowest numbers are given out first

    def __dealloc__(self):
        cdef int i
        # Leases, and an engine with posted blocks, hold a reference to the pool: nobody looks at this memory.
        if self.slab != NULL:
            for i in range(self.slots):
                if self.slab[i].memory != NULL:
                    munmap(self.slab[i].memory, self.block_size)
        free(self.slab)
        free(self.blocks)
        free(self.idle)
        free(self.bare)

    # --- what engines and transports call

    cdef Block *take(self) noexcept:
        cdef Block *block
        if self.free == 0 and not grow(self):
            self.exhausted += 1
            return NULL
        self.free -= 1
        block = self.idle[self.free]
        block.references = 1
        block.offset = 0
        return block

    cdef void drop(self, Block *block) noexcept:
        block.references -= 1
        if block.references > 0:
            return
        block.offset = 0
        if self.poison:
            memset(block.memory, POISON, block.size)
        self.idle[self.free] = block
        self.free += 1
        if self.starving and self.wake_fd >= 0:
            self.starving = 0
            wake_engine(self)

    cdef Lease lease(self, Block *block, char *data, Py_ssize_t size, Ledger ledger):
        cdef Lease result
        try:
            result = <Lease>Lease.__new__(Lease)
        except MemoryError:
            self.drop(block)
            raise
        settle(result, self, block, data, size, ledger)
        self.leases += 1
        if self.leak_level:
            observe(self, result)
        return result

    cdef Lease copy(self, const char *data, Py_ssize_t size):
        self.copies += 1
        return wrap(self, PyBytes_FromStringAndSize(data, size))

    cpdef Lease adopt(self, bytes heap):
        """A lease on bytes that lie on the heap already."""
        return wrap(self, heap)

    cdef void trim(self) noexcept:
        cdef int surplus = self.free - self.target
        cdef int i
        cdef Block *block
        if surplus <= 0:
            return
        for i in range(surplus):     # from the bottom of the stack: the coldest
            block = self.idle[i]
            munmap(block.memory, self.block_size)
            block.memory = NULL
            block.size = 0
            self.allocated -= 1
            self.bare[self.maximum - 1 - self.allocated] = block
        self.free -= surplus
        memmove(self.idle, self.idle + surplus, self.free * sizeof(Block *))

    # --- what users call

    def stats(self):
        """Counts, as a dict of int; bytes where it says so. A snapshot: any thread may ask.

        ``block_size`` (bytes), ``maximum``, ``allocated``, ``free``, ``posted``, ``pinned`` (by leases):
        blocks. ``leased``: bytes of blocks that leases hold. ``outstanding``: leases alive and not released,
        copies included. ``leases``, ``copies``: receives delivered in place and as copies, since the pool was
        made. ``exhausted``: how often no block could be had. ``collected_not_released``: leases whose last
        reference went before anybody called ``release()``: no memory is lost, but it came back later than it
        could.
        """
        return {
            "block_size": self.block_size,
            "maximum": self.maximum,
            "allocated": self.allocated,
            "free": self.free,
            "posted": self.posted,
            "pinned": self.pinned,
            "leased": self.leased_bytes,
            "outstanding": self.outstanding,
            "leases": self.leases,
            "copies": self.copies,
            "exhausted": self.exhausted,
            "collected_not_released": self.collected,
        }

    def report(self):
        """The observed leases that are alive, not released: a list of ``(site, size)``, oldest first.

        ``site`` says in words where the lease was made and last used, innermost frame first; ``size`` is in
        bytes.
        """
        return [(describe(site), site[2]) for site in self.sites.values()]

    def __repr__(self):
        return (
            f"<BufferPool {self.allocated} of {self.maximum} x {self.block_size} bytes, {self.free} free, "
            f"{self.outstanding} leases outstanding>"
        )

    def _take_bytes(self, bytes data not None, Ledger ledger=None):
        """For tests: a lease on a fresh block that holds `data`; None when the pool is exhausted."""
        cdef Block *block
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        if size > self.block_size:
            raise ValueError(f"{size} bytes don't fit a block of {self.block_size}")
        block = self.take()
        if block == NULL:
            return None
        memcpy(block.memory, PyBytes_AS_STRING(data), size)
        block.offset = <uint32_t>size
        return self.lease(block, block.memory, size, ledger)

    def _copy(self, bytes data not None):
        """For tests: a lease that owns a copy of `data`."""
        return self.copy(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


# Untracked by the collector: nothing that a lease refers to can refer to the lease. With the free list that
# makes the lease of a packet as cheap as a small bytes object.
@cython.no_gc
@cython.freelist(256)
cdef class Lease:
    """Received bytes, in the protocol's hands: a read-only, contiguous, one-dimensional buffer of bytes.

    ``len()``, ``lease[i]``, iteration, ``==`` with any bytes-like object, ``bytes(lease)`` and
    ``memoryview(lease)`` do what they do for bytes. ``lease[a:b]`` is a lease of its own on the same memory:
    it stays valid when the original is released. A lease is not hashable.

    The memory goes back to the pool with :meth:`release`, at the end of a ``with`` block, or with the last
    reference to the lease. Release early: until then a block can't be filled again. A lease that was written
    to a transport and let go of needs no release: it goes as soon as it's sent. As long as a memoryview (or
    another buffer) looks at the bytes they can't be released, and never change.

    Any use of a released lease raises ValueError. Any thread may use and release a lease.
    """

    def __cinit__(self):
        self.released = True     # until the pool gives it bytes

    def __init__(self):
        raise TypeError("leases are made by a pool; a protocol gets them in lease_received()")

    def __dealloc__(self):
        cdef tuple site
        if self.pool is None:
            return
        if self.released:
            if self.data != NULL:      # a transport let go of it without unpin(); nobody else can look
                give_back(self)
            return
        site = forget(self) if self.observed else None
        self.released = True
        give_back(self)
        if self.sent:
            return      # to write a lease and let go of it is in order: it goes as soon as it is sent
        self.pool.collected += 1
        if site is not None:
            warn(self.pool, site)

    # --- what transports call

    def _to_send(self):
        """The same bytes for a layer that sends them later: this lease can be released, or let go of, meanwhile."""
        cdef Lease kept = self[:]
        kept.sent = self.sent = True
        return kept

    cdef void pin(self) noexcept:
        # The caller holds a reference to the lease until it has called unpin().
        self.pins += 1
        self.sent = True

    cdef void unpin(self) noexcept:
        self.pins -= 1
        if self.pins == 0 and self.released and self.data != NULL:
            give_back(self)

    # --- what users call

    def __getbuffer__(self, Py_buffer *view, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("a lease is read-only")
        check(self)
        view.buf = <void *>self.data
        view.obj = self
        view.len = self.size
        view.itemsize = 1
        view.readonly = 1
        view.ndim = 1
        view.format = FORMAT if flags & PyBUF_FORMAT else NULL
        view.shape = &view.len if flags & PyBUF_ND else NULL
        view.strides = &view.itemsize if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    def __len__(self):
        check(self)
        return self.size

    def __getitem__(self, index):
        cdef Py_ssize_t start, stop, step
        check(self)
        if PySlice_Check(index):
            PySlice_Unpack(index, &start, &stop, &step)
            if step != 1:
                raise ValueError(f"a slice of a lease is contiguous: its step must be 1, not {step}")
            PySlice_AdjustIndices(self.size, &start, &stop, step)
            return part(self, start, stop)
        start = PyNumber_AsSsize_t(index, IndexError)
        if start < 0:
            start += self.size
        if not 0 <= start < self.size:
            raise IndexError(f"index {index} is out of range for a lease of {self.size} bytes")
        return <unsigned char>self.data[start]

    def __iter__(self):
        return iter(memoryview(self))

    def __bytes__(self):
        return self.tobytes()

    def __eq__(self, other):
        cdef Py_buffer view
        cdef bint equal
        check(self)
        if not PyObject_CheckBuffer(other):
            return NotImplemented
        try:
            PyObject_GetBuffer(other, &view, PyBUF_SIMPLE)
        except BufferError:          # not contiguous: such a buffer knows how to compare itself
            return NotImplemented
        equal = view.len == self.size and memcmp(view.buf, self.data, self.size) == 0
        PyBuffer_Release(&view)
        return equal

    def __enter__(self):
        check(self)
        return self

    def __exit__(self, *exception):
        self.release()

    def __repr__(self):
        cdef str kind = "a copy" if self.heap is not None else "in place"
        cdef list state = []
        if self.released:
            state.append("released")
        if self.exports:
            state.append(f"{self.exports} exported")
        if self.pins:
            state.append(f"{self.pins} being sent")
        return f"<Lease {self.size} bytes, {', '.join([kind, *state])}>"

    @property
    def nbytes(self):
        """How many bytes; ValueError when released."""
        check(self)
        return self.size

    @property
    def released(self):
        """True after :meth:`release`."""
        return self.released

    @property
    def copied(self):
        """True when the bytes lie in memory of their own and pin no block of the pool."""
        return self.heap is not None

    def tobytes(self):
        """The bytes, as a copy (of a lease that is itself a copy: without another one)."""
        check(self)
        if self.heap is not None and self.size == PyBytes_GET_SIZE(self.heap):
            return self.heap
        return PyBytes_FromStringAndSize(self.data, self.size)

    def detach(self):
        """Moves the bytes to memory of their own: returns a new lease on that, and releases this one.

        For bytes that are kept for long: one lease of a byte pins a whole block.

        :raises BufferError: when a memoryview still looks at this lease.
        """
        cdef Lease result
        check(self)
        check_exports(self)
        self.pool.copies += 1
        result = wrap(self.pool, self.tobytes())
        self.release()
        return result

    def touch(self, hint=None):
        """Notes, if the leak detector observes this lease, where it was: `hint`, or else the caller."""
        check(self)
        if self.observed and hint is not None:
            note(self, str(hint))

    def release(self):
        """Gives the memory back. Again is no error.

        Bytes that a transport is still sending go back when it is done with them.

        :raises BufferError: when a memoryview still looks at the bytes.
        """
        if self.released:
            return
        check_exports(self)
        if self.observed:
            forget(self)
        self.released = True
        if self.pins == 0:
            give_back(self)


# --- how blocks come and go

cdef bint grow(BufferPool pool) noexcept:
    # Doubles the memory; takes what the system will give, down to one block. True: idle isn't empty.
    cdef int wanted = min(max(pool.allocated, 1), pool.maximum - pool.allocated)
    cdef int i
    cdef char *memory = NULL
    if wanted == 0:
        return False
    while wanted > 0:
        memory = <char *>mmap(
            NULL, <size_t>wanted * pool.block_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
        )
        if <void *>memory != MAP_FAILED:
            break
        wanted //= 2
    if wanted == 0:
        # What there is, is all that can be had for now: half of that may be pinned.
        pool.pin_limit = pool.allocated // 2
        pool.low = pool.pinned >= pool.pin_limit
        return False
    for i in range(wanted - 1, -1, -1):
        furnish(pool, pool.bare[pool.maximum - 1 - pool.allocated], memory + i * pool.block_size)
    pool.pin_limit = pool.maximum // 2
    pool.low = pool.pinned >= pool.pin_limit
    return True


cdef void furnish(BufferPool pool, Block *block, char *memory) noexcept:
    # Gives memory to the slot on top of the bare stack, and lays it on the idle stack.
    block.memory = memory
    block.size = <uint32_t>pool.block_size
    block.offset = 0
    pool.allocated += 1
    pool.slots = max(pool.slots, block.index + 1)
    pool.idle[pool.free] = block
    pool.free += 1


cdef void wake_engine(BufferPool pool) noexcept:
    cdef uint64_t one = 1
    # The only failure there can be is EAGAIN, and then the counter is already far from zero.
    write(pool.wake_fd, &one, sizeof(one))


cdef inline void unlease(BufferPool pool, Block *block) noexcept:
    # A lease gives its reference back.
    block.leases -= 1
    if block.leases == 0:
        pool.pinned -= 1
        pool.low = pool.pinned >= pool.pin_limit
    pool.drop(block)


# --- how leases come and go

cdef inline void settle(
    Lease lease, BufferPool pool, Block *block, char *data, Py_ssize_t size, Ledger ledger
) noexcept:
    # Takes its place in the block, with a reference that the caller had.
    lease.pool = pool
    lease.block = block
    lease.data = data
    lease.size = size
    lease.ledger = ledger
    lease.released = False
    if block.leases == 0:
        pool.pinned += 1
        pool.low = pool.pinned >= pool.pin_limit
    block.leases += 1
    pool.outstanding += 1
    pool.leased_bytes += size
    if ledger is not None:
        ledger.leased += size


cdef Lease wrap(BufferPool pool, bytes heap):
    # A lease that owns its bytes.
    cdef Lease result = <Lease>Lease.__new__(Lease)
    result.pool = pool
    result.heap = heap
    result.data = PyBytes_AS_STRING(heap)
    result.size = PyBytes_GET_SIZE(heap)
    result.released = False
    pool.outstanding += 1
    if pool.leak_level:
        observe(pool, result)
    return result


cdef inline void give_back(Lease lease) noexcept:
    cdef Block *block = lease.block
    lease.data = NULL
    lease.pool.outstanding -= 1
    if block == NULL:
        lease.heap = NOTHING      # not None: `copied` stays true
        return
    lease.block = NULL
    lease.pool.leased_bytes -= lease.size
    if lease.ledger is not None:
        lease.ledger.leased -= lease.size
    unlease(lease.pool, block)


cdef tuple forget(Lease lease):
    # The end of its observation.
    lease.observed = False
    return lease.pool.sites.pop(<size_t><void *>lease, None)


cdef inline int check(Lease lease) except -1:
    # Before each use. For an observed lease it also notes who used it last.
    if lease.released:
        raise ValueError(
            "operation on a released lease; keep a slice of it, lease.detach() or bytes(lease) instead"
        )
    if lease.observed:
        note(lease, where())
    return 0


cdef int note(Lease lease, str place) except -1:
    cdef tuple site = lease.pool.sites[<size_t><void *>lease]
    lease.pool.sites[<size_t><void *>lease] = (site[0], place, site[2])
    return 0


cdef int check_exports(Lease lease) except -1:
    if lease.exports:
        raise BufferError(
            f"{lease.exports} {'buffer still looks' if lease.exports == 1 else 'buffers still look'} "
            "at this lease; release the memoryviews on it first"
        )
    return 0


cdef Lease part(Lease lease, Py_ssize_t start, Py_ssize_t stop):
    cdef Lease result = <Lease>Lease.__new__(Lease)
    if lease.block != NULL and stop > start:
        lease.block.references += 1
        settle(result, lease.pool, lease.block, <char *>lease.data + start, stop - start, lease.ledger)
    else:
        # An empty slice needn't pin a block.
        result.pool = lease.pool
        result.heap = lease.heap if lease.block == NULL else NOTHING
        result.data = lease.data + start if lease.block == NULL else PyBytes_AS_STRING(NOTHING)
        result.size = max(stop - start, 0)
        result.released = False
        lease.pool.outstanding += 1
    if lease.pool.leak_level:
        observe(lease.pool, result)
    return result


# --- the leak detector

cdef int chosen_leak_level(level) except -1:
    name = level if level is not None else os.environ.get("HEADRACE_LEAKS") or "off"
    if name not in LEAK_LEVELS:
        source = "leak_level" if level is not None else "HEADRACE_LEAKS"
        raise ValueError(f"{source} must be 'off', 'sampled' or 'all', not {name!r}")
    return LEAK_LEVELS[name]


cdef int observe(BufferPool pool, Lease lease) except -1:
    pool.sample += 1
    if pool.leak_level == LEAKS_SAMPLED and pool.sample % SAMPLING != 1:
        return 0
    pool.sites[<size_t><void *>lease] = (where(), None, lease.size)
    lease.observed = True
    return 0


cdef int warn(BufferPool pool, tuple site) except -1:
    # An observed lease was collected; `site` is what the pool knew of it. Once per place, not per lease.
    cdef tuple place = site[:2]
    if place in pool.warned:
        return 0
    pool.warned.add(place)
    logger.warning(
        "LEAK: a lease of %d bytes was collected without release(); %s "
        "(said once per place; HEADRACE_LEAKS=all observes every lease)",
        site[2], describe(site),
    )
    return 0


cdef str where():
    # The innermost Python frames, as text: a frame object would keep alive all that its locals refer to.
    cdef list lines = []
    cdef object frame
    try:
        frame = getframe()
    except ValueError:          # called from a thread that runs no Python
        return "a native thread"
    while frame is not None and len(lines) < FRAMES:
        code = frame.f_code
        lines.append(f"{code.co_filename}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return " < ".join(lines)


cdef str describe(tuple site):
    return f"made at {site[0]}" + (f"; last used at {site[1]}" if site[1] is not None else "")


cdef class Probe:
    """For tests: what engines and transports, which are C, do to a pool. Blocks are named by their index."""
    cdef readonly BufferPool pool

    def __init__(self, BufferPool pool not None):
        self.pool = pool

    def take(self):
        """A block with one reference, or None."""
        cdef Block *block = self.pool.take()
        return block.index if block != NULL else None

    def drop(self, int index):
        self.pool.drop(self.used(index))

    def lease(self, int index, bytes data not None, Ledger ledger=None):
        """Appends `data` to the block as the kernel would, and returns a lease on it with a new reference."""
        cdef Block *block = self.used(index)
        cdef char *place = block.memory + block.offset
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        if size > block.size - block.offset:
            raise ValueError(f"{size} bytes don't fit the rest of the block")
        memcpy(place, PyBytes_AS_STRING(data), size)
        block.offset += <uint32_t>size
        block.references += 1
        return self.pool.lease(block, place, size, ledger)

    def references(self, int index):
        """``(references, references of leases, bytes filled)`` of a block, used or idle."""
        cdef Block *block = self.pool.blocks[index]
        return block.references, block.leases, block.offset

    def room(self, int index):
        """Bytes of a used block that are still to be filled."""
        cdef Block *block = self.used(index)
        return block.size - block.offset

    def peek(self, int index, Py_ssize_t size):
        """The first bytes of an idle block's memory: stale, or poisoned."""
        if not 0 <= index < self.pool.slots or not 0 <= size <= self.pool.blocks[index].size:
            raise IndexError(index)
        return PyBytes_FromStringAndSize(self.pool.blocks[index].memory, size)

    def pin(self, Lease lease not None):
        lease.pin()

    def unpin(self, Lease lease not None):
        lease.unpin()

    def low(self):
        return bool(self.pool.low)

    def starve(self, int wake_fd):
        """As an engine that found no block and sleeps on an eventfd."""
        self.pool.wake_fd = wake_fd
        self.pool.starving = 1

    def starving(self):
        return bool(self.pool.starving)

    def trim(self):
        self.pool.trim()

    cdef Block *used(self, int index) except NULL:
        if not 0 <= index < self.pool.slots or self.pool.blocks[index].references < 1:
            raise IndexError(f"block {index} is not in use")
        return self.pool.blocks[index]
