"""Sealed Wrap tokens of RFC 4121, many at a time. See ``security/kerberos.py``, which has the rules.

``Sealer`` makes a whole write's frames in one ``bytes`` object; ``Opener`` takes the frames that one receive brought,
and puts what was in them together. Python and ``cryptography`` do the same frame by frame (``security/enctypes.py``);
there half of the time goes into calls and copies.

How it works
------------
* AES and the hashes are the interpreter's own OpenSSL's: libcrypto is neither linked nor are its headers needed; its
  functions are found at run time in the library that ``_hashlib`` has loaded. All of them are public and documented.
* A direction has one cipher context for its lifetime, in CBC mode, and each message begins with an IV of zeros: to set
  that is far cheaper than to set up a key. HMAC is two hash contexts that have the padded key behind them already,
  and are copied for each message.
* The last two blocks of a ciphertext are swapped, and the last but one is cut to where the message ends (RFC 3962
  section 5: CBC-CS3). All before them is encrypted or decrypted where it's to be; short messages are put together
  first, for one call is cheaper than three.
* What was decrypted is handed out only behind a checksum that was right. Checksums are compared in constant time.
"""
import ssl
import sys

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_XDECREF
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from posix.dlfcn cimport RTLD_LAZY, dlopen, dlsym

import os

from headrace.errors import FramingError

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **bytes, Py_ssize_t size) except -1
    # As a plain pointer: a bytes object with a second reference can't be resized.
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size) except NULL
    char *bytes_memory "PyBytes_AS_STRING"(PyObject *bytes) nogil

cdef extern from *:
    """
    #include <dlfcn.h>
    """
    int RTLD_NOLOAD

__all__ = ["Opener", "Sealer", "load"]

cdef enum:
    BLOCK = 16
    HEADER = 16  # bytes of a token's header
    PREFIX = 4  # bytes of a frame's header, which says how long the token is
    LARGEST_MAC = 64  # bytes of a digest, before it's cut
    SMALL = 512  # bytes: a message up to here is put together and encrypted in one call
    # What is handed out at a time, at most (or one message): larger objects would come from mmap each time.
    PIECE = 96 * 1024
    CONFOUNDERS = 64  # that many are taken from the kernel at a time
    LARGEST_FRAME = 65536  # bytes behind a frame's header


# ---- OpenSSL's functions ---------------------------------------------------------------------------------------------

ctypedef const void *(*Method)() noexcept nogil
ctypedef void *(*New)() noexcept nogil
ctypedef void (*Free)(void *context) noexcept nogil
ctypedef int (*CipherInit)(void *context, const void *cipher, void *engine, const uint8_t *key, const uint8_t *iv,
                           int encrypt) noexcept nogil
ctypedef int (*CipherUpdate)(void *context, uint8_t *out, int *done, const uint8_t *data, int size) noexcept nogil

cdef struct Library:
    New EVP_CIPHER_CTX_new
    Free EVP_CIPHER_CTX_free
    int (*EVP_CIPHER_CTX_set_padding)(void *context, int padding) noexcept nogil
    CipherInit EVP_CipherInit_ex
    CipherUpdate EVP_CipherUpdate
    New EVP_MD_CTX_new
    Free EVP_MD_CTX_free
    int (*EVP_MD_CTX_copy_ex)(void *to, const void *context) noexcept nogil
    int (*EVP_DigestInit_ex)(void *context, const void *method, void *engine) noexcept nogil
    int (*EVP_DigestUpdate)(void *context, const void *data, size_t size) noexcept nogil
    int (*EVP_DigestFinal_ex)(void *context, uint8_t *digest, unsigned *size) noexcept nogil
    int (*CRYPTO_memcmp)(const void *one, const void *other, size_t size) noexcept nogil
    void (*OPENSSL_cleanse)(void *data, size_t size) noexcept nogil
    void (*ERR_clear_error)() noexcept nogil
    unsigned long (*OpenSSL_version_num)() noexcept nogil
    Method EVP_aes_128_cbc
    Method EVP_aes_256_cbc
    Method EVP_sha1
    Method EVP_sha256
    Method EVP_sha384

cdef Library lib
cdef bint loaded = False

