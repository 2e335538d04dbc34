"""NegotiateStream framing without I/O ([MS-NNS]): authentication tokens and data frames in, plaintext out, and back.

Rules
-----
* The core knows no mechanism. When the peer's token is whole it is ``needed`` by the next step of the authentication;
  who uses the core does the step, elsewhere, and tells of it: ``step_done`` or ``step_failed``. There is one step at a
  time. What is received meanwhile is kept, HELD_LIMIT bytes at most (a server may send its last token and data in one
  segment), and worked off by the next ``receive``.
* A handshake frame is ``id(1) 1 0 size(2, big endian) token``. The id and the size are judged when they are there, not
  when the token is: no peer makes us wait for what we wouldn't take. The version is ignored, as .NET does.
* 0x14 stands on the token that completes its *sender's* context. A server always sends one, possibly empty; a client
  only if it has a token to send then. Who has sent one can't send another.
* An error frame carries a code of 8 bytes, little endian from .NET 5 on, big endian before. Ours is the low half of
  both: each side reads what it means.
* After that a data frame is ``size(4, little endian) token``, around up to ``frame_size`` bytes; but where neither
  signing nor sealing came out of the negotiation, data isn't framed at all. What was *negotiated* counts, not what was
  asked for.
* A frame has 1 to 65,536 bytes. One with nothing in it is passed over; SILENT_LIMIT of them in a row end the
  connection.
* ``receive`` stops after TURN_BYTES or TURN_FRAMES, so that one peer can't keep the others of a loop waiting: while
  there is something ``pending``, call it again.
* There is no end of the stream in the framing: the transport's end between two frames is one, and within a frame it's a
  truncation.

    HANDSHAKE -> OPEN       our context and the peer's are complete
    OPEN      -> CLOSED     ``close``: nothing more is sent; what the peer still sends can be received
    any       -> FAILED     an error frame, a broken rule, a failed step, a token that isn't the peer's next
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias
from typing import Protocol as TypingProtocol

from headrace.errors import AuthenticationError, FramingError

if TYPE_CHECKING:
    from headrace._pool import Lease

    _Data: TypeAlias = bytes | bytearray | memoryview | Lease

__all__ = ["FRAME_SIZE", "MAX_FRAME", "NegotiateCore", "Protection", "State"]

# What a handshake frame is ([MS-NNS] section 2.2.1).
DONE = 0x14
ERROR = 0x15
IN_PROGRESS = 0x16
HANDSHAKE_HEADER = struct.Struct(">BBBH")  # id, version 1.0, bytes that follow
MAX_ERROR = 9  # bytes; [MS-NNS] says 8, and some send a version behind it
ERROR_CODE = struct.Struct("<I"), struct.Struct(">I")

DATA_HEADER = struct.Struct("<I")
FRAME_SIZE = 12 * 1024  # bytes of plaintext in a frame of ours
MAX_FRAME = 64 * 1024  # bytes that are taken behind a header; .NET's own limit
MAX_TOKEN = 0xFFFF
MAX_ROUNDS = 10  # tokens of the peer's; Kerberos needs 1, NTLM 2, SPNEGO's reselection one more

HELD_LIMIT = 256 * 1024  # bytes: one receive of the largest kind
TURN_BYTES = 256 * 1024  # that one receive() works off
SILENT_LIMIT = 32  # frames in a row without data
TURN_FRAMES = 64  # likewise, of what was received at a time

LOGON_DENIED = 0x8009030C
REQUIREMENT_NOT_MET = 1790
MEANINGS = {
    0x80090302: "it doesn't support what we ask for",
    0x80090304: "its own security system failed",
    0x80090308: "our token was invalid to it",
    LOGON_DENIED: "the logon was denied",
    0x8009030E: "it has no credentials",
    0x80090311: "no authority could be asked",
    0x80090322: "it isn't who we asked for (the wrong principal)",
    REQUIREMENT_NOT_MET: "its demand for protection or impersonation isn't met",
}


class State(enum.Enum):
    """See the table above."""

    HANDSHAKE = "handshake"
    OPEN = "open"
    CLOSED = "closed"
    FAILED = "failed"


OPEN = State.OPEN


class Protection(TypingProtocol):
    """Tokens around messages; see ``headrace.security.contexts.MessageProtection``."""

    def wrap(self, data: bytes | bytearray | memoryview) -> bytes:
        """The next token."""

    def unwrap(self, token: bytes | bytearray | memoryview) -> bytes:
        """What is in the peer's next token."""


