"""What ``security=`` takes: how a loop's connections are to be secured, once or several times over."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from headrace.security.pending import PendingConnections, check_seconds
from headrace.security.proxy import ProxyProtocol

if TYPE_CHECKING:
    from headrace.loop import EventLoop
    from headrace.security.access import AccessList
    from headrace.security.layer import SecurityLayer

__all__ = ["Secured", "Security", "Stack", "connect_layers", "serve_layers", "stack_of"]


class Security(PendingConnections):
    """How connections are to be secured; :class:`headrace.TLS` and :class:`headrace.Negotiate` are such.

    One object serves any number of servers and connections of one loop.
    """

    accept: AccessList | None
    handshake_timeout: float
    shutdown_timeout: float

    def _take_limits(
        self, handshake_timeout: float, shutdown_timeout: float, max_pending_handshakes: int
    ) -> None:
        """The limits that every kind has."""
        self.handshake_timeout = check_seconds("handshake_timeout", handshake_timeout)
        self.shutdown_timeout = check_seconds("shutdown_timeout", shutdown_timeout)
        self._limit_pending(max_pending_handshakes)

    def check_server(self) -> None:
        """Raises what keeps a server from being secured so: missing arguments, files that can't be used."""
        raise NotImplementedError

    def check_client(self, server_hostname: str | None) -> None:
        """Likewise for a connection to ``server_hostname``."""
        raise NotImplementedError

    def server_layer(self, loop: EventLoop, protocol: asyncio.BaseProtocol, **options: Any) -> SecurityLayer:
        """The layer for an accepted connection."""
        raise NotImplementedError

    def client_layer(
        self, loop: EventLoop, protocol: asyncio.BaseProtocol, server_hostname: str | None, **options: Any
    ) -> SecurityLayer:
        """The layer for a connection to ``server_hostname``."""
        raise NotImplementedError


Secured: TypeAlias = Security | ProxyProtocol | Sequence[Security | ProxyProtocol]


class Stack(NamedTuple):
    """How a connection begins: maybe with a PROXY header, and then with what secures it, the outermost first."""

    proxy: ProxyProtocol | None
    layers: tuple[Security, ...]

    def check_server(self) -> None:
        """Raises what keeps a server from beginning so."""
        if self.proxy is not None:
            self.proxy.check_server()
        for one in self.layers:
            one.check_server()

    def check_client(self, server_hostname: str | None) -> None:
        """Likewise for a connection to ``server_hostname``."""
        if self.proxy is not None:
            self.proxy.check_client()
        for one in self.layers:
            one.check_client(server_hostname)


def stack_of(security: Secured) -> Stack:
    """One or several of them, the outermost (on the wire) first."""
    given: Any = [security] if isinstance(security, (Security, ProxyProtocol)) else security
    stack = tuple(given) if isinstance(given, Sequence) else ()
    proxy = None
    if stack and isinstance(stack[0], ProxyProtocol):
        proxy, *rest = stack
        stack = tuple(rest)
    if any(isinstance(one, ProxyProtocol) for one in stack):
        raise ValueError(
            "a PROXY header comes before everything else: headrace.ProxyProtocol is first, and once"
        )
    if not (stack or proxy) or not all(isinstance(one, Security) for one in stack):
        raise TypeError(
            "security= takes a headrace.TLS, a headrace.Negotiate, a headrace.ProxyProtocol, or a list of them, the "
            f"outermost first; not {security!r}"
        )
    return Stack(proxy, stack)


def serve_layers(loop: EventLoop, stack: Stack, protocol: asyncio.BaseProtocol) -> asyncio.BaseProtocol:
    """The layers of an accepted connection; the outermost, which the transport below talks to."""
    for security in reversed(stack.layers):
        protocol = security.server_layer(loop, protocol)
    return protocol if stack.proxy is None else stack.proxy.receiver(loop, protocol)


def connect_layers(
    loop: EventLoop,
    stack: Stack,
    protocol: asyncio.BaseProtocol,
    server_hostname: str | None,
    waiter: asyncio.Future[None],
) -> list[SecurityLayer]:
    """The layers of a client's connection, the innermost first. ``waiter`` is told when that one's handshake is done,
    or any failed."""
    layers: list[SecurityLayer] = []
    for security in reversed(stack.layers):
        if layers:  # the one above would never hear of a handshake that fails here
            waiter = failure_goes_on(loop, waiter)
        layer = security.client_layer(loop, protocol, server_hostname, waiter=waiter)
        layers.append(layer)
        protocol = layer
    return layers


def failure_goes_on(loop: EventLoop, waiter: asyncio.Future[None]) -> asyncio.Future[None]:
    """A waiter whose failure is that of ``waiter``, too."""

    def tell(future: asyncio.Future[None]) -> None:
        if not future.cancelled() and (exc := future.exception()) is not None and not waiter.done():
            waiter.set_exception(exc)

    outer = loop.create_future()
    outer.add_done_callback(tell)
    return outer
