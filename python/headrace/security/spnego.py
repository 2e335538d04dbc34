"""SPNEGO's tokens (RFC 4178) and the first bytes of Kerberos' and NTLM's: which mechanism a peer offers.

Rules
-----
* Only what is needed, of what a peer sends before it's authenticated: definite lengths, everything in its bounds, no
  bytes left over, at most MECHANISMS names in a list. What isn't so is refused, not guessed.
* GSSAPI makes and takes its own SPNEGO tokens for Kerberos; here they are only looked at. It's given nothing that
  wasn't: a token of NTLM's in its hands has been seen to end the process (MIT krb5 1.20 with gss-ntlmssp 1.2).
* For NTLM they are made and taken here, see ``ntlm.py``.

    NegTokenInit: 60 len 06 06 <SPNEGO> A0 len 30 len [0] mechTypes [1] reqFlags [2] mechToken [3] mechListMIC
    NegTokenResp: A1 len 30 len [0] negState [1] supportedMech [2] responseToken [3] mechListMIC
    raw Kerberos: 60 len 06 09 <Kerberos> ...
    raw NTLM:     "NTLMSSP\\0" ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from headrace.errors import AuthenticationError

__all__ = [
    "ACCEPT_COMPLETED",
    "ACCEPT_INCOMPLETE",
    "KERBEROS",
    "NTLM",
    "NTLM_SIGNATURE",
    "REJECT",
    "REQUEST_MIC",
    "NegTokenInit",
    "NegTokenResp",
    "Raw",
    "first_token",
    "kerberos_error",
    "pack_init",
    "pack_mechanisms",
    "pack_resp",
    "unpack_resp",
]

# Object identifiers as they stand on the wire, without tag and length.
SPNEGO = bytes.fromhex("2b0601050502")  # 1.3.6.1.5.5.2
NTLM = bytes.fromhex("2b06010401823702020a")  # 1.3.6.1.4.1.311.2.2.10
# 1.2.840.113554.1.2.2, and what Windows 2000 made of it by a slip of 16 bits, which Windows still lists first.
KERBEROS = (bytes.fromhex("2a864886f712010202"), bytes.fromhex("2a864882f712010202"))
NTLM_SIGNATURE = b"NTLMSSP\0"

ACCEPT_COMPLETED, ACCEPT_INCOMPLETE, REJECT, REQUEST_MIC = range(4)

SEQUENCE, OID, OCTETS, ENUMERATED = 0x30, 0x06, 0x04, 0x0A
INITIAL, RESPONSE = 0x60, 0xA1
MECHANISMS = 32  # Windows lists four

Raw: TypeAlias = Literal["kerberos", "ntlm"]


@dataclass(frozen=True, slots=True)
class NegTokenInit:
    """A client's first token. ``listed`` are the bytes that a mechListMIC is made of."""

    mechanisms: tuple[bytes, ...]
    listed: bytes
    token: bytes | None = None
    mic: bytes | None = None


@dataclass(frozen=True, slots=True)
class NegTokenResp:
    """Any later token, of either side."""

    state: int | None = None
    mechanism: bytes | None = None
    token: bytes | None = None
    mic: bytes | None = None


def malformed(why: str) -> AuthenticationError:
    return AuthenticationError(f"the peer's SPNEGO token is malformed: {why}")


# ---- DER -----------------------------------------------------------------------------------------------------


