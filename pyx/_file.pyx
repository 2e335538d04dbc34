"""Operations on files, for ``headrace.files``: what io_uring does for a file, as something to await.

A ``FileOperation`` is the endpoint of one engine operation and at the same time what the task awaits: it speaks the
protocol of asyncio's futures, so there is no second object per operation.

Cancelling a task that awaits an operation asks the kernel to cancel it, and the task goes on, with CancelledError, when
the operation has *ended*. Until then the kernel may write to the buffer or read from it; and only then it's known what
was transferred (``transferred``). For a regular file that is at once, or as soon as the disk has answered.

A ``Descriptor`` counts the operations on a file, so that it's closed after the last of them: a submission that isn't
with the kernel yet names a descriptor by its number, which would be another file's after a close.
"""
import asyncio
import os

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_XDECREF
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from headrace._engine cimport (
    CLOSE, FILE, FSYNC, FTRUNCATE, MKDIRAT, OPENAT, READ, RENAMEAT, STATX, UNLINKAT, WRITE,
    Completion, Endpoint, Engine,
)
from headrace._loop cimport LoopCore

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **bytes, Py_ssize_t size) except -1
    # As a plain pointer: a bytes object with a second reference can't be resized.
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size) except NULL
    char *bytes_memory "PyBytes_AS_STRING"(PyObject *bytes)

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <sys/sysmacros.h>
    #include <unistd.h>
    /* struct statx (kernel 4.11); glibc has it since 2.28 only. */
    struct hr_statx_time { int64_t tv_sec; uint32_t tv_nsec; int32_t pad; };
    struct hr_statx {
        uint32_t stx_mask, stx_blksize;
        uint64_t stx_attributes;
        uint32_t stx_nlink, stx_uid, stx_gid;
        uint16_t stx_mode, pad1;
        uint64_t stx_ino, stx_size, stx_blocks, stx_attributes_mask;
        struct hr_statx_time stx_atime, stx_btime, stx_ctime, stx_mtime;
        uint32_t stx_rdev_major, stx_rdev_minor, stx_dev_major, stx_dev_minor;
        uint64_t spare[14];
    };
    """
    struct hr_statx_time:
        int64_t tv_sec
        uint32_t tv_nsec
    struct hr_statx:
        uint32_t stx_blksize, stx_nlink, stx_uid, stx_gid
        uint16_t stx_mode
        uint64_t stx_ino, stx_size, stx_blocks
        hr_statx_time stx_atime, stx_ctime, stx_mtime
        uint32_t stx_rdev_major, stx_rdev_minor, stx_dev_major, stx_dev_minor
    enum:
        E_CANCELED "ECANCELED", E_INTR "EINTR"
        AT_FDCWD, AT_REMOVEDIR, O_CLOEXEC
    int c_close "close"(int fd) nogil
    uint64_t c_makedev "makedev"(unsigned major, unsigned minor) nogil

cdef enum:
    # One operation moves at most this much, so that a large transfer takes turns with everything else: what lies in
    # the page cache is copied within the submitting system call.
    PIECE = 1024 * 1024
    STATX_BASIC_STATS = 0x7ff
    AT_EMPTY_PATH = 0x1000
    AT_SYMLINK_NOFOLLOW = 0x100
    FSYNC_DATASYNC = 1

cdef dict OPCODES = {
    "fsync": FSYNC, "open": OPENAT, "close": CLOSE, "stat": STATX, "read": READ, "write": WRITE, "rename": RENAMEAT,
    "unlink": UNLINKAT, "mkdir": MKDIRAT, "truncate": FTRUNCATE,
}


def supported(loop, str name=None):
    """Whether the engine of this loop does file operations, or that one of them."""
    cdef Engine engine
    if not isinstance(loop, LoopCore) or (<LoopCore>loop).engine is None:
        return False
    engine = (<LoopCore>loop).engine
    if name is None:
        return engine.files
    return engine.files and engine.file_opcodes >> <int>OPCODES[name] & 1 != 0


@cython.final
@cython.no_gc_clear    # __dealloc__ needs the pool and the descriptor
cdef class FileOperation(Endpoint):
    """One operation on a file; to be awaited once. It's begun by the function that makes it.

    Not thread-safe: all happens in the loop's thread.
    """

    def __cinit__(self):
        self.opened = -1
        self.expected = -1
        self.offset = -1

    def __init__(self):
        raise TypeError("file operations are begun by a Descriptor and by the functions of this module")

    def __dealloc__(self):
        # Whoever had a result to take hasn't: the loop was closed, or the task is gone.
        self.let_go()
        if self.opened >= 0:
            c_close(self.opened)
        if self.call.opcode == CLOSE and self.operation.fd < 0 and self.descriptor is not None:
            self.descriptor.fd = -1    # closed by the kernel; the engine knows, and nobody was told

    def __repr__(self):
        state = "ended" if self.ended else "being cancelled" if self.cancelling else "in flight"
        names = [name for name, opcode in OPCODES.items() if opcode == self.call.opcode]
        return f"<FileOperation {names[0]}, fd {self.operation.fd}, {state}>"

    # ---- the engine's side ----------------------------------------------------------------------------------

    cdef int begin(self) except -1:
        self.arm()
        self.loop.engine.submit(&self.operation)
        return 0

    cdef int arm(self) noexcept:
        """For reads and writes: the next piece."""
        if self.total:
            self.call.address = <uint64_t>(self.start + self.moved)
            self.call.length = <uint32_t>min(self.total - self.moved, PIECE)
            self.call.offset = <uint64_t>(self.offset + self.moved if self.offset >= 0 else -1)
        return 0

    cdef int complete(self, Completion *completion) except -1:
        if completion.result > 0 and (self.call.opcode == READ or self.call.opcode == WRITE):
            self.moved += completion.result
        if self.goes_on(completion.result):
            return self.begin()
        return self.end(completion.result)

    cdef bint goes_on(self, int result) noexcept:
        if self.cancelling or self.failure is not None:
            return False
        if result == -E_INTR:    # as PEP 475 has it
            return True
        if not self.whole or result <= 0 or self.moved >= self.total:
            return False
        return <uint32_t>result == self.call.length or self.moved != self.expected

    cdef int end(self, int result) except -1:
        self.ended = True
        try:
            self.judge(result)
        except Exception as exc:     # out of memory for the result: that's the awaiting task's
            self.error = exc
        self.let_go()
        if self.descriptor is not None:
            self.descriptor.ended(self)
        return self.schedule()

    cdef int judge(self, int result) except -1:
        """What the awaiting task gets: a value, an error, or its cancellation."""
        if self.call.opcode == OPENAT and result >= 0:
            if self.cancelling or self.failure is not None:
                c_close(result)
            else:
                self.opened = result
        if self.failure is not None:
            self.error = self.failure
        elif self.cancelling:
            self.cancelled = True
        elif result < 0:
            self.error = system_error(-result, self.filename, self.filename2)
        else:
            self.value = self.outcome(result)
            return 0
        if self.target == BYTES and self.moved:    # a stream's bytes come once: they are kept for the next read
            self.value = self.filled()
        return 0

    cdef object outcome(self, int result):
        if self.call.opcode == READ:
            return self.moved if self.target == BUFFER else self.filled()
        if self.call.opcode == WRITE:
            return self.moved
        if self.call.opcode == OPENAT:
            return result
        if self.call.opcode == STATX:
            return stat_result(<hr_statx *>PyBytes_AS_STRING(self.keep[1]))
        return None

    cdef object filled(self):
        """The bytes that were read, as bytes or a lease; takes them from the operation."""
        cdef Block *block = self.block
        cdef bytes data
        if block != NULL and self.moved:
            self.block = NULL
            block.offset = <uint32_t>self.moved
            return self.pool.lease(block, block.memory, self.moved, None)
        if self.heap == NULL:
            data = b""
        else:
            if self.moved != self.total:
                _PyBytes_Resize(&self.heap, self.moved)    # frees it, and leaves NULL, when it raises
            data = <bytes>self.heap
            Py_DECREF(data)
            self.heap = NULL
        return self.pool.adopt(data) if self.target == LEASE else data

    cdef int let_go(self) noexcept:
        """Gives back what only the kernel needed."""
        if self.viewed:
            self.viewed = False
            PyBuffer_Release(&self.view)
        if self.block != NULL:
            self.pool.drop(self.block)
            self.block = NULL
        Py_XDECREF(self.heap)
        self.heap = NULL
        return 0

    # ---- the task's side: the protocol of asyncio's futures --------------------------------------------------

    cdef int schedule(self) except -1:
        cdef list callbacks = self.callbacks
        self.callbacks = []
        if callbacks is not None:
            for callback, context in callbacks:
                self.loop.call_soon(callback, self, context=context)
        return 0

    def get_loop(self):
        """The loop that executes the operation."""
        return self.loop

    def done(self):
        """Whether the operation has ended."""
        return self.ended

    def add_done_callback(self, callback, *, context=None):
        """Calls ``callback(self)`` when the operation has ended."""
        if self.callbacks is None:
            self.callbacks = []
        self.callbacks.append((callback, context))
        if self.ended:
            self.schedule()

    def remove_done_callback(self, callback):
        """Takes a callback back; returns how often it had been added."""
        cdef list kept = [entry for entry in self.callbacks or () if entry[0] != callback]
        removed = len(self.callbacks or ()) - len(kept)
        self.callbacks = kept
        return removed

    def cancel(self, msg=None):
        """Asks for the operation's end, which may take a moment; False when it has ended already."""
        if self.ended:
            return False
        if not self.cancelling:
            self.cancelling = True
            self.message = msg
            if self.call.opcode != CLOSE:    # a close always closes
                self.loop.engine.cancel(&self.operation)
        return True

    def result(self):
        """What it brought; raises OSError, or CancelledError when it was cancelled before its end."""
        if not self.ended:
            raise asyncio.InvalidStateError("the operation hasn't ended")
        if self.cancelled:
            raise asyncio.CancelledError() if self.message is None else asyncio.CancelledError(self.message)
        if self.error is not None:
            raise self.error
        return self.value

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        if not self.ended:
            self._asyncio_future_blocking = True
            return self
        value = self.result()
        # The task's from now on. Not in result() already: a task that was cancelled meanwhile calls that, too.
        self.opened = -1
        raise StopIteration(value)

    # ---- for headrace.files ---------------------------------------------------------------------------------

    @property
    def transferred(self):
        """Bytes read or written, also by an operation that failed or was cancelled."""
        return self.moved

    @property
    def received(self):
        """The bytes that a read brought although it was cancelled or interrupted."""
        return self.value if self.target == BYTES and self.value is not None else b""

    def interrupt(self, error):
        """Ends the operation with that exception, in place of its own result."""
        if not self.ended and self.failure is None:
            self.failure = error
            if self.call.opcode != CLOSE and not self.cancelling:
                self.loop.engine.cancel(&self.operation)

    def discard(self):
        """The task won't take the result: a descriptor that was opened is closed."""
        if self.ended and self.opened >= 0:
            c_close(self.opened)
            self.opened = -1


