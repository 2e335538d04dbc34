"""Kerberos around messages: the Wrap tokens of RFC 4121, made here from the keys that GSSAPI's context had.

MIT's own are five times as slow and more. Sealed tokens are made and opened by the Cython module ``_kerberos``, those
of a whole write or receive at a time, over the interpreter's own OpenSSL. Where that can't be had it's done here, over
the cryptography in ``enctypes.py``, and so it is for unsealed ones. ``HEADRACE_KERBEROS=native`` or ``python`` in the
environment forces one.

Rules
-----
* A token's header says the direction, the key, whether it's encrypted, and a number. All of them must be what is
  expected, in every token and in both directions, whether or not replay or sequence detection was negotiated: the
  next number, no other. TCP loses and swaps nothing, so what is missing, repeated or late was taken out or put in.
* A connection is sealed or it isn't. On a sealed one an unsealed token is refused: it would be genuine, but a peer that
  has begun to send in clear must not go unnoticed. On an unsealed one a sealed token is refused: no peer sends it (who
  seals has said so in the resulting flags), and one way is easier to get right than two.
* We send EC = 0 and RRC = 0 sealed, EC = the checksum's size and RRC = 0 unsealed, as MIT and .NET do. We take any
  rotation, also by more than there is, and any filler (RFC 4121 sections 4.2.3 and 4.2.5): Windows is said to use both.
* RRC isn't protected by anything (RFC 4121 section 4.2.4), so a rotation by a multiple of the body's length is taken
  like none: the message is the same. Every other change of a bit is found: the rest of the header is under the
  checksum, if it's sealed as the copy behind the message.
* That copy must be the header, but for RRC, which is zero there and which neither MIT nor Heimdal looks at.
* Unknown flags are ignored (RFC 4121 section 4.2.2), but they are under the checksum as well.
* The first failure is the last: keys are forgotten, and every later call fails. Errors say what was wrong, and never
  what was in a token.

    header: 05 04 | flags | FF | EC (2) | RRC (2) | number (8)         big-endian
    sealed:   header | encrypted(confounder | message | filler of EC bytes | header) | checksum, rotated by RRC
    unsealed: header | message | checksum of (message | header), rotated by RRC
"""

from __future__ import annotations

import logging
import os
import struct
from typing import Any, NoReturn, Protocol, TypeAlias

from headrace.errors import AuthenticationError, EngineUnavailable, FramingError
from headrace.security.enctypes import (
    BLOCK,
    ENCRYPTION_KEY,
    ENCTYPES,
    INTEGRITY_KEY,
    Checksum,
    Decryptor,
    Encryptor,
    Enctype,
    derive_key,
    supported_enctype,
)

__all__ = ["KerberosProtection", "supported_enctype"]

logger = logging.getLogger("headrace.security")

VARIABLE = "HEADRACE_KERBEROS"

Buffer: TypeAlias = bytes | bytearray | memoryview

HEADER = struct.Struct(">HBBHHQ")  # token, flags, filler, EC, RRC, number
SIZE = HEADER.size
WRAP = 0x0504
FILLER = 0xFF
SENT_BY_ACCEPTOR, SEALED, ACCEPTOR_SUBKEY = 1, 2, 4
KNOWN = SENT_BY_ACCEPTOR | SEALED | ACCEPTOR_SUBKEY
COMPLAINTS = {
    SENT_BY_ACCEPTOR: "comes from our own side",
    SEALED: "isn't sealed on a sealed connection, or the other way round",
    ACCEPTOR_SUBKEY: "is made with another key than the one agreed on",
}
ACCEPTOR_SEAL, INITIATOR_SEAL = 22, 24  # key usages (RFC 4121 section 2), of Wrap tokens of either kind
NUMBERS = 1 << 64


class Sender(Protocol):
    """One direction, outgoing."""

    overhead: int

    def wrap(self, data: Buffer) -> bytes: ...


class Receiver(Protocol):
    """One direction, incoming."""

    def unwrap(self, token: Buffer) -> bytes: ...


# ---- what goes -------------------------------------------------------------------------------------------------------


