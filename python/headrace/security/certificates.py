"""Certificates: hardened contexts, several names on one server, reloading, who a certificate names, channel bindings.

Rules
-----
* What is validated is what is used: a file that changes between the two is an error, not a surprise.
* A context that is in use is never changed; new files mean a new context, which takes over when all of it is good.
* A server that may ask for client certificates resumes no sessions by ticket: OP_NO_TICKET, and ``num_tickets = 0``
  (OP_NO_TICKET alone stops no resumption under TLS 1.3).
"""

from __future__ import annotations

import datetime
import hashlib
import os
import ssl
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import padding

from headrace.errors import CertificateError, HandshakeError
from headrace.security.identity import Identity

__all__ = [
    "Certificate",
    "ServerCertificates",
    "client_context",
    "end_point_binding",
    "expiry_of",
    "identity_of",
    "leaf_of",
]

Path = str | os.PathLike[str]

VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
LARGEST_FILE = 4 * 1024 * 1024  # bytes; a bundle of all public CAs is 220 KiB
BEGIN = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Certificate:
    """A server's certificate, and whom it's shown to.

    ``chain``: PEM file, the leaf first. ``private_key``: PEM file, if it isn't in the same. ``password``: of the key.
    ``client_certificate``: what is asked of clients; ``client_ca``: PEM file of who may have issued theirs.
    """

    chain: Path
    private_key: Path | None = None
    password: Any = None
    client_ca: Path | None = None
    client_certificate: Literal["none", "optional", "required"] = "none"


class ServerCertificates:
    """A server's contexts, by the name that a client asks for.

    An exact name goes before a wildcard (``"*.example.org"``: one label, no more), a wildcard before the default
    (None). Without a default, clients that ask for another name, or none, are refused.

    Parameters
    ----------
    certificates : mapping of str or None to Certificate
    alpn, crl, minimum_version, keylog
        As :class:`headrace.TLS` has them, for all of them.

    Raises
    ------
    headrace.errors.CertificateError
        For files that can't be read or don't fit together, certificates that have expired, and no certificate at all.

    ``select`` and ``reload`` may be called from any thread.
    """

    def __init__(
        self,
        certificates: Mapping[str | None, Certificate],
        *,
        alpn: Iterable[str] = (),
        crl: Path | Iterable[Path] | None = None,
        minimum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
        keylog: Path | None = None,
    ) -> None:
        if not certificates:
            raise CertificateError("a server needs at least one certificate")
        self._described = dict(certificates)
        self._options: dict[str, Any] = {
            "alpn": tuple(alpn),
            "crl": paths(crl),
            "minimum_version": minimum_version,
            "keylog": keylog,
        }
        self._contexts = self._build()

    def _build(self) -> dict[str | None, tuple[ssl.SSLContext, bytes]]:
        return {
            None if name is None else name.lower(): server_context(one, **self._options)
            for name, one in self._described.items()
        }

    def reload(self) -> None:
        """Reads all files again. Connections to come use the new contexts; if anything is wrong with one, none is used
        and :class:`headrace.errors.CertificateError` is raised."""
        self._contexts = self._build()

    @property
    def only(self) -> tuple[ssl.SSLContext, bytes] | None:
        """The context and leaf for everybody, where there's no choice."""
        contexts = self._contexts
        return contexts[None] if len(contexts) == 1 and None in contexts else None

    def select(self, server_name: str | None) -> tuple[ssl.SSLContext, bytes]:
        """(context, the leaf's DER) for a client that asks for ``server_name``; HandshakeError if there's none."""
        contexts = self._contexts
        if server_name is not None:
            name = server_name.lower()
            found = contexts.get(name) or contexts.get("*." + name.partition(".")[2])
            if found is not None:
                return found
        if None in contexts:
            return contexts[None]
        raise HandshakeError(f"there is no certificate for the server name {server_name!r}")