cdef FileOperation new_operation(LoopCore loop, uint8_t opcode, int fd):
    cdef FileOperation operation = FileOperation.__new__(FileOperation)
    operation.loop = loop
    operation.operation.owner = <PyObject *>operation
    operation.operation.kind = FILE
    operation.operation.fd = fd
    operation.operation.message = &operation.call
    operation.call.opcode = opcode
    return operation


@cython.final
cdef class Descriptor:
    """An open file: its descriptor, and the operations that are in flight on it.

    :param loop: a headrace loop whose engine does file operations, running in this thread.
    :param fd: the descriptor; closed with this object when `owned`.
    """

    def __cinit__(self):
        self.fd = -1

    def __init__(self, LoopCore loop not None, int fd, bint owned=True):
        self.loop = loop
        self.fd = fd
        self.owned = owned
        self.ops = set()

    def __dealloc__(self):
        # Nothing is in flight: an operation keeps its descriptor alive.
        if self.fd >= 0 and self.owned:
            c_close(self.fd)

    cdef FileOperation operation(self, uint8_t opcode):
        cdef FileOperation operation
        if self.fd < 0 or self.closing is not None:
            raise ValueError("I/O operation on closed file")
        operation = new_operation(self.loop, opcode, self.fd)
        operation.descriptor = self
        return operation

    cdef FileOperation started(self, FileOperation operation):
        operation.begin()
        self.ops.add(operation)
        return operation

    cdef int ended(self, FileOperation operation) except -1:
        self.ops.discard(operation)
        if operation is self.closing:
            self.fd = -1
        elif self.closing is not None and not self.ops:
            self.shut()
        return 0

    def read(self, Py_ssize_t size, long long offset, Py_ssize_t expected=-1):
        """Begins to read `size` bytes: an operation whose result is bytes.

        From `offset` it goes on until there are `size`, or the end of the file is met; with -1, for a stream, it
        brings what there is. `expected` is the likely size of what is left of the file: a short read that ends exactly
        there is believed to have met the end.
        """
        cdef FileOperation operation = self.operation(READ)
        operation.target = BYTES
        operation.expected = expected
        operation.heap = new_bytes(NULL, size)
        return self.reading(operation, bytes_memory(operation.heap), size, offset)

    def readinto(self, buffer, long long offset):
        """Begins to read into a writable buffer; the result is how many bytes."""
        cdef FileOperation operation = self.operation(READ)
        operation.target = BUFFER
        PyObject_GetBuffer(buffer, &operation.view, PyBUF_WRITABLE)
        operation.viewed = True
        return self.reading(operation, <char *>operation.view.buf, operation.view.len, offset)

    def lease(self, Py_ssize_t size, long long offset):
        """Begins to read into memory of the loop's pool; the result is a Lease.

        A block of the pool is taken when much of it is used, and the pool isn't in need: half of it stays with the
        connections' receives.
        """
        cdef FileOperation operation = self.operation(READ)
        cdef char *start
        operation.target = LEASE
        operation.pool = self.loop.engine.pool
        if operation.pool.block_size // 4 <= size <= operation.pool.block_size and not operation.pool.low:
            if operation.pool.allocated - operation.pool.free < operation.pool.pin_limit:
                operation.block = operation.pool.take()
        if operation.block != NULL:
            start = operation.block.memory
        else:
            operation.heap = new_bytes(NULL, size)
            start = bytes_memory(operation.heap)
        return self.reading(operation, start, size, offset)

    cdef FileOperation reading(self, FileOperation operation, char *start, Py_ssize_t size, long long offset):
        operation.start = start
        operation.total = size
        operation.offset = offset
        operation.whole = offset >= 0
        return self.started(operation)

    def write(self, data, long long offset):
        """Begins to write all of a buffer at `offset` (-1: at the file's own position, or its end with O_APPEND)."""
        cdef FileOperation operation = self.operation(WRITE)
        PyObject_GetBuffer(data, &operation.view, PyBUF_SIMPLE)
        operation.viewed = True
        operation.start = <char *>operation.view.buf
        operation.total = operation.view.len
        operation.offset = offset
        operation.whole = True
        return self.started(operation)

    def sync(self, bint data_only):
        """Begins an fsync, or an fdatasync."""
        cdef FileOperation operation = self.operation(FSYNC)
        operation.call.flags = FSYNC_DATASYNC if data_only else 0
        return self.started(operation)

    def truncate(self, long long size):
        """Begins an ftruncate (kernel 6.9)."""
        cdef FileOperation operation = self.operation(FTRUNCATE)
        operation.call.offset = <uint64_t>size
        return self.started(operation)

    def stat(self):
        """Begins an fstat; the result is an os.stat_result."""
        cdef FileOperation operation = self.operation(STATX)
        fill_stat(operation, b"", AT_EMPTY_PATH)
        return self.started(operation)

    def interrupt(self, error):
        """Ends everything that is in flight, with that exception."""
        for operation in list(self.ops):
            (<FileOperation>operation).interrupt(error)

    def close(self):
        """Begins to close, once what is in flight has ended. Cancelling it doesn't keep it from closing.

        A descriptor that isn't owned stays open; it's only waited for.
        """
        cdef FileOperation operation = self.operation(CLOSE)
        self.closing = operation
        if not self.ops:
            self.shut()
        return operation

    cdef int shut(self) except -1:
        if self.owned:
            return self.closing.begin()
        return self.closing.end(0)


