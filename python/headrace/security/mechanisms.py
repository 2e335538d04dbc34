"""Which mechanism authenticates a connection: Kerberos or NTLM, by what the two sides list.

Rules
-----
* A mechanism that isn't listed is never used: not by way of SPNEGO, not as a fallback, not because of an environment
  variable. Kerberos goes before NTLM wherever both are listed and possible.
* A server decides by the client's first token: raw NTLM (``NTLMSSP\\0``), raw Kerberos or SPNEGO (by their object
  identifier). A client that only offers what isn't listed is refused before any challenge is sent.
* A client that lists both uses NTLM where there's no way to get a ticket for its target, which it knows before
  it has sent anything. What a server says doesn't make it change from Kerberos to NTLM.
* Settings are checked when they are made, with ``ValueError``; making a context does nothing that blocks.
  Tickets, keys and files are read in ``step``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast, get_args

from headrace.errors import AuthenticationError
from headrace.security.contexts import ContextResult, ImpersonationLevel, ProtectionLevel, SecurityContext
from headrace.security.credentials import Credentials
from headrace.security.gss import KerberosClient, KerberosServer, library
from headrace.security.ntlm import NtlmClient, NtlmServer
from headrace.security.spnego import KERBEROS, NTLM, NegTokenInit, Raw, first_token

__all__ = [
    "ClientSettings",
    "Mechanism",
    "ServerSettings",
    "client_context",
    "server_context",
]

logger = logging.getLogger("headrace.security")

Mechanism: TypeAlias = Literal["kerberos", "ntlm"]
ChannelBinding: TypeAlias = Literal["when-supported", "require", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """What a client asks for. Immutable; the same object serves any number of connections and threads.

    Parameters
    ----------
    target : str
        Whom we want to reach, independent of the address that is connected to: ``"HTTP/www.example.org"``,
        ``"HTTP/www.example.org@EXAMPLE.ORG"`` or ``"HTTP@www.example.org"``. No IP address: Kerberos has no
        keys for those.
    credentials : Credentials
    mechanisms : tuple of {"kerberos", "ntlm"}
    protection : ProtectionLevel
        What is asked for, and the least that is accepted.
    impersonation : ImpersonationLevel
        What the server may do with our identity. DELEGATION forwards our ticket, which must be forwardable.
    mutual : bool
        Whether the server must show who it is. NTLM can't.
    channel_binding : {"when-supported", "require", "never"}
        Whether the TLS connection around this one is named in the authentication; ``"require"`` refuses to
        authenticate where there's no binding to send.
    spnego : bool
        Whether tokens are wrapped in SPNEGO (RFC 4178), as .NET and Windows do. NTLM without protection is always
        sent raw, as .NET does.

    Raises
    ------
    ValueError
        For arguments that don't go together: NTLM with ``mutual`` or DELEGATION, an IP address as target, ...
    """

    target: str
    credentials: Credentials = field(default_factory=Credentials)
    mechanisms: tuple[Mechanism, ...] = ("kerberos",)
    protection: ProtectionLevel = ProtectionLevel.ENCRYPT_AND_SIGN
    impersonation: ImpersonationLevel = ImpersonationLevel.IDENTIFICATION
    mutual: bool = True
    channel_binding: ChannelBinding = "when-supported"
    spnego: bool = True

    def __post_init__(self) -> None:
        check_common(self.mechanisms, self.channel_binding)
        check_target(self.target)
        if "ntlm" in self.mechanisms:
            if self.mutual:
                raise ValueError(
                    "NTLM can't show a client who the server is: set mutual=False, or don't list it"
                )
            if self.impersonation is ImpersonationLevel.DELEGATION:
                raise ValueError("NTLM has no credentials to forward: it can't be listed with DELEGATION")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a server demands. Immutable; the same object serves any number of connections and threads.

    Parameters
    ----------
    credentials : Credentials
        Its keytab. Any key in it may be asked for; see ``allowed_targets``. For NTLM the users are those of
        NTLM_USER_FILE, an environment variable.
    mechanisms : tuple of {"kerberos", "ntlm"}
    protection : ProtectionLevel
        The least that is accepted.
    impersonation : ImpersonationLevel
        The least that the client must allow; DELEGATION demands that it forwards its credentials.
    channel_binding : {"when-supported", "require", "never"}
        ``"when-supported"`` refuses a client that names another channel, ``"require"`` also one that names none.
    allowed_targets : tuple of str
        Which of its names clients may ask for: ``"HTTP/www.example.org"`` (in any realm) or with ``@REALM``. Empty:
        any whose key it has. Of NTLM's clients only those are checked that name a target.

    Raises
    ------
    ValueError
        For arguments that don't go together: no replay cache and no protection, ...
    """

    credentials: Credentials = field(default_factory=Credentials)
    mechanisms: tuple[Mechanism, ...] = ("kerberos",)
    protection: ProtectionLevel = ProtectionLevel.ENCRYPT_AND_SIGN
    impersonation: ImpersonationLevel = ImpersonationLevel.IDENTIFICATION
    channel_binding: ChannelBinding = "when-supported"
    allowed_targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_common(self.mechanisms, self.channel_binding)
        if isinstance(self.allowed_targets, str):
            raise ValueError("allowed_targets is a tuple of names, not one name")
        for target in self.allowed_targets:
            check_target(target)
        if self.impersonation is ImpersonationLevel.DELEGATION and self.mechanisms == ("ntlm",):
            raise ValueError("NTLM has no credentials to forward: DELEGATION needs kerberos")
        if "kerberos" in self.mechanisms and self.credentials.replays_unnoticed:
            if self.protection is ProtectionLevel.NONE:
                raise ValueError(
                    "the replay cache is off (replay_cache, or KRB5RCACHENAME) and messages aren't protected: a"
                    " recorded client could be replayed. Switch the cache on, or demand protection"
                )
            logger.warning(
                "the replay cache is off: recorded clients are stopped only by their messages' protection"
            )


