"""Versions, the extras that are installed, and the TLS pump."""

from __future__ import annotations

import importlib
import os
import platform
import ssl
from collections.abc import Iterable
from importlib import metadata

from headrace import __version__
from headrace.cli.doctor.finding import Finding, fail, ok, skip, warn
from headrace.cli.doctor.options import DoctorOptions
from headrace.framing import pump

__all__ = ["packages", "tls", "versions"]


def versions(options: DoctorOptions) -> Iterable[Finding]:
    """Only told."""
    python = platform.python_version()
    found = f"headrace {__version__}, {platform.python_implementation()} {python}"
    yield ok("versions", found, headrace=__version__, python=python)


def packages(options: DoctorOptions) -> Iterable[Finding]:
    """What Kerberos and NTLM stand on: whether it can be imported, not only whether it's installed."""
    spnego, why = version_of("pyspnego", "spnego")
    if spnego is not None:
        yield ok("pyspnego", f"{spnego}: NTLM can be used", version=spnego)
    else:
        yield fail("pyspnego", f"can't be imported: {why}", "pip install 'pyspnego>=0.10'", version=None)
    gssapi, why = version_of("gssapi", "gssapi.raw")
    advice = "pip install 'headrace[kerberos]' (built from source: gcc and Debian's libkrb5-dev)"
    if gssapi is not None:
        yield ok("gssapi", f"{gssapi}: Kerberos can be used", version=gssapi)
    elif options.negotiate:
        yield fail("gssapi", f"can't be imported: {why}", advice, version=None)
    else:
        yield skip("gssapi", f"Kerberos can't be used ({why}): {advice}", version=None)


def version_of(package: str, module: str) -> tuple[str | None, str]:
    """(its version, why there's none). A library of the system's may be missing under what is installed."""
    try:
        importlib.import_module(module)
        return metadata.version(package), ""
    except (ImportError, OSError, metadata.PackageNotFoundError) as error:
        return None, str(error)


def tls(options: DoctorOptions) -> Iterable[Finding]:
    """OpenSSL, and what moves records through it."""
    version = ssl.OPENSSL_VERSION
    if ssl.OPENSSL_VERSION_INFO < (3, 0):
        yield warn(
            "openssl", version, "a Python with OpenSSL 3: this one gets no more fixes", version=version
        )
    else:
        yield ok("openssl", version, version=version)
    forced = os.environ.get(pump.VARIABLE, "")
    reason = pump.reason()
    if forced not in ("", "stdlib", "native"):
        yield fail(
            "tls-pump", f"{pump.VARIABLE}={forced!r} names none", "native or stdlib, or unset it", pump=None
        )
    elif forced == "stdlib":
        yield ok("tls-pump", f"stdlib: {pump.VARIABLE} says so", pump="stdlib")
    elif not reason:
        yield ok("tls-pump", "native: records go straight through OpenSSL", pump="native")
    elif forced:
        yield fail(
            "tls-pump", f"native is forced and can't run here: {reason}", f"unset {pump.VARIABLE}", pump=None
        )
    else:
        advice = "records cost more processor time; a Python whose ssl module has OpenSSL as a shared library"
        yield warn("tls-pump", f"stdlib: {reason}", advice, pump="stdlib")
