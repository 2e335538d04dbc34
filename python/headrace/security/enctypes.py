"""Kerberos encryption types: keys from a key, and encryption and checksums with them. RFC 3961, 3962 and 8009.

Rules
-----
* Encryption types 17 and 18 (AES with HMAC-SHA1-96) and 19 and 20 (AES with HMAC-SHA2), no others: what else is in use
  is DES or RC4, or needs ciphers that nobody asks for.
* Setting up a cipher costs more than encrypting 1 KiB, so each direction has one for its lifetime, in CBC mode, and
  every message must still begin with an IV of zero. A decryptor is given a block of zeros first: the IV of what follows
  is the ciphertext before it. An encryptor is given the confounder XOR the block that it put out last, which undoes
  CBC's own XOR; the confounder itself is what the peer decrypts and what is under the checksum.
* So the state of a direction is right only as long as nothing fails in it: after any exception it mustn't be used.
* The checksum of types 17 and 18 is over the plaintext, so it's decrypted first; nothing of it is looked at before the
  checksum was right. That of types 19 and 20 is over the ciphertext, and nothing is decrypted before.
* Checksums are compared in constant time.
* Connections don't survive a fork: parent and child would have the same confounders ahead, and the same numbers.

The last two blocks are always swapped, also when the last one is full (RFC 3962 section 5: "CBC-CS3").
"""

from __future__ import annotations

import hmac
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hmac import HMAC

from headrace.errors import FramingError

__all__ = [
    "BLOCK",
    "CHECKSUM_KEY",
    "ENCRYPTION_KEY",
    "ENCTYPES",
    "INTEGRITY_KEY",
    "Checksum",
    "Decryptor",
    "Encryptor",
    "Enctype",
    "derive_key",
    "nfold",
    "supported_enctype",
]

Buffer: TypeAlias = bytes | bytearray | memoryview

BLOCK = 16  # bytes of an AES block, and of a confounder
ZERO = bytes(BLOCK)
KEPT = 16 * 1024  # bytes of working space that a direction keeps; a larger message gets its own
CONFOUNDERS = 64  # that many are taken from the kernel at a time: five times as fast as a call for each

# What a derived key is for (RFC 3961 section 5.3).
CHECKSUM_KEY = 0x99
ENCRYPTION_KEY = 0xAA
INTEGRITY_KEY = 0x55


@dataclass(frozen=True, slots=True)
class Enctype:
    """One encryption type; sizes in bytes."""

    number: int
    name: str
    key_size: int
    mac_key_size: int
    mac_size: int
    hash: hashes.HashAlgorithm
    encrypt_then_mac: bool  # RFC 8009: another key derivation, and the checksum is over the ciphertext


ENCTYPES = {
    each.number: each
    for each in (
        Enctype(17, "aes128-cts-hmac-sha1-96", 16, 16, 12, hashes.SHA1(), False),
        Enctype(18, "aes256-cts-hmac-sha1-96", 32, 32, 12, hashes.SHA1(), False),
        Enctype(19, "aes128-cts-hmac-sha256-128", 16, 16, 16, hashes.SHA256(), True),
        Enctype(20, "aes256-cts-hmac-sha384-192", 32, 24, 24, hashes.SHA384(), True),
    )
}


def supported_enctype(number: int) -> bool:
    """Whether tokens of this encryption type can be made here."""
    return number in ENCTYPES


# ---- keys ------------------------------------------------------------------------------------------------------------