# ---- what settings must be -----------------------------------------------------------------------------------


def check_common(mechanisms: Iterable[str], channel_binding: str) -> None:
    """What both sides' settings have in common."""
    if isinstance(mechanisms, str) or not isinstance(mechanisms, tuple):
        raise ValueError("mechanisms is a tuple: ('kerberos',)")
    unknown = [name for name in mechanisms if name not in get_args(Mechanism)]
    if unknown or not mechanisms or len(set(mechanisms)) != len(mechanisms):
        raise ValueError(f"mechanisms must be some of {get_args(Mechanism)}, each once, not {mechanisms!r}")
    if channel_binding not in get_args(ChannelBinding):
        raise ValueError(
            f"channel_binding must be one of {get_args(ChannelBinding)}, not {channel_binding!r}"
        )


def check_target(target: str) -> tuple[str, str, str | None]:
    """A target's service, host and realm.

    Raises ``ValueError``, saying why, for what is no name of a service.
    """
    if any(ord(letter) < 0x21 or letter == "\x7f" for letter in target):
        raise ValueError(f"a target has no blanks and no control characters: {target!r}")
    realm: str | None = None
    if "/" in target:
        service, _, host = target.partition("/")
        host, at, realm = host.partition("@")
        if not at:
            realm = None
        elif not realm:
            raise ValueError(f"a realm is missing after the @: {target!r}")
    else:
        service, _, host = target.partition("@")
    if not service or not host:
        raise ValueError(
            f"a target is 'service/host', 'service/host@REALM' or 'service@host', not {target!r}"
        )
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return service, host, realm
    raise ValueError(
        f"{target!r} names an IP address: tickets are issued for names. Give the server's name as target;"
        " the address that is connected to may be any"
    )


def target_allowed(target: str, allowed: Iterable[str]) -> bool:
    """Whether a target (``service/host@REALM``, or NTLM's ``service/host``) is one of those; case counts."""
    try:
        service, host, realm = check_target(target)
    except ValueError:
        return False
    for one in allowed:
        known = check_target(one)
        if known[:2] == (service, host) and known[2] in (None, realm):
            return True
    return False


# ---- contexts ------------------------------------------------------------------------------------------------


class Guarded:
    """A context that may be disposed of while a step of it runs on another thread: it's done when the step is."""

    def __init__(self, inner: SecurityContext) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._given_up = False

    @property
    def complete(self) -> bool:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        return self._inner.complete

    def step(self, token: bytes | None) -> bytes | None:
        """See :class:`headrace.security.contexts.SecurityContext`. After an error there are no more."""
        with self._used():
            return self._inner.step(token)

    def result(self) -> ContextResult:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        with self._used():
            return self._inner.result()

    def dispose(self) -> None:
        """See :class:`headrace.security.contexts.SecurityContext`. From any thread; never waits."""
        self._given_up = True
        if self._lock.acquire(blocking=False):
            try:
                self._inner.dispose()
            finally:
                self._lock.release()

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("one step at a time: another thread is in this context")
        try:
            if self._given_up:
                raise AuthenticationError("the authentication was given up, or has failed before")
            yield
        except BaseException:
            self._given_up = True
            raise
        finally:
            if self._given_up:
                self._inner.dispose()
            self._lock.release()

    def __repr__(self) -> str:
        return repr(self._inner)


