"""Certificate authorities and files for the TLS tests; made once for each test run."""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import trustme


@functools.cache
def authority(name: str = "main") -> trustme.CA:
    """The authority of that name."""
    return trustme.CA(organization_name=f"headrace's tests: {name}")


@functools.cache
def folder() -> Path:
    """Where the files below lie; goes with this process."""
    kept = tempfile.TemporaryDirectory(prefix="headrace-tls-")
    folder_of_this_process.append(kept)
    return Path(kept.name)


folder_of_this_process: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def ca_file(name: str = "main") -> Path:
    """PEM of an authority."""
    path = folder() / f"{os.getpid()}-{name}-ca.pem"
    authority(name).cert_pem.write_to_path(str(path))
    return path


@dataclass(frozen=True)
class Files:
    """A certificate that was issued: the whole chain, and its key."""

    chain: Path
    key: Path


@functools.cache
def issued(*names: str, ca: str = "main") -> Files:
    """A certificate for these names."""
    stem = "-".join(names).replace("*", "any").replace("/", "_").replace(":", "_")
    files = Files(folder() / f"{ca}-{stem}.pem", folder() / f"{ca}-{stem}.key")
    certificate = authority(ca).issue_cert(*names)
    files.chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(files.key))
    return files
