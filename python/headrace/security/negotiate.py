"""Kerberos and NTLM for connections: what ``security=headrace.Negotiate(...)`` puts above them; .NET's NegotiateStream.

Rules
-----
* The steps of an authentication are done on threads of their own (``steps.py``), one at a time for a connection, which
  reads nothing meanwhile. When the time is up the connection goes at once; the step keeps its context until it returns.
* What counts is what the finished context says, never what was asked for: protection, impersonation, mutual
  authentication and channel binding are checked on it, then the access list is asked, and only then does a server say
  that it's done. A peer that isn't let in gets an error frame; the protocol never hears of it.
* Where nothing protects the messages (``ProtectionLevel.NONE``), somebody in the middle could take an authenticated
  connection over. Inside TLS the channel must be bound then.
* There's no end in the framing: ``close`` sends what is queued and ends the transport; the peer's end between two
  frames is one, and within a frame a :class:`headrace.errors.TruncatedError`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from headrace.errors import AccessDenied, AuthenticationError, HandshakeError, SecurityError, TruncatedError
from headrace.framing.negotiate import (
    FRAME_SIZE,
    LOGON_DENIED,
    REQUIREMENT_NOT_MET,
    NegotiateCore,
    State,
)
from headrace.security.contexts import ContextResult, SecurityContext
from headrace.security.credentials import Credentials
from headrace.security.identity import ImpersonationLevel, ProtectionLevel, SecurityInfo
from headrace.security.layer import SLICE, SecurityLayer
from headrace.security.mechanisms import (
    ChannelBinding,
    ClientSettings,
    Mechanism,
    ServerSettings,
    client_context,
    server_context,
)
from headrace.security.settings import Security
from headrace.security.steps import CLIENTS, SERVERS

if TYPE_CHECKING:
    from headrace.loop import EventLoop
    from headrace.security.access import AccessList

__all__ = ["Negotiate", "NegotiateLayer"]

logger = logging.getLogger("headrace.security")

LARGEST_FRAME = 64_512  # bytes; .NET's largest, and what every peer takes
INTERNAL_ERROR = 0x80090304  # SEC_E_INTERNAL_ERROR: our own system failed


class Negotiate(Security):
    """How connections are to be secured by Kerberos or NTLM, in the framing of .NET's ``NegotiateStream`` ([MS-NNS]).

    Give it as ``security=`` to a loop's ``create_*`` methods, alone or, in a list, inside a :class:`headrace.TLS`.

    Parameters
    ----------
    target : str, optional
        Whom a client wants to talk to: a principal (``"HTTP/www.example.org@EXAMPLE.ORG"``) or ``"service@host"``. By
        default ``service`` at the name that the connection is made to.
    service : str
        See ``target``; .NET's and Windows' own default is ``"host"``.
    allowed_targets : iterable of str, optional
        A server's principals that clients may have asked for. By default any in its keytab.
    credentials : Credentials, optional
        Whose identity is ours; by default what Kerberos finds in the environment (a ticket cache; a keytab).
    mechanisms : iterable of {"kerberos", "ntlm"}
        What is offered and taken. NTLM is weak (no mutual authentication, RC4, MD4): it's never fallen back to unless
        it's listed here.
    protection : ProtectionLevel
        What is asked for and, at least, needed. On Linux messages are sealed whenever the mechanism can.
    impersonation : ImpersonationLevel
        What a client grants its server, and what a server needs at least.
    mutual : bool, optional
        Whether a client's server must show who it is. By default it must, unless NTLM is listed, which can't do that.
    channel_binding : {"when-supported", "require", "never"}
        Inside TLS: whether the authentication is bound to that channel (``tls-server-end-point``, RFC 5929). By default
        it's always sent, and one that doesn't fit is refused; with "require" a peer without one is refused, too.
    accept : AccessList, optional
        Who is let in, by the names that the authentication gave.
    frame_size : int
        Bytes of plaintext in a frame that is sent; 1 to 64,512.
    on_expiry : {"close", "notify", "ignore"}
        What happens when the client's ticket ends: the connection does, with a SecurityError; or the protocol's
        ``security_expired()`` is called, if it has one; or nothing.
    handshake_timeout : float
        Seconds for the authentication, the access list included.
    shutdown_timeout : float
        Seconds in which a closed connection sends at least something of what is queued.
    max_pending_handshakes : int
        How many connections of a server may be in their handshake; beyond it the oldest is closed.

    Raises
    ------
    ValueError
        For arguments that don't go together.
    """

    def __init__(
        self,
        *,
        target: str | None = None,
        service: str = "host",
        allowed_targets: Iterable[str] | None = None,
        credentials: Credentials | None = None,
        mechanisms: Iterable[Mechanism] = ("kerberos",),
        protection: ProtectionLevel = ProtectionLevel.ENCRYPT_AND_SIGN,
        impersonation: ImpersonationLevel = ImpersonationLevel.IDENTIFICATION,
        mutual: bool | None = None,
        channel_binding: ChannelBinding = "when-supported",
        accept: AccessList | None = None,
        frame_size: int = FRAME_SIZE,
        on_expiry: Literal["close", "notify", "ignore"] = "close",
        handshake_timeout: float = 10.0,
        shutdown_timeout: float = 5.0,
        max_pending_handshakes: int = 1024,
    ) -> None:
        self._take_limits(handshake_timeout, shutdown_timeout, max_pending_handshakes)
        if on_expiry not in ("close", "notify", "ignore"):
            raise ValueError(f"on_expiry must be 'close', 'notify' or 'ignore', not {on_expiry!r}")
        if not 0 < frame_size <= LARGEST_FRAME:
            raise ValueError(f"frame_size must be 1 to {LARGEST_FRAME} bytes, not {frame_size!r}")
        self.target = target
        self.service = service
        self.allowed_targets = None if allowed_targets is None else tuple(allowed_targets)
        self.credentials = credentials or Credentials()
        self.mechanisms: tuple[Mechanism, ...] = tuple(mechanisms)
        self.protection = ProtectionLevel(protection)
        self.impersonation = ImpersonationLevel(impersonation)
        self.mutual = mutual if mutual is not None else "ntlm" not in self.mechanisms
        self.channel_binding: ChannelBinding = channel_binding
        self.accept = accept
        self.frame_size = frame_size
        self.on_expiry = on_expiry
        self._server: ServerSettings | None = None

    # ---- layers ----------------------------------------------------------------------------------------------

    def check_server(self) -> None:
        """A server's part of the arguments. Raises ValueError."""
        self._server_settings()

    def _server_settings(self) -> ServerSettings:
        if self._server is None:
            if self.target is not None:
                raise ValueError("target= is a client's; a server has allowed_targets=")
            self._server = ServerSettings(
                credentials=self.credentials,
                mechanisms=self.mechanisms,
                protection=self.protection,
                impersonation=self.impersonation,
                channel_binding=self.channel_binding,
                allowed_targets=self.allowed_targets or (),
            )
        return self._server

    def check_client(self, server_hostname: str | None) -> None:
        """A client's part of the arguments. Raises ValueError."""
        self._client_settings(server_hostname)

    def _client_settings(self, server_hostname: str | None) -> ClientSettings:
        if self.allowed_targets is not None:
            raise ValueError("allowed_targets= are a server's; a client has target=")
        target = self.target
        if target is None:
            if server_hostname is None:
                raise ValueError("tell whom the connection is meant for: target= is needed without a host")
            target = f"{self.service}/{server_hostname}"
        return ClientSettings(
            target=target,
            credentials=self.credentials,
            mechanisms=self.mechanisms,
            protection=self.protection,
            impersonation=self.impersonation,
            mutual=self.mutual,
            channel_binding=self.channel_binding,
        )

    def server_layer(self, loop: EventLoop, protocol: asyncio.BaseProtocol, **options: Any) -> NegotiateLayer:
        """The layer for an accepted connection."""
        make = functools.partial(server_context, self._server_settings())
        return NegotiateLayer(loop, protocol, self, make, server_side=True, **options)

    def client_layer(
        self, loop: EventLoop, protocol: asyncio.BaseProtocol, server_hostname: str | None, **options: Any
    ) -> NegotiateLayer:
        """The layer for a connection to ``server_hostname``."""
        make = functools.partial(client_context, self._client_settings(server_hostname))
        return NegotiateLayer(loop, protocol, self, make, server_side=False, **options)

    def check_result(self, result: ContextResult, *, server_side: bool, binding: bytes | None) -> None:
        """Whether a finished authentication is what was demanded.

        Raises :class:`headrace.errors.AuthenticationError` with [MS-NNS]'s code for it.
        """
        missing = None
        if self.protection >= ProtectionLevel.SIGN and not result.is_signed:
            missing = f"protection={self.protection.name}, and the peer doesn't sign"
        elif self.protection == ProtectionLevel.ENCRYPT_AND_SIGN and not result.is_encrypted:
            missing = "protection=ENCRYPT_AND_SIGN, and the peer doesn't encrypt"
        elif server_side and result.impersonation_level < self.impersonation:
            missing = (
                f"impersonation={self.impersonation.name}, and the client grants "
                f"{result.impersonation_level.name}"
            )
        elif not server_side and self.mutual and not result.is_mutually_authenticated:
            missing = "the server hasn't shown who it is (mutual=False does without)"
        elif not result.channel_bound and self._demands_binding(result, binding):
            missing = "the authentication isn't bound to the TLS channel around it"
        if missing is not None:
            raise AuthenticationError(f"a requirement isn't met: {missing}", code=REQUIREMENT_NOT_MET)

    def _demands_binding(self, result: ContextResult, binding: bytes | None) -> bool:
        if self.channel_binding == "require":
            return True
        # A relayer who has no key can still speak where nothing is signed.
        return self.channel_binding != "never" and binding is not None and not result.is_signed