# In the order of the struct above, which is nothing but pointers.
NAMES = (
    b"EVP_CIPHER_CTX_new", b"EVP_CIPHER_CTX_free", b"EVP_CIPHER_CTX_set_padding", b"EVP_CipherInit_ex",
    b"EVP_CipherUpdate", b"EVP_MD_CTX_new", b"EVP_MD_CTX_free", b"EVP_MD_CTX_copy_ex", b"EVP_DigestInit_ex",
    b"EVP_DigestUpdate", b"EVP_DigestFinal_ex", b"CRYPTO_memcmp", b"OPENSSL_cleanse", b"ERR_clear_error",
    b"OpenSSL_version_num", b"EVP_aes_128_cbc", b"EVP_aes_256_cbc", b"EVP_sha1", b"EVP_sha256", b"EVP_sha384",
)


def load() -> str:
    """Finds OpenSSL's functions, once; says why that's impossible here, or ``""``. Call it before the classes.

    Not thread-safe.
    """
    if loaded:
        return ""
    if sys.implementation.name != "cpython":
        return "it knows CPython"
    import _hashlib
    path = getattr(_hashlib, "__file__", None)
    if path is None:
        return "the module _hashlib is part of the interpreter's executable"
    if not ssl.OPENSSL_VERSION.startswith("OpenSSL ") or not (1, 1, 1) <= ssl.OPENSSL_VERSION_INFO[:3] < (4,):
        return f"it knows OpenSSL 1.1.1 to 3, and this is {ssl.OPENSSL_VERSION}"
    return find_functions(path)


cdef str find_functions(str path):
    global loaded
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
    loaded = True
    return ""


cdef const void *cipher_of(Py_ssize_t key_size) except NULL:
    if key_size == 16:
        return lib.EVP_aes_128_cbc()
    if key_size == 32:
        return lib.EVP_aes_256_cbc()
    raise ValueError(f"AES has no keys of {key_size} bytes here")


cdef const void *hash_of(str name) except NULL:
    if name == "sha1":
        return lib.EVP_sha1()
    if name == "sha256":
        return lib.EVP_sha256()
    if name == "sha384":
        return lib.EVP_sha384()
    raise ValueError(f"no encryption type has {name!r}")


cdef uint8_t[BLOCK] ZERO
memset(ZERO, 0, BLOCK)


# ---- one direction ---------------------------------------------------------------------------------------------------

