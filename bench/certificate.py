"""The certificate that every TLS server of a comparison shows: one ECDSA key on P-256, signed by itself."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

from bench.native.build import build_directory

__all__ = ["certificate_file"]

DAY = 24 * 3600.0


def certificate_file() -> Path:
    """PEM of the certificate and its key; made when there's none, or an old one."""
    path = build_directory() / "tls.pem"
    if not path.exists() or path.stat().st_mtime < time.time() - DAY:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(make_certificate())
    return path


def make_certificate() -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "headrace bench")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)
