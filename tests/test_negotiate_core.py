"""The framing of [MS-NNS], without a mechanism: a toy one stands for it where tokens are needed."""

from __future__ import annotations

import random
import struct

import pytest

from headrace.errors import AuthenticationError, FramingError
from headrace.framing.negotiate import (
    FRAME_SIZE,
    HELD_LIMIT,
    MAX_FRAME,
    MAX_ROUNDS,
    SILENT_LIMIT,
    TURN_BYTES,
    TURN_FRAMES,
    NegotiateCore,
    State,
    error_code,
)


class Toy:
    """Tokens that show their order: ``sequence(4) message``."""

    def __init__(self) -> None:
        self.sent = self.received = 0

    def wrap(self, data: bytes | bytearray | memoryview) -> bytes:
        self.sent += 1
        return struct.pack(">I", self.sent) + bytes(data)

    def unwrap(self, token: bytes | bytearray | memoryview) -> bytes:
        self.received += 1
        if len(token) < 4 or struct.unpack_from(">I", token) != (self.received,):
            raise FramingError("not the next token")
        return bytes(token[4:])


def frame(kind: int, token: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    return struct.pack(">BBBH", kind, *version, len(token)) + token


def data_frame(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


def opened(server_side: bool = True, protected: bool = True, **options: int) -> NegotiateCore:
    """A core whose handshake is done, as Kerberos does it."""
    core = NegotiateCore(server_side=server_side, **options)
    core.start()
    protection = Toy() if protected else None
    if server_side:
        core.receive(frame(0x16, b"hello"), [])
        core.step_done(b"reply", True, protection)
    else:
        core.step_done(b"hello", False)
        core.receive(frame(0x14, b"reply"), [])
        core.step_done(None, True, protection)
    core.outgoing()
    assert core.state is State.OPEN
    return core


def received(core: NegotiateCore, *pieces: bytes) -> bytes:
    plaintext: list[bytes] = []
    for piece in pieces:
        core.receive(piece, plaintext)
        while core.pending:
            core.receive(None, plaintext)
    return b"".join(plaintext)


# ---- the handshake ---------------------------------------------------------------------------------------------


def test_a_client_begins_with_a_step() -> None:
    core = NegotiateCore()
    assert not core.stepping
    core.start()
    assert core.stepping
    assert core.needed is None
    core.step_done(b"first", False)
    assert core.outgoing() == b"\x16\x01\x00\x00\x05first"
    assert not core.stepping


def test_a_server_waits_for_a_token() -> None:
    core = NegotiateCore(server_side=True)
    core.start()
    assert not core.stepping
    core.receive(frame(0x16, b"token"), [])
    assert core.stepping
    assert core.needed == b"token"


def test_kerberos_as_dotnet_does_it() -> None:
    """One token each way; the client says nothing more, and is open with the server's last word."""
    client, server = NegotiateCore(), NegotiateCore(server_side=True)
    client.start()
    client.step_done(b"AP-REQ", False)
    server.receive(client.outgoing(), [])
    assert server.needed == b"AP-REQ"
    server.step_done(b"AP-REP", True, Toy())
    assert server.state is State.OPEN
    reply = server.outgoing()
    assert reply == b"\x14\x01\x00\x00\x06AP-REP"
    client.receive(reply, [])
    assert client.needed == b"AP-REP"
    client.step_done(None, True, Toy())
    assert client.state is State.OPEN
    assert client.outgoing() == b""


def test_raw_ntlm_as_dotnet_does_it() -> None:
    """The client's last token says that it's done; the server's word for that is empty."""
    client, server = NegotiateCore(), NegotiateCore(server_side=True)
    client.start()
    client.step_done(b"NEGOTIATE", False)
    server.receive(client.outgoing(), [])
    server.step_done(b"CHALLENGE", False)
    client.receive(server.outgoing(), [])
    client.step_done(b"AUTHENTICATE", True)
    last = client.outgoing()
    assert last[0] == 0x14
    assert client.state is State.HANDSHAKE
    server.receive(last, [])
    server.step_done(None, True)
    assert server.outgoing() == b"\x14\x01\x00\x00\x00"
    client.receive(b"\x14\x01\x00\x00\x00", [])
    assert client.state is State.OPEN
    assert server.state is State.OPEN


def test_bytes_that_come_with_the_last_token_are_kept() -> None:
    client = NegotiateCore()
    client.start()
    client.step_done(b"hello", False)
    plaintext: list[bytes] = []
    client.receive(
        frame(0x14, b"reply") + data_frame(b"\0\0\0\1early") + data_frame(b"\0\0\0\2bi"), plaintext
    )
    last = data_frame(b"\0\0\0\3!")
    client.receive(last[:1], plaintext)
    assert client.stepping
    assert not client.pending  # nothing can be done about it: nobody should try again and again
    assert not plaintext
    client.step_done(None, True, Toy())
    assert received(client, last[1:]) == b"earlybi!"


def test_what_comes_during_a_step_is_bounded() -> None:
    server = NegotiateCore(server_side=True)
    server.receive(frame(0x16, b"hello"), [])
    server.receive(bytes(HELD_LIMIT), [])
    with pytest.raises(FramingError, match="behind a token that is being worked on"):
        server.receive(b"x", [])
    assert server.state is State.FAILED


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_handshake_frame_in_pieces(cut: int) -> None:
    whole = frame(0x16, b"a token")
    core = NegotiateCore(server_side=True)
    core.receive(whole[:cut], [])
    if cut < len(whole):
        assert not core.stepping
        core.receive(whole[cut:], [])
    assert core.needed == b"a token"


def test_the_version_is_ignored() -> None:
    core = NegotiateCore(server_side=True)
    core.receive(frame(0x16, b"t", version=(7, 200)), [])
    assert core.needed == b"t"


@pytest.mark.parametrize("first", [0, 0x13, 0x17, ord("G"), 0xFF])
def test_another_protocol_is_refused_at_its_first_byte(first: int) -> None:
    core = NegotiateCore(server_side=True)
    with pytest.raises(FramingError, match=f"0x{first:02X}"):
        core.receive(bytes([first]), [])


def test_http_is_refused_at_once() -> None:
    with pytest.raises(FramingError, match="no NegotiateStream"):
        NegotiateCore(server_side=True).receive(b"GET / HTTP/1.1\r\n", [])


def test_an_empty_token_is_refused() -> None:
    with pytest.raises(FramingError, match="without a token"):
        NegotiateCore(server_side=True).receive(frame(0x16), [])
    with pytest.raises(FramingError, match="an empty token"):
        NegotiateCore(server_side=True).receive(frame(0x14), [])


def test_rounds_are_bounded() -> None:
    core = NegotiateCore(server_side=True)
    for _ in range(MAX_ROUNDS):
        core.receive(frame(0x16, b"again"), [])
        core.step_done(b"and again", False)
    with pytest.raises(FramingError, match=f"more than {MAX_ROUNDS} tokens"):
        core.receive(frame(0x16, b"again"), [])


def test_a_peer_that_is_done_too_early() -> None:
    core = NegotiateCore(server_side=True)
    core.receive(frame(0x14, b"all I have"), [])
    with pytest.raises(FramingError, match="the authentication isn't"):
        core.step_done(b"more, please", False)


def test_a_step_without_a_token_is_a_mistake() -> None:
    core = NegotiateCore(server_side=True)
    core.receive(frame(0x16, b"t"), [])
    with pytest.raises(FramingError, match="nothing to send"):
        core.step_done(b"", False)


def test_a_token_too_long_for_the_framing() -> None:
    core = NegotiateCore()
    core.start()
    with pytest.raises(FramingError, match="65536 bytes"):
        core.step_done(bytes(65_536), False)


def test_tokens_for_a_context_that_is_complete() -> None:
    for kind, token in ((0x16, b"again"), (0x14, b"again")):
        client = NegotiateCore()
        client.start()
        client.step_done(b"a", False)
        client.receive(frame(0x16, b"b"), [])
        client.step_done(b"c", True)
        with pytest.raises(FramingError):
            client.receive(frame(kind, token), [])


# ---- error frames ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ("fe06000000000000", 1790),  # .NET 8
        ("00000000000006fe", 1790),  # .NET Core 3.1
        ("0c030980ffffffff", 0x8009030C),
        ("ffffffff8009030c", 0x8009030C),
        ("0c0309808009030c", 0x8009030C),  # ours
        ("0c030980", 0x8009030C),
        ("", 0),
        ("0c", 12),
        ("0c030980ffffffff00", 0x8009030C),
    ],
)
def test_codes_of_every_byte_order(data: str, code: int) -> None:
    assert error_code(bytes.fromhex(data)) == code
    client = NegotiateCore()
    client.start()
    client.step_done(b"a", False)
    with pytest.raises(AuthenticationError, match=f"0x{code:08X}") as info:
        client.receive(frame(0x15, bytes.fromhex(data)), [])
    assert info.value.code == code
    assert client.state is State.FAILED


