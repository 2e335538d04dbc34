"""TLS from the middle of a connection on (STARTTLS), without losing what was read ahead.

A peer that needs no answer sends its first TLS record right behind the line that asks for TLS, often in one segment.
What of that lies in the transport is delivered to the TLS layer by the transport itself; what an
``asyncio.StreamReader`` has taken already is handed over here. asyncio leaves it there, before its fix of 2026: the
handshake waits for bytes that have long come (cpython#142352, uvloop#707), and plain bytes that somebody slipped in
behind the line are read later as if they had come through TLS (the kind of attack that CVE-2011-0411 names). Here they
go where they belong, and fail the handshake.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

from headrace.security.layer import SecurityLayer
from headrace.security.settings import Security
from headrace.security.tls import asyncio_layer

if TYPE_CHECKING:
    from headrace.loop import EventLoop

__all__ = ["start_tls"]


async def start_tls(
    loop: EventLoop,
    transport: Any,
    protocol: asyncio.BaseProtocol,
    context: ssl.SSLContext | Security,
    **options: Any,
) -> SecurityLayer:
    """See ``EventLoop.start_tls``; the options are those of ``asyncio_layer``."""
    check(transport, context)
    handshake = loop.create_future()
    tls = make_layer(loop, protocol, context, handshake, **options)
    reader: Any = getattr(protocol, "_stream_reader", None)  # of an asyncio.StreamReaderProtocol
    ahead, ended = b"", False
    take = getattr(protocol, "_take_read_ahead", None)  # of headrace's streams
    if take is not None:
        ahead, ended = take(tls)
    elif isinstance(reader, asyncio.StreamReader):
        ahead, ended = take_read_ahead(reader)
        # What it pauses when it's full must be the TLS side (cpython#114921), and from its first byte on: the raw
        # transport, paused by then, would never be resumed. (It may have none yet: the protocol learns of TLS first.)
        if reader._transport is transport:  # type: ignore[attr-defined]
            reader._transport = tls  # type: ignore[attr-defined]
    # The TLS layer must hear of its connection before any byte of it.
    transport.pause_reading()
    transport.set_protocol(tls)
    steps = [
        loop.call_soon(tls.connection_made, transport),
        loop.call_soon(hand_over, tls, ahead, ended),
        loop.call_soon(read_on, tls, transport),
    ]
    try:
        await handshake
    except BaseException:
        transport.close()
        for step in steps:
            step.cancel()
        raise
    return tls


def make_layer(
    loop: EventLoop,
    protocol: asyncio.BaseProtocol,
    context: ssl.SSLContext | Security,
    handshake: asyncio.Future[None],
    *,
    server_side: bool,
    server_hostname: str | None,
    ssl_handshake_timeout: float | None,
    ssl_shutdown_timeout: float | None,
) -> SecurityLayer:
    if isinstance(context, ssl.SSLContext):
        return asyncio_layer(
            loop,
            protocol,
            context,
            handshake,
            server_side=server_side,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
            connected=True,
        )
    limits = {"handshake_timeout": ssl_handshake_timeout, "shutdown_timeout": ssl_shutdown_timeout}
    if server_side:
        context.check_server()
        return context.server_layer(loop, protocol, waiter=handshake, connected=True, **limits)
    context.check_client(server_hostname)
    return context.client_layer(loop, protocol, server_hostname, waiter=handshake, connected=True, **limits)


def check(transport: Any, context: object) -> None:
    if not isinstance(context, (ssl.SSLContext, Security)):
        raise TypeError(f"sslcontext is expected to be an instance of ssl.SSLContext, got {context!r}")
    if not getattr(transport, "_start_tls_compatible", False):
        raise TypeError(f"transport {transport!r} is not supported by start_tls()")
    if transport.is_closing():
        raise ConnectionResetError("start_tls() on a transport that is closing or closed")


def take_read_ahead(reader: Any) -> tuple[bytes, bool]:
    """Takes out of a ``StreamReader`` what nobody has read yet, and whether that was all of the stream."""
    ahead, ended = bytes(reader._buffer), reader._eof
    reader._buffer.clear()
    # It begins anew: the end of the stream is now the TLS layer's to tell, and the transport is resumed for that.
    reader._eof = reader._paused = False
    return ahead, ended


def hand_over(tls: SecurityLayer, ahead: bytes, ended: bool) -> None:
    if ahead:
        tls.data_received(ahead)
    if ended:
        tls.eof_received()


def read_on(layer: SecurityLayer, transport: Any) -> None:
    if not layer._lower_held:  # by an authentication that has its first step to do
        transport.resume_reading()