class SealedSender:
    """Encrypts."""

    __slots__ = ("_encryptor", "_flags", "_number", "overhead")

    def __init__(self, enctype: Enctype, key: bytes, flags: int, number: int) -> None:
        self._encryptor = Encryptor(enctype, key, usage_of(flags))
        self._flags = flags
        self._number = number
        self.overhead = SIZE + BLOCK + SIZE + enctype.mac_size

    def wrap(self, data: Buffer) -> bytes:
        header = HEADER.pack(WRAP, self._flags, FILLER, 0, 0, self._number)
        self._number = (self._number + 1) % NUMBERS
        return self._encryptor.encrypt(header, data, header)


class SignedSender:
    """Adds a checksum."""

    __slots__ = ("_checksum", "_flags", "_number", "overhead")

    def __init__(self, enctype: Enctype, key: bytes, flags: int, number: int) -> None:
        self._checksum = Checksum(enctype, key, usage_of(flags))
        self._flags = flags
        self._number = number
        self.overhead = SIZE + enctype.mac_size

    def wrap(self, data: Buffer) -> bytes:
        number, flags, size = self._number, self._flags, self._checksum.size
        self._number = (number + 1) % NUMBERS
        checksum = self._checksum.of(data, HEADER.pack(WRAP, flags, FILLER, 0, 0, number))
        return b"".join((HEADER.pack(WRAP, flags, FILLER, size, 0, number), data, checksum))


# ---- what comes ------------------------------------------------------------------------------------------------------


class SealedReceiver:
    """Decrypts."""

    __slots__ = ("_decryptor", "_flags", "_number", "_shortest")

    def __init__(self, enctype: Enctype, key: bytes, flags: int, number: int) -> None:
        self._decryptor = Decryptor(enctype, key, usage_of(flags))
        self._flags = flags
        self._number = number
        self._shortest = SIZE + BLOCK + SIZE + enctype.mac_size

    def unwrap(self, token: Buffer) -> bytes:
        view = memoryview(token)
        if len(view) < self._shortest:
            raise too_short(view, self._shortest)
        header = view[:SIZE].tobytes()
        usual = HEADER.pack(WRAP, self._flags, FILLER, 0, 0, self._number)
        filler, body = 0, view[SIZE:]
        if header != usual:
            filler, body = unusual(header, view, self._flags, self._number, self._shortest)
        plain = self._decryptor.decrypt(body)
        end = len(plain) - SIZE
        copy = plain[end:].tobytes()
        if copy != header and (copy[:6] != header[:6] or copy[8:] != header[8:]):
            raise FramingError("a token's header isn't the one that was sealed")
        self._number = (self._number + 1) % NUMBERS
        return plain[: end - filler].tobytes()


class SignedReceiver:
    """Checks the checksum."""

    __slots__ = ("_checksum", "_flags", "_number", "_shortest")

    def __init__(self, enctype: Enctype, key: bytes, flags: int, number: int) -> None:
        self._checksum = Checksum(enctype, key, usage_of(flags))
        self._flags = flags
        self._number = number
        self._shortest = SIZE + enctype.mac_size

    def unwrap(self, token: Buffer) -> bytes:
        view = memoryview(token)
        if len(view) < self._shortest:
            raise too_short(view, self._shortest)
        header = view[:SIZE].tobytes()
        size, rotation = check_header(header, self._flags, self._number)
        if size != self._checksum.size:
            raise FramingError(f"a token says that its checksum has {size} bytes, not {self._checksum.size}")
        body = rotated_back(view[SIZE:], rotation)
        data = body[:-size]
        if not self._checksum.matches(data, header[:4] + b"\0\0\0\0" + header[8:], body[-size:]):
            raise FramingError("a token has a wrong checksum")
        self._number = (self._number + 1) % NUMBERS
        return data.tobytes()


# ---- the same by _kerberos -------------------------------------------------------------------------------------------


