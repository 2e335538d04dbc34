"""The fast TLS pump: records go through the interpreter's own OpenSSL without memory BIOs. See ``framing/pump.py``.

How it works
------------
* ``context.wrap_bio`` makes the object, so everything that CPython hangs on it (callbacks, SNI, verification, key log)
  stays as it is. Then the object's two memory BIOs are replaced by one of a kind of our own: OpenSSL reads straight
  from the buffer that ``decrypt`` was given, and writes straight into the ``bytes`` that ``outgoing`` will hand out.
* What is rare (handshake, errors) goes through CPython's methods, and what is frequent (SSL_read_ex, SSL_write_ex)
  doesn't. A call that fails here is made once more through CPython, which then raises its own exception: a failed
  connection fails again the same way, and OpenSSL's error queue still holds the reason.
* libssl is neither linked nor are its headers needed: its functions are found at run time in the library that ``_ssl``
  has loaded. All of them are public and documented. What isn't is where CPython keeps the ``SSL *`` (in all of 3.11
  to 3.13 at the same place); ``load`` and the constructor check that by everything that can be checked.

Who holds what
--------------
The BIO's state is a C struct, the *wire*, that goes when OpenSSL frees the BIO, and the pump holds a reference of its
own to the BIO. So the ``SSLObject`` may outlive the pump (it finds nothing to read and can't write), and the other way
round. OpenSSL calls the BIO without the GIL during the handshake: what it calls is plain C, and memory that it makes
grow is malloc's.

The input is borrowed for the duration of one call; only what lies behind the handshake is copied. An idle pump holds no
buffer.
"""
import ssl
import sys

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_XDECREF
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy
from posix.dlfcn cimport RTLD_LAZY, dlopen, dlsym

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **bytes, Py_ssize_t size) except -1
    # As a plain pointer: a bytes object with a second reference can't be resized.
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size) except NULL
    char *bytes_memory "PyBytes_AS_STRING"(PyObject *bytes) nogil

cdef extern from *:
    """
    #include <dlfcn.h>
    /* PySSLSocket and the beginning of PySSLContext, of Modules/_ssl.c. */
    struct hr_ssl_socket {
        PyObject_HEAD
        PyObject *socket;
        void *ssl;
        PyObject *context;
        char shutdown_seen_zero;
        int side;
        PyObject *owner, *server_hostname;
        int last_error[2];
    #if PY_VERSION_HEX < 0x030C0000
        PyObject *exception, *exception_value, *exception_traceback;
    #else
        PyObject *exception;
    #endif
    };
    struct hr_ssl_context {
        PyObject_HEAD
        void *context;
    };
    """
    struct hr_ssl_socket:
        PyObject *socket
        void *ssl
        PyObject *context
        PyObject *exception
    struct hr_ssl_context:
        void *context
    int RTLD_NOLOAD

__all__ = ["NativePump", "UnknownLayoutError", "load"]

cdef enum:
    # From OpenSSL's headers, where they have been the same since 1.1.0.
    BIO_TYPE_SOURCE_SINK = 0x0400
    BIO_FLAGS_READ = 0x01
    BIO_FLAGS_SHOULD_RETRY = 0x08
    BIO_FLAGS_RWS_RETRY = 0x0f
    BIO_CTRL_PENDING = 10
    BIO_CTRL_FLUSH = 11
    BIO_CTRL_DUP = 12
    BIO_CTRL_WPENDING = 13
    SSL_ERROR_WANT_READ = 2
    SSL_ERROR_ZERO_RETURN = 6
    SSL_SENT_SHUTDOWN = 1

    LARGEST_PLAINTEXT = 16384  # bytes of one record (RFC 8446 section 5.1)
    OVERHEAD = 64  # bytes a record of that; AES-GCM has 22 (TLS 1.3) or 29 (1.2), CBC with SHA-384 up to 85
    SPILL = 4096  # bytes; a handshake's flight fits in mostly

    # What reading came to.
    MORE = 1  # there may be more
    WAITING = 2  # for bytes
    CLOSED = 3  # by the peer's close_notify
    FAILED = 4


