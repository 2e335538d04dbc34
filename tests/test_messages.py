"""Messages in a stream of bytes, however they are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import MessageError
from headrace.messages import Delimited, LengthPrefixed, Netstrings

FRAMINGS: dict[str, Any] = {
    "length-1": LengthPrefixed(1),
    "length-2-little": LengthPrefixed(2, "little"),
    "length-4": LengthPrefixed(),
    "length-8": LengthPrefixed(8),
    "lines": Delimited(),
    "two-byte-delimiter": Delimited(b"\r\n"),
    "netstrings": Netstrings(),
}
every_framing = pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS.keys())


def decoded(framing: Any, stream: bytes, *cuts: int) -> list[bytes]:
    decoder = framing.decoder()
    found = []
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    for start, end in pairwise(edges):
        decoder.feed(stream[start:end])
        while (message := decoder.next()) is not None:
            found.append(message)
    assert decoder.partial == b""
    return found


@every_framing
@given(
    messages=st.lists(st.binary(max_size=200).filter(lambda m: b"\n" not in m and b"\r" not in m)),
    cuts=st.lists(st.integers(min_value=0, max_value=5000), max_size=20),
)
def test_all_messages_however_cut(framing: Any, messages: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(piece for message in messages for piece in framing.encode(message))
    assert decoded(framing, stream, *cuts) == messages
    assert decoded(framing, stream, *range(len(stream))) == messages


@every_framing
def test_what_is_cut_off_is_told(framing: Any) -> None:
    decoder = framing.decoder()
    whole = b"".join(framing.encode(b"hello"))
    decoder.feed(whole + whole[:-1])
    assert decoder.next() == b"hello"
    assert decoder.next() is None
    assert decoder.partial == whole[:-1]


@pytest.mark.parametrize(
    ("framing", "stream"),
    [
        (LengthPrefixed(limit=10), b"\0\0\0\x0b"),  # judged before the message is there
        (LengthPrefixed(2, "little", 10), b"\x0b\0"),
        (Delimited(limit=10), b"x" * 12),
        (Delimited(b"\r\n", limit=10), b"x" * 11 + b"\r\n"),
        (Netstrings(limit=10), b"11:"),
        (Netstrings(limit=10), b"999"),
        (Netstrings(limit=10), b"01:x,"),
        (Netstrings(limit=10), b":,"),
        (Netstrings(limit=10), b"-1:"),
        (Netstrings(limit=10), b"a"),
        (Netstrings(limit=10), b"2:abc"),
    ],
)
def test_streams_that_are_refused(framing: Any, stream: bytes) -> None:
    decoder = framing.decoder()
    decoder.feed(stream)
    for _ in range(2):  # there's no way back into step
        with pytest.raises(MessageError):
            decoder.next()
        decoder.feed(b"".join(framing.encode(b"good")))


@pytest.mark.parametrize(
    "framing",
    [LengthPrefixed(limit=10), Delimited(limit=10), Delimited(b"\r\n", limit=10), Netstrings(limit=10)],
    ids=repr,
)
def test_messages_at_the_limit(framing: Any) -> None:
    assert decoded(framing, b"".join(framing.encode(b"0123456789"))) == [b"0123456789"]
    with pytest.raises(MessageError):
        framing.encode(b"0123456789a")


def test_messages_that_cannot_be_sent() -> None:
    with pytest.raises(MessageError):
        LengthPrefixed(1).encode(bytes(256))
    with pytest.raises(MessageError):
        Delimited().encode(b"two\nlines")
    with pytest.raises(MessageError):
        Delimited(b"aa").encode(b"ba")  # with its delimiter: b + aa + a


def test_the_beginning_of_a_delimiter_is_no_delimiter() -> None:
    assert decoded(Delimited(b"\r\n"), b"".join(Delimited(b"\r\n").encode(b"a\r"))) == [b"a\r"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LengthPrefixed(3),
        lambda: LengthPrefixed(4, "middle"),  # type: ignore[arg-type]
        lambda: LengthPrefixed(limit=0),
        lambda: Delimited(b""),
        lambda: Delimited(limit=-1),
        lambda: Netstrings(limit=0),
    ],
)
def test_framings_that_make_no_sense(wrong: Any) -> None:
    with pytest.raises(ValueError):
        wrong()
