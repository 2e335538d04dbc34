"""A completion-based networking framework: io_uring under asyncio, leased receive buffers, authenticated streams."""

from __future__ import annotations

from headrace import files
from headrace._pool import BufferPool, Lease
from headrace._stream import StreamTransport
from headrace.errors import (
    AccessDenied,
    AuthenticationError,
    CertificateError,
    EngineError,
    EngineUnavailable,
    FramingError,
    HandshakeError,
    HeadraceError,
    SecurityError,
    StalledError,
    TruncatedError,
)
from headrace.loop import EventLoop, new_event_loop, run
from headrace.protocol import Protocol
from headrace.security import (
    TLS,
    AccessList,
    Certificate,
    Credentials,
    Identity,
    ImpersonationLevel,
    Negotiate,
    ProtectionLevel,
    SecurityInfo,
)

__all__ = [
    "TLS",
    "AccessDenied",
    "AccessList",
    "AuthenticationError",
    "BufferPool",
    "Certificate",
    "CertificateError",
    "Credentials",
    "EngineError",
    "EngineUnavailable",
    "EventLoop",
    "FramingError",
    "HandshakeError",
    "HeadraceError",
    "Identity",
    "ImpersonationLevel",
    "Lease",
    "Negotiate",
    "ProtectionLevel",
    "Protocol",
    "SecurityError",
    "SecurityInfo",
    "StalledError",
    "StreamTransport",
    "TruncatedError",
    "__version__",
    "files",
    "new_event_loop",
    "run",
]

__version__ = "0.1.0"
