"""PROXY headers on connections: what ``security=headrace.ProxyProtocol(...)`` puts before everything else.

A server's connection begins with a ``HeaderReceiver``, a client's with a ``HeaderSender``. Neither is a layer: when the
header is through, the protocol or layer that it stood before takes over by ``set_protocol``, on the transport itself.
From then on nothing is left of it but what ``get_extra_info`` tells.

Rules
-----
* Only a peer whose real address is in ``trusted`` may send a header, and it must. Nothing is guessed from bytes.
* The protocol hears nothing of a connection before its header is accepted, and nothing at all of one that is refused.
* The receiver takes the bytes of the header alone from the transport, as many as there surely are. What came behind
  them in the same receive is the transport's to deliver, to whatever kind of protocol takes over: paused or not, with
  the end of the stream behind it.
* A header has ``timeout`` seconds in total. Of too many connections without one the oldest goes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from headrace.errors import AccessDenied, FramingError, HandshakeError, TruncatedError
from headrace.framing.proxy import HeaderReader, ProxyHeader, encode
from headrace.security.pending import PendingConnections, check_seconds

if TYPE_CHECKING:
    from headrace.framing.proxy import Address
    from headrace.loop import EventLoop

__all__ = ["HeaderReceiver", "HeaderSender", "ProxyProtocol"]

logger = logging.getLogger("headrace.security")

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

UNIX = "unix"


class ProxyProtocol(PendingConnections):
    """PROXY headers of both versions, received by a server or sent by a client; the first of what ``security=`` takes.

    Behind a header, ``transport.get_extra_info("peername")`` and ``"sockname"`` are its addresses, unless it has none
    (LOCAL, UNKNOWN); ``"proxy_peername"`` and ``"proxy_sockname"`` are the real ones and ``"proxy"`` is the
    :class:`headrace.ProxyHeader`. A connection without a header has none of the three.

    Parameters
    ----------
    trusted : iterable of str or network
        Which peers' headers a server believes: networks in CIDR notation or single addresses (``"10.1.0.0/16"``,
        ``"::1"``), and ``"unix"`` for whoever can connect to a Unix socket. A server needs it; empty, it trusts nobody.
    version : {1, 2}, optional
        A server: the only one that is allowed (by default both are). A client: the one to send (2), with ``source`` and
        ``destination``.
    required : bool
        What a server does with a peer that isn't trusted. True: it's refused. False: it's served as a connection
        without a header; what it sends is all for the next layer or the protocol, even if it looks like a header. A
        trusted peer must send one in any case.
    timeout : float
        Seconds from the connection's beginning to the end of the header.
    max_pending_handshakes : int
        How many connections of a server may be without their header; beyond it the oldest is closed, with one line in
        the log.
    header : ProxyHeader, optional
        What a client sends.
    source, destination : address, optional
        The same for the usual case: see :class:`headrace.ProxyHeader`.

    Raises
    ------
    ValueError, TypeError
        For arguments that don't go together; from ``create_server`` and ``create_connection`` if what they need is
        missing.
    """

    def __init__(
        self,
        *,
        trusted: Iterable[str | Network] | None = None,
        version: Literal[1, 2] | None = None,
        required: bool = True,
        timeout: float = 5.0,
        max_pending_handshakes: int = 1024,
        header: ProxyHeader | None = None,
        source: Address | None = None,
        destination: Address | None = None,
    ) -> None:
        if version not in (None, 1, 2):
            raise ValueError(f"version must be 1 or 2, not {version!r}")
        if source is not None or destination is not None:
            if header is not None:
                raise ValueError("give either header, or source and destination")
            header = ProxyHeader(source, destination, version=version or 2)
        elif header is not None and version not in (None, header.version):
            raise ValueError(f"a header of version {header.version}, where version {version} is asked for")
        self._limit_pending(max_pending_handshakes)
        self.timeout = check_seconds("timeout", timeout)
        self.version = version
        self.required = required
        self.header = header
        self._encoded = None if header is None else encode(header)
        peers = None if trusted is None else listed(trusted)
        self._trusts_unix = peers is not None and UNIX in peers
        self._networks: tuple[Network, ...] | None = None
        if peers is not None:
            self._networks = tuple(ipaddress.ip_network(one) for one in peers if one != UNIX)

    def check_server(self) -> None:
        """A server must know whom to believe."""
        if self._networks is None:
            raise ValueError(
                "tell whose PROXY headers are believed: trusted= is needed, e.g. trusted=['10.0.0.0/8'] or ['unix']"
            )

    def check_client(self) -> None:
        """A client must know what to send."""
        if self._encoded is None:
            raise ValueError("tell what the PROXY header is to say: header=, or source= and destination=")

    def trusts(self, peername: Any) -> bool:
        """Whether a header from that address, as ``getpeername`` has it, is believed."""
        if isinstance(peername, (str, bytes)):
            return self._trusts_unix
        if not peername or self._networks is None:
            return False
        address = ipaddress.ip_address(peername[0].partition("%")[0])
        # An IPv4 peer of a socket that takes both.
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return any(address in network or (mapped or address) in network for network in self._networks)

    def receiver(self, loop: EventLoop, protocol: asyncio.BaseProtocol) -> HeaderReceiver:
        """What stands before an accepted connection's protocol."""
        return HeaderReceiver(loop, self, protocol)

    def sender(self, protocol: asyncio.BaseProtocol) -> HeaderSender:
        """What stands before a client's."""
        assert self._encoded is not None
        return HeaderSender(self._encoded, protocol)


