from collections.abc import Iterator
from typing import final

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

__all__ = ["Opener", "Sealer", "load"]

def load() -> str: ...

@disjoint_base
class Direction:
    def __init__(
        self,
        encryption_key: bytes,
        integrity_key: bytes,
        hash_name: str,
        mac_size: int,
        encrypt_then_mac: bool,
        flags: int,
        number: int,
    ) -> None: ...
    @property
    def overhead(self) -> int: ...
    @property
    def number(self) -> int: ...

@final
class Sealer(Direction):
    def __init__(
        self,
        encryption_key: bytes,
        integrity_key: bytes,
        hash_name: str,
        mac_size: int,
        encrypt_then_mac: bool,
        flags: int,
        number: int,
        *,
        random: Iterator[bytes] | None = None,
    ) -> None: ...
    def wrap(self, data: ReadableBuffer) -> bytes: ...
    def wrap_frames(self, data: ReadableBuffer, frame_size: int) -> bytes: ...

@final
class Opener(Direction):
    def unwrap(self, token: ReadableBuffer) -> bytes | None: ...
    def open(self, header: bytes, body: ReadableBuffer, filler: int) -> bytes: ...
    def unwrap_frames(
        self,
        view: ReadableBuffer,
        position: int,
        most: int,
        plaintext: list[bytes],
        silent: int,
        most_silent: int,
    ) -> tuple[int, int, int]: ...