def nfold(data: bytes, size: int) -> bytes:
    """``data`` stretched or shrunk to ``size`` bytes (RFC 3961 section 5.1).

    Copies of it, each rotated to the right by 13 bits more than the one before, up to a length that is a multiple of
    both; and that cut into numbers of ``size`` bytes, added up in ones' complement.
    """
    bits = 8 * len(data)
    value = int.from_bytes(data, "big")
    copies = bytearray()
    for turn in range(math.lcm(len(data), size) // len(data)):
        shift = 13 * turn % bits
        rotated = value >> shift | value << (bits - shift) & ((1 << bits) - 1)
        copies += rotated.to_bytes(len(data), "big")
    total = sum(int.from_bytes(copies[at : at + size], "big") for at in range(0, len(copies), size))
    limit = 1 << 8 * size
    while total >= limit:
        total = total % limit + total // limit
    return total.to_bytes(size, "big")


def derive_key(enctype: Enctype, key: bytes, usage: int, purpose: int) -> bytes:
    """The key for one use and one purpose: Kc, Ke or Ki.

    RFC 3961 section 5.1 ("DK") for types 17 and 18, RFC 8009 section 3 for types 19 and 20.
    """
    constant = struct.pack(">IB", usage, purpose)
    if not enctype.encrypt_then_mac:
        # DK is a block encrypted, and that encrypted again: CBC over zeros.
        encryptor = Cipher(algorithms.AES(key), modes.CBC(ZERO)).encryptor()
        return encryptor.update(nfold(constant, BLOCK) + bytes(enctype.key_size - BLOCK))
    size = enctype.key_size if purpose == ENCRYPTION_KEY else enctype.mac_key_size
    mac = HMAC(key, enctype.hash)
    mac.update(b"\0\0\0\1" + constant + b"\0" + struct.pack(">I", 8 * size))
    return mac.finalize()[:size]


def confounders() -> Iterator[bytes]:
    """Random blocks without an end."""
    while True:
        for (confounder,) in struct.iter_unpack("16s", os.urandom(CONFOUNDERS * BLOCK)):
            yield confounder


# ---- messages --------------------------------------------------------------------------------------------------------


def cipher(enctype: Enctype, key: bytes, usage: int) -> Cipher[modes.CBC]:
    return Cipher(algorithms.AES(derive_key(enctype, key, usage, ENCRYPTION_KEY)), modes.CBC(ZERO))


def keyed_mac(enctype: Enctype, key: bytes, usage: int) -> HMAC:
    """To be copied for each message."""
    mac = HMAC(derive_key(enctype, key, usage, INTEGRITY_KEY), enctype.hash)
    if enctype.encrypt_then_mac:
        mac.update(ZERO)  # the IV is under the checksum (RFC 8009 section 5)
    return mac


class Checksum:
    """Checksums under one key: of messages that aren't encrypted (RFC 3961 section 5.4, "get_mic")."""

    __slots__ = ("_keyed", "size")

    def __init__(self, enctype: Enctype, key: bytes, usage: int) -> None:
        self._keyed = HMAC(derive_key(enctype, key, usage, CHECKSUM_KEY), enctype.hash)
        self.size = enctype.mac_size

    def of(self, data: Buffer, trailer: bytes) -> bytes:
        """The checksum of both, one behind the other."""
        mac = self._keyed.copy()
        mac.update(data)
        mac.update(trailer)
        return mac.finalize()[: self.size]

    def matches(self, data: Buffer, trailer: bytes, checksum: Buffer) -> bool:
        """Whether that is it."""
        return hmac.compare_digest(self.of(data, trailer), checksum)


class WithSpace:
    """Working space that is kept from message to message. Nobody else's: it has plaintext in it."""

    __slots__ = ("_space",)

    def __init__(self) -> None:
        self._space = memoryview(b"")

    def _more_space(self, size: int) -> memoryview:
        if size > KEPT:
            return memoryview(bytearray(size))
        self._space = memoryview(bytearray(min(2 * size, KEPT)))
        return self._space


class Encryptor(WithSpace):
    """Encrypts messages under one key. Not thread-safe; not to be used after an exception.

    Parameters
    ----------
    enctype : Enctype
    key : bytes
        The one that others are derived from.
    usage : int
        RFC 3961's key usage number.
    random : iterator of bytes, optional
        The confounders; for tests.
    """

    __slots__ = ("_encryptor", "_keyed", "_last", "_mac_of_ciphertext", "_mac_size", "_random")

    def __init__(
        self, enctype: Enctype, key: bytes, usage: int, random: Iterator[bytes] | None = None
    ) -> None:
        super().__init__()
        self._encryptor = cipher(enctype, key, usage).encryptor()
        self._keyed = keyed_mac(enctype, key, usage)
        self._mac_of_ciphertext = enctype.encrypt_then_mac
        self._mac_size = enctype.mac_size
        self._last = 0  # the block that it put out last, as a number; at first the IV
        self._random = random or confounders()

    def encrypt(self, before: bytes, data: Buffer, behind: bytes) -> bytes:
        """``before`` as it is, ``data`` and ``behind`` encrypted as one message, and the checksum.

        What is encrypted is a byte at least.
        """
        confounder = next(self._random)
        plain = bytearray().join((confounder, data, behind))
        rest = len(plain) % BLOCK
        checksum = b""
        if not self._mac_of_ciphertext:
            mac = self._keyed.copy()
            mac.update(plain)
            checksum = mac.finalize()[: self._mac_size]
        if rest:
            plain += ZERO[rest:]
        plain[:BLOCK] = (int.from_bytes(confounder, "little") ^ self._last).to_bytes(BLOCK, "little")
        size = len(plain)
        space = self._space
        if len(space) < size + BLOCK:
            space = self._more_space(size + BLOCK)
        self._encryptor.update_into(plain, space)
        last = space[size - BLOCK : size]
        self._last = int.from_bytes(last, "little")
        tail = size - 2 * BLOCK
        parts = (before, space[:tail], last, space[tail : tail + (rest or BLOCK)], checksum)
        return b"".join(parts) if checksum else self._with_mac_of_ciphertext(parts)

    def _with_mac_of_ciphertext(self, parts: tuple[Buffer, ...]) -> bytes:
        mac = self._keyed.copy()
        for part in parts[1:4]:
            mac.update(part)
        return b"".join((*parts[:4], mac.finalize()[: self._mac_size]))


class Decryptor(WithSpace):
    """Decrypts messages under one key. Not thread-safe; not to be used after an exception."""

    __slots__ = ("_decryptor", "_keyed", "_mac_of_ciphertext", "_mac_size")

    def __init__(self, enctype: Enctype, key: bytes, usage: int) -> None:
        super().__init__()
        self._decryptor = cipher(enctype, key, usage).decryptor()
        self._keyed = keyed_mac(enctype, key, usage)
        self._mac_of_ciphertext = enctype.encrypt_then_mac
        self._mac_size = enctype.mac_size

    def decrypt(self, message: memoryview) -> memoryview:
        """What is behind the confounder. It stays unchanged until the next call.

        Raises :class:`headrace.errors.FramingError` for a message in which there is nothing but a confounder and a
        checksum, or not even those, and for a wrong checksum.
        """
        size = len(message) - self._mac_size
        if size <= BLOCK:
            raise FramingError("an encrypted message is too short for what must be in it")
        if self._mac_of_ciphertext:
            self._verify(message[:size], message[size:])
        ciphertext = self._in_cbc_order(message, size)
        space = self._space
        if len(space) < len(ciphertext) + BLOCK:
            space = self._more_space(len(ciphertext) + BLOCK)
        self._decryptor.update_into(ciphertext, space)
        if not self._mac_of_ciphertext:
            self._verify(space[BLOCK : BLOCK + size], message[size:])
        return space[2 * BLOCK : BLOCK + size]

    def _in_cbc_order(self, message: memoryview, size: int) -> bytes:
        """A block of zeros, and the ciphertext with its last blocks as CBC put them out."""
        rest = size % BLOCK
        tail = size - BLOCK - (rest or BLOCK)
        last, before = message[tail : tail + BLOCK], message[tail + BLOCK : size]
        if not rest:
            return b"".join((ZERO, message[:tail], before, last))
        # What was cut off the last block but one is what the zeros that filled the last one were XORed with.
        filled = self._decryptor.update(ZERO + last.tobytes())
        return b"".join((ZERO, message[:tail], before, filled[BLOCK + rest :], last))

    def _verify(self, data: memoryview, checksum: memoryview) -> None:
        mac = self._keyed.copy()
        mac.update(data)
        if not hmac.compare_digest(mac.finalize()[: self._mac_size], checksum):
            raise FramingError("an encrypted message has a wrong checksum")