class NativeSender:
    """Encrypts; whole writes, too."""

    __slots__ = ("_sealer", "overhead", "wrap", "wrap_frames")

    def __init__(self, enctype: Enctype, key: bytes, flags: int, number: int) -> None:
        from headrace._kerberos import Sealer

        self._sealer = Sealer(*native_arguments(enctype, key, flags, number))
        self.overhead = self._sealer.overhead
        self.wrap = self._sealer.wrap
        self.wrap_frames = self._sealer.wrap_frames


class NativeReceiver:
    """Decrypts; whole receives, too."""

    __slots__ = ("_flags", "_opener", "unwrap_frames")

    def __init__(self, enctype: Enctype, key: bytes, flags: int, number: int) -> None:
        from headrace._kerberos import Opener

        self._flags = flags
        self._opener = Opener(*native_arguments(enctype, key, flags, number))
        self.unwrap_frames = self._opener.unwrap_frames

    def unwrap(self, token: Buffer) -> bytes:
        opener = self._opener
        data = opener.unwrap(token)
        if data is not None:
            return data
        view = memoryview(token)
        header = view[:SIZE].tobytes()
        filler, body = unusual(header, view, self._flags, opener.number, opener.overhead)
        return opener.open(header, body, filler)


def native_arguments(
    enctype: Enctype, key: bytes, flags: int, number: int
) -> tuple[bytes, bytes, str, int, bool, int, int]:
    keys = (derive_key(enctype, key, usage_of(flags), purpose) for purpose in (ENCRYPTION_KEY, INTEGRITY_KEY))
    encryption_key, integrity_key = keys
    hash_name, then_mac = enctype.hash.name, enctype.encrypt_then_mac
    return encryption_key, integrity_key, hash_name, enctype.mac_size, then_mac, flags, number


_reason: str | None = None  # as native_reason() has found out


def native_reason() -> str:
    """Why ``_kerberos`` can't be used here; ``""`` if it can. It's tried out, once."""
    global _reason
    if _reason is None:
        _reason = try_native()
    return _reason


def try_native() -> str:
    try:
        from headrace import _kerberos
    except ImportError as error:
        return str(error)
    problem = _kerberos.load()
    if problem:
        return problem
    try:
        for enctype in ENCTYPES.values():
            self_test(enctype)
    except (FramingError, RuntimeError) as error:
        return f"its self-test failed: {error}"
    return ""


def self_test(enctype: Enctype) -> None:
    """Messages each way between the two kinds; RuntimeError or FramingError if something doesn't fit."""
    key = bytes(range(enctype.key_size))
    for sender, receiver in ((NativeSender, SealedReceiver), (SealedSender, NativeReceiver)):
        to, back = sender(enctype, key, SEALED, 1), receiver(enctype, key, SEALED, 1)
        for size in (0, 33, 1000):
            message = bytes(size)
            if back.unwrap(to.wrap(message)) != message:
                raise RuntimeError(f"what was sealed and what was opened differ with {enctype.name}")


def sealed_kinds(wanted: str) -> tuple[type[Sender], type[Receiver]]:
    """What seals and opens, for a value of the variable."""
    if wanted not in ("", "python", "native"):
        raise ValueError(f"{VARIABLE} must be 'python' or 'native', not {wanted!r}")
    if wanted == "python":
        return SealedSender, SealedReceiver
    if reason := native_reason():
        if wanted:
            raise EngineUnavailable(
                f"{VARIABLE}=native can't be had here: {reason}. Unset it, or use another Python"
            )
        logger.debug("Kerberos tokens are made in Python; the native module can't be used here: %s", reason)
        return SealedSender, SealedReceiver
    return NativeSender, NativeReceiver


# ---- what they have in common ----------------------------------------------------------------------------------------


def too_short(view: memoryview, shortest: int) -> FramingError:
    return FramingError(f"a token of {len(view)} bytes is too short: {shortest} are the least")


