"""The account's and its groups' SIDs, from a ticket's PAC: KERB_VALIDATION_INFO ([MS-PAC] section 2.5).

Rules
-----
* Only what a KDC has signed is given to this; what it says is still read within bounds, for the signature is made with
  a key that other services on this machine may have. Anything that doesn't add up is ValueError, never a guess.
* It's NDR ([C706] chapter 14; type serialization version 1, [MS-RPCE] section 2.2.6): little-endian, aligned to its
  own sizes, and what pointers point to follows the structure in the order of the pointers.
"""

from __future__ import annotations

import struct

__all__ = ["sids"]

# More than a ticket of 64 KiB can hold.
GROUPS = 8192
SUBAUTHORITIES = 15
# Common header, private header, and the pointer to the structure.
HEADERS = 20
VERSION_1_LITTLE = b"\x01\x10\x08\x00"
BY_ID_ONLY = 0  # of UserId: the account is the first of ExtraSids


class Reader:
    """Takes values off, one after the other, each at a multiple of its size."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    def take(self, size: int) -> bytes:
        """That many bytes."""
        if size > len(self._data) - self._at:
            raise ValueError("the PAC's logon information is cut off")
        self._at += size
        return self._data[self._at - size : self._at]

    def long(self) -> int:
        """Four bytes."""
        self._at += -self._at % 4
        return int.from_bytes(self.take(4), "little")

    def count(self, expected: int | None = None, limit: int = GROUPS) -> int:
        """The size of an array."""
        found = self.long()
        if found > limit or (expected is not None and found != expected):
            raise ValueError("the PAC's logon information has arrays of another size than it says")
        return found

    def text(self, pointer: int) -> None:
        """Passes an RPC_UNICODE_STRING's letters by."""
        if pointer:
            self.long()
            if self.long() != 0:
                raise ValueError(
                    "the PAC's logon information has a string that doesn't begin at its beginning"
                )
            self.take(2 * self.long())

    def sid(self, pointer: int) -> str | None:
        """An RPC_SID ([MS-DTYP] section 2.4.2.3), as text."""
        if not pointer:
            return None
        parts = self.count(limit=SUBAUTHORITIES)
        revision, again = self.take(2)
        authority = int.from_bytes(self.take(6), "big")
        if revision != 1 or again != parts:
            raise ValueError("the PAC's logon information has a SID that can't be")
        numbers = struct.unpack(f"<{parts}I", self.take(4 * parts))
        shown = str(authority) if authority < 1 << 32 else f"0x{authority:012x}"
        return "-".join(("S-1", shown, *map(str, numbers)))

    def groups(self, pointer: int, count: int) -> list[int]:
        """An array of GROUP_MEMBERSHIP: relative identifiers, and attributes."""
        if not pointer:
            return []
        self.count(count)
        return [struct.unpack("<II", self.take(8))[0] for _ in range(count)]


def sids(info: bytes) -> tuple[str, ...]:
    """The account's SID first, then its groups', each once, as ``"S-1-5-21-..."``.

    ``info`` is what GSSAPI calls ``urn:mspac:logon-info``. Raises ``ValueError`` for what isn't that.
    """
    if len(info) < HEADERS or info[:4] != VERSION_1_LITTLE:
        raise ValueError("the PAC's logon information isn't NDR")
    size = int.from_bytes(info[8:12], "little")
    if size > len(info) - 16:
        raise ValueError("the PAC's logon information is cut off")
    if not any(info[16:20]):
        return ()
    # Alignment is counted from behind the headers of 16 bytes, which keeps it the same.
    reader = Reader(info[: 16 + size], HEADERS)
    reader.take(48)  # six times
    texts = [struct.unpack("<HHI", reader.take(8))[2] for _ in range(6)]
    reader.take(4)  # logon counts
    user, primary, count, groups = (reader.long() for _ in range(4))
    reader.take(4 + 16)  # flags, session key
    texts += [struct.unpack("<HHI", reader.take(8))[2] for _ in range(2)]
    domain = reader.long()
    reader.take(8 + 4 + 4 + 16 + 4 + 4)
    extra_count, extra, resource_domain, resource_count, resources = (reader.long() for _ in range(5))

    for text in texts[:6]:
        reader.text(text)
    members = reader.groups(groups, count)
    for text in texts[6:]:
        reader.text(text)
    of_domain = reader.sid(domain)
    more = extra_sids(reader, extra, extra_count)
    of_resources = reader.sid(resource_domain)
    local = reader.groups(resources, resource_count)

    found: list[str] = []
    if of_domain is not None:
        account = [user] if user != BY_ID_ONLY else []
        found += [f"{of_domain}-{number}" for number in (*account, primary, *members)]
    found = found + more if user != BY_ID_ONLY else more + found
    if of_resources is not None:
        found += [f"{of_resources}-{number}" for number in local]
    return tuple(dict.fromkeys(found))


def extra_sids(reader: Reader, pointer: int, count: int) -> list[str]:
    """An array of KERB_SID_AND_ATTRIBUTES, and the SIDs behind it."""
    if not pointer:
        return []
    reader.count(count)
    pointers = [struct.unpack("<II", reader.take(8))[0] for _ in range(count)]
    return [sid for sid in map(reader.sid, pointers) if sid is not None]
