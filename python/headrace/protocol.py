"""The protocol interface of headrace's own: received bytes come as leases, not as copies."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace._pool import Lease

__all__ = ["Protocol"]


class Protocol(asyncio.BaseProtocol):
    """What a connection's owner subclasses. Every method is called in the loop's thread; none has to be overridden.

    The order of calls is ``connection_made``, then any number of ``lease_received``, then at most one
    ``eof_received``, then ``connection_lost``: once, and last. ``pause_writing`` and ``resume_writing`` come in
    between, in turns. An exception from ``lease_received`` or ``eof_received`` is reported to the loop's exception
    handler and closes the connection.

    ``asyncio.Protocol`` and ``asyncio.BufferedProtocol`` are served as well; which kind a protocol is, is decided by
    ``isinstance`` when it's connected, and again at ``transport.set_protocol``.
    """

    __slots__ = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands; ``transport`` is a :class:`headrace.StreamTransport`, an :class:`asyncio.Transport`.

        For type checkers: ``assert isinstance(transport, headrace.StreamTransport)`` narrows what asyncio declares, and
        then ``transport.write(lease)`` is known to be right.
        """

    def lease_received(self, lease: Lease) -> None:
        """Bytes came: ``lease`` is a read-only view of them, and this protocol's to keep.

        The memory goes back to the pool when the lease is released: by ``lease.release()``, by ``with lease:``, or
        when the last reference to it goes. ``transport.write(lease)`` sends the bytes from where they lie.
        A lease of a large receive pins a whole pool block (256 KiB); what is to be kept for long is better copied
        with ``bytes(lease)`` or ``lease.detach()``.
        """

    def eof_received(self) -> bool | None:
        """The peer will send no more. True keeps the connection open for writing; else it is closed."""
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone: ``None`` after an end in order or ``close``, else what ended it."""

    def security_expired(self) -> None:
        """The peer's ticket has ended; only with ``headrace.Negotiate(on_expiry="notify")``."""

    def pause_writing(self) -> None:
        """More than the high-water mark is queued: stop writing until ``resume_writing``."""

    def resume_writing(self) -> None:
        """The queue has drained to the low-water mark."""