def check_header(header: bytes, flags: int, number: int) -> tuple[int, int]:
    """(EC, RRC) of a token that is otherwise the one expected."""
    token, its_flags, filler, extra, rotation, its_number = HEADER.unpack(header)
    if token != WRAP or filler != FILLER:
        raise FramingError("what came isn't a Wrap token of RFC 4121")
    if wrong := (its_flags ^ flags) & KNOWN:
        complaint = next(text for flag, text in COMPLAINTS.items() if wrong & flag)
        raise FramingError(f"a token {complaint}")
    if its_number != number:
        what = "was repeated or is late" if its_number < number else "came too early: others are missing"
        raise FramingError(f"token number {its_number} {what}; {number} is the next")
    return extra, rotation


def unusual(
    header: bytes, view: memoryview, flags: int, number: int, shortest: int
) -> tuple[int, memoryview]:
    """(how much filler there is, the body in order) of a token with EC or RRC; most others end here."""
    filler, rotation = check_header(header, flags, number)
    if filler > len(view) - shortest:
        raise FramingError(f"a token of {len(view)} bytes says that {filler} of them are filler")
    return filler, rotated_back(view[SIZE:], rotation)


def rotated_back(body: memoryview, rotation: int) -> memoryview:
    """What the sender had before it moved the last ``rotation`` bytes to the front, one by one."""
    rotation %= len(body)
    return memoryview(b"".join((body[rotation:], body[:rotation]))) if rotation else body


def usage_of(flags: int) -> int:
    """The key usage of a direction. MIT and Heimdal use that of sealing for unsealed Wrap tokens, too."""
    return ACCEPTOR_SEAL if flags & SENT_BY_ACCEPTOR else INITIATOR_SEAL


# ---- both ------------------------------------------------------------------------------------------------------------


class Lost:
    """Both directions, after a failure."""

    overhead = 0

    def wrap(self, data: Buffer, frame_size: int = 0) -> NoReturn:
        raise FramingError("nothing can be protected any more: an earlier token has failed")

    def unwrap(self, token: Buffer, *more: object) -> NoReturn:
        raise FramingError("nothing can be trusted any more: an earlier token has failed")

    wrap_frames = wrap
    unwrap_frames = unwrap