# ---- OpenSSL's functions ---------------------------------------------------------------------------------------------

ctypedef int (*ReadEx)(void *object, char *data, size_t size, size_t *done) noexcept nogil
ctypedef int (*WriteEx)(void *object, const char *data, size_t size, size_t *done) noexcept nogil
ctypedef long (*Ctrl)(void *bio, int command, long number, void *pointer) noexcept nogil
ctypedef int (*IntOf)(const void *object) noexcept nogil
ctypedef int (*IntOfInt)(const void *object, int number) noexcept nogil
ctypedef void *(*PointerOf)(const void *object) noexcept nogil
ctypedef int (*SetPointer)(void *object, void *pointer) noexcept nogil

cdef struct Library:
    int (*BIO_get_new_index)() noexcept nogil
    void *(*BIO_meth_new)(int type, const char *name) noexcept nogil
    SetPointer BIO_meth_set_read_ex
    SetPointer BIO_meth_set_write_ex
    SetPointer BIO_meth_set_ctrl
    SetPointer BIO_meth_set_destroy
    PointerOf BIO_new
    IntOf BIO_up_ref
    IntOf BIO_free
    void (*BIO_set_data)(void *bio, void *data) noexcept nogil
    PointerOf BIO_get_data
    void (*BIO_set_flags)(void *bio, int flags) noexcept nogil
    void (*BIO_clear_flags)(void *bio, int flags) noexcept nogil
    void (*ERR_clear_error)() noexcept nogil
    unsigned long (*ERR_peek_error)() noexcept nogil
    unsigned long (*OpenSSL_version_num)() noexcept nogil
    void (*SSL_set_bio)(void *ssl, void *reading, void *writing) noexcept nogil
    PointerOf SSL_get_SSL_CTX
    ReadEx SSL_read_ex
    WriteEx SSL_write_ex
    IntOf SSL_pending
    IntOf SSL_shutdown
    IntOf SSL_get_shutdown
    IntOfInt SSL_get_error

cdef Library lib
cdef void *method = NULL  # the BIO_METHOD; lives as long as the process

# In the order of the struct above, which is nothing but pointers.
NAMES = (
    b"BIO_get_new_index", b"BIO_meth_new", b"BIO_meth_set_read_ex", b"BIO_meth_set_write_ex", b"BIO_meth_set_ctrl",
    b"BIO_meth_set_destroy", b"BIO_new", b"BIO_up_ref", b"BIO_free", b"BIO_set_data", b"BIO_get_data",
    b"BIO_set_flags", b"BIO_clear_flags", b"ERR_clear_error", b"ERR_peek_error", b"OpenSSL_version_num", b"SSL_set_bio",
    b"SSL_get_SSL_CTX", b"SSL_read_ex", b"SSL_write_ex", b"SSL_pending", b"SSL_shutdown", b"SSL_get_shutdown",
    b"SSL_get_error",
)


def load() -> str:
    """Finds OpenSSL's functions, once; says why that's impossible here, or ``""``. Call it before :class:`NativePump`.

    Not thread-safe.
    """
    if method != NULL:
        return ""
    if sys.implementation.name != "cpython" or not (3, 11) <= sys.version_info < (3, 14):
        return "it knows CPython 3.11 to 3.13"
    import _ssl
    path = getattr(_ssl, "__file__", None)
    if path is None:
        return "the module _ssl is part of the interpreter's executable"
    if not ssl.OPENSSL_VERSION.startswith("OpenSSL ") or not (1, 1, 1) <= ssl.OPENSSL_VERSION_INFO[:3] < (4,):
        return f"it knows OpenSSL 1.1.1 to 3, and this is {ssl.OPENSSL_VERSION}"
    if _ssl._SSLSocket.__basicsize__ != sizeof(hr_ssl_socket):
        return "this interpreter was built with another layout of its SSL objects"
    return find_functions(path) or make_method()


