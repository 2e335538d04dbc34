"""Security contexts: what a mechanism (Kerberos, NTLM) gives to a connection that it authenticates.

A context is one side of one authentication. Its steps may block (a client asks its KDC), so they are done on a thread,
one at a time; what it says when it's complete is plain data, and the protection of messages never blocks.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from headrace.security.identity import Identity, ImpersonationLevel, ProtectionLevel

__all__ = ["ContextResult", "ImpersonationLevel", "MessageProtection", "ProtectionLevel", "SecurityContext"]

Buffer: TypeAlias = bytes | bytearray | memoryview


class MessageProtection(Protocol):
    """Tokens around messages, in both directions of one connection. Not thread-safe; nothing in it blocks.

    After any error the connection is lost: neither method may be called again.
    """

    sealed: bool  # tokens are encrypted, and an unsealed one is refused
    overhead: int  # bytes that a token is longer than its message, at most

    def wrap(self, data: Buffer) -> bytes:
        """The next token, around ``data``."""

    def unwrap(self, token: Buffer) -> bytes:
        """What is in the next token of the peer's.

        Raises :class:`headrace.errors.FramingError` for one that isn't the peer's next, whole and as protected as
        agreed.
        """


@dataclass(frozen=True, slots=True)
class ContextResult:
    """What a finished authentication came to.

    Attributes
    ----------
    mechanism : {"kerberos", "ntlm"}
    remote_identity : Identity or None
        None where the mechanism doesn't tell a client who the server is (NTLM).
    is_signed, is_encrypted : bool
        The resulting flags of the context: what messages are to be protected by; not what was asked for.
    is_mutually_authenticated : bool
        The server has shown that it is who the client asked for.
    impersonation_level : ImpersonationLevel
        DELEGATION when credentials were forwarded.
    expires_at : datetime or None
        When the client's ticket ends; aware, UTC. None for a mechanism without an end.
    channel_bound : bool
        Both sides named the same channel (TLS) around this authentication.
    delegated : object or None
        The credentials that the client forwarded: a ``gssapi.Credentials``.
    protection : MessageProtection or None
        None where messages are neither signed nor encrypted.
    """

    mechanism: Literal["kerberos", "ntlm"]
    remote_identity: Identity | None
    is_signed: bool
    is_encrypted: bool
    is_mutually_authenticated: bool
    impersonation_level: ImpersonationLevel
    expires_at: datetime.datetime | None
    channel_bound: bool
    delegated: Any = field(default=None, repr=False)
    protection: MessageProtection | None = field(default=None, repr=False)


class SecurityContext(Protocol):
    """One side of one authentication. Used by one thread at a time; its methods may block."""

    @property
    def complete(self) -> bool:
        """Whether ``result`` may be called; no more steps follow."""

    def step(self, token: bytes | None) -> bytes | None:
        """Takes the peer's token (None: a client's first step) and gives the next one of ours, if there's one.

        Raises :class:`headrace.errors.AuthenticationError`, which has the token that tells the peer, if there's one.
        """

    def result(self) -> ContextResult:
        """What the finished authentication came to. Once: the keys of the context move into it.

        Raises :class:`headrace.errors.AuthenticationError` for a context that mustn't be used (a ticket that is over).
        """

    def dispose(self) -> None:
        """Forgets keys and credentials; any time, and more than once."""
