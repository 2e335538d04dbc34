"""The core in the place of either end of .NET's own conversations: it takes, and says, exactly their bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from headrace.errors import AuthenticationError
from headrace.framing.negotiate import DONE, ERROR, NegotiateCore, State

FOLDER = Path(__file__).parent / "data" / "negotiate"
RECORDINGS = sorted(path.stem for path in FOLDER.glob("*.hex"))
ECHOES = [name for name in RECORDINGS if name.endswith("_echo")]
FRAME = re.compile(r"(?P<what>\w+).* hdr=(?P<header>[0-9a-f]*) payload\(\d+\)=(?P<payload>[0-9a-f]*)")


@dataclass
class Side:
    """What one end said."""

    handshake: list[tuple[int, bytes]] = field(default_factory=list)  # ids and tokens
    data: list[bytes] = field(default_factory=list)  # tokens, or unframed data
    stream: bytes = b""

    def add(self, line: str) -> None:
        match = FRAME.match(line)
        if match is None:
            return
        header, payload = bytes.fromhex(match["header"]), bytes.fromhex(match["payload"])
        self.stream += header + payload
        if match["what"].startswith("Handshake"):
            self.handshake.append((header[0], payload))
        else:
            self.data.append(payload)


def recording(name: str) -> dict[str, Side]:
    sides = {"C>S": Side(), "S>C": Side()}
    side = None
    for line in (FOLDER / f"{name}.hex").read_text().splitlines():
        if line.startswith("== "):
            side = sides.get(line[3:6]) if line.endswith("decoded") else None
        elif side is not None:
            side.add(line)
    return sides


class Recorded:
    """In the place of a protection: the tokens that the other implementation made."""

    def __init__(self, own: list[bytes], theirs: list[bytes]) -> None:
        self.own = list(own)
        self.theirs = list(theirs)

    def wrap(self, data: bytes | bytearray | memoryview) -> bytes:
        return self.own.pop(0)

    def unwrap(self, token: bytes | bytearray | memoryview) -> bytes:
        assert bytes(token) == self.theirs.pop(0)
        return b"."


class End:
    """Plays one end of a recording: its steps make the tokens that were recorded."""

    def __init__(self, name: str, *, server_side: bool) -> None:
        directions = ("S>C", "C>S") if server_side else ("C>S", "S>C")
        sides = recording(name)
        self.own, self.peer = (sides[direction] for direction in directions)
        self.steps = list(self.own.handshake)
        self.framed = "none" not in name
        self.protection = Recorded(self.own.data, self.peer.data) if self.framed else None
        self.core = NegotiateCore(server_side=server_side)
        self.said = b""
        self.got: list[bytes] = []

    def play(self, size: int) -> None:
        """Receives what the peer said, ``size`` bytes at a time."""
        self.core.start()
        self.step()
        for position in range(0, len(self.peer.stream), size):
            self.core.receive(self.peer.stream[position : position + size], self.got)
            self.step()
            while self.core.pending and self.core.state is not State.FAILED:
                self.core.receive(None, self.got)
                self.step()

    def step(self) -> None:
        if self.core.stepping:
            kind, token = self.steps.pop(0) if self.steps else (DONE, b"")
            if kind == ERROR:
                self.core.step_failed(int.from_bytes(token[:4], "little"))
            else:
                self.core.step_done(token, kind == DONE, self.protection)
        self.said += self.core.outgoing()


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
@pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("name", ECHOES)
def test_conversation(name: str, server_side: bool, size: int) -> None:
    end = End(name, server_side=server_side)
    end.play(size)
    assert end.core.state is State.OPEN
    assert not end.core.truncated
    for data in end.own.data:
        end.core.send(b"." if end.framed else data)
    assert end.said + end.core.outgoing() == end.own.stream
    if isinstance(end.protection, Recorded):
        assert not end.protection.theirs
        assert len(end.got) == len(end.peer.data) == 3
    else:
        assert b"".join(end.got) == b"".join(end.peer.data)


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_server_that_speaks_first(size: int) -> None:
    """Its last token and its first frame may come in one segment."""
    end = End("net8_krb_zero", server_side=False)
    end.play(size)
    assert (end.core.state, end.got) == (State.OPEN, [b"."])
    assert end.said == end.own.stream


@pytest.mark.parametrize("name", ["net8_krb_imp_mismatch", "net8_ntlm_badpw"])
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_server_that_refuses(name: str, size: int) -> None:
    end = End(name, server_side=False)
    code = {"net8_krb_imp_mismatch": 1790, "net8_ntlm_badpw": 0x80090304}[name]
    with pytest.raises(AuthenticationError) as caught:
        end.play(size)
    assert caught.value.code == code
    assert end.core.state is State.FAILED
    assert end.said == end.own.stream


@pytest.mark.parametrize("name", ["net8_krb_imp_mismatch", "net8_ntlm_badpw"])
def test_refusing_as_that_server_does(name: str) -> None:
    """The same frames; the error's second half is ours, for readers of either byte order."""
    end = End(name, server_side=True)
    end.play(1 << 20)
    assert end.core.state is State.FAILED
    assert end.said[:-4] == end.own.stream[:-4]


def test_a_server_that_leaves() -> None:
    """.NET Core 3.1's server threw an exception of its own and said nothing: the handshake is cut short."""
    end = End("net31_krb_imp_mismatch", server_side=False)
    end.play(1 << 20)
    assert end.said == end.own.stream
    assert end.core.truncated