cdef str find_functions(str path):
    cdef void **entry = <void **> &lib
    cdef bytes name
    cdef size_t i
    cdef void *library = dlopen(path.encode("utf-8", "surrogateescape"), RTLD_LAZY | RTLD_NOLOAD)
    if library == NULL:
        return f"{path} isn't loaded as a shared library"
    assert len(NAMES) * sizeof(void *) == sizeof(Library)
    for i, name in enumerate(NAMES):
        entry[i] = dlsym(library, name)
        if entry[i] == NULL:
            return f"OpenSSL's {name.decode()} isn't visible in {path} or a library of its"
    if lib.OpenSSL_version_num() != ssl.OPENSSL_VERSION_NUMBER:
        return f"the OpenSSL that {path} names isn't the one that it uses"
    return ""


cdef str make_method():
    global method
    cdef int index = lib.BIO_get_new_index()
    cdef void *made = lib.BIO_meth_new(index | BIO_TYPE_SOURCE_SINK, b"headrace") if index >= 0 else NULL
    if made == NULL:
        lib.ERR_clear_error()
        return "OpenSSL takes no other kind of BIO"
    lib.BIO_meth_set_read_ex(made, <void *> wire_read)
    lib.BIO_meth_set_write_ex(made, <void *> wire_write)
    lib.BIO_meth_set_ctrl(made, <void *> wire_ctrl)
    lib.BIO_meth_set_destroy(made, <void *> wire_destroy)
    method = made
    return ""


cdef inline void forget_errors() noexcept nogil:
    """What somebody else has left in OpenSSL's queue would be taken for an error of this connection."""
    if lib.ERR_peek_error():  # the queue is empty nearly always, and clearing it isn't free
        lib.ERR_clear_error()


# ---- the BIO ---------------------------------------------------------------------------------------------------------

cdef struct Wire:
    # Where OpenSSL reads: what handshake() or decrypt() was given, during that call.
    const char *source
    size_t left
    size_t wanted  # bytes of the current record that OpenSSL asked for in vain; 0 between records
    size_t taken  # bytes since the last record with plaintext
    # Where OpenSSL writes during encrypt(): the bytes object that outgoing() will hand out.
    char *target
    size_t room
    size_t written
    # Where it writes otherwise, and what didn't fit there.
    char *spill
    size_t spill_room
    size_t spilled
    bint orphaned  # the pump is gone


cdef int wire_read(void *bio, char *data, size_t size, size_t *done) noexcept nogil:
    cdef Wire *wire = <Wire *> lib.BIO_get_data(bio)
    cdef size_t given = min(size, wire.left)
    done[0] = given
    wire.wanted = size - given
    if not given:
        lib.BIO_set_flags(bio, BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY)
        return 0
    # Otherwise SSL_get_error takes a close_notify in the handshake for "wait for more", and nobody would ever wake up.
    lib.BIO_clear_flags(bio, BIO_FLAGS_RWS_RETRY)
    memcpy(data, wire.source, given)
    wire.source += given
    wire.left -= given
    wire.taken += given
    return 1


cdef int wire_write(void *bio, const char *data, size_t size, size_t *done) noexcept nogil:
    cdef Wire *wire = <Wire *> lib.BIO_get_data(bio)
    done[0] = 0
    if not wire.spilled and size <= wire.room - wire.written:
        memcpy(wire.target + wire.written, data, size)
        wire.written += size
    elif wire.orphaned or not spill(wire, data, size):
        lib.BIO_clear_flags(bio, BIO_FLAGS_RWS_RETRY)
        return 0
    done[0] = size
    return 1


cdef bint spill(Wire *wire, const char *data, size_t size) noexcept nogil:
    cdef size_t room = wire.spilled + size
    cdef char *memory
    if room > wire.spill_room:
        room = max(room, 2 * wire.spill_room, <size_t> SPILL)
        memory = <char *> realloc(wire.spill, room)
        if memory == NULL:
            return False
        wire.spill = memory
        wire.spill_room = room
    memcpy(wire.spill + wire.spilled, data, size)
    wire.spilled += size
    return True


cdef void drop_spill(Wire *wire) noexcept nogil:
    free(wire.spill)
    wire.spill = NULL
    wire.spilled = wire.spill_room = 0


