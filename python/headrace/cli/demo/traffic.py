"""What travels over the demo's connections, and the check of every byte of it.

A connection carries messages of one size, back to back. A message is a header of 16 bytes and a body:

- the header is a time on CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share, and the same
  number XORed with a key that depends on the connection and on the message's number. So each of its bits is
  checked;
- the body is cut from one block of random bytes, at an offset that depends on connection and message. Bytes
  that are lost, doubled, swapped, or that belong to another connection don't match.

The check compares whole chunks as they come: ``bytes.startswith(chunk, offset)`` is one ``memcmp`` and
accepts any buffer, so neither a lease nor the pattern is ever copied.

In one-way mode a connection starts with a greeting of 16 bytes that tells the server its number.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from time import monotonic_ns

from headrace._pool import Lease
from headrace.cli.demo.histogram import LatencyHistogram

__all__ = ["GREETING", "HEADER", "MAGIC", "MessageSource", "StreamCheck", "WrongBytesError"]

HEADER = struct.Struct("<QQ")
GREETING = struct.Struct("<8sII")
MAGIC = b"headrace"
# Offsets into the pattern go round in a prime number of steps: all of them are used, by strides that share no
# factor. Small, so that the pattern of 64 KiB messages stays in the processor's second-level cache.
_PERIOD = 4093
_CONNECTION_STRIDE = 97
_MESSAGE_STRIDE = 61
_KEY = 0x9E37_79B9_7F4A_7C15
_MASK = (1 << 64) - 1


class WrongBytesError(Exception):
    """A connection carried something else than what was sent."""


def make_pattern(size: int) -> bytes:
    """The random bytes that bodies of ``size``-byte messages are cut from; the same in every process."""
    return random.Random(0).randbytes(size + _PERIOD)


def _offset(connection: int, number: int) -> int:
    return (connection * _CONNECTION_STRIDE + number * _MESSAGE_STRIDE) % _PERIOD


def _key(connection: int, number: int) -> int:
    return ((connection << 40 ^ number) * _KEY) & _MASK


class MessageSource:
    """Makes the messages of a run. ``size`` is a whole message's: at least the header's 16 bytes."""

    def __init__(self, size: int) -> None:
        self._body = size - HEADER.size
        self._pattern = memoryview(make_pattern(size))

    def message(self, connection: int, number: int, stamp: int) -> bytes:
        """Message ``number`` of ``connection``, stamped with a time in nanoseconds."""
        offset = _offset(connection, number)
        header = HEADER.pack(stamp, stamp ^ _key(connection, number))
        return b"".join((header, self._pattern[offset : offset + self._body]))


class StreamCheck:
    """Checks what one connection carries, chunk by chunk, and records when each message was there as a whole.

    ``on_message`` is called after each message, without arguments.
    """

    __slots__ = (
        "_at",
        "_base",
        "_header",
        "_latencies",
        "_on_message",
        "_pattern",
        "_size",
        "_stamp",
        "connection",
        "last_arrival",
        "messages",
    )

    def __init__(
        self,
        connection: int,
        size: int,
        pattern: bytes,
        latencies: LatencyHistogram,
        on_message: Callable[[], None] | None = None,
    ) -> None:
        self.connection = connection
        self.messages = 0
        self.last_arrival = 0  # nanoseconds
        self._size = size
        self._pattern = pattern
        self._latencies = latencies
        self._on_message = on_message
        self._header = bytearray()
        self._at = 0  # position in the current message
        self._base = 0  # where position 0 of the current message would lie in the pattern
        self._stamp = 0

    @property
    def received(self) -> int:
        """Bytes that came and were right."""
        return self.messages * self._size + self._at

    def feed(self, data: bytes | bytearray | memoryview | Lease) -> None:
        """The next bytes. Raises :class:`WrongBytesError`; the stream can't be checked further then."""
        at = self._at
        length = len(data)
        # Two cases that are usual when messages are large, and far cheaper than the general one below.
        if at == 0 and HEADER.size < length <= self._size:  # a message from its beginning
            self._read_header(data)
            with memoryview(data) as view, view[HEADER.size :] as body:
                self._compare(body, HEADER.size)
        elif HEADER.size <= at and at + length <= self._size:  # more of its body
            self._compare(data, at)
        else:
            with memoryview(data) as view:
                self._feed_pieces(view, length)
            return
        self._at = at + length
        if self._at == self._size:
            self._complete()

    def _feed_pieces(self, view: memoryview, length: int) -> None:
        position = 0
        while position < length:
            at = self._at
            if at < HEADER.size:
                taken = min(HEADER.size - at, length - position)
                self._header += view[position : position + taken]
                if at + taken == HEADER.size:
                    self._read_header(self._header)
                    self._header.clear()
            else:
                taken = min(self._size - at, length - position)
                # Closed at once: a lease can't be released while something looks at it.
                with view[position : position + taken] as piece:
                    self._compare(piece, at)
            position += taken
            self._at = at + taken
            if self._at == self._size:
                self._complete()

    def _read_header(self, data: bytes | bytearray | memoryview | Lease) -> None:
        self._stamp, check = HEADER.unpack_from(data)
        number = self.messages
        if self._stamp ^ check != _key(self.connection, number):
            self._wrong()
        self._base = _offset(self.connection, number) - HEADER.size

    def _compare(self, data: bytes | bytearray | memoryview | Lease, at: int) -> None:
        if not self._pattern.startswith(data, self._base + at):
            self._wrong()

    def _complete(self) -> None:
        now = monotonic_ns()
        self._latencies.record(now - self._stamp)
        self.last_arrival = now
        self.messages += 1
        self._at = 0
        if self._on_message is not None:
            self._on_message()

    def _wrong(self) -> None:
        raise WrongBytesError(
            f"connection {self.connection}: wrong bytes in message {self.messages}, "
            f"at or after byte {self._at} of it"
        )