cdef class Direction:
    """What encrypting and decrypting have in common: a cipher, an HMAC, and the header of the next token.

    Parameters
    ----------
    encryption_key, integrity_key : bytes
        Derived from the context's key for this direction.
    hash_name : {"sha1", "sha256", "sha384"}
    mac_size : int
        Bytes that a checksum is cut to.
    encrypt_then_mac : bool
        Whether the checksum is over the ciphertext and its IV (RFC 8009), or over the plaintext (RFC 3962).
    flags, number : int
        Of the next token's header.
    """

    cdef void *cipher
    cdef void *inner  # hash contexts: the key has been hashed
    cdef void *outer
    cdef void *work
    cdef Py_ssize_t mac_size
    cdef bint encrypt_then_mac
    cdef uint8_t[HEADER] header  # of the next token
    cdef readonly Py_ssize_t overhead

    def __init__(self, bytes encryption_key not None, bytes integrity_key not None, str hash_name not None,
                 Py_ssize_t mac_size, bint encrypt_then_mac, uint8_t flags, uint64_t number):
        if not loaded:
            raise RuntimeError("OpenSSL's functions weren't found: load() comes first")
        if self.cipher != NULL:
            raise RuntimeError("keys can't be changed")
        if not 0 < mac_size <= 32:
            raise ValueError(f"a checksum of {mac_size} bytes")
        self.mac_size = mac_size
        self.encrypt_then_mac = encrypt_then_mac
        self.overhead = HEADER + BLOCK + HEADER + mac_size
        self.header[0], self.header[1], self.header[2], self.header[3] = 5, 4, flags, 0xFF
        memset(self.header + 4, 0, 4)
        put_number(self.header + 8, number)
        self.cipher = lib.EVP_CIPHER_CTX_new()
        self.inner = lib.EVP_MD_CTX_new()
        self.outer = lib.EVP_MD_CTX_new()
        self.work = lib.EVP_MD_CTX_new()
        if self.cipher == NULL or self.inner == NULL or self.outer == NULL or self.work == NULL:
            raise MemoryError
        check(lib.EVP_CipherInit_ex(self.cipher, cipher_of(len(encryption_key)), NULL,
                                    <const uint8_t *> PyBytes_AS_STRING(encryption_key), ZERO, self.encrypts()))
        check(lib.EVP_CIPHER_CTX_set_padding(self.cipher, 0))
        self.key_hashes(hash_of(hash_name), integrity_key, 128 if hash_name == "sha384" else 64)

    cdef int encrypts(self) except -1:
        raise NotImplementedError

    cdef int key_hashes(self, const void *method, bytes key, Py_ssize_t block) except -1:
        """HMAC (RFC 2104) is two hashes, each of a block of the padded key and of what follows."""
        cdef uint8_t[128] pad
        cdef Py_ssize_t i
        if len(key) > block:
            raise ValueError("a key of more than a block")
        for inner in (True, False):
            memset(pad, 0, sizeof(pad))
            memcpy(pad, PyBytes_AS_STRING(key), len(key))
            for i in range(block):
                pad[i] ^= 0x36 if inner else 0x5C
            check(lib.EVP_DigestInit_ex(self.inner if inner else self.outer, method, NULL))
            check(lib.EVP_DigestUpdate(self.inner if inner else self.outer, pad, block))
        lib.OPENSSL_cleanse(pad, sizeof(pad))
        if self.encrypt_then_mac:
            check(lib.EVP_DigestUpdate(self.inner, ZERO, BLOCK))  # the IV
        return 0

    def __dealloc__(self):
        if self.cipher != NULL:
            lib.EVP_CIPHER_CTX_free(self.cipher)
            lib.EVP_MD_CTX_free(self.inner)
            lib.EVP_MD_CTX_free(self.outer)
            lib.EVP_MD_CTX_free(self.work)

    cdef int begin_mac(self) except -1:
        return check(lib.EVP_MD_CTX_copy_ex(self.work, self.inner))

    cdef int mac(self, const uint8_t *data, Py_ssize_t size) except -1:
        return check(lib.EVP_DigestUpdate(self.work, data, size))

    cdef int end_mac(self, uint8_t *digest) except -1:
        """``digest`` has room for LARGEST_MAC bytes, of which ``mac_size`` are the checksum."""
        cdef unsigned size
        check(lib.EVP_DigestFinal_ex(self.work, digest, &size))
        check(lib.EVP_MD_CTX_copy_ex(self.work, self.outer))
        check(lib.EVP_DigestUpdate(self.work, digest, size))
        return check(lib.EVP_DigestFinal_ex(self.work, digest, &size))

    cdef int begin_message(self) except -1:
        return check(lib.EVP_CipherInit_ex(self.cipher, NULL, NULL, NULL, ZERO, -1))

    cdef int crypt(self, uint8_t *out, const uint8_t *data, Py_ssize_t size) except -1:
        """Whole blocks, of which as many come out."""
        cdef int done
        if not size:
            return 0
        check(lib.EVP_CipherUpdate(self.cipher, out, &done, data, <int> size))
        if done != size:
            raise RuntimeError(f"OpenSSL made {done} bytes of {size}")
        return 0

    cdef void next_number(self) noexcept:
        cdef int i
        for i in range(15, 7, -1):
            self.header[i] += 1
            if self.header[i]:
                return

    @property
    def number(self):
        """Of the next token."""
        return int.from_bytes(self.header[8:16], "big")


cdef inline int check(int good) except -1:
    if good != 1:
        lib.ERR_clear_error()
        raise RuntimeError("OpenSSL has failed")
    return 0


cdef void put_number(uint8_t *header, uint64_t number) noexcept:
    cdef int i
    for i in range(8):
        header[i] = <uint8_t> (number >> (56 - 8 * i))


# ---- what goes -------------------------------------------------------------------------------------------------------

