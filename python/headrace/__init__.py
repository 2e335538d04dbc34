"""A completion-based networking framework: io_uring under asyncio, leased receive buffers, authenticated streams."""

from __future__ import annotations

from headrace import files, messages
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
    IncompleteReadError,
    LimitOverrunError,
    MessageError,
    SecurityError,
    StalledError,
    TruncatedError,
)
from headrace.framing.proxy import ProxyHeader, ProxySSL
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
    ProxyProtocol,
    SecurityInfo,
)
from headrace.streams import (
    Reader,
    Writer,
    open_connection,
    open_unix_connection,
    start_server,
    start_unix_server,
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
    "IncompleteReadError",
    "Lease",
    "LimitOverrunError",
    "MessageError",
    "Negotiate",
    "ProtectionLevel",
    "Protocol",
    "ProxyHeader",
    "ProxyProtocol",
    "ProxySSL",
    "Reader",
    "SecurityError",
    "SecurityInfo",
    "StalledError",
    "StreamTransport",
    "TruncatedError",
    "Writer",
    "__version__",
    "files",
    "messages",
    "new_event_loop",
    "open_connection",
    "open_unix_connection",
    "run",
    "start_server",
    "start_unix_server",
]

__version__ = "0.1.0"
