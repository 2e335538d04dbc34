"""The Twisted server: its epoll reactor, default settings, the same work as ``loop_server.py``.

usage: twisted_server.py PORT echo|sink|source
       twisted_server.py PORT tls-echo|tls-sink|tls-source CERTIFICATE
"""

# ruff: noqa: N802 (the names are Twisted's)
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from twisted.internet import epollreactor

epollreactor.install()  # type: ignore[no-untyped-call]

from twisted.internet import protocol, reactor  # noqa: E402  (the reactor is chosen by the first import)

BACKLOG = 4096
CHUNK = b"\x07" * 262144


class Server(protocol.Protocol):
    transport: Any  # Twisted's own type leaves out what TCP adds

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(1)  # asyncio's default


class Echo(Server):
    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


class Sink(Server):
    def connectionMade(self) -> None:
        self.received = 0

    def dataReceived(self, data: bytes) -> None:
        self.received += len(data)


class Source(Server):
    def dataReceived(self, data: bytes) -> None:
        self.transport.registerProducer(self, False)

    def resumeProducing(self) -> None:
        self.transport.write(CHUNK)

    def stopProducing(self) -> None:
        """The connection is gone: nothing to stop."""


def listen(port: int, factory: protocol.Factory, certificate: str | None) -> Any:
    tcp: Any = reactor  # a module to the eye, the reactor in truth
    if not certificate:
        return tcp.listenTCP(port, factory, backlog=BACKLOG)
    from twisted.internet import ssl

    options = ssl.PrivateCertificate.loadPEM(Path(certificate).read_bytes()).options()
    return tcp.listenSSL(port, factory, options, backlog=BACKLOG)


def main(port: int, mode: str, certificate: str | None = None) -> None:
    tcp: Any = reactor
    serve = {"echo": Echo, "sink": Sink, "source": Source}[mode.removeprefix("tls-")]
    listening = listen(port, protocol.Factory.forProtocol(serve), certificate)
    tcp.callWhenRunning(lambda: print("READY", listening.getHost().port, flush=True))
    tcp.run()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