def lease_bytes(LoopCore loop not None, bytes data not None):
    """A Lease, of the loop's pool, on a bytes object: without a copy."""
    return loop.engine.pool.adopt(data)


# ---- calls on paths -------------------------------------------------------------------------------------------

def open_file(LoopCore loop not None, bytes path not None, int flags, uint32_t mode, filename, bint wait=False):
    """Begins openat(2), close-on-exec; the result is a descriptor, which is the caller's when it has got it.

    What io_uring tries first, within the submission, is an open with O_NONBLOCK, and a FIFO succeeds or fails (ENXIO)
    with that. With `wait` a worker of the kernel opens it, and waits for the other end.
    """
    cdef FileOperation operation = new_operation(loop, OPENAT, AT_FDCWD)
    operation.keep = path
    operation.filename = filename
    operation.call.address = <uint64_t>PyBytes_AS_STRING(path)
    operation.call.length = mode
    operation.call.flags = <uint32_t>(flags | O_CLOEXEC)
    operation.call.worker = wait
    operation.begin()
    return operation


def stat(LoopCore loop not None, int fd, bytes path, bint follow, filename):
    """Begins statx(2) of a path or, without one, of a descriptor; the result is an os.stat_result."""
    cdef FileOperation operation = new_operation(loop, STATX, AT_FDCWD if path is not None else fd)
    operation.filename = filename
    if path is None:
        fill_stat(operation, b"", AT_EMPTY_PATH)
    else:
        fill_stat(operation, path, 0 if follow else AT_SYMLINK_NOFOLLOW)
    operation.begin()
    return operation