def element(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """The tag of the element at ``at``, and where its contents begin and end."""
    if end - at < 2:
        raise malformed("it's cut off")
    tag, size = data[at], data[at + 1]
    at += 2
    if size & 0x80:
        more = size & 0x7F
        if not 1 <= more <= 3 or end - at < more:
            raise malformed("a length can't be")
        size = int.from_bytes(data[at : at + more], "big")
        at += more
    if size > end - at:
        raise malformed("a length goes beyond its end")
    return tag, at, at + size


def only(data: bytes, tag: int, at: int, end: int) -> tuple[int, int]:
    """The contents of the element that alone fills what is between ``at`` and ``end``."""
    found, start, stop = element(data, at, end)
    if found != tag or stop != end:
        raise malformed(f"{found:#x} where {tag:#x} was due")
    return start, stop


def fields(data: bytes, at: int, end: int) -> dict[int, tuple[int, int]]:
    """The elements ``[0]`` to ``[3]`` of a sequence, in their order, each once."""
    found: dict[int, tuple[int, int]] = {}
    last = -1
    while at < end:
        tag, start, at = element(data, at, end)
        number = tag - 0xA0
        if not last < number <= 3:
            raise malformed("its fields are out of order")
        found[number] = (start, at)
        last = number
    return found


def octets(data: bytes, place: tuple[int, int] | None) -> bytes | None:
    if place is None:
        return None
    start, end = only(data, OCTETS, *place)
    return data[start:end]


def pack(tag: int, *contents: bytes) -> bytes:
    """An element around contents."""
    whole = b"".join(contents)
    size = len(whole)
    if size < 0x80:
        return bytes((tag, size)) + whole
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + whole


# ---- tokens --------------------------------------------------------------------------------------------------


def first_token(data: bytes) -> NegTokenInit | Raw:
    """What a client's first token is: SPNEGO's, or that of a mechanism without it.

    Raises :class:`headrace.errors.AuthenticationError` for what is none.
    """
    if data.startswith(NTLM_SIGNATURE):
        return "ntlm"
    if not data or data[0] != INITIAL:
        raise AuthenticationError("the client's first token is neither SPNEGO's nor Kerberos' nor NTLM's")
    start, end = only(data, INITIAL, 0, len(data))
    tag, name, after = element(data, start, end)
    mechanism = data[name:after]
    if tag == OID and mechanism in KERBEROS:
        return "kerberos"
    if tag != OID or mechanism != SPNEGO:
        raise AuthenticationError(
            "the client's first token is of a mechanism that isn't supported", code=0x80090302
        )
    return unpack_init(data, *only(data, 0xA0, after, end))


def unpack_init(data: bytes, start: int, end: int) -> NegTokenInit:
    """The NegTokenInit between ``start`` and ``end``."""
    found = fields(data, *only(data, SEQUENCE, start, end))
    if 0 not in found:
        raise malformed("it lists no mechanisms")
    start, end = found[0]
    at, stop = only(data, SEQUENCE, start, end)
    mechanisms: list[bytes] = []
    while at < stop:
        tag, name, at = element(data, at, stop)
        if tag != OID or len(mechanisms) == MECHANISMS:
            raise malformed("its list of mechanisms isn't one, or too long")
        mechanisms.append(data[name:at])
    if not mechanisms:
        raise malformed("it lists no mechanisms")
    # [3] of a server's hint is something else (NegTokenInit2); a client has nothing to be signed with yet.
    return NegTokenInit(tuple(mechanisms), data[start:end], octets(data, found.get(2)))


def unpack_resp(data: bytes) -> NegTokenResp:
    """A NegTokenResp. Raises :class:`headrace.errors.AuthenticationError` for what is none."""
    start, end = only(data, RESPONSE, 0, len(data))
    found = fields(data, *only(data, SEQUENCE, start, end))
    state = mechanism = None
    if 0 in found:
        start, end = only(data, ENUMERATED, *found[0])
        if end - start != 1:
            raise malformed("its state can't be")
        state = data[start]
    if 1 in found:
        start, end = only(data, OID, *found[1])
        mechanism = data[start:end]
    token = octets(data, found.get(2))
    mic = octets(data, found.get(3))
    # Some old implementations repeat the token where the MIC would be; MIT and pyspnego look over it as well.
    return NegTokenResp(state, mechanism, token, None if mic == token else mic)


def pack_mechanisms(*mechanisms: bytes) -> bytes:
    """A list of mechanisms; also what a mechListMIC is made of."""
    return pack(SEQUENCE, *(pack(OID, one) for one in mechanisms))


def pack_init(listed: bytes, token: bytes) -> bytes:
    """A client's first token."""
    body = pack(SEQUENCE, pack(0xA0, listed), pack(0xA2, pack(OCTETS, token)))
    return pack(INITIAL, pack(OID, SPNEGO), pack(0xA0, body))


def pack_resp(resp: NegTokenResp) -> bytes:
    """A later token."""
    parts: list[bytes] = []
    if resp.state is not None:
        parts.append(pack(0xA0, pack(ENUMERATED, bytes((resp.state,)))))
    if resp.mechanism is not None:
        parts.append(pack(0xA1, pack(OID, resp.mechanism)))
    if resp.token is not None:
        parts.append(pack(0xA2, pack(OCTETS, resp.token)))
    if resp.mic is not None:
        parts.append(pack(0xA3, pack(OCTETS, resp.mic)))
    return pack(RESPONSE, pack(SEQUENCE, *parts))


# ---- Kerberos' errors ----------------------------------------------------------------------------------------


def kerberos_error(token: bytes | None) -> int | None:
    """The error-code of a KRB-ERROR (RFC 4120 section 5.9.1), in whatever it's wrapped; None if it's none.

    GSSAPI under SPNEGO gives numbers of its own to Kerberos' errors; this is the number that is meant.
    """
    if not token:
        return None
    try:
        if token[0] == RESPONSE:
            token = unpack_resp(token).token or b""
        if token[:1] == bytes((INITIAL,)):  # GSSAPI's frame: mechanism, then 03 00 for an error
            start, end = only(token, INITIAL, 0, len(token))
            _, _, after = element(token, start, end)
            token = token[after + 2 : end]
        start, end = only(token, 0x7E, 0, len(token))
        at, end = only(token, SEQUENCE, start, end)
        while at < end:
            tag, start, at = element(token, at, end)
            if tag == 0xA6:
                start, end = only(token, 0x02, start, at)
                return int.from_bytes(token[start:end], "big", signed=True)
    except AuthenticationError:
        pass
    return None
