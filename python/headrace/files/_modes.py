"""What the arguments of ``open`` mean."""

from __future__ import annotations

import functools
import os

# An operation costs a turn of the loop, so files look further ahead than io's 8 KiB.
BUFFER_SIZE = 64 * 1024


class Opened:
    """A mode, and what follows from it."""

    def __init__(self, mode: str, buffering: int, owned: bool) -> None:
        if not isinstance(mode, str):
            raise TypeError(f"mode must be str, not {type(mode).__name__}")
        letters = set(mode)
        if letters - set("xrwabt+") or len(mode) > len(letters):
            raise ValueError(f"invalid mode: {mode!r}")
        kinds = letters & set("xrwa")
        if len(kinds) != 1:
            raise ValueError("must have exactly one of create/read/write/append mode")
        self.text = "b" not in letters
        if not self.text and "t" in letters:
            raise ValueError("can't have text and binary mode at once")
        (kind,) = kinds
        both = "+" in letters
        self.readable = both or kind == "r"
        self.writable = both or kind != "r"
        self.appending = kind == "a"
        self.mode = kind + "b" + ("+" if both else "")
        self.flags = os.O_RDWR if both else os.O_WRONLY if self.writable else os.O_RDONLY
        self.flags |= {
            "r": 0,
            "w": os.O_CREAT | os.O_TRUNC,
            "x": os.O_CREAT | os.O_EXCL,
            "a": os.O_CREAT | os.O_APPEND,
        }[kind]
        if self.text and buffering == 0:
            raise ValueError("can't have unbuffered text I/O")
        self.line_buffering = buffering == 1
        self.buffering = BUFFER_SIZE if buffering < 0 or buffering == 1 else buffering
        self.owned = owned


_cached = functools.lru_cache(64)(Opened)


def parsed(mode: str, buffering: int, owned: bool) -> Opened:
    """An Opened, which nobody changes: programs use few modes, and open often."""
    return _cached(mode, buffering, owned)