def rename(LoopCore loop not None, bytes old not None, bytes new not None, filename, filename2):
    """Begins renameat(2), which replaces `new`."""
    cdef FileOperation operation = new_operation(loop, RENAMEAT, AT_FDCWD)
    operation.keep = (old, new)
    operation.filename = filename
    operation.filename2 = filename2
    operation.call.address = <uint64_t>PyBytes_AS_STRING(old)
    operation.call.offset = <uint64_t>PyBytes_AS_STRING(new)
    operation.call.length = <uint32_t>AT_FDCWD
    operation.begin()
    return operation


def unlink(LoopCore loop not None, bytes path not None, bint directory, filename):
    """Begins unlinkat(2): unlink, or rmdir of a directory."""
    cdef FileOperation operation = new_operation(loop, UNLINKAT, AT_FDCWD)
    operation.keep = path
    operation.filename = filename
    operation.call.address = <uint64_t>PyBytes_AS_STRING(path)
    operation.call.flags = AT_REMOVEDIR if directory else 0
    operation.begin()
    return operation


def mkdir(LoopCore loop not None, bytes path not None, uint32_t mode, filename):
    """Begins mkdirat(2)."""
    cdef FileOperation operation = new_operation(loop, MKDIRAT, AT_FDCWD)
    operation.keep = path
    operation.filename = filename
    operation.call.address = <uint64_t>PyBytes_AS_STRING(path)
    operation.call.length = mode
    operation.begin()
    return operation


