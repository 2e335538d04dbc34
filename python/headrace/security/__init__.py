"""Secured connections: TLS, who the peer is, and whom to let in."""

from __future__ import annotations

from headrace.security.access import AccessList
from headrace.security.certificates import Certificate, ServerCertificates
from headrace.security.identity import Identity, SecurityInfo
from headrace.security.tls import TLS, TLSLayer

__all__ = ["TLS", "AccessList", "Certificate", "Identity", "SecurityInfo", "ServerCertificates", "TLSLayer"]
