"""TLS for connections: what ``security=headrace.TLS(...)``, and asyncio's ``ssl=`` and ``start_tls``, put above them.

Both ways share one layer and its defences; they differ where asyncio's users rely on asyncio's ways:

==================================  =============================  ==============================================
what                                ``security=headrace.TLS(...)``  asyncio's ``ssl=``, ``start_tls``
==================================  =============================  ==============================================
the context                         built here, hardened, or given  the caller's, never changed
a FIN without close_notify          TruncatedError (configurable)  an end of the stream like any other
half-closed connections             yes: ``write_eof``             no
handshake, in total                 10 s                           60 s, or ``ssl_handshake_timeout``
the peer's answer to close()        5 s; no answer is no error     30 s, or ``ssl_shutdown_timeout``; TimeoutError
handshakes under way                1,024, then the oldest goes    no limit
==================================  =============================  ==============================================
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from asyncio import constants
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from headrace.errors import HandshakeError, TruncatedError
from headrace.framing.client_hello import ClientHello
from headrace.framing.tls import State, TLSCore
from headrace.security.certificates import (
    Certificate,
    ServerCertificates,
    client_context,
    end_point_binding,
    expiry_of,
    identity_of,
    leaf_of,
)
from headrace.security.identity import SecurityInfo
from headrace.security.layer import SecurityLayer
from headrace.security.settings import Security

if TYPE_CHECKING:
    from headrace.loop import EventLoop
    from headrace.security.access import AccessList

__all__ = ["TLS", "TLSLayer", "asyncio_layer"]

logger = logging.getLogger("headrace.security")

# Sessions that a client keeps for resumption; each is some KiB.
SESSIONS_KEPT = 256

Path = str | os.PathLike[str]


class TLS(Security):
    """How connections are to be secured by TLS; give it as ``security=`` to a loop's ``create_*`` methods.

    The same object serves any number of servers and connections of one loop; contexts are built once.

    Parameters
    ----------
    context : ssl.SSLContext, optional
        Used as it is, and never changed. Without it a hardened one is built from the files that follow: TLS 1.2 or
        newer, no renegotiation, no compression, the peer verified.
    certificate, private_key : path, optional
        Ours, PEM: a chain with its leaf first, and the key if it isn't in the same file. A server needs one. With
        ``context``, ``certificate`` only tells which leaf it holds: channel bindings need to know.
    password : str, bytes or callable, optional
        Of the private key.
    certificates : mapping of str or None to Certificate, optional
        For a server with several names: by server name (``"example.org"``, ``"*.example.org"``, None for any other);
        each with its own rule about client certificates. See :class:`headrace.security.certificates.Certificate`.
    ca : path, optional
        Whom to trust: a client's servers (by default whom the system trusts), a server's clients.
    client_certificate : {"none", "optional", "required"}
        What a server asks of its clients.
    crl : path or iterable of paths, optional
        Revoked certificates.
    alpn : iterable of str
        Application protocols, in order of preference (RFC 7301).
    minimum_version : ssl.TLSVersion
    accept : AccessList, optional
        Who is let in, by the names in the peer's certificate; checked after every handshake, resumed or not.
    truncation : {"error", "eof"}
        What a stream's end without close_notify is: :class:`headrace.errors.TruncatedError`, after everything that came
        before it was delivered, or an end like any other.
    handshake_timeout : float
        Seconds from the connection's beginning to the end of the handshake, in total.
    shutdown_timeout : float
        Seconds that ``close`` waits for the peer's close_notify.
    max_pending_handshakes : int
        How many connections of a server may be in their handshake; beyond it the oldest is closed, with one line in the
        log.
    resumption : bool
        Whether a client resumes its sessions with a server. Each ticket is used once (RFC 8446, C.4).
    keylog : path, optional
        Where the keys of all connections are written, for wireshark. Whoever reads the file reads the connections.

    Raises
    ------
    ValueError
        For arguments that don't go together.
    headrace.errors.CertificateError
        For files that can't be used; from ``create_server`` or ``create_connection``, which build the contexts.
    """

    def __init__(
        self,
        context: ssl.SSLContext | None = None,
        *,
        certificate: Path | None = None,
        private_key: Path | None = None,
        password: Any = None,
        certificates: Mapping[str | None, Certificate] | None = None,
        ca: Path | None = None,
        client_certificate: Literal["none", "optional", "required"] = "none",
        crl: Path | Iterable[Path] | None = None,
        alpn: Iterable[str] = (),
        minimum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
        accept: AccessList | None = None,
        truncation: Literal["error", "eof"] = "error",
        handshake_timeout: float = 10.0,
        shutdown_timeout: float = 5.0,
        max_pending_handshakes: int = 1024,
        resumption: bool = True,
        keylog: Path | None = None,
    ) -> None:
        built = {
            "private_key": private_key,
            "password": password,
            "certificates": certificates,
            "ca": ca,
            "crl": crl,
            "keylog": keylog,
        }
        if context is not None:
            given = [name for name, value in built.items() if value is not None]
            if given or tuple(alpn) or client_certificate != "none":
                raise ValueError(
                    f"a context is used as it is: {', '.join(given) or 'alpn or client_certificate'} can't be added"
                )
        if certificates is not None and (certificate is not None or private_key is not None):
            raise ValueError("give either certificate, or certificates by server name")
        if truncation not in ("error", "eof"):
            raise ValueError(f"truncation must be 'error' or 'eof', not {truncation!r}")
        self._take_limits(handshake_timeout, shutdown_timeout, max_pending_handshakes)
        self.context = context
        self.accept = accept
        self.truncation = truncation
        self.resumption = resumption
        self._certificate = certificate
        self._private_key = private_key
        self._password = password
        self._certificates = certificates
        self._ca = ca
        self._client_certificate = client_certificate
        self._crl = crl
        self._alpn = tuple(alpn)
        self._minimum_version = minimum_version
        self._keylog = keylog
        self._client: ssl.SSLContext | None = None
        self._server: ServerCertificates | None = None
        self._leaf: bytes | None = None
        self._sessions: OrderedDict[str | None, ssl.SSLSession] = OrderedDict()

    # ---- contexts --------------------------------------------------------------------------------------------

    def server_contexts(self) -> ServerCertificates | ssl.SSLContext:
        """What a server uses; built at the first call. Raises what the class says."""
        if self.context is not None:
            if self.accept is not None and self.context.verify_mode == ssl.CERT_NONE:
                raise ValueError(
                    "an access list needs clients with certificates: set the context's verify_mode"
                )
            if self._leaf is None and self._certificate is not None:
                self._leaf = leaf_of(self._certificate)
            return self.context
        if self._server is None:
            self._server = ServerCertificates(
                self._described(),
                crl=self._crl,
                alpn=self._alpn,
                minimum_version=self._minimum_version,
                keylog=self._warned_keylog(),
            )
        return self._server

    def _described(self) -> Mapping[str | None, Certificate]:
        certificates = self._certificates
        if certificates is None:
            if self._certificate is None:
                raise ValueError("a TLS server needs certificate= (or certificates=, or a context)")
            certificates = {
                None: Certificate(
                    self._certificate,
                    self._private_key,
                    password=self._password,
                    client_ca=self._ca,
                    client_certificate=self._client_certificate,
                )
            }
        if self.accept is not None:
            for name, one in certificates.items():
                if one.client_certificate == "none":
                    raise ValueError(
                        f"an access list needs clients with certificates: client_certificate of {name or 'default'}"
                    )
        return certificates

    def client_context(self) -> ssl.SSLContext:
        """What a client uses; built at the first call. Raises what the class says."""
        if self.context is not None:
            return self.context
        if self._client is None:
            self._client = client_context(
                self._ca,
                self._certificate,
                self._private_key,
                password=self._password,
                alpn=self._alpn,
                minimum_version=self._minimum_version,
                crl=self._crl,
                keylog=self._warned_keylog(),
            )
        return self._client

    def _warned_keylog(self) -> Path | None:
        if self._keylog is not None:
            logger.warning("the keys of all TLS connections are being written to %s", self._keylog)
        return self._keylog

    def reload(self) -> None:
        """Reads a server's certificates and keys again, for the connections to come.

        Raises :class:`headrace.errors.CertificateError` when they can't be used, and goes on with the old ones.
        """
        if self.context is not None:
            raise ValueError(
                "a context that was given isn't ours to reload: make a new one, and a new headrace.TLS"
            )
        if self._server is not None:
            self._server.reload()

    # ---- layers ----------------------------------------------------------------------------------------------

    def check_server(self) -> None:
        """Files that can't be used are an error before the first connection."""
        self.server_contexts()

    def check_client(self, server_hostname: str | None) -> None:
        """Likewise; and a client must know whose certificate it expects."""
        if server_hostname is None:
            raise ValueError(
                "tell what the server's certificate is to be for: server_hostname= is needed without a host"
            )
        self.client_context()

    def server_layer(self, loop: EventLoop, protocol: asyncio.BaseProtocol, **options: Any) -> TLSLayer:
        """The layer for an accepted connection."""
        contexts = self.server_contexts()
        chosen: list[bytes] = [] if self._leaf is None else [self._leaf]
        context: ssl.SSLContext | Callable[[ClientHello], ssl.SSLContext]
        if isinstance(contexts, ssl.SSLContext):
            context = contexts
        elif contexts.only is not None:
            context, leaf = contexts.only
            chosen.append(leaf)
        else:

            def context(hello: ClientHello) -> ssl.SSLContext:
                context, leaf = contexts.select(hello.server_name)
                chosen.append(leaf)
                return context

        core = TLSCore(context, server_side=True)
        return TLSLayer(loop, protocol, core, server_side=True, settings=self, leaf=chosen, **options)

    def client_layer(
        self, loop: EventLoop, protocol: asyncio.BaseProtocol, server_hostname: str | None, **options: Any
    ) -> TLSLayer:
        """The layer for a connection to ``server_hostname``."""
        session = self._sessions.pop(server_hostname, None) if self.resumption else None
        core = TLSCore(self.client_context(), server_hostname=server_hostname, session=session)
        return TLSLayer(
            loop, protocol, core, server_side=False, settings=self, server_hostname=server_hostname, **options
        )

    def _keep_session(self, server_hostname: str | None, ssl_object: ssl.SSLObject) -> None:
        if not self.resumption:
            return
        session = ssl_object.session
        if session is not None and session.has_ticket:
            self._sessions[server_hostname] = session
            if len(self._sessions) > SESSIONS_KEPT:
                self._sessions.popitem(last=False)