cdef int fill_stat(FileOperation operation, bytes path, uint32_t flags) except -1:
    cdef bytes memory = PyBytes_FromStringAndSize(NULL, sizeof(hr_statx))
    operation.keep = (path, memory)
    operation.call.address = <uint64_t>PyBytes_AS_STRING(path)
    operation.call.offset = <uint64_t>PyBytes_AS_STRING(memory)
    operation.call.length = STATX_BASIC_STATS
    operation.call.flags = flags
    return 0


cdef object system_error(int error, filename, filename2):
    """OSError itself picks the subclass."""
    if filename is None:
        return OSError(error, os.strerror(error))
    return OSError(error, os.strerror(error), filename, None, filename2)


cdef object stat_result(hr_statx *found):
    """As os.stat makes it."""
    times = {}
    for name, seconds, nanoseconds in (
        ("st_atime", found.stx_atime.tv_sec, found.stx_atime.tv_nsec),
        ("st_mtime", found.stx_mtime.tv_sec, found.stx_mtime.tv_nsec),
        ("st_ctime", found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec),
    ):
        times[name] = seconds + 1e-9 * nanoseconds
        times[name + "_ns"] = seconds * 1_000_000_000 + nanoseconds
    times["st_blksize"] = found.stx_blksize
    times["st_blocks"] = found.stx_blocks
    times["st_rdev"] = c_makedev(found.stx_rdev_major, found.stx_rdev_minor)
    return os.stat_result((
        found.stx_mode, found.stx_ino, c_makedev(found.stx_dev_major, found.stx_dev_minor), found.stx_nlink,
        found.stx_uid, found.stx_gid, found.stx_size,
        found.stx_atime.tv_sec, found.stx_mtime.tv_sec, found.stx_ctime.tv_sec,
    ), times)
