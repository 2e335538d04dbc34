"""The certificate of every TLS server: self-signed, ECDSA on P-256, made when it's first needed."""

from __future__ import annotations

import atexit
import datetime
import ipaddress
import tempfile
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["certificate", "make_certificate"]

LIFETIME = datetime.timedelta(days=1)


def make_certificate() -> bytes:
    """A certificate for localhost and its key, both as PEM; good for a day."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
    )
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - LIFETIME)
        .not_valid_after(now + LIFETIME)
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@cache
def certificate() -> Path:
    """One file with certificate and key, the same for all servers of this process; gone at its end."""
    directory = tempfile.TemporaryDirectory(prefix="headrace-bench-")
    atexit.register(directory.cleanup)
    path = Path(directory.name) / "server.pem"
    path.touch(mode=0o600)
    path.write_bytes(make_certificate())
    return path
