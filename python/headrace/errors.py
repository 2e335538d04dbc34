"""The errors that headrace raises: one small hierarchy.

What the operating system says about a connection or a file stays what Python users know: ``OSError`` and its
subclasses. What asyncio's contract demands (``RuntimeError`` for a closed loop, ``ValueError`` and ``TypeError``
for bad arguments) stays that as well.
"""

from __future__ import annotations

import asyncio

__all__ = [
    "AccessDenied",
    "AuthenticationError",
    "CertificateError",
    "EngineError",
    "EngineUnavailable",
    "FramingError",
    "HandshakeError",
    "HeadraceError",
    "IncompleteReadError",
    "LimitOverrunError",
    "MessageError",
    "SecurityError",
    "StalledError",
    "TruncatedError",
]


class HeadraceError(Exception):
    """The base of every error of headrace's own."""


class EngineError(HeadraceError, RuntimeError):
    """An engine was used in a way, a process or a thread it can't be used in."""


class EngineUnavailable(EngineError):  # noqa: N818  # a state of the machine, not a mistake
    """An engine that was asked for by name can't start here; the text says why and what to change."""


class StalledError(HeadraceError, ConnectionError):
    """A connection was given up because its peer accepted no byte for too long while data was queued."""


class IncompleteReadError(HeadraceError, asyncio.IncompleteReadError):
    """A stream ended before what was asked for had come; ``partial`` has what was there."""


class LimitOverrunError(HeadraceError, asyncio.LimitOverrunError):
    """No separator came within a stream's limit; nothing was consumed."""


class MessageError(HeadraceError, ValueError):
    """A message that its framing can't hold, or bytes that aren't in that framing; the text says which."""


class SecurityError(HeadraceError, ConnectionError):
    """The base of what ends a secured connection; what OpenSSL finds stays ``ssl.SSLError``."""


class HandshakeError(SecurityError):
    """A handshake didn't come to its end: it took too long, gave way to others, or the peer lacks what is demanded."""


class AuthenticationError(HandshakeError):
    """Kerberos or NTLM has failed; the text says what, and what to do about it.

    Attributes
    ----------
    code : int
        What [MS-NNS] section 2.2.1 has the peer told: an HRESULT or a Windows error number.
    token : bytes or None
        What the mechanism itself would have the peer told; never shown.
    """

    def __init__(self, message: str, *, code: int = 0x80090308, token: bytes | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.token = token


class AccessDenied(HandshakeError):  # noqa: N818  # the field's own name for it
    """The peer is who it says, and the access list doesn't let it in."""


class FramingError(SecurityError):
    """The peer sent what no peer sends, or more than the limits allow; the text says which."""


class TruncatedError(SecurityError):
    """The stream ended without the end that the framing has for it: what was received may not be all."""


class CertificateError(HeadraceError, ValueError):
    """Certificates or keys that can't be used; the text says which file, and why."""