class KerberosProtection:
    """Wrap tokens in both directions of one connection (RFC 4121 section 4.2): a ``MessageProtection``.

    Parameters
    ----------
    enctype : int
        The number of an encryption type for which :func:`supported_enctype` is true.
    key : bytes
        The context's key: the acceptor's subkey if there's one.
    initiator : bool
        Whether we are the client.
    acceptor_subkey : bool
        Whether that key is the acceptor's subkey. Tokens say so.
    send_sequence, receive_sequence : int
        The numbers of the first token in each direction.
    sealed : bool
        Whether messages are encrypted. They are always signed.

    Attributes
    ----------
    sealed : bool
    overhead : int
        Bytes that a token is longer than its message: 60, 64 or 72 sealed, 28, 32 or 40 signed only.
    enctype : int
    in_batches : bool
        Whether ``wrap_frames`` and ``unwrap_frames`` can be used.

    Raises ``ValueError`` for an encryption type, a key or a number that can't be. Not thread-safe; nothing blocks.
    A sealed connection keeps up to 32 KiB of working space once messages have gone both ways.
    """

    __slots__ = ("_receiver", "_sender", "enctype", "in_batches", "overhead", "sealed")

    def __init__(
        self,
        *,
        enctype: int,
        key: bytes,
        initiator: bool,
        acceptor_subkey: bool,
        send_sequence: int,
        receive_sequence: int,
        sealed: bool,
    ) -> None:
        kind = ENCTYPES.get(enctype)
        if kind is None:
            raise ValueError(f"encryption type {enctype} isn't one of {', '.join(map(str, ENCTYPES))}")
        if len(key) != kind.key_size:
            raise ValueError(f"a key of {kind.name} has {kind.key_size} bytes, not {len(key)}")
        if not (0 <= send_sequence < NUMBERS and 0 <= receive_sequence < NUMBERS):
            raise ValueError("sequence numbers have 64 bits")
        self.enctype = enctype
        self.sealed = sealed
        shared = (SEALED if sealed else 0) | (ACCEPTOR_SUBKEY if acceptor_subkey else 0)
        ours, theirs = (0, SENT_BY_ACCEPTOR) if initiator else (SENT_BY_ACCEPTOR, 0)
        sender: Any = SignedSender
        receiver: Any = SignedReceiver
        if sealed:
            sender, receiver = sealed_kinds(os.environ.get(VARIABLE, ""))
        self._sender: Any = sender(kind, key, shared | ours, send_sequence)
        self._receiver: Any = receiver(kind, key, shared | theirs, receive_sequence)
        self.overhead = self._sender.overhead
        self.in_batches = sender is NativeSender

    @classmethod
    def from_lucid(cls, lucid: Any, *, sealed: bool) -> KerberosProtection:
        """From what ``gssapi.raw.ext_krb5.krb5_export_lucid_sec_context(context, 1)`` gives.

        ``sealed`` is the confidentiality in the context's resulting flags. The export destroys the context, so
        there is no way back to GSSAPI's own tokens: ask :func:`supported_enctype` before. And no message may have been
        sent or received yet: the numbers are those of the first ones.

        Raises :class:`headrace.errors.AuthenticationError` for a context with tokens of another kind (RFC 1964) or
        with an encryption type that isn't supported.
        """
        keys = lucid.cfx_kd
        if lucid.protocol != 1 or keys is None:
            raise AuthenticationError(
                "the Kerberos context has tokens of RFC 1964 (DES, RC4), which are refused"
            )
        subkey = keys.acceptor_subkey
        enctype = keys.ctx_key_type if subkey is None else keys.acceptor_subkey_type
        if not supported_enctype(enctype):
            raise AuthenticationError(
                f"the Kerberos context has encryption type {enctype}, which isn't supported"
            )
        return cls(
            enctype=enctype,
            key=keys.ctx_key if subkey is None else subkey,
            initiator=bool(lucid.is_initiator),
            acceptor_subkey=subkey is not None,
            send_sequence=lucid.send_seq,
            receive_sequence=lucid.recv_seq,
            sealed=sealed,
        )

    def wrap(self, data: Buffer) -> bytes:
        """The next token, around ``data``: bytes, of any number.

        Raises :class:`headrace.errors.FramingError` after an earlier failure. ``TypeError`` or ``BufferError`` for what
        isn't a contiguous buffer of bytes is a failure, too.
        """
        try:
            token: bytes = self._sender.wrap(data)
        except BaseException:
            self._fail()
            raise
        return token

    def wrap_frames(self, data: Buffer, frame_size: int) -> bytes:
        """All of ``data`` as frames of NegotiateStream, each with a token around at most ``frame_size`` bytes."""
        try:
            frames: bytes = self._sender.wrap_frames(data, frame_size)
        except BaseException:
            self._fail()
            raise
        return frames

    def unwrap(self, token: Buffer) -> bytes:
        """What is in the next token of the peer's; may be empty.

        Raises :class:`headrace.errors.FramingError` for one that isn't the peer's next, whole and as protected as
        agreed, and after an earlier failure.
        """
        try:
            data: bytes = self._receiver.unwrap(token)
        except BaseException:
            self._fail()
            raise
        return data

    def unwrap_frames(
        self,
        view: memoryview,
        position: int,
        most: int,
        plaintext: list[bytes],
        silent: int,
        most_silent: int,
    ) -> tuple[int, int, int]:
        """What is in the frames from ``position`` on; see ``headrace._kerberos.Opener.unwrap_frames``."""
        try:
            result: tuple[int, int, int] = self._receiver.unwrap_frames(
                view, position, most, plaintext, silent, most_silent
            )
        except BaseException:
            self._fail()
            raise
        return result

    def _fail(self) -> None:
        """A cipher may have stopped in the middle, and a peer that has forged once isn't to try again."""
        self._sender = self._receiver = Lost()

    def __repr__(self) -> str:
        state = " lost" if isinstance(self._sender, Lost) else ""
        kind = "sealed" if self.sealed else "signed"
        return f"<KerberosProtection {ENCTYPES[self.enctype].name} {kind}{state}>"
