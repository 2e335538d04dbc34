"""Who a secured connection says the peer is, and how the connection is protected."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

__all__ = ["KINDS", "Identity", "ImpersonationLevel", "ProtectionLevel", "SecurityInfo"]

# What a name may be, and what stands before it.
KINDS = ("dns", "uri", "email", "ip", "subject", "principal", "realm", "user", "domain", "sid")


class ProtectionLevel(IntEnum):
    """What is done to messages; .NET's names and values."""

    NONE = 0
    SIGN = 1
    ENCRYPT_AND_SIGN = 2


class ImpersonationLevel(IntEnum):
    """What a server may do with its client's identity; .NET's names and values ([MS-NNS] section 2.2.2).

    IDENTIFICATION: know it, and decide by it. IMPERSONATION: act as the client on the same machine; to a server on
    Linux it's the same. DELEGATION: act as the client towards other servers, with the ticket that it forwarded.
    """

    IDENTIFICATION = 2
    IMPERSONATION = 3
    DELEGATION = 4


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated peer.

    Attributes
    ----------
    name : str
        The one to show: of a certificate its first DNS name, else URI, e-mail address, IP address, else subject.
    names : tuple of str
        All names that the peer was authenticated under, each with its kind before it: ``"dns:example.org"``,
        ``"uri:spiffe://example.org/a"``, ``"email:a@example.org"``, ``"ip:192.0.2.1"``, ``"subject:CN=a,O=b"``
        (RFC 4514); of Kerberos ``"principal:alice@EXAMPLE.ORG"``, ``"realm:EXAMPLE.ORG"`` and, where the KDC vouches
        for them, the SIDs of the account and its groups, ``"sid:S-1-5-21-..."``; of NTLM ``"user:DOMAIN\\alice"``
        and ``"domain:DOMAIN"``. Access lists go by these.
    certificate : bytes or None
        The peer's, DER.
    """

    name: str
    names: tuple[str, ...]
    certificate: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SecurityInfo:
    """What ``transport.get_extra_info("security")`` gives, once the handshake is done.

    Attributes
    ----------
    protocol : str
        ``"TLSv1.3"``, ``"TLSv1.2"``, ``"NegotiateStream"``.
    mechanism : str
        The cipher suite; ``"kerberos"`` or ``"ntlm"``.
    protection : {"encrypt", "sign", "none"}
    is_server : bool
        Which end this is.
    is_mutually_authenticated : bool
        Whether both sides have shown who they are.
    remote_identity : Identity or None
        None for a peer that nobody vouches for.
    expires_at : datetime or None
        When the peer's certificate, or the client's Kerberos ticket, does; aware, UTC.
    alpn_protocol : str or None
        The application protocol that was agreed on (RFC 7301).
    resumed : bool
        Whether an earlier session was resumed.
    channel_binding : bytes or None
        ``tls-server-end-point`` (RFC 5929 section 4), without a prefix; None where it isn't defined or not known.
    impersonation_level : ImpersonationLevel or None
        What the server may do with its client's identity; TLS has none.
    delegated : object or None
        A server's: the credentials that its client forwarded, a ``gssapi.Credentials``.
    channel_bound : bool
        Both sides named the same TLS channel around this authentication.
    channel : SecurityInfo or None
        Of the layer around this one, such as TLS around Kerberos.
    """

    protocol: str
    mechanism: str
    protection: Literal["encrypt", "sign", "none"]
    is_server: bool
    is_mutually_authenticated: bool
    remote_identity: Identity | None
    expires_at: datetime.datetime | None
    alpn_protocol: str | None = None
    resumed: bool = False
    channel_binding: bytes | None = None
    impersonation_level: ImpersonationLevel | None = None
    delegated: Any = field(default=None, repr=False)
    channel_bound: bool = False
    channel: SecurityInfo | None = None

    @property
    def is_encrypted(self) -> bool:
        """Whether nobody on the way can read what is sent."""
        return self.protection == "encrypt"

    @property
    def is_signed(self) -> bool:
        """Whether nobody on the way can change what is sent unnoticed."""
        return self.protection != "none"