class HeaderReceiver(asyncio.BufferedProtocol):
    """Reads the header of an accepted connection, and gives way to ``protocol``. Made by the loop."""

    __slots__ = ("_buffer", "_loop", "_peername", "_protocol", "_reader", "_settings", "_timer", "_transport")

    def __init__(self, loop: EventLoop, settings: ProxyProtocol, protocol: asyncio.BaseProtocol) -> None:
        self._loop = loop
        self._settings = settings
        self._protocol = protocol
        self._reader = HeaderReader(settings.version)
        self._buffer = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._transport: Any = None
        self._peername: Any = None

    def __repr__(self) -> str:
        return f"<headrace.HeaderReceiver from {self._peername!r} over {self._transport!r}>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        settings = self._settings
        self._peername = transport.get_extra_info("peername")
        if settings.trusts(self._peername):
            self._timer = self._loop.call_later(settings.timeout, self._overdue)
            settings._begins(self)
        elif settings.required:
            self._fail(AccessDenied(f"{self._peername!r} isn't trusted to send a PROXY header (trusted=)"))
        else:
            self._give_way()

    def get_buffer(self, sizehint: int) -> bytearray:
        self._buffer = bytearray(self._reader.wanted)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        reader = self._reader
        try:
            reader.feed(memoryview(self._buffer)[:nbytes])
        except FramingError as exc:
            self._fail(exc)
            return
        if reader.header is not None:
            self._stop()
            self._tell(reader.header)
            self._give_way()

    def _tell(self, header: ProxyHeader) -> None:
        transport = self._transport
        known = {"proxy": header, "proxy_peername": self._peername}
        known["proxy_sockname"] = transport.get_extra_info("sockname")
        if header.source is not None:
            known.update(peername=header.source, sockname=header.destination)
        # The transport has its cache, since it was asked for its peer's name.
        transport._extra.update(known)

    def _give_way(self) -> None:
        """What was received behind the header is held by the transport, and is the next protocol's."""
        transport, protocol = self._transport, self._protocol
        transport.set_protocol(protocol)
        protocol.connection_made(transport)

    def _overdue(self) -> None:
        self._fail(
            HandshakeError(
                f"in {self._settings.timeout:g} s no PROXY header came but {self._reader.received} bytes of one"
            )
        )

    def _fail(self, exc: BaseException) -> None:
        """The connection is over, and nobody else hears of it."""
        if not self._transport.is_closing():
            logger.info("%r: %s", self, exc)
            self._transport.abort()

    def _stop(self) -> None:
        self._settings._over(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def eof_received(self) -> None:
        if self._reader.received:
            self._fail(TruncatedError("the connection ended within its PROXY header"))
        elif self._loop.get_debug():  # many a health check does no more than that
            logger.debug("%r: the connection ended before its PROXY header", self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop()


class HeaderSender(asyncio.Protocol):
    """Sends a client's header, and gives way to ``protocol``. Made by the loop."""

    __slots__ = ("_encoded", "_protocol")

    def __init__(self, encoded: bytes, protocol: asyncio.BaseProtocol) -> None:
        self._encoded = encoded
        self._protocol = protocol

    def connection_made(self, transport: Any) -> None:
        transport.write(self._encoded)  # one send together with what follows in this turn
        transport.set_protocol(self._protocol)
        self._protocol.connection_made(transport)


def listed(trusted: Iterable[str | Network]) -> tuple[str | Network, ...]:
    if isinstance(trusted, str):
        raise TypeError(f"trusted takes a list of networks, not {trusted!r} alone")
    return tuple(trusted)
