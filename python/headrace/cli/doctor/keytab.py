"""What a keytab has: names, versions and encryption types, never the keys.

MIT's format 0x0502 (krb5's doc/formats/keytab_file_format.rst): entries with their length before them, a negative one
for what was deleted; everything big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Key", "KeytabError", "keys_in"]

LARGEST = 4 * 1024 * 1024  # bytes


class KeytabError(Exception):
    """What isn't a keytab, or can't be read; the text says why."""


@dataclass(frozen=True, slots=True)
class Key:
    """An entry: ``HTTP/www.example.org@EXAMPLE.ORG``, its key's version and encryption type."""

    principal: str
    version: int
    enctype: int


def keys_in(path: Path) -> list[Key]:
    """The entries of a file. KeytabError says why there are none to be had."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST)
    except OSError as error:
        raise KeytabError(error.strerror or str(error)) from None
    if data[:2] != b"\x05\x02":
        raise KeytabError("it isn't a keytab of format 0x0502")
    keys = []
    at = 2
    try:
        while at + 4 <= len(data):
            (size,) = struct.unpack_from(">i", data, at)
            at += 4
            if size > 0:
                if at + size > len(data):
                    raise KeytabError("it's cut off")
                keys.append(entry(data[at : at + size]))
            elif size == 0:
                break
            at += abs(size)
    except (struct.error, IndexError):
        raise KeytabError("an entry can't be read") from None
    return keys


def entry(data: bytes) -> Key:
    (components,) = struct.unpack_from(">H", data, 0)
    at = 2
    texts = []
    for _ in range(components + 1):  # the realm comes first
        (size,) = struct.unpack_from(">H", data, at)
        texts.append(data[at + 2 : at + 2 + size].decode("utf-8", "replace"))
        at += 2 + size
    at += 4 + 4  # kind of name, time
    version, enctype, size = struct.unpack_from(">BHH", data, at)
    at += 5 + size  # over the key itself
    if at + 4 <= len(data):  # a version that needs more than a byte is said again
        (longer,) = struct.unpack_from(">I", data, at)
        version = longer or version
    realm, *names = texts
    return Key(f"{'/'.join(names)}@{realm}", version, enctype)