cdef long wire_ctrl(void *bio, int command, long number, void *pointer) noexcept nogil:
    cdef Wire *wire = <Wire *> lib.BIO_get_data(bio)
    if command == BIO_CTRL_FLUSH or command == BIO_CTRL_DUP:
        return 1
    if command == BIO_CTRL_PENDING:
        return <long> wire.left
    if command == BIO_CTRL_WPENDING:
        return <long> (wire.written + wire.spilled)
    return 0


cdef int wire_destroy(void *bio) noexcept nogil:
    cdef Wire *wire = <Wire *> lib.BIO_get_data(bio)
    if wire != NULL:
        drop_spill(wire)
        free(wire)
        lib.BIO_set_data(bio, NULL)
    return 1


class UnknownLayoutError(RuntimeError):
    """What a context makes isn't an SSL object of CPython's as this module knows it."""


# ---- the pump --------------------------------------------------------------------------------------------------------

@cython.final
@cython.no_gc_clear  # the SSL must live as long as the pointer to it; an SSLObject refers to no pump
cdef class NativePump:
    """A pump (see ``headrace.framing.pump.Pump``) without memory BIOs: one ``bytes`` object for all records of a call.

    Parameters as those of ``ssl.SSLContext.wrap_bio``, and its errors. :class:`UnknownLayoutError` if the context makes
    other objects than CPython's; RuntimeError if ``load`` hasn't succeeded, and if a callback of OpenSSL's uses the
    pump that calls it. The GIL is held while records are worked off. Not thread-safe.
    """

    cdef readonly object ssl_object
    cdef object _owner  # CPython's object, which owns the SSL
    cdef hr_ssl_socket *_socket  # the same
    cdef void *_ssl
    cdef void *_bio
    cdef Wire *_wire
    cdef PyObject *_out  # bytes object that is being filled, or NULL
    cdef size_t _used
    cdef size_t _room
    cdef bytes _rest  # what came behind the handshake
    cdef bint _busy
    cdef bint _peer_closed

    def __init__(self, context, bint server_side, server_hostname, session):
        if method == NULL:
            raise RuntimeError("OpenSSL's functions weren't found: load() comes first")
        if self._bio != NULL:
            raise RuntimeError("a pump can't be used for another connection")
        self._rest = b""
        self.ssl_object = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side, server_hostname, session)
        self._find_ssl(context)
        self._wire = <Wire *> calloc(1, sizeof(Wire))
        self._bio = lib.BIO_new(method) if self._wire != NULL else NULL
        if self._bio == NULL:
            free(self._wire)
            self._wire = NULL
            raise MemoryError
        lib.BIO_set_data(self._bio, self._wire)
        lib.BIO_up_ref(self._bio)  # ours
        lib.SSL_set_bio(self._ssl, self._bio, self._bio)  # takes over the one from BIO_new

    cdef int _find_ssl(self, context) except -1:
        """Takes the SSL out of CPython's object, if that looks as it must."""
        import _ssl
        cdef hr_ssl_context *theirs
        self._owner = getattr(self.ssl_object, "_sslobj", None)
        if type(self._owner) is not _ssl._SSLSocket:
            raise UnknownLayoutError(f"{type(self.ssl_object).__qualname__} isn't an ssl.SSLObject")
        self._socket = <hr_ssl_socket *> <PyObject *> self._owner
        inner = self._owner.context
        theirs = <hr_ssl_context *> <PyObject *> inner
        if not isinstance(inner, _ssl._SSLContext) or self._socket.context != <PyObject *> inner or (
                self._socket.socket != NULL or self._socket.exception != NULL or self._socket.ssl == NULL):
            raise UnknownLayoutError("CPython's SSL object has an unknown layout")
        if lib.SSL_get_SSL_CTX(self._socket.ssl) != theirs.context:
            raise UnknownLayoutError("CPython's SSL object belongs to another OpenSSL")
        self._ssl = self._socket.ssl
        return 0

    def __dealloc__(self):
        if self._bio != NULL:
            self._wire.orphaned = True
            drop_spill(self._wire)
            lib.BIO_free(self._bio)
        Py_XDECREF(self._out)

    @property
    def pending(self):
        """Bytes that ``outgoing`` would give."""
        return self._used + (self._wire.spilled if self._wire != NULL else 0)

    cdef int _enter(self) except -1:
        if self._busy or self._bio == NULL:
            raise RuntimeError("a callback of OpenSSL's must not use the pump that has called it" if self._busy
                               else "the pump wasn't initialised")
        self._busy = True
        return 0

    # ---- what came ----

    def handshake(self, data):
        """Goes on with the handshake; True when it's done. See ``headrace.framing.pump.Pump``."""
        cdef Py_buffer view
        if self._rest:
            data = self._rest + bytes(data)
        self._enter()
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            self._attach(&view)
            try:
                self.ssl_object.do_handshake()
            except ssl.SSLWantReadError:
                return False
            finally:
                self._rest = PyBytes_FromStringAndSize(self._wire.source, <Py_ssize_t> self._wire.left)
                self._detach(&view)
        finally:
            self._busy = False
        return True

    def decrypt(self, data, list plaintext not None):
        """Appends the plaintext of records; False behind a close_notify. See ``headrace.framing.pump.Pump``."""
        cdef Py_buffer view
        cdef bint open
        if self._peer_closed:
            return False
        if self._rest:
            data = self._rest + bytes(data)
            self._rest = b""
        self._enter()
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            self._attach(&view)
            try:
                open = self._read(plaintext)
            finally:
                self._detach(&view)
        finally:
            self._busy = False
        return open

    cdef void _attach(self, Py_buffer *view) noexcept:
        self._wire.source = <const char *> view.buf
        self._wire.left = <size_t> view.len

    cdef void _detach(self, Py_buffer *view) noexcept:
        self._wire.source = NULL
        self._wire.left = 0
        PyBuffer_Release(view)

    cdef bint _read(self, list plaintext) except -1:
        """All that is complete, into one bytes object. It's as large as what came, and what came before of its record:
        a record is longer than its plaintext."""
        cdef Wire *wire = self._wire
        cdef size_t room
        cdef int outcome = MORE
        forget_errors()
        while outcome == MORE and (wire.left or lib.SSL_pending(self._ssl)):
            room = wire.left + min(wire.taken, <size_t> LARGEST_PLAINTEXT)
            if not wire.left:
                room = LARGEST_PLAINTEXT  # a buffer that was too short after all
            elif wire.left < wire.wanted:
                room = 1  # the record won't be complete: only to have it read
            outcome = self._read_piece(plaintext, room)
        if outcome == FAILED:
            # The same call again, with the same outcome, but this time CPython makes an exception of it.
            self.ssl_object.read(1)
            raise ssl.SSLError("OpenSSL has failed and then gone on")
        if self._socket.exception != NULL:
            self.ssl_object.do_handshake()  # raises what a callback of Python's has raised
        self._peer_closed = outcome == CLOSED
        return not self._peer_closed

    cdef int _read_piece(self, list plaintext, size_t room) except -1:
        cdef PyObject *piece = new_bytes(NULL, <Py_ssize_t> room)
        cdef size_t used = 0
        cdef int outcome = self._read_into(bytes_memory(piece), room, &used)
        if used == 0:
            Py_XDECREF(piece)
        else:
            if used != room:
                _PyBytes_Resize(&piece, <Py_ssize_t> used)
            whole = <object> piece
            Py_XDECREF(piece)
            plaintext.append(whole)
        return outcome

    cdef int _read_into(self, char *memory, size_t room, size_t *used) noexcept:
        cdef Wire *wire = self._wire
        cdef size_t got
        cdef int result
        while used[0] < room:
            result = lib.SSL_read_ex(self._ssl, memory + used[0], room - used[0], &got)
            if result <= 0:
                result = lib.SSL_get_error(self._ssl, result)
                return WAITING if result == SSL_ERROR_WANT_READ else (
                    CLOSED if result == SSL_ERROR_ZERO_RETURN else FAILED)
            used[0] += got
            wire.taken = 0
            if not wire.left:
                break
        return MORE

    # ---- what goes ----

    def encrypt(self, data):
        """Makes records of ``data``; how many bytes were taken. See ``headrace.framing.pump.Pump``."""
        cdef Py_buffer view
        cdef size_t sent
        self._enter()
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            try:
                sent = self._write(<const char *> view.buf, <size_t> view.len)
            finally:
                PyBuffer_Release(&view)
        finally:
            self._busy = False
        return sent

    cdef size_t _write(self, const char *data, size_t size) except? 0:
        cdef size_t sent = 0
        cdef int error = 0
        if size == 0:
            return 0
        forget_errors()
        self._take_spill()
        self._make_room(size + (size // LARGEST_PLAINTEXT + 1) * OVERHEAD)
        error = self._write_records(data, size, &sent)
        self._take_spill()
        if error != 0 and error != SSL_ERROR_WANT_READ:
            # The same call again, with the same outcome, but this time CPython makes an exception of it.
            self.ssl_object.write(PyBytes_FromStringAndSize(data + sent, <Py_ssize_t> (size - sent)))
            raise ssl.SSLError("OpenSSL has failed and then gone on")
        if self._socket.exception != NULL:
            self.ssl_object.do_handshake()  # raises what a callback of Python's has raised
        return sent

    cdef int _write_records(self, const char *data, size_t size, size_t *sent) noexcept:
        """0, or OpenSSL's code for what stopped it."""
        cdef Wire *wire = self._wire
        cdef size_t got
        cdef int result
        cdef int error = 0
        wire.target = bytes_memory(self._out)
        wire.room = self._room
        wire.written = self._used
        while sent[0] < size:  # CPython has SSL_MODE_ENABLE_PARTIAL_WRITE set: a record each time
            result = lib.SSL_write_ex(self._ssl, data + sent[0], size - sent[0], &got)
            if result <= 0:
                error = lib.SSL_get_error(self._ssl, result)
                break
            sent[0] += got
        self._used = wire.written
        wire.target = NULL
        wire.room = wire.written = 0
        return error

    cdef int _make_room(self, size_t size) except -1:
        """Room for ``size`` bytes more in the bytes object that goes out next."""
        cdef size_t room = self._used + size
        if self._out == NULL:
            self._out = new_bytes(NULL, <Py_ssize_t> room)
        elif room <= self._room:
            return 0
        else:
            room = max(room, 2 * self._room)
            self._resize(room)
        self._room = room
        return 0

    cdef int _resize(self, size_t room) except -1:
        try:
            _PyBytes_Resize(&self._out, <Py_ssize_t> room)
        except MemoryError:  # and the object is gone
            self._used = self._room = 0
            raise
        return 0

    cdef int _take_spill(self) except -1:
        """Puts what was written outside of encrypt() behind what encrypt() has made."""
        cdef Wire *wire = self._wire
        if wire.spilled:
            self._make_room(wire.spilled)
            memcpy(bytes_memory(self._out) + self._used, wire.spill, wire.spilled)
            self._used += wire.spilled
            drop_spill(wire)
        return 0

    def outgoing(self):
        """Takes the records that are to be sent; ``b""`` if there are none."""
        cdef object records = b""
        self._enter()
        try:
            self._take_spill()
            if self._used:
                if self._used != self._room:
                    self._resize(self._used)
                records = <object> self._out
            Py_XDECREF(self._out)
            self._out = NULL
            self._used = self._room = 0
        finally:
            self._busy = False
        return records

    def close(self):
        """Puts a close_notify behind the records to be sent, once. See ``headrace.framing.pump.Pump``."""
        cdef int result
        self._enter()
        try:
            if lib.SSL_get_shutdown(self._ssl) & SSL_SENT_SHUTDOWN:
                return
            forget_errors()
            # CPython's unwrap() would look for the peer's close_notify, and fail for good if it met data.
            result = lib.SSL_shutdown(self._ssl)
            if result < 0:
                self.ssl_object.unwrap()
            if self._socket.exception != NULL:
                self.ssl_object.do_handshake()  # raises what a callback of Python's has raised
        finally:
            self._busy = False