def test_a_long_error_frame_is_refused_before_it_is_there() -> None:
    with pytest.raises(FramingError, match="an error frame of 10 bytes"):
        NegotiateCore(server_side=True).receive(frame(0x15, bytes(10))[:5], [])


def test_our_error_is_read_by_both_kinds_of_dotnet() -> None:
    core = NegotiateCore(server_side=True)
    core.receive(frame(0x16, b"t"), [])
    core.step_failed(0x8009030C)
    sent = core.outgoing()
    assert sent[:5] == b"\x15\x01\x00\x00\x08"
    assert int.from_bytes(sent[5:], "little") & 0xFFFFFFFF == 0x8009030C  # .NET 8 reads it so
    assert int.from_bytes(sent[5:], "big") & 0xFFFFFFFF == 0x8009030C  # and .NET Core 3.1 so
    assert core.state is State.FAILED


# ---- data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, FRAME_SIZE, FRAME_SIZE + 1, 200_000])
@pytest.mark.parametrize("protected", [True, False])
def test_what_is_sent_arrives(size: int, protected: bool) -> None:
    client, server = opened(False, protected), opened(True, protected)
    data = random.Random(size).randbytes(size)
    client.send(data)
    wire = client.outgoing()
    if not protected:
        assert wire == data
    assert received(server, wire) == data


