"""The event loop that users see: CPython's own, with headrace's core, transports and engine under it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import IO, TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

from headrace import starttls
from headrace._datagram import DatagramBatch, DatagramTransport
from headrace._engine import Engine
from headrace._epoll import EpollEngine
from headrace._listener import Listener
from headrace._pool import BufferPool
from headrace._stream import StreamTransport
from headrace._uring import UringEngine
from headrace.errors import EngineUnavailable
from headrace.security.settings import Secured, Security, connect_layers, serve_layers, stack_of
from headrace.security.steps import StepThreads
from headrace.security.tls import asyncio_layer
from headrace.sockets import SocketOperations
from headrace.stats import LoopStats
from headrace.subprocesses import ChildProcesses, can_wait_on_pidfd, program_has_child_watcher

if TYPE_CHECKING:
    import ssl

__all__ = ["EventLoop", "new_event_loop", "run"]

logger = logging.getLogger("headrace")

T = TypeVar("T")

# What datagram transports of ours know the addresses of; of other sockets, asyncio's own take care.
DATAGRAM_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)

ENGINES = ("uring", "epoll")

ASYNCIO_TLS = ("ssl", "ssl_handshake_timeout", "ssl_shutdown_timeout")


class LoopOptions(TypedDict, total=False):
    """What :func:`new_event_loop` takes besides the engine; see :class:`EventLoop`."""

    pool: BufferPool | None
    ring_entries: int
    completion_entries: int


# Why this process fell back to epoll: said once, not once a loop.
_reported: set[str] = set()


class EventLoop(SocketOperations):
    """A complete asyncio event loop over a completion engine.

    Parameters
    ----------
    engine : {"uring", "epoll"} or Engine, optional
        Which engine executes operations. By default ``HEADRACE_ENGINE`` decides; without it, io_uring where it works
        and epoll elsewhere (one line on the ``headrace`` logger says why). An engine that is named, here or in the
        environment, and can't start is an error: :class:`headrace.errors.EngineUnavailable`, from the first run (from
        :func:`new_event_loop` already, if that makes the loop).
    pool : BufferPool, optional
        Where received bytes go; by default one of 8 x 256 KiB that grows to 64 MiB.
    ring_entries, completion_entries : int
        Sizes of io_uring's queues. Neither is a limit on anything.

    The engine starts at the first run, in the thread that runs. Between runs nothing is in flight, so the next run
    may be in another thread. Like asyncio's own, the loop isn't thread-safe but for ``call_soon_threadsafe``.
    """

    if TYPE_CHECKING:
        # asyncio's own; typeshed leaves it out.
        _csock: socket.socket | None
        _ssock: socket.socket | None
        _signal_handlers: dict[int, asyncio.Handle]

        def _check_running(self) -> None: ...

    def __init__(
        self,
        engine: str | Engine | None = None,
        *,
        pool: BufferPool | None = None,
        ring_entries: int = 256,
        completion_entries: int = 4096,
    ) -> None:
        super().__init__()
        self._child_processes = ChildProcesses(self)
        if isinstance(engine, str) and engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, or an Engine; not {engine!r}")
        self._choice = engine
        self._pool = pool
        self._ring_entries = ring_entries
        self._completion_entries = completion_entries
        self._reason = ""
        self._listeners: dict[socket.socket, Listener] = {}
        self._datagrams: DatagramBatch | None = None
        self._previous_wakeup_fd: int | None = None
        _loops.add(self)

    # ---- the engine ------------------------------------------------------------------------------------------

    @property
    def engine_name(self) -> str | None:
        """``"uring"``, ``"epoll"`` or ``"simulated"``; None before the first run."""
        engine = self._engine
        return None if engine is None else engine.name

    @property
    def engine_reason(self) -> str:
        """Why it's this engine, in words; empty before the first run."""
        return self._reason

    def stats(self) -> LoopStats:
        """Counters of the loop, its engine and its pool; :class:`headrace.stats.LoopStats` says what each one is.

        They are kept always: asking computes nothing but the dicts. A snapshot, and any thread may ask.
        """
        engine = self._engine
        pool = None if engine is None else engine.pool
        return {
            **self._counters(),
            "listeners": len(self._listeners),
            "processes": len(self._child_processes),
            "engine": {} if engine is None else engine.stats(),
            "pool": {} if pool is None else pool.stats(),
        }

    def _start_engine(self) -> None:
        if self._engine is not None:
            self._engine_start(self._engine)
            return
        choice, asked_by = self._choice, "it was asked for"
        if isinstance(choice, Engine):
            self._engine_start(choice)
            self._reason = asked_by
            return
        if choice is None and os.environ.get("HEADRACE_ENGINE"):
            choice, asked_by = os.environ["HEADRACE_ENGINE"], "HEADRACE_ENGINE says so"
            if choice not in ENGINES:
                raise EngineUnavailable(
                    f"HEADRACE_ENGINE must be one of {', '.join(ENGINES)}; not {choice!r}"
                )
        if choice != "epoll":
            try:
                self._engine_start(self._new_uring())
            except EngineUnavailable as exc:
                if choice == "uring":
                    raise
                asked_by = str(exc)
                if asked_by not in _reported:
                    _reported.add(asked_by)
                    logger.warning("headrace runs on epoll: %s", asked_by)
            else:
                self._reason = asked_by if choice else "io_uring works here"
                return
        self._engine_start(EpollEngine(self._pool))
        self._reason = asked_by

    def _need_engine(self) -> None:
        """Transports may be made before the loop first runs; they want to know their engine."""
        if self._engine is None:
            self._start_engine()
            self._engine_stop()

    def _new_uring(self) -> UringEngine:
        return UringEngine(
            self._pool, ring_entries=self._ring_entries, completion_entries=self._completion_entries
        )

    # ---- running ---------------------------------------------------------------------------------------------

    def run_forever(self) -> None:
        """Runs until ``stop`` is called. When it returns, nothing is in flight: see the class."""
        self._check_closed()
        self._check_running()
        self._start_engine()
        try:
            self._hear_signals()
            super().run_forever()
        finally:
            self._unhear_signals()
            self._engine_stop()

    def _hear_signals(self) -> None:
        """Lets a signal that another thread receives end this thread's wait."""
        if threading.current_thread() is threading.main_thread():
            self._previous_wakeup_fd = signal.set_wakeup_fd(self._wakeup_fd(), warn_on_full_buffer=False)

    def _wakeup_fd(self) -> int:
        assert self._csock is not None  # only a closed loop has none
        return self._csock.fileno()

    def _unhear_signals(self) -> None:
        previous, self._previous_wakeup_fd = self._previous_wakeup_fd, None
        if previous is None or self._forked:
            return
        # With handlers installed, asyncio keeps its wake-up descriptor between runs: no signal is lost.
        if not self._signal_handlers:
            signal.set_wakeup_fd(previous, warn_on_full_buffer=False)

    def remove_signal_handler(self, sig: int) -> bool:
        """See :meth:`asyncio.loop.remove_signal_handler`."""
        removed = super().remove_signal_handler(sig)
        if removed and self._previous_wakeup_fd is not None:
            signal.set_wakeup_fd(self._wakeup_fd(), warn_on_full_buffer=False)
        return removed

    def close(self) -> None:
        """Closes the loop: the engine's descriptors, and everything that asyncio closes. Idempotent."""
        if self.is_running():
            raise RuntimeError("Cannot close a running event loop")
        if self.is_closed():
            return
        self._engine_close()
        self._datagrams = None
        super().close()
        self._child_processes.close()
        _loops.discard(self)

    def _forked_child(self) -> None:
        """The child closes its copies of the loop's descriptors, and can't use the loop."""
        self._engine_forked()
        if self._selector is not None:
            self._selector.close()
            self._selector = None
        for sock in (self._ssock, self._csock):
            if sock is not None:
                sock.close()
        self._ssock = self._csock = None
        self._child_processes.close()

    # ---- child processes -------------------------------------------------------------------------------------

    async def _make_subprocess_transport(
        self, protocol: asyncio.SubprocessProtocol, *args: Any, **options: Any
    ) -> asyncio.SubprocessTransport:
        if program_has_child_watcher() or not can_wait_on_pidfd():
            inherited = super()._make_subprocess_transport  # type: ignore[misc]  # not in typeshed
            return await inherited(protocol, *args, **options)  # type: ignore[no-any-return]
        return await self._child_processes.start(protocol, *args, **options)

    # ---- transports ------------------------------------------------------------------------------------------

    def _make_socket_transport(
        self,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
        *,
        extra: dict[str, Any] | None = None,
        server: asyncio.Server | None = None,
    ) -> StreamTransport:
        self._ensure_fd_no_transport(sock)
        self._need_engine()
        return StreamTransport(self, sock, protocol, waiter, extra, server)

    def _make_datagram_transport(
        self,
        sock: socket.socket,
        protocol: asyncio.DatagramProtocol,
        address: Any = None,
        waiter: asyncio.Future[None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> asyncio.DatagramTransport:
        self._ensure_fd_no_transport(sock)
        if sock.family not in DATAGRAM_FAMILIES or sock.type != socket.SOCK_DGRAM:
            inherited: asyncio.DatagramTransport = super()._make_datagram_transport(  # type: ignore[misc]
                sock, protocol, address, waiter, extra
            )
            return inherited
        self._need_engine()
        if self._datagrams is None:
            self._datagrams = DatagramBatch()
        return DatagramTransport(self, self._datagrams, sock, protocol, address, waiter, extra)

    def _make_ssl_transport(
        self,
        rawsock: socket.socket,
        protocol: asyncio.BaseProtocol,
        sslcontext: ssl.SSLContext,
        waiter: asyncio.Future[None] | None = None,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        extra: dict[str, Any] | None = None,
        server: asyncio.Server | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> asyncio.Transport:
        """TLS over our transport, as asyncio has it."""
        self._ensure_fd_no_transport(rawsock)
        layer = asyncio_layer(
            self,
            protocol,
            sslcontext,
            waiter,
            server_side=server_side,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )
        self._need_engine()
        StreamTransport(self, rawsock, layer, None, extra, server)
        return layer

    async def create_server(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        *args: Any,
        security: Secured | None = None,
        **options: Any,
    ) -> asyncio.Server:
        """See :meth:`asyncio.loop.create_server`; with ``security=`` its connections are secured: by a
        :class:`headrace.TLS`, a :class:`headrace.Negotiate`, or a list of them, the outermost first. Before them all
        there may be a :class:`headrace.ProxyProtocol`.

        The protocol hears of a connection when its handshake is done and the peer is let in.
        """
        factory = self._secured(protocol_factory, security, options)
        return await super().create_server(factory, *args, **options)

    async def create_unix_server(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        *args: Any,
        security: Secured | None = None,
        **options: Any,
    ) -> asyncio.Server:
        """See :meth:`asyncio.loop.create_unix_server` and ``create_server``."""
        factory = self._secured(protocol_factory, security, options)
        return await super().create_unix_server(factory, *args, **options)

    def _secured(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        security: Secured | None,
        options: dict[str, Any],
    ) -> Callable[[], asyncio.BaseProtocol]:
        if security is None:
            return protocol_factory
        refuse_both(options)
        stack = stack_of(security)
        stack.check_server()  # files that can't be used are an error now, not at the first connection
        return lambda: serve_layers(self, stack, protocol_factory())

    async def create_connection(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        host: Any = None,
        port: Any = None,
        *,
        security: Secured | None = None,
        server_hostname: str | None = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        """See :meth:`asyncio.loop.create_connection`; with ``security=`` the connection is secured, as those of
        ``create_server``.

        ``server_hostname`` is what the server's certificate must be for; by default ``host``.
        """
        if security is None:
            return await super().create_connection(
                protocol_factory, host, port, server_hostname=server_hostname, **options
            )
        refuse_both(options)
        name = host if server_hostname is None else server_hostname
        return await self._secure_connection(
            lambda factory: super(EventLoop, self).create_connection(factory, host, port, **options),
            protocol_factory,
            security,
            name,
        )

    async def create_unix_connection(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        path: Any = None,
        *,
        security: Secured | None = None,
        server_hostname: str | None = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        """See :meth:`asyncio.loop.create_unix_connection` and ``create_connection``."""
        if security is None:
            return await super().create_unix_connection(
                protocol_factory, path, server_hostname=server_hostname, **options
            )
        refuse_both(options)
        return await self._secure_connection(
            lambda factory: super(EventLoop, self).create_unix_connection(factory, path, **options),
            protocol_factory,
            security,
            server_hostname,
        )

    async def _secure_connection(
        self,
        connect: Callable[[Callable[[], asyncio.BaseProtocol]], Coroutine[Any, Any, tuple[Any, Any]]],
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        security: Secured,
        server_hostname: str | None,
    ) -> tuple[Any, Any]:
        stack = stack_of(security)
        stack.check_client(server_hostname)
        waiter = self.create_future()
        protocol = protocol_factory()
        layers = connect_layers(self, stack, protocol, server_hostname, waiter)
        first = layers[-1] if layers else protocol
        if stack.proxy is not None:
            first = stack.proxy.sender(first)
        try:
            transport, _ = await connect(lambda: first)
            if layers:
                await waiter
        except BaseException:
            for layer in layers:
                layer.abort()
            raise
        return layers[0] if layers else transport, protocol

    async def start_tls(
        self,
        transport: asyncio.BaseTransport,
        protocol: asyncio.BaseProtocol,
        sslcontext: ssl.SSLContext | Security,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> asyncio.Transport:
        """Upgrades a connection to TLS; see :meth:`asyncio.loop.start_tls`.

        Nothing that the peer sent ahead is lost: what the transport holds, and what an ``asyncio.StreamReader`` has
        taken but nobody read, goes to the TLS layer. So does plain text that was slipped in there: the handshake fails.

        Raises
        ------
        TypeError
            For what is neither an ``SSLContext`` nor a ``security=`` (a :class:`headrace.TLS` or
            :class:`headrace.Negotiate`), and a transport that can't be upgraded.
        ConnectionResetError
            If the transport is closing already, or the peer leaves.
        ssl.SSLError
            If the handshake fails; the transport is closed then.
        """
        return await starttls.start_tls(
            self,
            transport,
            protocol,
            sslcontext,
            server_side=server_side,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )

    async def start_security(
        self,
        transport: asyncio.BaseTransport,
        protocol: asyncio.BaseProtocol,
        security: Security,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
    ) -> asyncio.Transport:
        """Secures a connection from here on, as ``start_tls`` does, by whatever ``security=`` takes."""
        return await self.start_tls(
            transport, protocol, security, server_side=server_side, server_hostname=server_hostname
        )

    def _do_step(self, threads: StepThreads, step: Callable[[], None]) -> None:
        """Does an authentication's step, which may block, and which tells the loop when it's done."""
        threads.submit(step)

    def _accepted_socket(self, fd: int, family: int, type: int, proto: int) -> socket.socket:
        """A socket object for an accepted descriptor; made only when somebody asks for it."""
        return socket.socket(family, type | socket.SOCK_NONBLOCK, proto, fileno=fd)

    def _start_serving(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        sock: socket.socket,
        sslcontext: ssl.SSLContext | None = None,
        server: asyncio.Server | None = None,
        backlog: int = 100,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> None:
        self._need_engine()
        factory = protocol_factory
        if sslcontext is not None:

            def factory() -> asyncio.BaseProtocol:
                return asyncio_layer(
                    self,
                    protocol_factory(),
                    sslcontext,
                    server_side=True,
                    ssl_handshake_timeout=ssl_handshake_timeout,
                    ssl_shutdown_timeout=ssl_shutdown_timeout,
                )

        self._listeners[sock] = Listener(self, factory, sock, server)

    def _stop_serving(self, sock: socket.socket) -> None:
        listener = self._listeners.pop(sock, None)
        if listener is not None:
            listener.stop()
        if sock.fileno() >= 0:  # not closed by its owner
            super()._stop_serving(sock)  # type: ignore[misc]  # not in typeshed

    async def _sendfile_native(
        self, transp: StreamTransport, file: IO[bytes], offset: int, count: int | None
    ) -> int:
        reading = transp.is_reading()
        transp.pause_reading()
        try:
            await transp._make_empty_waiter()
            if transp.is_closing():
                raise ConnectionError("the transport was closed before sendfile began")
            return await self._sendfile_lent(transp, file, offset, count)
        finally:
            transp._reset_empty_waiter()
            if reading:
                transp.resume_reading()

    async def _sendfile_lent(
        self, transp: StreamTransport, file: IO[bytes], offset: int, count: int | None
    ) -> int:
        """``sock_sendfile`` on a transport's descriptor; the transport's end stops it before the descriptor goes."""
        task = asyncio.current_task()
        assert task is not None
        transp._lend_descriptor(lambda: sending.cancel())
        sending = self.create_task(self.sock_sendfile(transp._sock, file, offset, count, fallback=False))
        try:
            return await sending
        except asyncio.CancelledError:
            if transp.is_closing() and not task.cancelling():
                raise ConnectionError("the transport was closed during sendfile") from None
            raise
        finally:
            transp._take_back_descriptor()


def refuse_both(options: dict[str, Any]) -> None:
    """asyncio's TLS arguments mean nothing beside ``security=``; dropping them silently would mean less security."""
    given = [name for name in ASYNCIO_TLS if options.get(name) is not None]
    if given:
        raise ValueError(
            f"security= doesn't go together with {', '.join(given)}: give headrace.TLS what is meant"
        )


_loops: weakref.WeakSet[EventLoop] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for loop in list(_loops):
        loop._forked_child()
    _loops.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def new_event_loop(engine: str | Engine | None = None, **options: Unpack[LoopOptions]) -> EventLoop:
    """A new :class:`EventLoop`; what ``asyncio.Runner(loop_factory=headrace.new_event_loop)`` wants.

    An engine that is named, here or in the environment, is tried at once. One that can't start is an error here,
    :class:`headrace.errors.EngineUnavailable`, where nothing has begun: a loop that fails at its first run leaves tasks
    behind that can neither run nor be cancelled.
    """
    loop = EventLoop(engine, **options)
    if isinstance(engine, str) or (engine is None and os.environ.get("HEADRACE_ENGINE")):
        try:
            loop._start_engine()
            loop._engine_stop()
        except BaseException:
            loop.close()
            raise
    return loop


def run(main: Coroutine[Any, Any, T], *, engine: str | Engine | None = None, debug: bool | None = None) -> T:
    """``asyncio.run`` on a headrace loop.

    Parameters
    ----------
    main : coroutine
    engine : {"uring", "epoll"} or Engine, optional
        See :class:`EventLoop`.
    debug : bool, optional
        asyncio's debug mode; by default what ``PYTHONASYNCIODEBUG`` says.
    """
    runner = asyncio.Runner(debug=debug, loop_factory=lambda: new_event_loop(engine))
    try:
        runner.get_loop()
    except BaseException:
        main.close()
        raise
    with runner:
        return runner.run(main)
