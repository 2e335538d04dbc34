"""A completion-based networking framework: io_uring under asyncio, leased receive buffers, authenticated streams."""

from __future__ import annotations

from headrace import files
from headrace._pool import BufferPool, Lease
from headrace._stream import StreamTransport
from headrace.errors import EngineError, EngineUnavailable, HeadraceError, StalledError
from headrace.loop import EventLoop, new_event_loop, run
from headrace.protocol import Protocol

__all__ = [
    "BufferPool",
    "EngineError",
    "EngineUnavailable",
    "EventLoop",
    "HeadraceError",
    "Lease",
    "Protocol",
    "StalledError",
    "StreamTransport",
    "__version__",
    "files",
    "new_event_loop",
    "run",
]

__version__ = "0.1.0"