class NegotiateCore:
    """One end of a NegotiateStream.

    Parameters
    ----------
    server_side : bool
    frame_size : int
        Bytes of plaintext in a frame, at most.

    Methods raise :class:`headrace.errors.FramingError` for what no peer sends, and
    :class:`headrace.errors.AuthenticationError` for a peer that says it failed; both leave the state FAILED. Not
    thread-safe.
    """

    __slots__ = (
        "_done_received",
        "_done_sent",
        "_frame_size",
        "_in_batches",
        "_out",
        "_part",
        "_protection",
        "_rounds",
        "_server_side",
        "_silent",
        "_waiting",
        "_wanted",
        "needed",
        "peer_closed",
        "pending",
        "state",
        "stepping",
        "unsent",
    )

    def __init__(self, *, server_side: bool = False, frame_size: int = FRAME_SIZE) -> None:
        self.state = State.HANDSHAKE
        self.stepping = False  # a step of the authentication is to be done, or being done
        self.needed: bytes | None = None  # what it's about: the peer's token; None: a client's first
        # What was received and hasn't been worked off; while there's something, receive(None) is to be called.
        self.pending: deque[memoryview] = deque()
        self.peer_closed = False  # never: it's the transport that ends
        self.unsent = 0  # never anything: nothing that is sent waits for the peer
        self._waiting: deque[memoryview] = deque()  # what came during a step
        self._server_side = server_side
        self._frame_size = frame_size
        self._protection: Protection | None = None
        self._in_batches = False  # the protection works off several frames at a time
        self._out: list[bytes] = []
        self._part = bytearray()  # the beginning of a frame, header included, when it came in pieces
        self._wanted = 0  # its size, once the header is there
        self._rounds = 0
        self._silent = 0
        self._done_received = False
        self._done_sent = False

    # ---- the authentication ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins the handshake: a client's first step is needed."""
        if not self._server_side:
            self.stepping = True

    def step_done(self, token: bytes | None, complete: bool, protection: Protection | None = None) -> None:
        """A step has made ``token`` for the peer (None or empty: nothing to say).

        When our context is ``complete``, ``protection`` is what data frames will be protected by; None: not at all.
        """
        self.stepping = False
        self.needed = None
        token = token or b""
        if len(token) > MAX_TOKEN:
            self._broken(
                f"our token has {len(token)} bytes, and a frame of [MS-NNS] takes {MAX_TOKEN}: is the account "
                "in very many groups?"
            )
        if complete:
            self._protection = protection
            self._in_batches = getattr(protection, "in_batches", False)
            if token or self._server_side:
                self._say(DONE, token)
            self._done_sent = True
            if self._server_side or self._done_received:
                self.state = OPEN
        elif self._done_received:
            self._broken("the peer says that it's done, and the authentication isn't")
        elif not token:
            self._broken("the authentication isn't done, and there's nothing to send")
        else:
            self._say(IN_PROGRESS, token)
        self.pending.extend(self._waiting)
        self._waiting.clear()

    def step_failed(self, code: int) -> None:
        """A step has failed, or its outcome isn't enough: the peer gets an error frame with ``code``."""
        self.stepping = False
        self.needed = None
        self._waiting.clear()
        self.pending.clear()
        self.state = State.FAILED
        if not (self._done_sent and self._done_received):
            little, big = ERROR_CODE
            self._say(ERROR, little.pack(code) + big.pack(code))

    def _say(self, kind: int, token: bytes) -> None:
        self._out.append(HANDSHAKE_HEADER.pack(kind, 1, 0, len(token)) + token)

    def _handshake_frame(self, kind: int, token: bytes) -> None:
        if kind == ERROR:
            self._peer_failed(token)
        if self._done_received or (self._done_sent and kind != DONE):
            self._broken("a handshake frame came after the handshake")
        if kind == DONE:
            self._done_received = True
            if self._done_sent:
                # A server's word that it's done, too: our context needs nothing any more.
                if token:
                    self._broken("a token came for a context that is complete")
                self.state = OPEN
                return
        if not token:
            self._broken("an empty token came, and the authentication isn't done")
        self._rounds += 1
        if self._rounds > MAX_ROUNDS:
            self._broken(f"more than {MAX_ROUNDS} tokens came, and the authentication isn't done")
        self.needed = token
        self.stepping = True

    def _peer_failed(self, data: bytes) -> None:
        code = error_code(data)
        meaning = MEANINGS.get(code, "its code isn't known here")
        self.state = State.FAILED
        raise AuthenticationError(f"the peer refused the authentication: {meaning} (0x{code:08X})", code=code)

    def _broken(self, what: str) -> None:
        self.state = State.FAILED
        self.pending.clear()
        self._waiting.clear()
        raise FramingError(what)

    # ---- what came -------------------------------------------------------------------------------------------

    def receive(self, data: _Data | None, plaintext: list[bytes]) -> None:
        """Works off ``data``, or what is ``pending``, and appends the plaintext to ``plaintext``.

        ``data`` must stay unchanged until nothing is ``pending`` any more. What was decrypted before an error was met
        is in ``plaintext``.
        """
        if self.stepping:
            if data is not None:
                self._wait(memoryview(data))
            return
        if data is not None and self.state is not State.FAILED:
            self.pending.append(memoryview(data))
        try:
            self._receive(plaintext)
        except FramingError:
            self.state = State.FAILED
            self.pending.clear()
            raise

    def _receive(self, plaintext: list[bytes]) -> None:
        budget = TURN_BYTES
        while self.pending and budget > 0:
            view = self.pending.popleft()
            if self.state is State.HANDSHAKE:
                rest = self._handshake(view)
                if rest:
                    self.pending.appendleft(rest)
                if self.stepping:
                    break
            elif self._protection is None:
                plaintext.append(bytes(view))
                budget -= len(view)
            else:
                rest = self._frames(view, plaintext)
                budget -= len(view)
                if rest:
                    self.pending.appendleft(rest)
                    return
        if self.stepping:
            waiting, self.pending = self.pending, deque()
            for view in waiting:
                self._wait(view)

    def _wait(self, view: memoryview) -> None:
        if sum(map(len, self._waiting)) + len(view) > HELD_LIMIT:
            self._broken(f"more than {HELD_LIMIT} bytes came behind a token that is being worked on")
        self._waiting.append(view)

    def _handshake(self, view: memoryview) -> memoryview:
        """Up to the end of one handshake frame; what is behind it."""
        part = self._part
        header = HANDSHAKE_HEADER.size
        position = 0
        if len(part) < header:
            position = header - len(part)
            part += view[:position]
            if part and not self._wanted and part[0] not in (DONE, ERROR, IN_PROGRESS):
                self._broken(f"no NegotiateStream: the first byte of a handshake frame was 0x{part[0]:02X}")
            if len(part) < header:
                return view[:0]
            self._wanted = header + self._token_size(part)
        missing = self._wanted - len(part)
        part += view[position : position + missing]
        if len(part) == self._wanted:
            self._part = bytearray()
            self._wanted = 0
            self._handshake_frame(part[0], bytes(part[header:]))
        return view[position + missing :]

    def _token_size(self, header: bytearray) -> int:
        kind, _major, _minor, size = HANDSHAKE_HEADER.unpack(header)
        if kind == ERROR and size > MAX_ERROR:
            self._broken(f"an error frame of {size} bytes came; it has 8")
        if kind == IN_PROGRESS and not size:
            self._broken("a handshake frame without a token came")
        return int(size)

    def _frames(self, view: memoryview, plaintext: list[bytes]) -> memoryview:
        """All whole frames in ``view``, and the beginning of the next; what is left when it's enough for a turn."""
        unwrap = self._protection.unwrap  # type: ignore[union-attr]
        position = 0
        size = len(view)
        if self._part:
            position = self._continue_frame(view, plaintext)
        frames = 0
        if self._in_batches:
            position, frames = self._batch(view, position, plaintext)
        while size - position >= 4:
            length = (
                view[position] | view[position + 1] << 8 | view[position + 2] << 16 | view[position + 3] << 24
            )
            if not 0 < length <= MAX_FRAME:
                self._wrong_size(length)
            end = position + 4 + length
            if end > size:
                break
            if frames == TURN_FRAMES:
                return view[position:]
            frames += 1
            self._got(unwrap(view[position + 4 : end]), plaintext)
            position = end
        if position < size:
            self._begin_frame(view[position:])
        return view[:0]

    def _batch(self, view: memoryview, position: int, plaintext: list[bytes]) -> tuple[int, int]:
        """As many frames as the protection takes at once: (the position behind them, how many)."""
        batch: Any = self._protection
        position, frames, self._silent = batch.unwrap_frames(
            view, position, TURN_FRAMES, plaintext, self._silent, SILENT_LIMIT
        )
        self._check_silent()
        return position, frames

    def _begin_frame(self, view: memoryview) -> None:
        self._part += view
        if len(self._part) >= 4 and not self._wanted:
            (length,) = DATA_HEADER.unpack_from(self._part)
            if not 0 < length <= MAX_FRAME:
                self._wrong_size(length)
            self._wanted = 4 + length

    def _continue_frame(self, view: memoryview, plaintext: list[bytes]) -> int:
        """Adds to the frame that has begun; how many bytes of ``view`` were its."""
        part = self._part
        position = 0
        if not self._wanted:
            position = 4 - len(part)
            self._begin_frame(view[:position])
            if not self._wanted:
                return len(view)
        missing = self._wanted - len(part)
        part += view[position : position + missing]
        if len(part) == self._wanted:
            self._part = bytearray()
            self._wanted = 0
            assert self._protection is not None
            self._got(self._protection.unwrap(memoryview(part)[4:]), plaintext)
        return min(len(view), position + missing)

    def _got(self, data: bytes, plaintext: list[bytes]) -> None:
        if data:
            self._silent = 0
            plaintext.append(data)
            return
        self._silent += 1
        self._check_silent()

    def _check_silent(self) -> None:
        if self._silent > SILENT_LIMIT:
            self._broken(f"more than {SILENT_LIMIT} frames in a row carried no data")

    def _wrong_size(self, length: int) -> None:
        self._broken(f"a frame of {length} bytes was announced; 1 to {MAX_FRAME} are taken")

    @property
    def truncated(self) -> bool:
        """Whether an end of the transport now would cut the peer's stream short."""
        return self.state is State.HANDSHAKE or bool(self._part)

    # ---- what goes -------------------------------------------------------------------------------------------

    def send(self, data: _Data) -> None:
        """Makes frames of ``data``: full ones, and a rest. In OPEN only."""
        if self.state is not OPEN:
            raise RuntimeError(f"nothing can be sent in state {self.state.value!r}")
        if self._protection is None:
            self._out.append(bytes(data))
            return
        if self._in_batches:
            batch: Any = self._protection
            self._out.append(batch.wrap_frames(data, self._frame_size))
            return
        wrap, size, out, header = self._protection.wrap, self._frame_size, self._out, DATA_HEADER
        view = memoryview(data)
        for position in range(0, len(view), size):
            token = wrap(view[position : position + size])
            out.append(header.pack(len(token)))
            out.append(token)

    def outgoing(self) -> bytes:
        """Takes what is to be sent to the peer; ``b""`` if there is nothing."""
        out = self._out
        if not out:
            return b""
        self._out = []
        return out[0] if len(out) == 1 else b"".join(out)

    def close(self) -> None:
        """Nothing more is sent. The transport's end tells the peer."""
        if self.state is OPEN:
            self.state = State.CLOSED


def error_code(data: bytes) -> int:
    """The code in an error frame, of whichever byte order; 0 if there is none.

    It's a signed number of 8 bytes, so the half that isn't the code is all zeros or all ones.
    """
    if len(data) < 8:
        return int.from_bytes(data[:4], "little")
    first, last = data[:4], data[4:8]
    if first in (b"\0\0\0\0", b"\xff\xff\xff\xff"):
        return int.from_bytes(last, "big")
    return int.from_bytes(first, "little")