@cython.final
cdef class Sealer(Direction):
    """Makes sealed tokens, and frames of them. Not thread-safe; not to be used after an exception, or after a fork.

    Parameters as :class:`Direction`, and ``random``, an iterator of the confounders, for tests.
    """

    cdef bytes confounders
    cdef Py_ssize_t confounder  # where the next is
    cdef object random

    def __init__(self, encryption_key, integrity_key, hash_name, mac_size, encrypt_then_mac, flags, number, *,
                 random=None):
        Direction.__init__(self, encryption_key, integrity_key, hash_name, mac_size, encrypt_then_mac, flags, number)
        self.confounders = b""
        self.random = random

    cdef int encrypts(self) except -1:
        return 1

    def wrap(self, data):
        """The next token."""
        return self.make(data, 0)

    def wrap_frames(self, data, Py_ssize_t frame_size):
        """All of ``data`` in frames: each a header of 4 bytes (its size, little-endian) and a token around at most
        ``frame_size`` bytes. The last has what is left. Of nothing, nothing."""
        if frame_size < 1:
            raise ValueError(f"frames of {frame_size} bytes")
        return self.make(data, frame_size)

    cdef bytes make(self, data, Py_ssize_t frame_size):
        cdef Py_buffer view
        cdef Py_ssize_t count, size, position = 0
        cdef uint8_t *at
        cdef bytes out
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if not frame_size:
                out = PyBytes_FromStringAndSize(NULL, view.len + self.overhead)
                self.seal(<uint8_t *> PyBytes_AS_STRING(out), <const uint8_t *> view.buf, view.len)
                return out
            count = (view.len + frame_size - 1) // frame_size
            out = PyBytes_FromStringAndSize(NULL, view.len + count * (PREFIX + self.overhead))
            at = <uint8_t *> PyBytes_AS_STRING(out)
            while position < view.len:
                size = min(frame_size, view.len - position)
                put_size(at, size + self.overhead)
                self.seal(at + PREFIX, <const uint8_t *> view.buf + position, size)
                at += PREFIX + self.overhead + size
                position += size
            return out
        finally:
            PyBuffer_Release(&view)

    cdef int take_confounder(self, uint8_t *block) except -1:
        if self.random is not None:
            self.confounders = next(self.random)
            self.confounder = 0
        elif self.confounder + BLOCK > PyBytes_GET_SIZE(self.confounders):
            self.confounders = os.urandom(CONFOUNDERS * BLOCK)
            self.confounder = 0
        memcpy(block, PyBytes_AS_STRING(self.confounders) + self.confounder, BLOCK)
        self.confounder += BLOCK
        return 0

    cdef int seal(self, uint8_t *out, const uint8_t *data, Py_ssize_t size) except -1:
        """One token: ``size + overhead`` bytes of ``out``."""
        cdef uint8_t[LARGEST_MAC] digest
        cdef uint8_t *body = out + HEADER
        cdef Py_ssize_t whole = BLOCK + size + HEADER  # bytes that are encrypted
        memcpy(out, self.header, HEADER)
        self.begin_message()
        self.begin_mac()
        if whole <= SMALL:
            self.encrypt_small(body, data, size)
        else:
            self.encrypt_large(body, data, size)
        if self.encrypt_then_mac:
            self.mac(body, whole)
        self.end_mac(digest)
        memcpy(body + whole, digest, self.mac_size)
        self.next_number()
        return 0

    cdef int encrypt_small(self, uint8_t *body, const uint8_t *data, Py_ssize_t size) except -1:
        cdef uint8_t[SMALL + BLOCK] plain
        cdef uint8_t[SMALL + BLOCK] sealed
        cdef Py_ssize_t whole = BLOCK + size + HEADER
        cdef Py_ssize_t padded = (whole + BLOCK - 1) // BLOCK * BLOCK
        self.take_confounder(plain)
        memcpy(plain + BLOCK, data, size)
        memcpy(plain + BLOCK + size, self.header, HEADER)
        memset(plain + whole, 0, padded - whole)
        if not self.encrypt_then_mac:
            self.mac(plain, whole)
        self.crypt(sealed, plain, padded)
        memcpy(body, sealed, padded - 2 * BLOCK)
        memcpy(body + padded - 2 * BLOCK, sealed + padded - BLOCK, BLOCK)
        memcpy(body + padded - BLOCK, sealed + padded - 2 * BLOCK, whole - (padded - BLOCK))
        return 0

    cdef int encrypt_large(self, uint8_t *body, const uint8_t *data, Py_ssize_t size) except -1:
        """The confounder and the data's whole blocks, one after the other; then the end from a place of its own."""
        cdef uint8_t[BLOCK] confounder
        cdef uint8_t[3 * BLOCK] end
        cdef Py_ssize_t left = size % BLOCK
        cdef Py_ssize_t straight = size - left - BLOCK  # of the data; a whole block is kept back
        cdef Py_ssize_t rest = BLOCK + left + HEADER  # bytes of the end
        cdef Py_ssize_t padded = (rest + BLOCK - 1) // BLOCK * BLOCK
        self.take_confounder(confounder)
        memcpy(end, data + straight, BLOCK + left)
        memcpy(end + BLOCK + left, self.header, HEADER)
        if not self.encrypt_then_mac:
            self.mac(confounder, BLOCK)
            self.mac(data, straight)
            self.mac(end, rest)
        self.crypt(body, confounder, BLOCK)
        self.crypt(body + BLOCK, data, straight)
        body += BLOCK + straight
        if padded == 2 * BLOCK:
            self.crypt(end, end, padded)
            memcpy(body, end + BLOCK, BLOCK)
            memcpy(body + BLOCK, end, BLOCK)
            return 0
        return self.encrypt_end(body, end, rest)

    cdef int encrypt_end(self, uint8_t *body, uint8_t *end, Py_ssize_t rest) except -1:
        """Between two and three blocks."""
        cdef uint8_t[4 * BLOCK] padded
        memcpy(padded, end, rest)
        memset(padded + rest, 0, sizeof(padded) - rest)
        self.crypt(padded, padded, 3 * BLOCK)
        memcpy(body, padded, BLOCK)
        memcpy(body + BLOCK, padded + 2 * BLOCK, BLOCK)
        memcpy(body + 2 * BLOCK, padded + BLOCK, rest - 2 * BLOCK)
        return 0


