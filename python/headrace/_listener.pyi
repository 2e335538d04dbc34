import socket
from asyncio import BaseProtocol, Server
from collections.abc import Callable
from typing import final

from headrace._engine import Endpoint
from headrace._loop import LoopCore

@final
class Listener(Endpoint):
    def __init__(
        self,
        loop: LoopCore,
        protocol_factory: Callable[[], BaseProtocol],
        sock: socket.socket,
        server: Server | None,
    ) -> None: ...
    def _retry(self) -> None: ...
    def stop(self) -> None: ...
