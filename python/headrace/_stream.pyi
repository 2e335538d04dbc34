import asyncio
import socket
from collections.abc import Callable, Iterable
from typing import Any, final

from headrace._loop import LoopCore
from headrace._pool import Lease

# In truth a C class whose `__class__` answers with a subclass of asyncio.Transport.
@final
class StreamTransport(asyncio.Transport):
    def __init__(
        self,
        loop: LoopCore,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[Any] | None = None,
        extra: dict[str, Any] | None = None,
        server: asyncio.Server | None = None,
    ) -> None: ...
    def write(self, data: bytes | bytearray | memoryview[Any] | Lease) -> None: ...
    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any] | Lease]) -> None: ...
    @property
    def _sock(self) -> socket.socket: ...
    def _make_empty_waiter(self) -> asyncio.Future[None]: ...
    def _reset_empty_waiter(self) -> None: ...
    def _lend_descriptor(self, stop: Callable[[], object]) -> None: ...
    def _take_back_descriptor(self) -> None: ...
