"""Messages in a stream of bytes, without I/O: how they are told apart, and how long one may be.

Rules
-----
* A framing is a description: immutable, shared by any number of connections. ``decoder()`` makes what keeps the state
  of one stream.
* A decoder takes bytes however they are cut, and gives whole messages. It holds at most one message's limit and what it
  was last fed.
* A length is judged as soon as it's known: nobody makes us wait for what wouldn't be taken.
* What breaks a framing's rules is MessageError, and the decoder says so from then on: there's no way back into step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from headrace.errors import MessageError

if TYPE_CHECKING:
    from headrace._pool import Lease

    _Data = bytes | bytearray | memoryview | Lease

__all__ = ["LIMIT", "Decoder", "Delimited", "Framing", "LengthPrefixed", "Netstrings"]

LIMIT = 1024 * 1024  # bytes of a message


class Framing(Protocol):
    """What tells messages apart."""

    def decoder(self) -> Decoder:
        """For one stream, from its beginning."""

    def encode(self, message: bytes) -> list[bytes]:
        """The message as it's sent, in pieces that needn't be joined. Raises MessageError."""


class Decoder:
    """One stream's messages. Not thread-safe."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._broken: MessageError | None = None

    def feed(self, data: _Data) -> None:
        """Bytes that came; they are copied."""
        self._buffer += data

    def next(self) -> bytes | None:
        """The next message, if it's whole.

        Raises
        ------
        MessageError
            What came isn't in this framing, or its message is longer than allowed.
        """
        if self._broken is not None:
            raise self._broken
        try:
            return self._next()
        except MessageError as exc:
            self._broken = exc
            raise

    @property
    def partial(self) -> bytes:
        """What has come of the next message, framing included."""
        return bytes(self._buffer)

    def _next(self) -> bytes | None:
        raise NotImplementedError

    def _cut(self, start: int, end: int, behind: int) -> bytes:
        """Takes ``start`` to ``end`` out, and everything before ``behind`` away."""
        message = bytes(memoryview(self._buffer)[start:end])
        del self._buffer[:behind]
        return message


def check_length(size: int, limit: int) -> None:
    if size > limit:
        raise MessageError(f"a message of {size} bytes; at most {limit} are taken (limit=)")


def check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit must be at least 1 byte, not {limit!r}")


@dataclass(frozen=True, slots=True)
class LengthPrefixed:
    """A length, then that many bytes.

    Parameters
    ----------
    size : {1, 2, 4, 8}
        Bytes of the length.
    byteorder : {"big", "little"}
    limit : int
        Bytes of a message, at most.
    """

    size: int = 4
    byteorder: Literal["big", "little"] = "big"
    limit: int = LIMIT

    def __post_init__(self) -> None:
        if self.size not in (1, 2, 4, 8) or self.byteorder not in ("big", "little"):
            raise ValueError(f"a length has 1, 2, 4 or 8 bytes, big or little: not {self!r}")
        check_limit(self.limit)

    def decoder(self) -> Decoder:
        """See :class:`Framing`."""
        return LengthPrefixedDecoder(self)

    def encode(self, message: bytes) -> list[bytes]:
        """See :class:`Framing`."""
        check_length(len(message), min(self.limit, 256**self.size - 1))
        return [len(message).to_bytes(self.size, self.byteorder), message]


class LengthPrefixedDecoder(Decoder):
    """See :class:`LengthPrefixed`."""

    def __init__(self, framing: LengthPrefixed) -> None:
        super().__init__()
        self._framing = framing

    def _next(self) -> bytes | None:
        framing, buffer = self._framing, self._buffer
        header = framing.size
        if len(buffer) < header:
            return None
        size = int.from_bytes(buffer[:header], framing.byteorder)
        check_length(size, framing.limit)
        end = header + size
        return self._cut(header, end, end) if len(buffer) >= end else None


@dataclass(frozen=True, slots=True)
class Delimited:
    """Messages with a delimiter behind each; one with the delimiter in it can't be sent.

    Parameters
    ----------
    delimiter : bytes
    limit : int
        Bytes of a message without its delimiter, at most.
    """

    delimiter: bytes = b"\n"
    limit: int = LIMIT

    def __post_init__(self) -> None:
        if not self.delimiter:
            raise ValueError("a delimiter has at least one byte")
        check_limit(self.limit)

    def decoder(self) -> Decoder:
        """See :class:`Framing`."""
        return DelimitedDecoder(self)

    def encode(self, message: bytes) -> list[bytes]:
        """See :class:`Framing`."""
        check_length(len(message), self.limit)
        # Also one that only begins in the message and ends in the delimiter behind it.
        if (message + self.delimiter).find(self.delimiter) != len(message):
            raise MessageError(f"the message has the delimiter {self.delimiter!r} in it")
        return [message, self.delimiter]


class DelimitedDecoder(Decoder):
    """See :class:`Delimited`."""

    def __init__(self, framing: Delimited) -> None:
        super().__init__()
        self._framing = framing
        self._searched = 0  # bytes in which no delimiter begins

    def _next(self) -> bytes | None:
        delimiter, limit = self._framing.delimiter, self._framing.limit
        at = self._buffer.find(delimiter, self._searched)
        if at < 0:
            self._searched = max(0, len(self._buffer) - len(delimiter) + 1)
            check_length(self._searched, limit)
            return None
        check_length(at, limit)
        self._searched = 0
        return self._cut(0, at, at + len(delimiter))


@dataclass(frozen=True, slots=True)
class Netstrings:
    """``5:hello,``: see D. J. Bernstein's specification.

    Parameters
    ----------
    limit : int
        Bytes of a message, at most.
    """

    limit: int = LIMIT

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def decoder(self) -> Decoder:
        """See :class:`Framing`."""
        return NetstringsDecoder(self)

    def encode(self, message: bytes) -> list[bytes]:
        """See :class:`Framing`."""
        check_length(len(message), self.limit)
        return [b"%d:" % len(message), message, b","]


class NetstringsDecoder(Decoder):
    """See :class:`Netstrings`."""

    def __init__(self, framing: Netstrings) -> None:
        super().__init__()
        self._longest = framing.limit

    def _next(self) -> bytes | None:
        buffer = self._buffer
        colon = buffer.find(b":", 0, len(str(self._longest)) + 1)
        digits = bytes(buffer[: colon if colon >= 0 else len(str(self._longest)) + 1])
        if (digits and not digits.isdigit()) or (digits[:1] == b"0" and len(digits) > 1) or colon == 0:
            raise MessageError(f"no netstring: its length is {digits[:20]!r}")
        if digits:
            check_length(int(digits), self._longest)
        if colon < 0:
            return None
        end = colon + 1 + int(digits)
        if len(buffer) <= end:
            return None
        if buffer[end] != ord(","):
            raise MessageError("no netstring: there's no comma behind it")
        return self._cut(colon + 1, end, end + 1)
