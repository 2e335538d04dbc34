"""Compiles the C programs of this directory when they are first needed, or when a source has changed.

``python -m bench.native.build`` compiles all of them and prints where they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

__all__ = ["PROGRAMS", "CompilerMissingError", "build_directory", "program"]

SOURCES = Path(__file__).parent
PROGRAMS = ("loadgen", "epoll_echo", "uring_echo", "tls_loadgen", "tls_echo")
OPENSSL = ("-lssl", "-lcrypto")
# Where a program's source has another name, and what it needs besides.
SPECIAL = {"tls_loadgen": ("loadgen", ("-DTLS",), OPENSSL), "tls_echo": ("tls_echo", (), OPENSSL)}
HEADERS = ("tcp.h", "uring_raw.h")
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")
COMPILE_TIMEOUT = 120  # seconds


class CompilerMissingError(RuntimeError):
    """No C compiler was found; the text says what to install."""


def build_directory() -> Path:
    """Where the programs are put: ``HEADRACE_BENCH_BUILD``, or ``build/bench`` beside ``bench``."""
    chosen = os.environ.get("HEADRACE_BENCH_BUILD")
    return Path(chosen) if chosen else SOURCES.parent.parent / "build" / "bench"


def program(name: str) -> Path:
    """The path of a compiled program, compiled now if it is missing or older than a source.

    Raises ``CompilerMissingError`` without a C compiler, ``ValueError`` for an unknown name and
    ``subprocess.CalledProcessError`` when a source doesn't compile.
    """
    if name not in PROGRAMS:
        raise ValueError(f"no program {name!r}: {', '.join(PROGRAMS)}")
    binary = build_directory() / name
    stem, flags, libraries = SPECIAL.get(name, (name, (), ()))
    source = SOURCES / f"{stem}.c"
    newest = max(path.stat().st_mtime for path in (source, *(SOURCES / header for header in HEADERS)))
    if not binary.exists() or binary.stat().st_mtime < newest:
        compile_program(source, binary, flags, libraries)
    return binary


def compile_program(
    source: Path, binary: Path, flags: tuple[str, ...] = (), libraries: tuple[str, ...] = ()
) -> None:
    """Compiles ``source``; the result appears in one step, so a second run never starts half of it."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "gcc", "cc"))), None)
    if not compiler:
        raise CompilerMissingError(
            f"{source.name} needs a C compiler (Debian: apt install gcc libc6-dev linux-libc-dev libssl-dev), "
            "or the variable CC naming one"
        )
    binary.parent.mkdir(parents=True, exist_ok=True)
    partial = binary.with_name(f"{binary.name}.{os.getpid()}")
    subprocess.run(
        [compiler, *FLAGS, *flags, "-o", partial, source, *libraries], check=True, timeout=COMPILE_TIMEOUT
    )
    partial.replace(binary)


if __name__ == "__main__":
    for each in PROGRAMS:
        print(program(each))