class EitherClient:
    """Kerberos where a ticket can be had, else NTLM: for clients that list both."""

    def __init__(self, settings: ClientSettings, binding: bytes | None) -> None:
        self._settings = settings
        self._binding = binding
        self._inner: SecurityContext = KerberosClient(settings, binding)

    @property
    def complete(self) -> bool:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        return self._inner.complete

    def step(self, token: bytes | None) -> bytes | None:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        if token is not None:
            return self._inner.step(token)
        try:
            return self._inner.step(None)
        except AuthenticationError as error:
            # Not secret, and who listed both wants to know why it isn't the better one.
            logger.info("no Kerberos for %s, so NTLM: %s", self._settings.target, error)
        self._inner.dispose()
        self._inner = NtlmClient(self._settings, self._binding)
        return self._inner.step(None)

    def result(self) -> ContextResult:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        return self._inner.result()

    def dispose(self) -> None:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        self._inner.dispose()

    def __repr__(self) -> str:
        return repr(self._inner)


class AnyServer:
    """A server whose mechanism follows from the client's first token."""

    def __init__(self, settings: ServerSettings, binding: bytes | None) -> None:
        self._settings = settings
        self._binding = binding
        self._inner: SecurityContext | None = None

    @property
    def complete(self) -> bool:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        return self._inner is not None and self._inner.complete

    def step(self, token: bytes | None) -> bytes | None:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        if self._inner is None:
            self._inner = self._chosen(first_token(token or b""))
        return self._inner.step(token)

    def _chosen(self, first: NegTokenInit | Raw) -> SecurityContext:
        listed = self._settings.mechanisms
        raw = isinstance(first, str)
        offered = {first} if isinstance(first, str) else offered_by(first)
        if "kerberos" in listed and "kerberos" in offered:
            return KerberosServer(self._settings, self._binding)
        if "ntlm" in listed and "ntlm" in offered:
            return NtlmServer(self._settings, self._binding, None if raw else cast(NegTokenInit, first))
        theirs = " and ".join(sorted(offered)) or "mechanisms that are unknown here"
        raise AuthenticationError(
            f"the client offers {theirs}, and this server takes {' and '.join(listed)}: have the client get a ticket"
            " for this server, or list its mechanism in mechanisms=",
            code=0x80090302,
        )

    def result(self) -> ContextResult:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        if self._inner is None:
            raise AuthenticationError("the authentication hasn't begun")
        return self._inner.result()

    def dispose(self) -> None:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        if self._inner is not None:
            self._inner.dispose()

    def __repr__(self) -> str:
        return repr(self._inner) if self._inner is not None else "<AnyServer>"


def offered_by(first: NegTokenInit) -> set[str]:
    """Our names for what a client lists."""
    names: set[str] = set()
    for one in first.mechanisms:
        if one in KERBEROS:
            names.add("kerberos")
        elif one == NTLM:
            names.add("ntlm")
    return names


def check_binding(settings: ClientSettings | ServerSettings, binding: bytes | None) -> None:
    """A binding that is required must be there: on a client to be sent, on a server to be compared with."""
    if settings.channel_binding == "require" and binding is None:
        raise AuthenticationError(
            "channel_binding='require', and this connection has none: it needs TLS around it, with a certificate whose"
            " tls-server-end-point is defined"
        )


def client_context(settings: ClientSettings, binding: bytes | None = None) -> SecurityContext:
    """A client's side of one authentication.

    ``binding`` is the ``tls-server-end-point`` hash of the connection's TLS (RFC 5929 section 4), without a prefix;
    None where there's no TLS or the binding isn't defined. Doesn't block. The context's ``dispose`` may be called from
    any thread at any time.

    Raises :class:`headrace.errors.AuthenticationError` when a binding is required and there's none, and when the
    ``kerberos`` extra is needed and isn't installed.
    """
    check_binding(settings, binding)
    if settings.mechanisms == ("ntlm",):
        return Guarded(NtlmClient(settings, binding))
    if "ntlm" in settings.mechanisms:
        return Guarded(EitherClient(settings, binding))
    return Guarded(KerberosClient(settings, binding))


def server_context(settings: ServerSettings, binding: bytes | None = None) -> SecurityContext:
    """A server's side of one authentication; the mechanism follows from the client's first token.

    ``binding`` as for :func:`client_context`. Doesn't block. Call ``result`` before the last token is sent: it's what
    finds that the client offers too little protection, asks for a target that isn't allowed, or that its ticket
    is over.

    Raises :class:`headrace.errors.AuthenticationError` when a binding is required and there's none, and when the
    ``kerberos`` extra is needed and isn't installed.
    """
    check_binding(settings, binding)
    if "kerberos" in settings.mechanisms:
        library()
    return Guarded(AnyServer(settings, binding))
