"""What ``security=`` takes: how a loop's connections are to be secured, once or several times over."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from headrace.errors import HandshakeError

if TYPE_CHECKING:
    from headrace.loop import EventLoop
    from headrace.security.access import AccessList
    from headrace.security.layer import SecurityLayer

__all__ = ["Secured", "Security", "connect_layers", "serve_layers", "stack_of"]


class Security:
    """How connections are to be secured; :class:`headrace.TLS` and :class:`headrace.Negotiate` are such.

    One object serves any number of servers and connections of one loop.
    """

    accept: AccessList | None
    handshake_timeout: float
    shutdown_timeout: float
    max_pending_handshakes: int

    def _take_limits(
        self, handshake_timeout: float, shutdown_timeout: float, max_pending_handshakes: int
    ) -> None:
        """The limits that every kind has."""
        for name, value in (("handshake_timeout", handshake_timeout), ("shutdown_timeout", shutdown_timeout)):
            if not value > 0:
                raise ValueError(f"{name} must be a positive number of seconds, not {value!r}")
        if max_pending_handshakes < 1:
            raise ValueError(f"max_pending_handshakes must be at least 1, not {max_pending_handshakes!r}")
        self.handshake_timeout = handshake_timeout
        self.shutdown_timeout = shutdown_timeout
        self.max_pending_handshakes = max_pending_handshakes
        self._pending: dict[SecurityLayer, None] = {}

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

    def _begins(self, layer: SecurityLayer) -> None:
        """A server's connection begins its handshake; if there are too many, the oldest goes."""
        self._pending[layer] = None
        if len(self._pending) > self.max_pending_handshakes:
            oldest = next(iter(self._pending))
            self._over(oldest)
            oldest._fail(
                HandshakeError(
                    f"{self.max_pending_handshakes} connections are in their handshake: the oldest gives way"
                )
            )

    def _over(self, layer: SecurityLayer) -> None:
        self._pending.pop(layer, None)


Secured: TypeAlias = Security | Sequence[Security]


def stack_of(security: Secured) -> tuple[Security, ...]:
    """One or several of them, the outermost (on the wire) first."""
    given: Any = [security] if isinstance(security, Security) else security
    stack = tuple(given) if isinstance(given, Sequence) else ()
    if not stack or not all(isinstance(one, Security) for one in stack):
        raise TypeError(
            "security= takes a headrace.TLS, a headrace.Negotiate, or a list of them, the outermost first; "
            f"not {security!r}"
        )
    return stack


def serve_layers(
    loop: EventLoop, stack: tuple[Security, ...], protocol: asyncio.BaseProtocol
) -> asyncio.BaseProtocol:
    """The layers of an accepted connection; the outermost, which the transport below talks to."""
    for security in reversed(stack):
        protocol = security.server_layer(loop, protocol)
    return protocol


def connect_layers(
    loop: EventLoop,
    stack: tuple[Security, ...],
    protocol: asyncio.BaseProtocol,
    server_hostname: str | None,
    waiter: asyncio.Future[None],
) -> list[SecurityLayer]:
    """The layers of a client's connection, the innermost first. ``waiter`` is told when that one's handshake is done,
    or any failed."""
    layers: list[SecurityLayer] = []
    for security in reversed(stack):
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
