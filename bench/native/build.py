"""Compiles the C programs of this directory when they are first needed, or when a source has changed.

``python -m bench.native.build`` compiles all of them and prints where they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PROGRAMS", "CompilerMissingError", "build_directory", "program"]

SOURCES = Path(__file__).parent
HEADERS = ("tcp.h", "tls_client.h", "uring_raw.h")
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")
COMPILE_TIMEOUT = 120  # seconds


@dataclass(frozen=True)
class Program:
    """How one program is made: ``<source>.c``, what is defined for it, whether it needs OpenSSL."""

    source: str
    definitions: tuple[str, ...] = ()
    tls: bool = False


PROGRAMS = {
    "loadgen": Program("loadgen"),
    "epoll_echo": Program("epoll_echo"),
    "uring_echo": Program("uring_echo"),
    "tls_loadgen": Program("loadgen", ("-DTLS",), tls=True),
    "tls_server": Program("tls_server", tls=True),
}


class CompilerMissingError(RuntimeError):
    """No C compiler was found, or not what a program needs beside it; the text says what to install."""


def build_directory() -> Path:
    """Where the programs are put: ``HEADRACE_BENCH_BUILD``, or ``build/bench`` beside ``bench``."""
    chosen = os.environ.get("HEADRACE_BENCH_BUILD")
    return Path(chosen) if chosen else SOURCES.parent.parent / "build" / "bench"


def program(name: str) -> Path:
    """The path of a compiled program, compiled now if it is missing or older than a source.

    Raises ``CompilerMissingError`` without a C compiler (or, for TLS, without OpenSSL's headers), ``ValueError``
    for an unknown name and ``subprocess.CalledProcessError`` when a source doesn't compile.
    """
    if name not in PROGRAMS:
        raise ValueError(f"no program {name!r}: {', '.join(PROGRAMS)}")
    recipe = PROGRAMS[name]
    binary = build_directory() / name
    source = SOURCES / f"{recipe.source}.c"
    newest = max(path.stat().st_mtime for path in (source, *(SOURCES / header for header in HEADERS)))
    if not binary.exists() or binary.stat().st_mtime < newest:
        compile_program(recipe, source, binary)
    return binary


def has_openssl(compiler: str) -> bool:
    """Whether that compiler finds OpenSSL's headers."""
    words = [compiler, "-E", "-include", "openssl/ssl.h", "-x", "c", "/dev/null"]
    return subprocess.run(words, capture_output=True, timeout=COMPILE_TIMEOUT).returncode == 0


def compile_program(recipe: Program, source: Path, binary: Path) -> None:
    """Compiles ``source``; the result appears in one step, so a second run never starts half of it."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "gcc", "cc"))), None)
    if not compiler:
        raise CompilerMissingError(
            f"{source.name} needs a C compiler (Debian: apt install gcc libc6-dev linux-libc-dev), "
            "or the variable CC naming one"
        )
    if recipe.tls and not has_openssl(compiler):
        raise CompilerMissingError(f"{binary.name} needs OpenSSL's headers (Debian: apt install libssl-dev)")
    libraries = ("-lssl", "-lcrypto") if recipe.tls else ()
    binary.parent.mkdir(parents=True, exist_ok=True)
    partial = binary.with_name(f"{binary.name}.{os.getpid()}")
    words = [compiler, *FLAGS, *recipe.definitions, "-o", partial, source, *libraries]
    subprocess.run(words, check=True, timeout=COMPILE_TIMEOUT)
    partial.replace(binary)


if __name__ == "__main__":
    for each in PROGRAMS:
        print(program(each))