class Step:
    """One step of an authentication, to be done on a thread."""

    __slots__ = ("_layer", "_make", "_peer_token", "binding", "context", "error", "result", "token")

    def __init__(
        self,
        layer: NegotiateLayer,
        context: SecurityContext | None,
        make: Callable[[bytes | None], SecurityContext],
        binding: bytes | None,
        token: bytes | None,
    ) -> None:
        self._layer = layer
        self._make = make
        self._peer_token = token
        self.binding = binding
        self.context = context
        self.token: bytes | None = None
        self.result: ContextResult | None = None
        self.error: BaseException | None = None

    def __call__(self) -> None:
        if self._layer._closing:  # it gave up before its turn came: others are to have the thread
            self.dispose()
            return
        try:
            if self.context is None:
                self.context = self._make(self.binding)
            self.token = self.context.step(self._peer_token)
            if self.context.complete:
                self.result = self.context.result()
        except BaseException as exc:
            self.error = exc
        try:
            self._layer._loop.call_soon_threadsafe(self._layer._stepped, self)
        except RuntimeError:  # the loop was closed meanwhile
            self.dispose()

    def dispose(self) -> None:
        """Nobody waits for this any more."""
        if self.context is not None:
            self.context.dispose()


class NegotiateLayer(SecurityLayer):
    """A connection under Kerberos or NTLM; an :class:`asyncio.Transport`. Made by the loop, and the loop's thread's."""

    __slots__ = (
        "_binding",
        "_expiry",
        "_in_thread",
        "_make_context",
        "_result",
        "_security_context",
        "_server_side",
        "_settings",
        "_step",
    )

    _core: NegotiateCore

    def __init__(
        self,
        loop: EventLoop,
        protocol: asyncio.BaseProtocol,
        settings: Negotiate,
        make_context: Callable[[bytes | None], SecurityContext],
        *,
        server_side: bool,
        handshake_timeout: float | None = None,
        shutdown_timeout: float | None = None,
        waiter: asyncio.Future[None] | None = None,
        connected: bool = False,
    ) -> None:
        self._core = NegotiateCore(server_side=server_side, frame_size=settings.frame_size)
        self._settings = settings
        self._server_side = server_side
        self._make_context = make_context
        self._security_context: SecurityContext | None = None
        self._in_thread = False  # a step is, and has the context
        self._step: Step | None = None  # which is complete, while the access list is asked
        self._result: ContextResult | None = None
        self._binding: bytes | None = None
        self._expiry: asyncio.TimerHandle | None = None
        super().__init__(
            loop,
            protocol,
            handshake_timeout=handshake_timeout or settings.handshake_timeout,
            shutdown_timeout=shutdown_timeout or settings.shutdown_timeout,
            waiter=waiter,
            connected=connected,
        )
        self._slice = max(1, SLICE // settings.frame_size) * settings.frame_size  # whole frames

    # ---- the handshake ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        channel = transport.get_extra_info("security")
        if channel is not None and self._settings.channel_binding != "never":
            self._binding = channel.channel_binding
        super().connection_made(transport)
        if self._closing:
            return
        if self._server_side:
            self._settings._begins(self)
        elif self._settings.channel_binding == "require" and self._binding is None:
            self._fail(
                HandshakeError(
                    "channel_binding='require' needs a TLS channel around the authentication whose certificate has a "
                    "binding (RFC 5929 section 4)"
                )
            )
        else:
            self._begin_step()

    def _begin_step(self) -> None:
        """The authentication goes on, on a thread; nothing is read meanwhile."""
        self._hold_lower()
        step = Step(self, self._security_context, self._make_context, self._binding, self._core.needed)
        try:
            self._loop._do_step(SERVERS if self._server_side else CLIENTS, step)
        except HandshakeError as exc:  # too many wait already
            self._refuse(exc)
        else:
            self._in_thread = True

    def _stepped(self, step: Step) -> None:
        """A step is done; in the loop's thread again."""
        self._in_thread = False
        if self._lower is None or self._closing:
            step.dispose()
            return
        self._security_context = step.context
        try:
            if step.error is not None:
                raise step.error
            if step.result is None:
                self._core.step_done(step.token, False)
            elif self._permitted(step, step.result):
                self._complete(step)
            else:
                return  # the access list is asked, and that takes time
            self._receive(None)
            self._control_reading()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._refuse(exc)

    def _permitted(self, step: Step, result: ContextResult) -> bool:
        """Whether a finished authentication is enough, and the peer let in; False while that is being found out."""
        settings = self._settings
        settings.check_result(result, server_side=self._server_side, binding=self._binding)
        self._result = result
        self._step = step
        return settings.accept is None or self._ask(settings.accept, result.remote_identity)

    def _complete(self, step: Step) -> None:
        assert step.result is not None
        self._step = None
        self._core.step_done(step.token, True, step.result.protection)

    def _let_in(self) -> None:
        step = self._step
        assert step is not None
        try:
            self._complete(step)
            self._receive(None)
            self._control_reading()
        except SecurityError as exc:
            self._refuse(exc)

    def _denied(self, exc: AccessDenied) -> None:
        self._refuse(exc)

    def _refuse(self, exc: BaseException) -> None:
        """The peer isn't let in, or we failed: it gets an error frame."""
        code = INTERNAL_ERROR
        if isinstance(exc, AccessDenied):
            code = LOGON_DENIED
        elif isinstance(exc, AuthenticationError):
            code = exc.code
        if self._core.stepping:
            self._core.step_failed(code)
        self._fail(exc, "the authentication failed")

    def _handshake_done(self) -> bool:
        core = self._core
        if core.state is State.HANDSHAKE:
            if core.stepping and core.needed is not None:
                self._begin_step()
            return False
        self._settings._over(self)
        self._watch_expiry()
        return True

    def _control_reading(self) -> None:
        if self._core.stepping:
            self._hold_lower()
        else:
            super()._control_reading()

    def _deadline_error(self) -> Exception:
        return HandshakeError(f"the authentication took longer than {self._handshake_timeout:g} s")

    # ---- the end ---------------------------------------------------------------------------------------------

    def _watch_expiry(self) -> None:
        """The ticket's end, by the clock that tickets go by."""
        assert self._result is not None
        expires = self._result.expires_at
        if expires is None or self._settings.on_expiry == "ignore":
            return
        left = expires.timestamp() - time.time()
        if left > 0:
            # A clock that is set, or a long sleep of the machine, is noticed within a minute.
            self._expiry = self._loop.call_later(min(left, 60.0), self._watch_expiry, context=self._context)
            return
        self._expiry = None
        when = f"{expires:%Y-%m-%d %H:%M:%S} UTC"
        if self._settings.on_expiry == "close":
            self._fail(
                SecurityError(f"the client's ticket ended at {when} (on_expiry= says what happens then)")
            )
            return
        logger.info("%r: the client's ticket ended at %s", self, when)
        if hasattr(self._protocol, "security_expired"):
            self._call_protocol("security_expired")

    def _truncation(self) -> BaseException | None:
        if not self._core.truncated:
            return None
        return TruncatedError("the peer ended the connection within a frame: what came isn't all")

    def _tells_failures(self) -> bool:
        return True

    def _half_closes(self) -> bool:
        return True

    def _say_goodbye(self) -> None:
        """Everything is encrypted. There's no end in the framing: it's the transport's."""
        self._goodbye = True
        self._core.close()
        self._send_outgoing()
        if self._closing or self._end_told:
            self._finish_closing()
        elif self._lower is not None:
            self._lower.write_eof()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._settings._over(self)
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self._security_context is not None and not self._in_thread:
            self._security_context.dispose()
        self._step = None
        super().connection_lost(exc)

    # ---- what it is ------------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``security``, once the authentication is done; else what the transport below knows."""
        if name == "security" and self._result is not None and name not in self._extra:
            self._extra[name] = self._make_security(self._result)
        return super().get_extra_info(name, default)

    def _make_security(self, result: ContextResult) -> SecurityInfo:
        return SecurityInfo(
            protocol="NegotiateStream",
            mechanism=result.mechanism,
            protection="encrypt" if result.is_encrypted else "sign" if result.is_signed else "none",
            is_server=self._server_side,
            is_mutually_authenticated=result.is_mutually_authenticated,
            remote_identity=result.remote_identity,
            expires_at=result.expires_at,
            impersonation_level=result.impersonation_level,
            delegated=result.delegated,
            channel_bound=result.channel_bound,
            channel=self._lower.get_extra_info("security"),
        )
