"""Frames of sealed tokens, many at a time: the Cython module against the Python that does the same one by one."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import _kerberos
from headrace.errors import EngineUnavailable, FramingError
from headrace.framing.negotiate import SILENT_LIMIT, TURN_FRAMES, NegotiateCore
from headrace.security import kerberos
from headrace.security.enctypes import ENCTYPES, Encryptor
from headrace.security.kerberos import (
    HEADER,
    SEALED,
    KerberosProtection,
    NativeReceiver,
    NativeSender,
    SealedReceiver,
    SealedSender,
    native_arguments,
    usage_of,
)

NUMBERS = [17, 18, 19, 20]
PIECE = 96 * 1024
every_enctype = pytest.mark.parametrize("number", NUMBERS)


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kerberos.VARIABLE, "native")
    assert kerberos.native_reason() == ""


def key_of(number: int) -> bytes:
    return bytes(range(9, 9 + ENCTYPES[number].key_size))


def side(number: int, *, initiator: bool, first: int = 5) -> KerberosProtection:
    return KerberosProtection(
        enctype=number,
        key=key_of(number),
        initiator=initiator,
        acceptor_subkey=True,
        send_sequence=first,
        receive_sequence=first,
        sealed=True,
    )


def frames_of(data: bytes, frame_size: int, number: int = 18, first: int = 5) -> bytes:
    return side(number, initiator=True, first=first).wrap_frames(data, frame_size)


def pieces(frames: bytes) -> list[bytes]:
    """Each frame by itself, header included."""
    found, position = [], 0
    while position < len(frames):
        (size,) = struct.unpack_from("<I", frames, position)
        found.append(frames[position : position + 4 + size])
        position += 4 + size
    return found


def opened_core(number: int = 18) -> NegotiateCore:
    """A server behind its handshake."""
    core = NegotiateCore(server_side=True)
    core.receive(b"\x16\x01\x00\x00\x01x", [])
    core.step_done(None, True, side(number, initiator=False))
    core.outgoing()
    assert core.state.value == "open"
    return core


def received(core: NegotiateCore, chunks: list[bytes]) -> bytes:
    plaintext: list[bytes] = []
    for chunk in chunks:
        core.receive(chunk, plaintext)
        while core.pending:
            core.receive(None, plaintext)
    return b"".join(plaintext)


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


# ---- the same as in Python -------------------------------------------------------------------------------------------


@every_enctype
def test_byte_for_byte_what_python_makes(number: int) -> None:
    """With the same confounders, over all lengths of the last blocks, short and long."""
    enctype = ENCTYPES[number]
    blocks = [noise(n)[-16:] for n in range(16, 80)]

    def confounders() -> Iterator[bytes]:
        return itertools.cycle(blocks)

    sealer = _kerberos.Sealer(*native_arguments(enctype, key_of(number), SEALED, 3), random=confounders())
    encryptor = Encryptor(enctype, key_of(number), usage_of(SEALED), confounders())
    for position, size in enumerate([*range(600), 4095, 4096, 4097, 12_288, 12_289, 65_519, 65_536]):
        header = HEADER.pack(0x0504, SEALED, 0xFF, 0, 0, 3 + position)
        assert sealer.wrap(noise(size)) == encryptor.encrypt(header, noise(size), header), size


@every_enctype
@pytest.mark.parametrize(
    ("sender", "receiver"), [(NativeSender, SealedReceiver), (SealedSender, NativeReceiver)]
)
def test_each_opens_the_other_s(number: int, sender: Any, receiver: Any) -> None:
    first = 2**64 - 300  # and the numbers begin again meanwhile
    to = sender(ENCTYPES[number], key_of(number), SEALED, first)
    back = receiver(ENCTYPES[number], key_of(number), SEALED, first)
    for size in [*range(600), 12_288, 64_512]:
        assert back.unwrap(to.wrap(noise(size))) == noise(size)


# ---- frames ----------------------------------------------------------------------------------------------------------


@every_enctype
@pytest.mark.parametrize(
    ("size", "frame_size"), [(0, 1), (1, 1), (100, 7), (36_864, 12_288), (100_000, 12_288)]
)
def test_frames(number: int, size: int, frame_size: int) -> None:
    frames = frames_of(noise(size), frame_size, number)
    alone = side(number, initiator=False)
    data = [alone.unwrap(frame[4:]) for frame in pieces(frames)]
    assert b"".join(data) == noise(size)
    assert [len(one) for one in data[:-1]] == [frame_size] * (len(data) - 1)
    assert received(opened_core(number), [frames] if frames else []) == noise(size)


@settings(max_examples=80, deadline=None)
@given(
    number=st.sampled_from(NUMBERS),
    sizes=st.lists(
        st.one_of(st.integers(0, 80), st.integers(400, 700), st.integers(8000, 20_000)), max_size=12
    ),
    cuts=st.lists(st.integers(1, 9000), min_size=1, max_size=30),
    first=st.sampled_from([0, 5, 2**64 - 3]),
)
def test_any_frames_in_any_segments(number: int, sizes: list[int], cuts: list[int], first: int) -> None:
    sender = KerberosProtection(
        enctype=number, key=key_of(number), initiator=True, acceptor_subkey=True, send_sequence=first,
        receive_sequence=0, sealed=True,
    )  # fmt: skip
    receiver = KerberosProtection(
        enctype=number, key=key_of(number), initiator=False, acceptor_subkey=True, send_sequence=0,
        receive_sequence=first, sealed=True,
    )  # fmt: skip
    core = opened_core(number)
    core._protection = receiver
    data = [noise(size) for size in sizes]
    stream = b"".join(struct.pack("<I", len(token)) + token for one in data for token in (sender.wrap(one),))
    chunks, lengths = [], itertools.cycle(cuts)
    while stream:
        length = next(lengths)
        chunks.append(stream[:length])
        stream = stream[length:]
    assert received(core, chunks) == b"".join(data)
    assert not core.truncated


def test_every_split_of_three_frames() -> None:
    frames = frames_of(noise(50), 20)
    for cut in range(1, len(frames)):
        assert received(opened_core(), [frames[:cut], frames[cut:]]) == noise(50)


def test_plaintext_comes_in_few_pieces_and_none_too_large() -> None:
    plaintext: list[bytes] = []
    frames = frames_of(noise(250_000), 12_288)
    opened_core().receive(frames, plaintext)
    assert [len(one) for one in plaintext] == [8 * 12_288, 8 * 12_288, 250_000 - 16 * 12_288]
    assert max(map(len, plaintext)) <= PIECE
    plaintext.clear()
    opened_core().receive(frames_of(noise(3 * 65_000), 65_000), plaintext)
    assert [len(one) for one in plaintext] == [65_000] * 3


def test_a_turn_is_bounded() -> None:
    core, plaintext = opened_core(), []  # type: tuple[NegotiateCore, list[bytes]]
    core.receive(frames_of(noise(200), 1), plaintext)
    assert sum(map(len, plaintext)) == TURN_FRAMES
    assert core.pending


# ---- what must be refused --------------------------------------------------------------------------------------------


def changed(frames: list[bytes], which: int, change: Callable[[bytes], bytes]) -> bytes:
    return b"".join(change(frame) if i == which else frame for i, frame in enumerate(frames))


@every_enctype
def test_what_came_before_a_bad_frame_is_delivered_and_nothing_behind_it(number: int) -> None:
    frames = pieces(frames_of(noise(70), 10, number))
    core, plaintext = opened_core(number), []  # type: tuple[NegotiateCore, list[bytes]]
    with pytest.raises(FramingError, match="wrong checksum"):
        core.receive(
            changed(frames, 3, lambda frame: frame[:30] + bytes([frame[30] ^ 1]) + frame[31:]), plaintext
        )
    assert b"".join(plaintext) == noise(70)[:30]
    assert core.state.value == "failed"
    with pytest.raises(FramingError, match="earlier token has failed"):
        core._protection.unwrap(frames[3][4:])  # type: ignore[union-attr]


@every_enctype
@pytest.mark.parametrize("size", [21, 601], ids=["short", "long"])
def test_every_flipped_bit_of_a_frame_is_refused(number: int, size: int) -> None:
    """The body's length is odd: a rotation by a power of two is never one by a multiple of it."""
    frames = pieces(frames_of(noise(2 * size), size, number))
    bits = range(32, 8 * len(frames[1])) if size < 100 else range(32, 8 * len(frames[1]), 37)
    for bit in bits:
        spoilt = bytearray(frames[1])
        spoilt[bit // 8] ^= 1 << bit % 8
        plaintext: list[bytes] = []
        with pytest.raises(FramingError):
            opened_core(number).receive(frames[0] + spoilt, plaintext)
        assert b"".join(plaintext) == noise(2 * size)[:size]


@every_enctype
@pytest.mark.parametrize("order", [(1, 0, 2), (0, 0, 1), (0, 2, 1), (1, 2)], ids=str)
def test_order_is_checked_within_a_batch(number: int, order: tuple[int, ...]) -> None:
    frames = pieces(frames_of(noise(30), 10, number))
    with pytest.raises(FramingError, match=r"token number \d+ (was repeated or is late|came too early)"):
        opened_core(number).receive(b"".join(frames[i] for i in order), [])


@pytest.mark.parametrize("size", [0, 65_537, 2**31, 2**32 - 1])
def test_sizes_that_can_t_be_in_a_batch(size: int) -> None:
    frames = pieces(frames_of(noise(20), 10))
    plaintext: list[bytes] = []
    with pytest.raises(FramingError, match=f"a frame of {size} bytes was announced"):
        opened_core().receive(frames[0] + struct.pack("<I", size) + bytes(100), plaintext)
    assert b"".join(plaintext) == noise(20)[:10]


@pytest.mark.parametrize("size", [1, 16, 59])
def test_a_token_that_is_too_short_in_a_batch(size: int) -> None:
    frames = pieces(frames_of(noise(20), 10))
    with pytest.raises(FramingError, match="is too short: 60 are the least"):
        opened_core().receive(frames[0] + struct.pack("<I", size) + bytes(size), [])


def test_frames_without_data_are_limited_in_a_batch() -> None:
    sender = side(18, initiator=True)
    empty = [
        struct.pack("<I", len(token)) + token for token in (sender.wrap(b"") for _ in range(SILENT_LIMIT + 1))
    ]
    core = opened_core()
    assert received(core, [b"".join(empty[:SILENT_LIMIT])]) == b""
    with pytest.raises(FramingError, match=f"more than {SILENT_LIMIT} frames in a row carried no data"):
        core.receive(empty[SILENT_LIMIT], [])


def test_a_rotated_token_between_others() -> None:
    """Windows sends such: RRC is 28. What is behind it is opened as well."""
    frames = pieces(frames_of(noise(50), 10))

    def rotate(frame: bytes) -> bytes:
        token = frame[4:]
        body = token[16:]
        return frame[:10] + struct.pack(">H", 28) + token[8:16] + body[-28:] + body[:-28]

    assert received(opened_core(), [changed(frames, 2, rotate)]) == noise(50)


# ---- which of the two ------------------------------------------------------------------------------------------------


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, batches in (("native", True), ("python", False), ("", True)):
        monkeypatch.setenv(kerberos.VARIABLE, wanted)
        assert side(18, initiator=True).in_batches is batches
    monkeypatch.setenv(kerberos.VARIABLE, "fast")
    with pytest.raises(ValueError, match="must be 'python' or 'native', not 'fast'"):
        side(18, initiator=True)


def test_where_it_can_t_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kerberos, "native_reason", lambda: "no such library")
    with pytest.raises(EngineUnavailable, match="can't be had here: no such library"):
        side(18, initiator=True)
    monkeypatch.delenv(kerberos.VARIABLE)
    assert not side(18, initiator=True).in_batches


def test_wrong_arguments() -> None:
    good: list[Any] = list(native_arguments(ENCTYPES[18], key_of(18), SEALED, 0))
    wrongs = [
        (0, bytes(24), "no keys of 24 bytes"),
        (1, bytes(65), "more than a block"),
        (2, "md5", "'md5'"),
        (3, 33, "33"),
    ]
    for position, value, complaint in wrongs:
        arguments = [*good]
        arguments[position] = value
        with pytest.raises(ValueError, match=complaint):
            _kerberos.Sealer(*arguments)
    with pytest.raises(RuntimeError, match="can't be changed"):
        _kerberos.Opener(*good).__init__(*good)  # type: ignore[misc]
    with pytest.raises(ValueError, match="frames of 0 bytes"):
        _kerberos.Sealer(*good).wrap_frames(b"x", 0)
