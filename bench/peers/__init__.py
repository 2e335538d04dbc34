"""The servers that are compared, and how each is started.

A peer is a name in the tables and a command. Every command takes a port (0: the kernel chooses) and a mode,
in the modes of TLS the file of a certificate and its key as well, and prints ``READY <port>`` when it listens.
Python peers run ``loop_server.py`` or ``twisted_server.py`` in processes of their own, with the interpreter that
runs the benchmark, default settings and the same protocol code.

Names: ``headrace-<engine>-<kind>`` with engine uring or epoll and kind lease, bytes, buffered, streams or reader;
``asyncio``, ``uvloop`` and ``rloop``, each also with ``-buffered`` and ``-streams``; ``aiofastnet`` on asyncio's
loop and ``aiofastnet-uvloop`` on uvloop's; ``twisted``; ``c-uring``, the best plain C io_uring server found;
``c-epoll``; ``c-uring:option=value:...`` for its ablations; ``c-openssl``, plain C over OpenSSL.

In the modes of TLS, ``lease`` is a ``headrace.Protocol`` behind ``security=headrace.TLS(...)``; everything else gets
an ``ssl.SSLContext`` as ``ssl=``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.certificate import certificate
from bench.native import build

__all__ = ["ENGINES", "KINDS", "TLS", "Peer", "find_peer", "standard_peers", "tls_peers"]

HERE = Path(__file__).parent
ENGINES = ("uring", "epoll")
KINDS = ("lease", "bytes", "buffered", "streams", "reader")
OTHER_LOOPS = ("asyncio", "uvloop", "rloop")
# What the modes of TLS begin with: "tls-echo" is "echo" over TLS.
TLS = "tls-"
C_URING_OPTIONS = ("skip=1", "inc=1", "bs=262144", "nb=8")


@dataclass(frozen=True)
class Peer:
    """One server to compare: ``command`` with a port and a mode appended by ``arguments``."""

    name: str
    command: tuple[str, ...]
    options: tuple[str, ...] = ()
    needs: str | None = None  # a Python module; without it the peer is left out, and the report says so
    environment: dict[str, str] = field(default_factory=dict)
    over: tuple[str, ...] = ("tcp", "tls")
    tls_needs: str | None = None  # a name of a Python module, as "module.name": without it, no TLS

    def arguments(self, mode: str, port: int = 0) -> list[str]:
        """The command line that serves ``mode`` (echo, sink or source, or one of these over TLS) on ``port``."""
        options = [str(certificate()), *self.options] if mode.startswith(TLS) else self.options
        return [*self.command, str(port), mode, *options]

    def missing(self, mode: str = "echo") -> str | None:
        """Why this peer can't serve ``mode`` here, or None."""
        over = "tls" if mode.startswith(TLS) else "tcp"
        if over not in self.over:
            return f"no {over.upper()} in {self.name}"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"no module {self.needs}"
        if over == "tls" and self.tls_needs:
            module, _, name = self.tls_needs.partition(".")
            if importlib.util.find_spec(module) is None:
                return f"no module {module}"
            if not hasattr(importlib.import_module(module), name):
                return f"no {self.tls_needs} in this version"
        return None


def python_peer(name: str, loop: str, kind: str, engine: str | None = None) -> Peer:
    """A server of ``loop_server.py``."""
    command = (sys.executable, str(HERE / "loop_server.py"), loop, kind)
    package = loop.partition("-")[0]
    return Peer(
        name,
        command,
        needs=None if package == "asyncio" else package,
        environment={"HEADRACE_ENGINE": engine} if engine else {},
        over=("tcp",) if package == "rloop" else ("tcp", "tls"),
        tls_needs={"lease": "headrace.TLS"}.get(kind, {"aiofastnet-uvloop": "uvloop.Loop"}.get(loop)),
    )


def find_peer(name: str) -> Peer:
    """The peer of that name; ``ValueError`` for a name that isn't one."""
    if name.startswith("c-uring"):
        options = tuple(name.split(":")[1:])
        command = (str(build.program("uring_echo")),)
        return Peer(name, command, (*C_URING_OPTIONS, *options), over=("tcp",))
    if name == "c-epoll":
        return Peer(name, (str(build.program("epoll_echo")),), over=("tcp",))
    if name == "c-openssl":
        return Peer(name, (str(build.program("tls_server")),), over=("tls",))
    if name == "twisted":
        command = (sys.executable, str(HERE / "twisted_server.py"))
        return Peer(name, command, needs="twisted", tls_needs="OpenSSL.SSL")
    if name in ("aiofastnet", "aiofastnet-uvloop"):
        return python_peer(name, name, "bytes")
    first, _, rest = name.partition("-")
    if first in OTHER_LOOPS and rest in ("", "buffered", "streams"):
        return python_peer(name, first, rest or "bytes")
    engine, _, kind = rest.partition("-")
    if first == "headrace" and engine in ENGINES and kind in KINDS:
        return python_peer(name, "headrace", kind, engine)
    raise ValueError(f"no peer {name!r}; bench/peers/__init__.py lists the names")


def standard_peers() -> list[str]:
    """What the suites compare by default: the reference and the limits first."""
    ours = [f"headrace-{engine}-{kind}" for engine in ENGINES for kind in ("lease", "bytes")]
    return ["uvloop", "c-uring", "c-epoll", *ours, "asyncio", "rloop", "twisted"]


def tls_peers() -> list[str]:
    """The same for TLS."""
    ours = [f"headrace-{engine}-{kind}" for engine in ENGINES for kind in ("lease", "bytes")]
    return ["uvloop", "c-openssl", "aiofastnet-uvloop", "aiofastnet", *ours, "asyncio", "twisted"]
