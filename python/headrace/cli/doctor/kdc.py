"""Is a KDC there, and what does its clock say: one request for a ticket that it must refuse (RFC 4120 section 5.4.1).

It's for a client ``headrace-doctor``, which nobody has, so nothing is issued and nothing changes; a KDC may log it. The
refusal (KRB-ERROR, section 5.9.1) has the KDC's time in it.
"""

from __future__ import annotations

import datetime
import random
import socket
from dataclasses import dataclass

from headrace.errors import AuthenticationError
from headrace.security.spnego import SEQUENCE, element, only, pack

__all__ = ["Answer", "ask", "place_of"]

PORT = 88
CLIENT = b"headrace-doctor"
LARGEST = 64 * 1024  # bytes of an answer
INTEGER, BITS, TEXT, TIME = 0x02, 0x03, 0x1B, 0x18
AS_REQ, AS_REP, KRB_ERROR = 0x6A, 0x6B, 0x7E
AES = (18, 17, 20, 19)


@dataclass(frozen=True, slots=True)
class Answer:
    """``offset``: by how many seconds our clock is ahead of the KDC's; None if it didn't say the time."""

    offset: float | None


def place_of(text: str) -> tuple[str, int] | None:
    """The host and port of a ``kdc =`` line; None for one that isn't reached by host and port (a proxy's URL)."""
    if "://" in text or text.startswith("/"):
        return None
    host, port = text, str(PORT)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    return (host, int(port)) if port.isdecimal() else None


def ask(host: str, port: int, realm: str, seconds: float) -> Answer:
    """By TCP, and where that isn't served by UDP. OSError: nobody answers; AuthenticationError: no KDC does."""
    question = request(realm)
    before = datetime.datetime.now(datetime.UTC)
    try:
        answer = by_tcp(host, port, question, seconds)
    except ConnectionRefusedError:
        answer = by_udp(host, port, question, seconds)
    now = before + (datetime.datetime.now(datetime.UTC) - before) / 2
    if answer[:1] == bytes((AS_REP,)):
        return Answer(None)
    return Answer((now - time_in(answer)).total_seconds())


def by_tcp(host: str, port: int, question: bytes, seconds: float) -> bytes:
    with socket.create_connection((host, port), timeout=seconds) as connection:
        connection.sendall(len(question).to_bytes(4, "big") + question)
        with connection.makefile("rb") as stream:
            size = int.from_bytes(stream.read(4), "big")
            return stream.read(min(size, LARGEST))


def by_udp(host: str, port: int, question: bytes, seconds: float) -> bytes:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as connection:
        connection.settimeout(seconds)
        connection.connect(address)
        connection.send(question)
        return connection.recv(LARGEST)


# ---- the question and the answer -------------------------------------------------------------------------------


def request(realm: str) -> bytes:
    """An AS-REQ without pre-authentication."""
    name = realm.encode()
    body = pack(
        SEQUENCE,
        pack(0xA0, pack(BITS, bytes(5))),  # no options
        pack(0xA1, principal(1, CLIENT)),
        pack(0xA2, pack(TEXT, name)),
        pack(0xA3, principal(2, b"krbtgt", name)),
        pack(0xA5, pack(TIME, b"20370101000000Z")),
        pack(0xA7, integer(random.getrandbits(31))),
        pack(0xA8, pack(SEQUENCE, *map(integer, AES))),
    )
    return pack(AS_REQ, pack(SEQUENCE, pack(0xA1, integer(5)), pack(0xA2, integer(10)), pack(0xA4, body)))


def principal(kind: int, *names: bytes) -> bytes:
    return pack(
        SEQUENCE,
        pack(0xA0, integer(kind)),
        pack(0xA1, pack(SEQUENCE, *(pack(TEXT, name) for name in names))),
    )


def integer(value: int) -> bytes:
    return pack(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def time_in(answer: bytes) -> datetime.datetime:
    """The KDC's time in a KRB-ERROR (fields 4 and 5). AuthenticationError for what is none."""
    start, end = only(answer, KRB_ERROR, 0, len(answer))
    at, end = only(answer, SEQUENCE, start, end)
    time, microseconds = b"", 0
    while at < end:
        tag, start, at = element(answer, at, end)
        if tag == 0xA4:
            first, last = only(answer, TIME, start, at)
            time = answer[first:last]
        elif tag == 0xA5:
            first, last = only(answer, INTEGER, start, at)
            microseconds = int.from_bytes(answer[first:last], "big")
    try:
        whole = datetime.datetime.strptime(time.decode("ascii"), "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.UTC)
    except ValueError:
        raise AuthenticationError("the answer has no time in it") from None
    return whole + datetime.timedelta(microseconds=microseconds % 1_000_000)
