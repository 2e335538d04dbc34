"""The Twisted server: its epoll reactor, default settings, the same work as ``loop_server.py``.

usage: twisted_server.py PORT echo|sink|source [--tls PEM]
"""

# ruff: noqa: N802 (the names are Twisted's)
from __future__ import annotations

import sys
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


def main(port: int, mode: str, pem: str | None) -> None:
    tcp: Any = reactor  # a module to the eye, the reactor in truth
    factory = protocol.Factory.forProtocol({"echo": Echo, "sink": Sink, "source": Source}[mode])
    if pem is None:
        listening = tcp.listenTCP(port, factory, backlog=BACKLOG)
    else:
        from OpenSSL import SSL
        from twisted.internet import ssl

        contexts = ssl.DefaultOpenSSLContextFactory(pem, pem, sslmethod=SSL.TLS_METHOD)  # type: ignore[no-untyped-call]
        listening = tcp.listenSSL(port, factory, contexts, backlog=BACKLOG)
    tcp.callWhenRunning(lambda: print("READY", listening.getHost().port, flush=True))
    tcp.run()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[4] if len(sys.argv) > 3 else None)