class TLSLayer(SecurityLayer):
    """A connection under TLS; an :class:`asyncio.Transport`. Made by the loop. Belongs to the loop's thread."""

    __slots__ = ("_leaf", "_server_hostname", "_server_side", "_settings")

    _core: TLSCore

    def __init__(
        self,
        loop: EventLoop,
        protocol: asyncio.BaseProtocol,
        core: TLSCore,
        *,
        server_side: bool,
        settings: TLS | None = None,
        server_hostname: str | None = None,
        leaf: list[bytes] | None = None,
        handshake_timeout: float | None = None,
        shutdown_timeout: float | None = None,
        waiter: asyncio.Future[None] | None = None,
        connected: bool = False,
    ) -> None:
        self._core = core
        self._settings = settings
        self._server_side = server_side
        self._server_hostname = server_hostname
        self._leaf = leaf
        if settings is not None:
            handshake_timeout = handshake_timeout or settings.handshake_timeout
            shutdown_timeout = shutdown_timeout or settings.shutdown_timeout
        super().__init__(
            loop,
            protocol,
            handshake_timeout=handshake_timeout or constants.SSL_HANDSHAKE_TIMEOUT,
            shutdown_timeout=shutdown_timeout or constants.SSL_SHUTDOWN_TIMEOUT,
            waiter=waiter,
            connected=connected,
        )

    # ---- the handshake ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._server_side and self._settings is not None and not self._closing:
            self._settings._begins(self)

    def _handshake_done(self) -> bool:
        if self._core.state is State.HANDSHAKE:
            return False
        settings = self._settings
        if settings is not None:
            settings._over(self)
            if settings.accept is not None:
                return self._ask(settings.accept, self._security().remote_identity)
        return True

    def _deadline_error(self) -> Exception:
        return HandshakeError(f"the TLS handshake took longer than {self._handshake_timeout:g} s")

    # ---- the end ---------------------------------------------------------------------------------------------

    def _truncation(self) -> Exception | None:
        if self._settings is not None and self._settings.truncation == "eof":
            return None
        return TruncatedError(
            "the peer ended the connection without a TLS close_notify: what came may not be all "
            "(truncation='eof' takes it as the end)"
        )

    def _tells_failures(self) -> bool:
        return True

    def _half_closes(self) -> bool:
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        settings = self._settings
        if settings is not None:
            settings._over(self)
            if self._established and not self._server_side and self._core.state is not State.FAILED:
                settings._keep_session(self._server_hostname, self._core.ssl_object)
        super().connection_lost(exc)

    # ---- what it is ------------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``security``, ``sslcontext``, ``ssl_object``, ``peercert``, ``cipher``, ``compression``; else what the
        transport below knows. All but ``sslcontext`` once the handshake is done."""
        if self._established:
            if name == "security":
                return self._security()
            if name in OF_SSL_OBJECT:
                return OF_SSL_OBJECT[name](self._core.ssl_object)
        return super().get_extra_info(name, default)

    def _security(self) -> SecurityInfo:
        info: SecurityInfo | None = self._extra.get("security")
        if info is None:
            info = self._extra["security"] = self._make_security()
        return info

    def _make_security(self) -> SecurityInfo:
        ours = self._core.ssl_object
        peer = ours.getpeercert(binary_form=True)
        leaf = peer
        if self._server_side:
            leaf = self._leaf[-1] if self._leaf else None
        cipher = ours.cipher()
        # A client that doesn't verify has a certificate, but nobody's word for it.
        verified = peer is not None and ours.context.verify_mode != ssl.CERT_NONE
        return SecurityInfo(
            protocol=ours.version() or "",
            mechanism=cipher[0] if cipher else "",
            protection="encrypt",
            is_mutually_authenticated=verified and (self._server_side or self._showed_certificate()),
            remote_identity=identity_of(peer) if verified and peer is not None else None,
            impersonation_level=None,
            expires_at=expiry_of(peer) if verified and peer is not None else None,
            is_server=self._server_side,
            alpn_protocol=ours.selected_alpn_protocol(),
            resumed=bool(ours.session_reused),
            channel_binding=None if leaf is None else end_point_binding(leaf),
        )

    def _showed_certificate(self) -> bool:
        """Whether we, a client, had a certificate to show; the stdlib doesn't tell whether the server asked for it."""
        return self._settings is not None and self._settings._certificate is not None


