"""Secured connections: TLS, Kerberos and NTLM, who the peer is, and whom to let in; PROXY headers before them."""

from __future__ import annotations

from headrace.security.access import AccessList
from headrace.security.certificates import Certificate, ServerCertificates
from headrace.security.credentials import Credentials
from headrace.security.identity import Identity, ImpersonationLevel, ProtectionLevel, SecurityInfo
from headrace.security.negotiate import Negotiate, NegotiateLayer
from headrace.security.proxy import ProxyProtocol
from headrace.security.tls import TLS, TLSLayer

__all__ = [
    "TLS",
    "AccessList",
    "Certificate",
    "Credentials",
    "Identity",
    "ImpersonationLevel",
    "Negotiate",
    "NegotiateLayer",
    "ProtectionLevel",
    "ProxyProtocol",
    "SecurityInfo",
    "ServerCertificates",
    "TLSLayer",
]
