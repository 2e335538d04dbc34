import asyncio
import socket
from typing import Any, final

from headrace._loop import LoopCore
from headrace._pool import Lease

@final
class Peer: ...

@final
class DatagramBatch:
    def __init__(self) -> None: ...

# In truth a C class whose `__class__` answers with a subclass of asyncio.DatagramTransport.
@final
class DatagramTransport(asyncio.DatagramTransport):
    def __init__(
        self,
        loop: LoopCore,
        shared: DatagramBatch,
        sock: socket.socket,
        protocol: asyncio.DatagramProtocol,
        address: Any = None,
        waiter: asyncio.Future[Any] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None: ...
    def sendto(self, data: bytes | bytearray | memoryview[Any] | Lease, addr: Any = None) -> None: ...
    def is_reading(self) -> bool: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_write_buffer_size(self) -> int: ...
    def get_write_buffer_limits(self) -> tuple[int, int]: ...
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