class SSLTransport(TLSLayer):
    """The same with asyncio's ways, for ``ssl=`` and ``start_tls``."""

    __slots__ = ()

    def _deadline_error(self) -> Exception:
        return ConnectionAbortedError(
            f"SSL handshake is taking longer than {self._handshake_timeout} seconds: aborting the connection"
        )

    def _truncation(self) -> Exception | None:
        return None

    def _tells_failures(self) -> bool:
        return False

    def _half_closes(self) -> bool:
        return False

    def _leaves_silently(self) -> bool:
        return self._lower_ended and not self._core.peer_closed

    def _shutdown_error(self, unsent: int) -> Exception | None:
        return TimeoutError("SSL shutdown timed out")

    @property
    def _ssl_protocol(self) -> SSLTransport:
        """What asyncio calls the half that is a protocol."""
        return self

    def _test__append_write_backlog(self, data: bytes) -> None:
        """CPython's own tests queue something behind the transport's back with it."""
        self._queue.append(data)
        self._queued += len(data)


OF_SSL_OBJECT: dict[str, Callable[[ssl.SSLObject], Any]] = {
    "ssl_object": lambda ours: ours,
    "sslcontext": lambda ours: ours.context,
    "peercert": lambda ours: ours.getpeercert(),
    "cipher": lambda ours: ours.cipher(),
    "compression": lambda ours: ours.compression(),
}


def asyncio_layer(
    loop: EventLoop,
    protocol: asyncio.BaseProtocol,
    context: ssl.SSLContext | None,
    waiter: asyncio.Future[None] | None = None,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    connected: bool = False,
) -> SSLTransport:
    """A layer that behaves as asyncio's ``SSLProtocol``; for ``ssl=`` and ``start_tls``."""
    for name, value in (
        ("ssl_handshake_timeout", ssl_handshake_timeout),
        ("ssl_shutdown_timeout", ssl_shutdown_timeout),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{name} should be a positive number, got {value}")
    if context is None:  # ssl=True
        if server_side:
            raise ValueError("Server side SSL needs a valid SSLContext")
        context = ssl.create_default_context()
        if not server_hostname:
            context.check_hostname = False
    core = TLSCore(
        context,
        server_side=server_side,
        server_hostname=(server_hostname or None) if not server_side else None,
    )
    layer = SSLTransport(
        loop,
        protocol,
        core,
        server_side=server_side,
        handshake_timeout=ssl_handshake_timeout,
        shutdown_timeout=ssl_shutdown_timeout,
        waiter=waiter,
        connected=connected,
    )
    layer._extra["sslcontext"] = context
    return layer