cdef inline void put_size(uint8_t *header, Py_ssize_t size) noexcept:
    header[0] = <uint8_t> size
    header[1] = <uint8_t> (size >> 8)
    header[2] = <uint8_t> (size >> 16)
    header[3] = <uint8_t> (size >> 24)


cdef inline Py_ssize_t get_size(const uint8_t *header) noexcept:
    return header[0] | header[1] << 8 | header[2] << 16 | <Py_ssize_t> header[3] << 24


# ---- what comes ------------------------------------------------------------------------------------------------------

@cython.final
cdef class Opener(Direction):
    """Opens sealed tokens, and frames of them. Not thread-safe; not to be used after an exception.

    Tokens whose header is the usual one (EC and RRC are 0) and the next; of others it's for the caller to find out what
    they are: ``open`` takes the rest of the way.
    """

    cdef int encrypts(self) except -1:
        return 0

    def unwrap(self, token):
        """What is in the next token; None, and nothing has happened, if its header isn't the usual one.

        Raises :class:`headrace.errors.FramingError` for a token that is too short or isn't genuine.
        """
        cdef Py_buffer view
        cdef const uint8_t *at
        cdef bytes out
        PyObject_GetBuffer(token, &view, PyBUF_SIMPLE)
        try:
            self.long_enough(view.len)
            at = <const uint8_t *> view.buf
            if memcmp(at, self.header, HEADER):
                return None
            out = PyBytes_FromStringAndSize(NULL, view.len - self.overhead)
            self.decrypt(<uint8_t *> PyBytes_AS_STRING(out), at + HEADER, view.len - self.overhead, self.header)
            self.next_number()
            return out
        finally:
            PyBuffer_Release(&view)

    def open(self, bytes header not None, body, Py_ssize_t filler):
        """What is in a token of the expected number with that header, whose body is in order and ends with ``filler``
        bytes before the sealed copy of the header. Raises as ``unwrap``."""
        cdef Py_buffer view
        cdef Py_ssize_t size
        cdef bytes out
        assert len(header) == HEADER
        PyObject_GetBuffer(body, &view, PyBUF_SIMPLE)
        try:
            self.long_enough(HEADER + view.len - filler)
            size = HEADER + view.len - self.overhead
            out = PyBytes_FromStringAndSize(NULL, size)
            self.decrypt(<uint8_t *> PyBytes_AS_STRING(out), <const uint8_t *> view.buf, size,
                         <const uint8_t *> PyBytes_AS_STRING(header))
            self.next_number()
            return out[:size - filler]
        finally:
            PyBuffer_Release(&view)

    def unwrap_frames(self, view, Py_ssize_t position, Py_ssize_t most, list plaintext not None, Py_ssize_t silent,
                      Py_ssize_t most_silent):
        """Opens the whole frames from ``position`` on, at most ``most``, and appends what was in them to ``plaintext``:
        in pieces of several frames.

        Stops before a frame whose size can't be or whose token has an unusual header, behind one of more than
        ``most_silent`` frames in a row without data, and where a frame isn't whole. Gives (the position behind the last
        one, how many, how many of the last ones were without data; ``silent`` were so before).

        Raises :class:`headrace.errors.FramingError` as ``unwrap``; what was in the frames before is in ``plaintext``.
        """
        cdef Py_buffer buffer
        cdef Py_ssize_t opened = 0, room
        PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
        try:
            while opened < most and silent <= most_silent:
                room = self.plaintext_ahead(&buffer, position, most - opened)
                if room < 0:
                    break
                self.open_piece(&buffer, room, &position, &opened, most, &silent, most_silent, plaintext)
            return position, opened, silent
        finally:
            PyBuffer_Release(&buffer)

    cdef Py_ssize_t whole_frame(self, Py_buffer *buffer, Py_ssize_t position) noexcept:
        """Bytes of the token of the frame there; -1 if it isn't whole, not usual, or of a size that can't be."""
        cdef const uint8_t *at = <const uint8_t *> buffer.buf + position
        cdef Py_ssize_t size
        if buffer.len - position < PREFIX:
            return -1
        size = get_size(at)
        if size < self.overhead or size > LARGEST_FRAME or size > buffer.len - position - PREFIX:
            return -1
        return size

    cdef Py_ssize_t plaintext_ahead(self, Py_buffer *buffer, Py_ssize_t position, Py_ssize_t most) noexcept:
        """Bytes that are in the next frames together, as many as make up a piece; -1: no frame can be opened here."""
        cdef Py_ssize_t size, room = -1
        size = self.whole_frame(buffer, position)
        if size < 0 or memcmp(<const uint8_t *> buffer.buf + position + PREFIX, self.header, HEADER):
            return -1
        room = 0
        while size >= 0 and most > 0 and (not room or room + size - self.overhead <= PIECE):
            room += size - self.overhead
            position += PREFIX + size
            most -= 1
            size = self.whole_frame(buffer, position)
        return room

    cdef int open_piece(self, Py_buffer *buffer, Py_ssize_t room, Py_ssize_t *position, Py_ssize_t *opened,
                        Py_ssize_t most, Py_ssize_t *silent, Py_ssize_t most_silent, list plaintext) except -1:
        """One piece of plaintext, of several frames; where one fails, of those before it."""
        cdef PyObject *out = new_bytes(NULL, room)
        cdef const uint8_t *at
        cdef Py_ssize_t size, used = 0
        try:
            while opened[0] < most and silent[0] <= most_silent:
                size = self.whole_frame(buffer, position[0])
                at = <const uint8_t *> buffer.buf + position[0] + PREFIX
                if size < 0 or size - self.overhead > room - used or memcmp(at, self.header, HEADER):
                    break
                self.decrypt(<uint8_t *> bytes_memory(out) + used, at + HEADER, size - self.overhead, self.header)
                self.next_number()
                used += size - self.overhead
                silent[0] = 0 if size > self.overhead else silent[0] + 1
                position[0] += PREFIX + size
                opened[0] += 1
        finally:
            if used:
                if used < room:
                    _PyBytes_Resize(&out, used)
                plaintext.append(<bytes> out)
            Py_XDECREF(out)
        return 0

    cdef int long_enough(self, Py_ssize_t size) except -1:
        if size < self.overhead:
            raise FramingError(f"a token of {size} bytes is too short: {self.overhead} are the least")
        return 0

    cdef int decrypt(self, uint8_t *out, const uint8_t *body, Py_ssize_t size, const uint8_t *header) except -1:
        """``size`` bytes of ``out``: what is between the confounder and the sealed copy of the header."""
        cdef Py_ssize_t whole = BLOCK + size + HEADER
        if self.encrypt_then_mac:
            self.begin_mac()
            self.mac(body, whole)
            self.verify(body + whole)
        if whole <= SMALL:
            self.decrypt_small(out, body, size, header)
        else:
            self.decrypt_large(out, body, size, header)
        return 0

    cdef int verify(self, const uint8_t *checksum) except -1:
        cdef uint8_t[LARGEST_MAC] digest
        self.end_mac(digest)
        if lib.CRYPTO_memcmp(digest, checksum, self.mac_size):
            raise FramingError("an encrypted message has a wrong checksum")
        return 0

    cdef int swap_back(self, uint8_t *end, const uint8_t *last, Py_ssize_t rest) except -1:
        """Two blocks as CBC put them out, of the last one and ``rest`` bytes of the one before."""
        cdef uint8_t[BLOCK] filled
        if rest < BLOCK:
            # What was cut off is what the zeros that filled the last block were XORed with.
            self.begin_message()
            self.crypt(filled, last, BLOCK)
            memcpy(end, filled, BLOCK)
        memcpy(end, last + BLOCK, rest)
        memcpy(end + BLOCK, last, BLOCK)
        return 0

    cdef int decrypt_small(self, uint8_t *out, const uint8_t *body, Py_ssize_t size, const uint8_t *header) except -1:
        cdef uint8_t[SMALL + BLOCK] sealed
        cdef uint8_t[SMALL + BLOCK] plain
        cdef Py_ssize_t whole = BLOCK + size + HEADER
        cdef Py_ssize_t padded = (whole + BLOCK - 1) // BLOCK * BLOCK
        cdef Py_ssize_t straight = padded - 2 * BLOCK
        memcpy(sealed, body, straight)
        self.swap_back(sealed + straight, body + straight, whole - straight - BLOCK)
        self.begin_message()
        self.crypt(plain, sealed, padded)
        if not self.encrypt_then_mac:
            self.begin_mac()
            self.mac(plain, whole)
            self.verify(body + whole)
        same_header(plain + BLOCK + size, header)
        memcpy(out, plain + BLOCK, size)
        return 0

    cdef int decrypt_large(self, uint8_t *out, const uint8_t *body, Py_ssize_t size, const uint8_t *header) except -1:
        """The data's whole blocks go where they are to be; its end and the header are taken from a place of their own.
        """
        cdef uint8_t[BLOCK] confounder
        cdef uint8_t[2 * BLOCK] end
        cdef Py_ssize_t whole = BLOCK + size + HEADER
        cdef Py_ssize_t straight = (whole - 1) // BLOCK * BLOCK - 2 * BLOCK  # of the data
        self.swap_back(end, body + BLOCK + straight, whole - 2 * BLOCK - straight)
        self.begin_message()
        self.crypt(confounder, body, BLOCK)
        self.crypt(out, body + BLOCK, straight)
        self.crypt(end, end, 2 * BLOCK)
        if not self.encrypt_then_mac:
            self.begin_mac()
            self.mac(confounder, BLOCK)
            self.mac(out, straight)
            self.mac(end, size - straight + HEADER)
            self.verify(body + whole)
        same_header(end + size - straight, header)
        memcpy(out + straight, end, size - straight)
        return 0


cdef int same_header(const uint8_t *copy, const uint8_t *header) except -1:
    """But for RRC, which is zero in the copy, and which nobody else looks at."""
    if memcmp(copy, header, 6) or memcmp(copy + 8, header + 8, 8):
        raise FramingError("a token's header isn't the one that was sealed")
    return 0