def paths(one_or_more: Path | Iterable[Path] | None) -> tuple[Path, ...]:
    if one_or_more is None:
        return ()
    return (one_or_more,) if isinstance(one_or_more, (str, os.PathLike)) else tuple(one_or_more)


# ---- contexts ------------------------------------------------------------------------------------------------


def server_context(
    certificate: Certificate,
    *,
    alpn: Iterable[str] = (),
    crl: Iterable[Path] = (),
    minimum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
    keylog: Path | None = None,
) -> tuple[ssl.SSLContext, bytes]:
    """A hardened context, and its leaf (DER)."""
    if certificate.client_certificate not in VERIFY:
        raise CertificateError(
            f"client_certificate must be one of {', '.join(VERIFY)}; not {certificate.client_certificate!r}"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    harden(context, alpn, minimum_version, keylog)
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    leaf = load_own(context, certificate.chain, certificate.private_key, certificate.password)
    if certificate.client_certificate != "none":
        if certificate.client_ca is None:
            raise CertificateError(
                f"clients of {os.fspath(certificate.chain)} are asked for certificates: whom to trust? (client_ca, ca)"
            )
        context.verify_mode = VERIFY[certificate.client_certificate]
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        load_trusted(context, certificate.client_ca)
        load_revoked(context, crl)
    return context, leaf


def client_context(
    ca: Path | None = None,
    certificate: Path | None = None,
    private_key: Path | None = None,
    *,
    password: Any = None,
    alpn: Iterable[str] = (),
    crl: Path | Iterable[Path] | None = None,
    minimum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
    keylog: Path | None = None,
) -> ssl.SSLContext:
    """A hardened context that verifies servers and their names; by default, by whom the system trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    harden(context, alpn, minimum_version, keylog)
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        load_trusted(context, ca)
    load_revoked(context, paths(crl))
    if certificate is not None:
        load_own(context, certificate, private_key, password)
    elif private_key is not None:
        raise CertificateError(f"a private key, {os.fspath(private_key)}, without a certificate")
    return context


def harden(
    context: ssl.SSLContext, alpn: Iterable[str], minimum_version: ssl.TLSVersion, keylog: Path | None
) -> None:
    if minimum_version < ssl.TLSVersion.TLSv1_2:
        raise CertificateError(
            f"{minimum_version!r}: TLS before 1.2 is broken; give a context to use it all the same"
        )
    context.minimum_version = minimum_version
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    protocols = list(alpn)
    if protocols:
        context.set_alpn_protocols(protocols)
    if keylog is not None:
        context.keylog_filename = os.fspath(keylog)


def load_own(context: ssl.SSLContext, chain: Path, private_key: Path | None, password: Any) -> bytes:
    """Loads and validates; the leaf's DER."""
    leaf = leaf_of(chain)
    certificate = x509.load_der_x509_certificate(leaf)
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise CertificateError(
            f"{os.fspath(chain)} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        )
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{os.fspath(chain)} isn't valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        )
    try:
        # A password that isn't known is an error: OpenSSL would ask the terminal, and block the loop.
        context.load_cert_chain(chain, private_key, password if password is not None else refuse_to_ask)
    except ssl.SSLError as exc:
        reason = "the private key doesn't match" if exc.reason == "KEY_VALUES_MISMATCH" else str(exc)
        raise CertificateError(f"{os.fspath(chain)} and its key can't be used: {reason}") from exc
    except (OSError, PasswordNeededError) as exc:
        raise CertificateError(f"{os.fspath(private_key or chain)} can't be used: {exc}") from exc
    if leaf_of(chain) != leaf:
        raise CertificateError(f"{os.fspath(chain)} changed while it was being loaded; load it again")
    return leaf


class PasswordNeededError(Exception):
    """The private key is encrypted, and there is no password."""


def refuse_to_ask() -> bytes:
    raise PasswordNeededError("the private key is encrypted: give its password")


def load_trusted(context: ssl.SSLContext, ca: Path) -> None:
    try:
        context.load_verify_locations(cafile=ca)
    except (ssl.SSLError, OSError) as exc:
        raise CertificateError(f"{os.fspath(ca)} has no certificates to trust: {exc}") from exc


def load_revoked(context: ssl.SSLContext, crls: Iterable[Path]) -> None:
    for crl in crls:
        pem = read(crl)
        try:
            x509.load_pem_x509_crl(pem)
            context.load_verify_locations(cafile=crl)
        except (ValueError, ssl.SSLError) as exc:
            raise CertificateError(
                f"{os.fspath(crl)} isn't a list of revoked certificates (PEM): {exc}"
            ) from exc
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def read(path: Path) -> bytes:
    """A file's bytes; CertificateError for what isn't a file, or is far too large for a certificate."""
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CertificateError(f"{os.fspath(path)} isn't a file")
            data = file.read(LARGEST_FILE + 1)
    except OSError as exc:
        raise CertificateError(f"{os.fspath(path)} can't be read: {exc.strerror or exc}") from exc
    if len(data) > LARGEST_FILE:
        raise CertificateError(f"{os.fspath(path)} is larger than {LARGEST_FILE} bytes")
    return data


def leaf_of(chain: Path) -> bytes:
    """The DER of the first certificate in a PEM file."""
    data = read(chain)
    start = data.find(BEGIN)
    if start < 0:
        raise CertificateError(f"{os.fspath(chain)} has no certificate in it (PEM is expected)")
    try:
        certificate = x509.load_pem_x509_certificate(data[start:])
    except ValueError as exc:
        raise CertificateError(f"the first certificate in {os.fspath(chain)} can't be read: {exc}") from exc
    return certificate.public_bytes(serialization.Encoding.DER)


# ---- what a certificate says ---------------------------------------------------------------------------------


def identity_of(der: bytes) -> Identity:
    """Whom a certificate names. The names are not judged here: see :class:`headrace.AccessList`.

    Raises ValueError for what isn't a certificate.
    """
    certificate = x509.load_der_x509_certificate(der)
    names = list(alternative_names(certificate))
    subject = certificate.subject.rfc4514_string()
    if subject:
        names.append(f"subject:{subject}")
    by_kind = sorted(names, key=lambda name: SHOWN_FIRST.index(name.partition(":")[0]))
    shown = by_kind[0].partition(":")[2] if by_kind else f"serial {certificate.serial_number:x}"
    return Identity(shown, tuple(names), der)


SHOWN_FIRST = ("dns", "uri", "email", "ip", "subject")


def alternative_names(certificate: x509.Certificate) -> Iterable[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    for name in names:
        if isinstance(name, x509.DNSName):
            yield f"dns:{name.value}"
        elif isinstance(name, x509.UniformResourceIdentifier):
            yield f"uri:{name.value}"
        elif isinstance(name, x509.RFC822Name):
            yield f"email:{name.value}"
        elif isinstance(name, x509.IPAddress):
            yield f"ip:{name.value}"


def expiry_of(der: bytes) -> datetime.datetime:
    """When a certificate expires; aware, UTC."""
    return x509.load_der_x509_certificate(der).not_valid_after_utc


def end_point_binding(der: bytes) -> bytes | None:
    """The channel binding ``tls-server-end-point`` of a server's certificate (RFC 5929 section 4.1), without a prefix.

    A hash of the certificate, by the hash of its own signature; SHA-256 for MD5 and SHA-1. None where the signature has
    no single hash (Ed25519, Ed448): the binding isn't defined there.
    """
    certificate = x509.load_der_x509_certificate(der)
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return None
    if algorithm is None:
        return None
    parameters = certificate.signature_algorithm_parameters
    if isinstance(parameters, padding.PSS) and parameters.mgf._algorithm.name != algorithm.name:
        return None  # two hashes: not defined either
    name = "sha256" if algorithm.name in ("md5", "sha1") else algorithm.name
    return hashlib.new(name, der).digest()
