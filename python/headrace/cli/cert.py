"""``headrace cert``: an authority of one's own, and certificates by it, for development and tests."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import trustme

__all__ = ["Files", "register", "write_certificates"]


class Files:
    """Where the parts of a set lie: ``ca``, ``server`` and ``server_key``, and by name ``client(name)``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = folder / "ca.pem"
        self.server = folder / "server.pem"
        self.server_key = folder / "server.key"

    def client(self, name: str) -> tuple[Path, Path]:
        """(certificate, private key)"""
        stem = "client-" + "".join(letter if letter.isalnum() or letter in "._-@" else "_" for letter in name)
        return self.folder / f"{stem}.pem", self.folder / f"{stem}.key"

    def all(self, clients: Sequence[str]) -> list[Path]:
        """Every file of a set."""
        found = [self.ca, self.server, self.server_key]
        for name in clients:
            found += self.client(name)
        return found


def write_certificates(
    folder: Path, names: Sequence[str], clients: Sequence[str] = (), days: int = 30
) -> Files:
    """Writes a new authority's certificate, and certificates by it, over what is there.

    The authority's own key is forgotten: nobody can issue more. Private keys are readable by their owner only. Raises
    ImportError without trustme, and ValueError for names that can't be in a certificate.
    """
    import trustme

    files = Files(folder)
    authority = trustme.CA(organization_name="headrace development")
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    authority.cert_pem.write_to_path(str(files.ca))
    write(authority.issue_cert(*names, not_after=expires), files.server, files.server_key)
    for name in clients:
        write(authority.issue_cert(name, not_after=expires), *files.client(name))
    return files


def write(issued: trustme.LeafCert, chain: Path, key: Path) -> None:
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    with contextlib.suppress(FileNotFoundError):
        key.unlink()  # a new file has the mode below, an old one would keep its own
    with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(issued.private_key_pem.bytes())


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``cert`` to the commands."""
    parser = subparsers.add_parser(
        "cert",
        help="make an authority and certificates for development",
        description="Writes the certificate of a new authority (ca.pem), a server's certificate and key by it "
        "(server.pem, server.key), and as many for clients as are named (client-NAME.pem, .key). For development: "
        "the authority's own key isn't kept, and whoever trusts ca.pem trusts these certificates and no others.",
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("certificates"),
        metavar="DIR",
        help="where to (default: certificates)",
    )
    add(
        "--name",
        action="append",
        metavar="NAME",
        help="a name or address of the server; may be repeated (default: localhost, 127.0.0.1 and ::1)",
    )
    add("--client", action="append", default=[], metavar="NAME", help="a client's name; may be repeated")
    add("--days", type=int, default=30, metavar="N", help="how long they are valid (default: 30)")
    add("--force", action="store_true", help="write over files that are there")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Exit status: see :func:`headrace.cli.main`."""
    folder: Path = options.out
    if not 1 <= options.days <= 3650:
        return fail(f"--days must be between 1 and 3650, not {options.days}")
    there = [str(path) for path in Files(folder).all(options.client) if path.exists()]
    if there and not options.force:
        return fail(f"{', '.join(there)} would be overwritten; choose another --out, or add --force")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = options.name or ["localhost", "127.0.0.1", "::1"]
        files = write_certificates(folder, names, options.client, options.days)
    except ImportError:
        return fail("needs trustme: pip install 'headrace[demo]'")
    except (OSError, ValueError) as error:
        return fail(str(error))
    for path in files.all(options.client):
        print(path)
    print(f"\nserver: headrace.TLS(certificate={str(files.server)!r}, private_key={str(files.server_key)!r})")
    print(f"client: headrace.TLS(ca={str(files.ca)!r})")
    return 0


def fail(text: str) -> int:
    print(f"headrace cert: {text}", file=sys.stderr)
    return 2