def test_full_frames_and_a_rest() -> None:
    client = opened(False, frame_size=1000)
    client.send(bytes(2500))
    wire = client.outgoing()
    sizes = []
    while wire:
        (size,) = struct.unpack_from("<I", wire)
        sizes.append(size - 4)
        wire = wire[4 + size :]
    assert sizes == [1000, 1000, 500]


@pytest.mark.parametrize("seed", range(20))
def test_any_segmentation(seed: int) -> None:
    rng = random.Random(seed)
    client, server = opened(False), opened(True)
    data = rng.randbytes(rng.choice([10, 1000, 50_000]))
    position = 0
    while position < len(data):
        size = rng.choice([1, 2, 10, 5000])
        client.send(data[position : position + size])
        position += size
    wire = client.outgoing()
    pieces = []
    while wire:
        size = rng.choice([1, 2, 3, 4, 5, 7, 1000, 20_000])
        pieces.append(wire[:size])
        wire = wire[size:]
    assert received(server, *pieces) == data
    assert not server.truncated


@pytest.mark.parametrize("size", [0, MAX_FRAME + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_sizes_that_no_frame_has(size: int, cut: int) -> None:
    server = opened()
    header = struct.pack("<I", size)
    with pytest.raises(FramingError, match=f"a frame of {size} bytes"):
        received(server, *filter(None, (header[:cut], header[cut:])))
    assert server.state is State.FAILED


def test_the_largest_frame() -> None:
    server = opened()
    assert len(received(server, data_frame(b"\0\0\0\1" + bytes(MAX_FRAME - 4)))) == MAX_FRAME - 4


def test_empty_frames_are_passed_over_but_not_for_ever() -> None:
    server = opened()
    toy = Toy()
    assert received(server, *[data_frame(toy.wrap(b"")) for _ in range(SILENT_LIMIT)]) == b""
    assert received(server, data_frame(toy.wrap(b"x"))) == b"x"
    with pytest.raises(FramingError, match="in a row carried no data"):
        received(server, *[data_frame(toy.wrap(b"")) for _ in range(SILENT_LIMIT + 1)])


def test_a_token_that_is_not_the_next_ends_everything() -> None:
    server = opened()
    toy = Toy()
    first, second = data_frame(toy.wrap(b"first")), data_frame(toy.wrap(b"second"))
    plaintext: list[bytes] = []
    with pytest.raises(FramingError):
        server.receive(first + first + second, plaintext)
    assert plaintext == [b"first"]
    assert server.state is State.FAILED
    assert not server.pending
    server.receive(second, plaintext)
    assert plaintext == [b"first"]


def test_small_frames_are_worked_off_some_at_a_time() -> None:
    server = opened()
    toy = Toy()
    plaintext: list[bytes] = []
    server.receive(b"".join(data_frame(toy.wrap(b"x")) for _ in range(TURN_FRAMES + 1)), plaintext)
    assert len(plaintext) == TURN_FRAMES
    assert server.pending
    server.receive(None, plaintext)
    assert len(plaintext) == TURN_FRAMES + 1
    assert not server.pending


def test_bytes_are_worked_off_some_at_a_time() -> None:
    """What waited for a step may be more than one turn's work."""
    client = NegotiateCore()
    client.start()
    client.step_done(b"a", False)
    toy = Toy()
    client.receive(frame(0x14, b"b"), [])
    large = data_frame(toy.wrap(bytes(60_000)))
    for _ in range(4):
        client.receive(large, [])
        large = data_frame(toy.wrap(bytes(60_000)))
    client.step_done(None, True, Toy())
    plaintext: list[bytes] = []
    client.receive(large, plaintext)
    assert sum(map(len, plaintext)) <= TURN_BYTES + 60_000
    while client.pending:
        client.receive(None, plaintext)
    assert sum(map(len, plaintext)) == 300_000


def test_truncation() -> None:
    server = opened()
    assert not server.truncated
    whole = data_frame(b"\0\0\0\1abc")
    for cut in range(1, len(whole)):
        server = opened()
        received(server, whole[:cut])
        assert server.truncated, cut
    server = opened()
    received(server, whole)
    assert not server.truncated
    assert NegotiateCore().truncated


def test_nothing_is_sent_in_the_wrong_state() -> None:
    core = NegotiateCore()
    with pytest.raises(RuntimeError, match="handshake"):
        core.send(b"x")
    core = opened()
    core.close()
    with pytest.raises(RuntimeError, match="closed"):
        core.send(b"x")


def test_a_closed_core_still_receives() -> None:
    core = opened()
    core.close()
    assert received(core, data_frame(b"\0\0\0\1late")) == b"late"
