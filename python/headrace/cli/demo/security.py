"""What secures the demo's connections: what is made for a run and removed after it, and each child's part of it.

Secrets are in files that only this user can read; a child's arguments, which everybody can, name them.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import headrace
from headrace.cli.cert import Files, write_certificates

__all__ = ["SECURITY", "Materials", "SecurityError", "client_security", "prepared", "server_security"]

SECURITY = ("none", "tls", "kerberos", "ntlm")
HOST = "localhost"
HANDSHAKE_TIMEOUT = 30.0  # seconds: all connections are made at once, on one machine
NTLM_USER = "DEMO", "alice"


class SecurityError(Exception):
    """What was asked for can't be had here; the text says what's missing."""


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What was made for a run.

    ``kind`` is what it came to, ``folder`` where the files are, ``environment`` what the children get besides,
    ``notice`` what the user should know.
    """

    kind: str = "none"
    folder: str = ""
    target: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    notice: str | None = None


@contextlib.contextmanager
def prepared(kind: str) -> Iterator[Materials]:
    """Makes what a run needs. Kerberos without a KDC becomes NTLM, and the notice says so.

    Raises :class:`SecurityError`.
    """
    if kind == "none":
        yield Materials()
        return
    if kind == "kerberos":
        from headrace.testing.realm import Realm, needs

        missing = needs()
        if missing is None:
            with contextlib.closing(Closing(Realm())) as made:
                yield of_realm(made.realm)
            return
        notice = f"Kerberos {missing}; going on with NTLM"
    else:
        notice = None
    with tempfile.TemporaryDirectory(prefix="headrace-demo-") as folder:
        yield of_certificates(Path(folder)) if kind == "tls" else of_users(Path(folder), notice)


class Closing:
    """A realm, for ``contextlib.closing``."""

    def __init__(self, realm: Any) -> None:
        self.realm = realm

    def close(self) -> None:
        self.realm.stop()


def of_realm(realm: Any) -> Materials:
    service = realm.services[0]
    realm.kvno(service)  # one ticket for all connections, as a client has it after its first
    return Materials(kind="kerberos", target=service, environment=realm.env)


def of_certificates(folder: Path) -> Materials:
    try:
        write_certificates(folder, [HOST, "127.0.0.1"])
    except ImportError:
        raise SecurityError("--security tls needs trustme: pip install 'headrace[demo]'") from None
    return Materials(kind="tls", folder=str(folder))


def of_users(folder: Path, notice: str | None) -> Materials:
    users = folder / "ntlm-users"
    users.touch(mode=0o600)
    users.write_text(":".join((*NTLM_USER, secrets.token_urlsafe(16))) + "\n")
    return Materials(
        kind="ntlm",
        folder=str(folder),
        target=f"host/{HOST}",
        environment={"NTLM_USER_FILE": str(users)},
        notice=notice,
    )


def server_security(materials: Materials) -> Any:
    """The server's ``security=``."""
    if materials.kind == "none":
        return None
    if materials.kind == "tls":
        files = Files(Path(materials.folder))
        return headrace.TLS(certificate=files.server, private_key=files.server_key)
    return headrace.Negotiate(mechanisms=[materials.kind], handshake_timeout=HANDSHAKE_TIMEOUT)  # type: ignore[list-item]


def client_security(materials: Materials) -> Any:
    """The load's ``security=``."""
    if materials.kind == "none":
        return None
    if materials.kind == "tls":
        return headrace.TLS(ca=Files(Path(materials.folder)).ca)
    credentials = None
    if materials.kind == "ntlm":
        domain, user, password = (Path(materials.folder) / "ntlm-users").read_text().strip().split(":")
        credentials = headrace.Credentials(principal=f"{domain}\\{user}", password=password)
    return headrace.Negotiate(
        target=materials.target,
        mechanisms=[materials.kind],  # type: ignore[list-item]
        credentials=credentials,
        handshake_timeout=HANDSHAKE_TIMEOUT,
    )
