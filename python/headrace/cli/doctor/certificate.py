"""A server's certificate, as headrace's own server would load it and its clients would see it."""

from __future__ import annotations

import datetime
import os
import ssl
import stat
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from headrace.cli.doctor.finding import Finding, fail, ok, skip, warn
from headrace.cli.doctor.options import DoctorOptions
from headrace.errors import CertificateError
from headrace.framing.pump import StdlibPump
from headrace.security.certificates import (
    BEGIN,
    Certificate,
    PasswordNeededError,
    client_context,
    expiry_of,
    identity_of,
    leaf_of,
    read,
    server_context,
)

__all__ = ["certificate", "readable_by_others"]

SOON = datetime.timedelta(days=30)
FLIGHTS = 6  # of a handshake, with some to spare
KEY = b"PRIVATE KEY-----"


def certificate(options: DoctorOptions) -> Iterable[Finding]:
    """Its key, names, end, chain, and who may read the key."""
    chain = options.certificate
    if chain is None:
        yield skip("certificate", "not checked: name a server's with --certificate")
        return
    try:
        leaf = leaf_of(chain)
    except CertificateError as error:
        yield fail("certificate", str(error), "give a PEM file with the server's certificate first")
        return
    has_key = options.private_key is not None or KEY in read(chain)
    context: ssl.SSLContext | None = None
    if has_key:
        finding, context = loaded(chain, options.private_key)
        yield finding
        yield key_file(options.private_key or chain)
    else:
        yield skip("certificate", f"{chain} has no private key: it isn't checked without --private-key")
    yield expiry(leaf)
    yield names(leaf)
    yield order(chain)
    if options.ca is not None:
        yield trusted(context, leaf, options.ca)


def loaded(chain: Path, private_key: Path | None) -> tuple[Finding, ssl.SSLContext | None]:
    """By the code that servers use, so what is good here is good there."""
    try:
        context, _ = server_context(Certificate(chain, private_key))
    except CertificateError as error:
        if isinstance(error.__cause__, PasswordNeededError):
            return skip(
                "certificate", f"{private_key or chain}: the key is encrypted, and isn't checked"
            ), None
        return fail("certificate", str(error), "give the certificate and the key that belong together"), None
    return ok("certificate", f"{chain} and its private key belong together"), context


def key_file(path: Path) -> Finding:
    others = readable_by_others(path)
    if others:
        return fail(
            "private-key-file", f"{path} {others}", f"chmod o= {path}; and take a new key, if it was exposed"
        )
    return ok("private-key-file", f"{path} isn't readable by everybody")


def readable_by_others(path: str | os.PathLike[str]) -> str:
    """What is wrong with a secret file's mode, in words; empty if nothing is, or if a folder keeps others out."""
    file = Path(path).resolve()
    mode = stat.S_IMODE(file.stat().st_mode)
    if not mode & (stat.S_IROTH | stat.S_IWOTH):
        return ""
    if not all(folder.stat().st_mode & stat.S_IXOTH for folder in file.parents):
        return ""
    return f"is open to everybody (mode {mode:04o})"


def expiry(leaf: bytes) -> Finding:
    end = expiry_of(leaf)
    left = end - datetime.datetime.now(datetime.UTC)
    values = {"expires": end.isoformat(), "days": left.days}
    if left < datetime.timedelta(0):
        return fail("certificate-expiry", f"it expired on {end:%Y-%m-%d %H:%M} UTC", "renew it", **values)
    found = f"it expires on {end:%Y-%m-%d %H:%M} UTC, in {left.days} days"
    if left < SOON:
        return warn(
            "certificate-expiry", found, "renew it; headrace.TLS.reload() takes new files over", **values
        )
    return ok("certificate-expiry", found, **values)


def names(leaf: bytes) -> Finding:
    """Clients look at alternative names alone."""
    listed = identity_of(leaf).names
    hosts = [name for name in listed if name.startswith(("dns:", "ip:"))]
    if hosts:
        return ok("certificate-names", ", ".join(hosts), names=hosts)
    found = f"it names no host ({', '.join(listed) or 'nothing at all'}): clients will refuse it"
    return warn("certificate-names", found, "have one issued with subjectAltName entries", names=[])


def order(chain: Path) -> Finding:
    """Whether each certificate of the file is issued by the next one."""
    data = read(chain)
    try:
        listed = x509.load_pem_x509_certificates(data[data.index(BEGIN) :])
        for lower, upper in pairwise(listed):
            lower.verify_directly_issued_by(upper)
    except (ValueError, TypeError, InvalidSignature):
        return fail(
            "certificate-chain",
            f"{chain} has certificates that aren't issued by the one behind them",
            "the server's first, then its issuer's, and so on; the root may be left out",
        )
    last = listed[-1]
    issuer = last.issuer.rfc4514_string()
    if len(listed) == 1 and last.issuer == last.subject:
        found = "it's signed by itself: clients must be given this very file (headrace.TLS(ca=))"
    elif last.issuer == last.subject:
        found = f"{len(listed)} certificates, with the root {issuer}"
    else:
        found = f"{len(listed)} in the file; clients must know the issuer of the last, {issuer}"
    return ok("certificate-chain", found, certificates=len(listed), issuer=issuer)


def trusted(context: ssl.SSLContext | None, leaf: bytes, ca: Path) -> Finding:
    """A handshake with a client that trusts the file, without a socket."""
    hosts = [name.partition(":")[2] for name in identity_of(leaf).names if name.startswith(("dns:", "ip:"))]
    if context is None or not hosts:
        return skip(
            "certificate-trust", "not checked: the certificate, its key or a name can't be used, see above"
        )
    name = hosts[0].replace("*", "any")
    advice = "put the intermediate certificates behind the server's, or give the file of the authority that issued it"
    try:
        handshake(context, client_context(ca), name)
    except ssl.SSLCertVerificationError as error:
        return fail("certificate-trust", f"clients that trust {ca}: {error.verify_message}", advice)
    except (ssl.SSLError, CertificateError) as error:
        return fail("certificate-trust", str(error), advice)
    return ok("certificate-trust", f"clients that trust {ca} accept it for {name}", name=name)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> None:
    """Raises what either side raises; the client, which verifies, comes first."""
    there = StdlibPump(server, True, None, None)
    here = StdlibPump(client, False, name, None)
    here_done = there_done = False
    for _ in range(FLIGHTS):
        here_done = here_done or here.handshake(there.outgoing())
        there_done = there_done or there.handshake(here.outgoing())
        if here_done and there_done:
            return
    raise ssl.SSLError("the handshake doesn't end")
