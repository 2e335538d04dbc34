from typing import final

from headrace._engine import Engine
from headrace._pool import BufferPool

@final
class Ring: ...

@final
class UringEngine(Engine):
    def __init__(
        self,
        pool: BufferPool | None = None,
        *,
        ring_entries: int = 256,
        completion_entries: int = 4096,
        incremental: bool | None = None,
    ) -> None: ...
    @property
    def features(self) -> dict[str, bool]: ...
    @property
    def no_buffers(self) -> int: ...
    @property
    def overflows(self) -> int: ...
