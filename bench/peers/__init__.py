"""The servers that are compared, and how each is started.

A peer is a name in the tables and a command. Every command takes a port (0: the kernel chooses) and a mode,
and prints ``READY <port>`` when it listens. Python peers run ``loop_server.py`` or ``twisted_server.py`` in
processes of their own, with the interpreter that runs the benchmark, default settings and the same protocol
code.

Names: ``headrace-<engine>-<kind>`` with engine uring or epoll and kind lease, bytes, buffered or streams;
``asyncio``, ``uvloop`` and ``rloop``, each also with ``-buffered`` and ``-streams``; ``twisted``;
``c-uring``, the best plain C io_uring server found; ``c-epoll``; ``c-uring:option=value:...`` for its
ablations.

Under TLS besides: ``aiofastnet`` (on asyncio) and ``aiofastnet-uvloop``, and ``c-tls``, plain C over OpenSSL.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.native import build

__all__ = ["ENGINES", "KINDS", "Peer", "find_peer", "standard_peers"]

HERE = Path(__file__).parent
ENGINES = ("uring", "epoll")
KINDS = ("lease", "bytes", "buffered", "streams")
OTHER_LOOPS = ("asyncio", "uvloop", "rloop")
C_URING_OPTIONS = ("skip=1", "inc=1", "bs=262144", "nb=8")


@dataclass(frozen=True)
class Peer:
    """One server to compare: ``command`` with a port and a mode appended by ``arguments``."""

    name: str
    command: tuple[str, ...]
    options: tuple[str, ...] = ()
    needs: str | None = None  # a Python module; without it the peer is left out, and the report says so
    environment: dict[str, str] = field(default_factory=dict)

    def arguments(self, mode: str, port: int = 0, certificate: Path | None = None) -> list[str]:
        """The command line that serves ``mode`` (echo, sink or source) on ``port``; with a certificate, over TLS."""
        tls = () if certificate is None else ("--tls", str(certificate))
        return [*self.command, str(port), mode, *self.options, *tls]

    def missing(self) -> str | None:
        """Why this peer can't run here, or None."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"no module {self.needs}"
        return None


def python_peer(name: str, loop: str, kind: str, needs: str | None, engine: str | None = None) -> Peer:
    """A server of ``loop_server.py``."""
    command = (sys.executable, str(HERE / "loop_server.py"), loop, kind)
    environment = {"HEADRACE_ENGINE": engine} if engine else {}
    return Peer(name, command, needs=needs, environment=environment)


def find_peer(name: str) -> Peer:
    """The peer of that name; ``ValueError`` for a name that isn't one."""
    if name.startswith("c-uring"):
        options = tuple(name.split(":")[1:])
        return Peer(name, (str(build.program("uring_echo")),), (*C_URING_OPTIONS, *options))
    if name == "c-epoll":
        return Peer(name, (str(build.program("epoll_echo")),))
    if name == "c-tls":
        return Peer(name, (str(build.program("tls_echo")),))
    if name in ("aiofastnet", "aiofastnet-uvloop"):
        return python_peer(name, name, "bytes", "aiofastnet")
    if name == "twisted":
        return Peer(name, (sys.executable, str(HERE / "twisted_server.py")), needs="twisted")
    first, _, rest = name.partition("-")
    if first in OTHER_LOOPS and rest in ("", "buffered", "streams"):
        return python_peer(name, first, rest or "bytes", None if first == "asyncio" else first)
    engine, _, kind = rest.partition("-")
    if first == "headrace" and engine in ENGINES and kind in KINDS:
        return python_peer(name, "headrace", kind, "headrace", engine)
    raise ValueError(f"no peer {name!r}; bench/peers/__init__.py lists the names")


def standard_peers() -> list[str]:
    """What the suites compare by default: the reference and the limits first."""
    ours = [f"headrace-{engine}-{kind}" for engine in ENGINES for kind in ("lease", "bytes")]
    return ["uvloop", "c-uring", "c-epoll", *ours, "asyncio", "rloop", "twisted"]
