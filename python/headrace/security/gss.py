"""Kerberos by GSSAPI (RFC 4120, RFC 4121, RFC 4178), through python-gssapi's public interface to MIT's library.

Rules
-----
* ``gssapi.raw``: its errors come at once, with the token that tells the peer. (python-gssapi's own classes defer
  them, and give that token as if all were well.) A token with an error is an error token, never success.
* Credentials are acquired for SPNEGO and told by ``set_neg_mechs`` that they are Kerberos', on both sides: whatever
  other mechanisms the machine has, they can't happen. The finished context is asked again.
* GSSAPI is only given tokens that look like Kerberos' or SPNEGO's (see ``spnego.py``).
* Flags are as the context says when it's finished. Replay and sequence detection are asked for and never demanded: our
  tokens have their numbers checked in any case, and .NET 8 doesn't ask for them.
* First everything is asked that there is to ask, then the keys are exported, which destroys the context. What can't be
  exported goes on with GSSAPI's tokens if those are RFC 4121's, with our own check of their headers.
* The context ends when the client's ticket does, not later by the clock skew that MIT allows.
* Under SPNEGO, MIT numbers Kerberos' errors anew. What is meant is found in the error token, in the number where it's
  Kerberos' own, by asking Kerberos without SPNEGO, or at last in the English words.
"""

from __future__ import annotations

import datetime
import logging
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from headrace.errors import AuthenticationError, FramingError
from headrace.security import pac
from headrace.security.contexts import ContextResult, ImpersonationLevel, MessageProtection, ProtectionLevel
from headrace.security.identity import Identity
from headrace.security.kerberos import KerberosProtection, supported_enctype
from headrace.security.ntlm import application_data
from headrace.security.spnego import first_token, kerberos_error, unpack_resp

if TYPE_CHECKING:
    from headrace.security.mechanisms import ClientSettings, ServerSettings

__all__ = ["GssProtection", "KerberosClient", "KerberosServer", "library"]

Buffer: TypeAlias = bytes | bytearray | memoryview

logger = logging.getLogger("headrace.security")

KERBEROS = "1.2.840.113554.1.2.2"
SPNEGO = "1.3.6.1.5.5.2"
# Asks a context for its session key; the last arc of the second answer is the enctype (MIT, gssapi_ext.h).
SESSION_KEY = "1.2.840.113554.1.2.2.5.5"
# Has a client not ask for confidentiality and integrity that nobody asked it for (MIT, gssapi_krb5.h).
NO_CI_FLAGS = "1.2.752.43.13.29"
LOGON_INFO = b"urn:mspac:logon-info"

DELEGATE, MUTUAL, REPLAY, SEQUENCE, CONFIDENTIALITY, INTEGRITY, ANONYMOUS = 1, 2, 4, 8, 16, 32, 64
CHANNEL_BOUND, IDENTIFY = 0x800, 0x2000

BAD_TOKEN, FAILED, UNSUPPORTED, DENIED, NOT_MET = 0x80090308, 0x80090304, 0x80090302, 0x8009030C, 1790

# Kerberos' errors in GSSAPI's minor status: the numbers of RFC 4120 section 7.5.9 from here on, then MIT's own.
ERRORS = -1765328384 & 0xFFFF_FFFF
OWN_ERRORS = 39756032  # GSSAPI's Kerberos: the cache is another principal's

# What an error means, by Kerberos' numbers; what to do; and what the peer is told.
CLIENT_UNKNOWN, TARGET_UNKNOWN, EXPIRED, REPLAYED, SKEW, NO_KEY = 6, 7, 32, 34, 37, 45
REASONS: dict[int, tuple[str, int]] = {
    1: ("the client's password has expired: change it", DENIED),
    CLIENT_UNKNOWN: ("the KDC doesn't know the client: check Credentials(principal=)", DENIED),
    TARGET_UNKNOWN: (
        "the KDC doesn't know the target: check target= (as the server's keytab has it), or have it made",
        DENIED,
    ),
    18: ("the client's account is locked or disabled", DENIED),
    23: ("the client's password has expired: change it", DENIED),
    24: ("the password is wrong", DENIED),
    31: ("the password is wrong, or the server's key isn't the one that the ticket was made with", DENIED),
    EXPIRED: ("the ticket has expired: get a new one (kinit), or give a client_keytab", DENIED),
    33: ("the ticket isn't valid yet: check the clocks", DENIED),
    REPLAYED: ("the client's message is a replay: it was accepted before", DENIED),
    35: ("the server's keytab has no key for the ticket's target: check target=, and the keytab", DENIED),
    SKEW: ("the clocks of client and server (or KDC) differ too much: set them, by NTP", DENIED),
    41: ("the client's message was changed on the way", DENIED),
    44: (
        "the server hasn't the key (its version) that the ticket is made with: export its keytab anew",
        DENIED,
    ),
    NO_KEY: (
        "the server's keytab has no key for this ticket: export the target's newest key to it, or get a new ticket",
        DENIED,
    ),
    141: ("there's no ticket: get one (kinit), or give a password, a client_keytab or a ccache", DENIED),
    154: ("no KDC is known for the realm: check the realm, and KRB5_CONFIG's krb5.conf", DENIED),
    156: ("no KDC can be reached: check the network, and KRB5_CONFIG's krb5.conf", DENIED),
    181: ("the keytab has no such key: check credentials' keytab, or KRB5_KTNAME", FAILED),
    195: ("there's no ticket: get one (kinit), or give a password, a client_keytab or a ccache", DENIED),
    230: (
        "the server's keytab has the key only in another version: export it anew, or get a new ticket",
        DENIED,
    ),
}
OTHER_PRINCIPAL = "the ticket cache is another principal's: check Credentials(principal=)"
NOT_CACHED, PASSWORD_WRONG, UNREACHABLE = 195, 24, 156

# MIT's words for the same, where a number doesn't say it.
WORDS: tuple[tuple[str, int], ...] = (
    ("is a replay", REPLAYED),
    ("Clock skew too great", SKEW),
    ("Ticket expired", EXPIRED),
    ("ticket is likely out of date", 230),
    ("not found in keytab", NO_KEY),
    ("Cannot contact any KDC", UNREACHABLE),
    ("Cannot find KDC", 154),
    ("not found in Kerberos database", TARGET_UNKNOWN),
    ("No Kerberos credentials available", NOT_CACHED),
    ("No credentials cache found", NOT_CACHED),
    ("is nonexistent or empty", 181),
    ("Wrong principal in request", 35),
    ("Ticket not yet valid", 33),
)
BAD_BINDINGS, CREDENTIALS_OVER, CONTEXT_OVER = (
    4,
    11,
    12,
)  # GSSAPI's major status, in its third byte (RFC 2744 section 3.9.1)


def library() -> Any:
    """``gssapi.raw``. Where it isn't installed: AuthenticationError, naming the extra."""
    try:
        import gssapi.raw
        import gssapi.raw.ext_krb5
    except (ImportError, OSError) as error:
        raise AuthenticationError(
            f"Kerberos needs python-gssapi: pip install 'headrace[kerberos]' ({error})", code=UNSUPPORTED
        ) from None
    return gssapi.raw


def oid(dotted: str) -> Any:
    return library().OID.from_int_seq(dotted)


# ---- errors --------------------------------------------------------------------------------------------------


def words_of(error: Exception) -> str:
    """What GSSAPI says, short: of its two sentences the one about the mechanism."""
    try:
        whole = str(error)
    except Exception:
        return type(error).__name__
    _, found, minor = whole.partition("Minor (")
    if found:
        said = minor.partition(": ")[2].strip()
        if said and not said.startswith(("Unknown error", "Success")):
            return said
        return whole.partition(": ")[2].partition(", Minor")[0]
    return whole or type(error).__name__


def number_of(error: Exception, token: bytes | None) -> int | None:
    """Which of Kerberos' errors is meant, if it can be told."""
    minor = getattr(error, "min_code", None)
    if isinstance(minor, int) and 0 <= minor - ERRORS < 256:
        return minor - ERRORS
    told = kerberos_error(token)
    if told is not None and told != 60:  # "generic"
        return told
    words = words_of(error)
    return next((number for text, number in WORDS if text in words), None)


def failure(what: str, error: Exception, received: bytes | None = None) -> AuthenticationError:
    """The error that a caller gets: says what to do, has the token for the peer, and nothing secret."""
    token = getattr(error, "token", None)
    token = token if isinstance(token, bytes) and token else None
    words = words_of(error)
    major = (getattr(error, "maj_code", 0) >> 16) & 0xFF
    if major == BAD_BINDINGS:
        said, code = "the peer names another TLS connection than this one (channel binding)", DENIED
    elif major in (CREDENTIALS_OVER, CONTEXT_OVER):
        said, code = REASONS[EXPIRED]
    elif getattr(error, "min_code", None) == OWN_ERRORS:
        said, code = OTHER_PRINCIPAL, DENIED
    else:
        number = number_of(error, token or received)
        said, code = REASONS.get(number if number is not None else -1, ("", BAD_TOKEN))
    text = f"{what}: {said} ({words})" if said else f"{what}: {words}"
    return AuthenticationError(text, code=code, token=token)


# ---- names ---------------------------------------------------------------------------------------------------


def identity_of(principal: str, sids: tuple[str, ...] = ()) -> Identity:
    """A Kerberos principal, as access lists name it."""
    names = [f"principal:{principal}"]
    realm = realm_of(principal)
    if realm:
        names.append(f"realm:{realm}")
    names += [f"sid:{sid}" for sid in sids]
    return Identity(principal, tuple(names))


def realm_of(principal: str) -> str:
    """What is behind the first ``@`` that no backslash is before (MIT, krb5_unparse_name)."""
    at = 0
    while at < len(principal):
        if principal[at] == "\\":
            at += 1
        elif principal[at] == "@":
            return principal[at + 1 :]
        at += 1
    return ""


def shown(name: Any) -> str:
    """A GSSAPI name as text. One that isn't text is refused: no access list could name it."""
    try:
        text: str = library().display_name(name, name_type=False).name.decode("utf-8")
    except UnicodeDecodeError:
        raise AuthenticationError("the peer's principal isn't text", code=DENIED) from None
    if "\0" in text or "\\0" in text:
        raise AuthenticationError("the peer's principal has a NUL in it", code=DENIED)
    return text


def sids_of(name: Any) -> tuple[str, ...]:
    """The SIDs that the KDC vouches for; none where it doesn't."""
    g = library()
    try:
        if LOGON_INFO not in (g.inquire_name(name, mech_name=False).attrs or ()):
            return ()
        attribute = g.get_name_attribute(name, LOGON_INFO)
    except g.GSSError:
        return ()
    if not attribute.authenticated or len(attribute.values) != 1:
        return ()
    try:
        return pac.sids(attribute.values[0])
    except ValueError as error:
        # Group rules may deny: who comes with a PAC that can't be read isn't let through as someone without groups.
        raise AuthenticationError(f"the ticket's PAC can't be read: {error}", code=DENIED) from None


# ---- GSSAPI's own tokens -------------------------------------------------------------------------------------


class GssProtection:
    """Messages by GSSAPI's wrap and unwrap, for encryption types that we have no code for: a ``MessageProtection``.

    Their headers (RFC 4121 section 4.2.6.2) are checked as strictly as our own code does: direction, sealing, key and
    the next number, for GSSAPI checks numbers only where it was agreed on, and takes unsealed tokens.
    """

    __slots__ = ("_context", "_expected", "_lost", "_number", "overhead", "sealed")

    def __init__(
        self, context: Any, *, initiator: bool, subkey: bool, receive_sequence: int, sealed: bool
    ) -> None:
        self._context = context
        self._expected = (0x01 if initiator else 0) | (0x02 if sealed else 0) | (0x04 if subkey else 0)
        self._number = receive_sequence
        self._lost = False
        self.sealed = sealed
        self.overhead = 128  # header twice, confounder, filler, the longest checksum

    def wrap(self, data: Buffer) -> bytes:
        """The next token, around ``data``."""
        if self._lost:
            raise FramingError("the connection's protection is lost after an error")
        g = library()
        try:
            token = g.wrap(self._context, bytes(data), self.sealed)
        except g.GSSError as error:
            self._lost = True
            raise FramingError(f"a message can't be protected: {words_of(error)}") from None
        if token.encrypted != self.sealed:
            self._lost = True
            raise FramingError("a message would have gone out less protected than agreed")
        return bytes(token.message)

    def unwrap(self, token: Buffer) -> bytes:
        """What is in the peer's next token; FramingError for one that isn't that."""
        if self._lost:
            raise FramingError("the connection's protection is lost after an error")
        self._lost = True
        token = bytes(memoryview(token))  # a copy in any case: MIT unwraps in place, and bytes mustn't change
        if len(token) < 16 or token[:2] != b"\x05\x04" or token[3] != 0xFF:
            raise FramingError("a message isn't a Wrap token")
        if token[2] & 0x07 != self._expected:
            raise FramingError("a message is from the wrong side, or not as protected as agreed")
        if int.from_bytes(token[8:16], "big") != self._number:
            raise FramingError("a message isn't the next one: some are missing, repeated or out of order")
        g = library()
        try:
            data = g.unwrap(self._context, token)
        except g.GSSError as error:
            raise FramingError(f"a message is forged or broken: {words_of(error)}") from None
        if data.encrypted != self.sealed:
            raise FramingError("a message isn't as protected as agreed")
        self._number = (self._number + 1) % (1 << 64)
        self._lost = False
        return bytes(data.message)

    def __repr__(self) -> str:
        return f"<GssProtection {'sealed' if self.sealed else 'signed'}>"


# ---- contexts ------------------------------------------------------------------------------------------------


class KerberosContext:
    """What client and server have in common."""

    initiator: bool

    def __init__(self, settings: ClientSettings | ServerSettings, binding: bytes | None) -> None:
        self._g = library()
        self.complete = False
        self._settings = settings
        self._binding = binding if settings.channel_binding != "never" else None
        self._creds: Any = None
        self._context: Any = None
        self._delegated: Any = None
        self._macs = 0  # mechListMICs that the peer has made; each had a sequence number
        self._spnego = True

    def dispose(self) -> None:
        """Forgets keys and credentials; any time, and more than once."""
        self._creds = self._context = self._delegated = None

    def _bindings(self) -> Any:
        if self._binding is None:
            return None
        return self._g.ChannelBindings(application_data=application_data(self._binding))

    def _only_kerberos(self, creds: Any) -> Any:
        self._g.set_neg_mechs(creds, [oid(KERBEROS)])
        return creds

    def _looked_at(self, token: bytes) -> None:
        """A later token, before GSSAPI gets it."""
        if self._spnego:
            self._macs += unpack_resp(token).mic is not None
        elif first_token(token) != "kerberos":
            raise AuthenticationError("the peer's token isn't Kerberos'")

    # ---- the result --------------------------------------------------------------------------------------------

    def result(self) -> ContextResult:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        context, self._context, self._creds = self._context, None, None
        if not self.complete or context is None:
            raise AuthenticationError(
                "the Kerberos authentication isn't finished, or its result was taken before"
            )
        try:
            return self._told(context)
        except (self._g.GSSError, IndexError) as error:
            raise failure("Kerberos' result can't be read", error) from None

    def _told(self, context: Any) -> ContextResult:
        about = self._g.inquire_context(context)
        if about.mech != oid(KERBEROS) or not about.complete:
            raise AuthenticationError("SPNEGO came to another mechanism than Kerberos", code=UNSUPPORTED)
        flags = int(about.flags)
        sealed = bool(flags & CONFIDENTIALITY)
        signed = sealed or bool(flags & INTEGRITY)
        self._demanded(ProtectionLevel(int(signed) + int(sealed)), flags)
        identity = self._identity(about, flags)
        bound = self._is_bound(flags)
        level = self._impersonation(flags)
        protection, end = self._keys(context, signed=signed, sealed=sealed)
        if end <= time.time():
            raise AuthenticationError(
                "the ticket has expired, within the clock skew that Kerberos allows: get a new one (kinit)",
                code=DENIED,
            )
        delegated, self._delegated = self._delegated, None
        return ContextResult(
            mechanism="kerberos",
            remote_identity=identity,
            is_signed=signed,
            is_encrypted=sealed,
            is_mutually_authenticated=bool(flags & MUTUAL),
            impersonation_level=level,
            expires_at=datetime.datetime.fromtimestamp(end, datetime.UTC),
            channel_bound=bound,
            delegated=delegated,
            protection=protection,
        )

    def _demanded(self, level: ProtectionLevel, flags: int) -> None:
        if level < self._settings.protection:
            raise AuthenticationError(
                f"the peer offers {level.name}, and {self._settings.protection.name} is demanded: lower protection=, or"
                " have the peer ask for more",
                code=NOT_MET,
            )

    def _identity(self, about: Any, flags: int) -> Identity | None:
        raise NotImplementedError

    def _is_bound(self, flags: int) -> bool:
        raise NotImplementedError

    def _impersonation(self, flags: int) -> ImpersonationLevel:
        if flags & DELEGATE:
            return ImpersonationLevel.DELEGATION
        return ImpersonationLevel.IDENTIFICATION if flags & IDENTIFY else ImpersonationLevel.IMPERSONATION

    def _keys(self, context: Any, *, signed: bool, sealed: bool) -> tuple[MessageProtection | None, int]:
        """The protection of messages, and when the ticket ends, in seconds since 1970."""
        g = self._g
        number = int(str(g.inquire_sec_context_by_oid(context, oid(SESSION_KEY))[1][-1]))
        kept = None
        if signed and not supported_enctype(number):
            # Two from one: the first is destroyed for what it knows, the second goes on.
            exported = g.export_sec_context(context)
            context, kept = g.import_sec_context(exported), g.import_sec_context(exported)
            del exported
        lucid = g.ext_krb5.krb5_export_lucid_sec_context(context, 1)
        end = lucid.endtime & 0xFFFF_FFFF
        if not signed:
            return None, end
        if kept is None:
            return KerberosProtection.from_lucid(MovedOn(lucid, self._macs), sealed=sealed), end
        if lucid.protocol != 1:
            raise AuthenticationError(
                f"the ticket's encryption type {number} is too weak (DES or RC4): have the KDC issue AES keys",
                code=UNSUPPORTED,
            )
        protection = GssProtection(
            kept,
            initiator=self.initiator,
            subkey=lucid.cfx_kd.acceptor_subkey is not None,
            receive_sequence=lucid.recv_seq + self._macs,
            sealed=sealed,
        )
        return protection, end

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'complete' if self.complete else 'under way'}>"


class MovedOn:
    """An exported context whose peer has used numbers already, which the export doesn't count (RFC 4178 section 5)."""

    def __init__(self, lucid: Any, used: int) -> None:
        self.cfx_kd = lucid.cfx_kd
        self.protocol = lucid.protocol
        self.is_initiator = lucid.is_initiator
        self.send_seq = lucid.send_seq
        self.recv_seq = lucid.recv_seq + used


class KerberosClient(KerberosContext):
    """A client's side: a ``SecurityContext``."""

    initiator = True
    _settings: ClientSettings

    def __init__(self, settings: ClientSettings, binding: bytes | None) -> None:
        super().__init__(settings, binding)
        self._spnego = settings.spnego
        self._target: Any = None

    def step(self, token: bytes | None) -> bytes | None:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        if self.complete:
            if token:
                raise AuthenticationError("the server goes on after the end of the Kerberos authentication")
            return None
        if token is None:
            return self._first()
        self._looked_at(token)
        try:
            return self._stepped(token)
        except (self._g.GSSError, IndexError) as error:
            raise failure("Kerberos has failed at the server", error, token) from None

    def _first(self) -> bytes | None:
        g = self._g
        self._target = self._name()
        try:
            self._creds = self._acquired(SPNEGO if self._spnego else KERBEROS)
            return self._stepped(None)
        except g.GSSError as error:
            told = failure(f"Kerberos has failed for {self._settings.target!r}", error)
            if self._spnego and number_of(error, None) is None:
                self._asked_without_spnego()
        raise told

    def _asked_without_spnego(self) -> None:
        """SPNEGO only says that no mechanism is left: why Kerberos isn't is Kerberos' own to say."""
        g = self._g
        try:
            creds = self._acquired(KERBEROS)
            g.init_sec_context(self._target, creds, None, oid(KERBEROS), [MUTUAL], None, None, None)
        except g.GSSError as error:
            raise failure(f"Kerberos has failed for {self._settings.target!r}", error) from None

    def _name(self) -> Any:
        """The target as Kerberos names it; nothing is looked up in DNS to make it."""
        from headrace.security.mechanisms import check_target

        g = self._g
        service, host, realm = check_target(self._settings.target)
        if realm is not None:
            return g.import_name(f"{service}/{host}@{realm}".encode(), g.NameType.kerberos_principal)
        return g.import_name(f"{service}@{host}".encode(), g.NameType.hostbased_service)

    def _acquired(self, mechanism: str) -> Any:
        g = self._g
        ours = self._settings.credentials
        name = None
        if ours.principal is not None:
            name = g.import_name(ours.principal.encode(), g.NameType.user)
        if ours.delegated is not None:
            # A copy: what is set on it below must not reach other connections.
            creds = g.import_cred(g.export_cred(ours.delegated))
        elif ours.password is not None:
            creds = g.acquire_cred_with_password(
                name, ours.password.encode(), usage="initiate", mechs=[oid(mechanism)]
            ).creds
        else:
            mechs = None if mechanism == SPNEGO else [oid(mechanism)]
            creds = g.acquire_cred_from(ours.initiator_store(), name, mechs=mechs, usage="initiate").creds
        if mechanism == SPNEGO and ours.delegated is None:  # what is forwarded is for Kerberos alone
            self._only_kerberos(creds)
        if self._settings.protection is not ProtectionLevel.ENCRYPT_AND_SIGN:
            g.set_cred_option(oid(NO_CI_FLAGS), creds, None)
        return creds

    def _flags(self) -> list[int]:
        settings = self._settings
        flags: list[int] = []
        if settings.mutual:
            flags.append(MUTUAL)
        if settings.protection is not ProtectionLevel.NONE:
            flags += [INTEGRITY, REPLAY, SEQUENCE]
        if settings.protection is ProtectionLevel.ENCRYPT_AND_SIGN:
            flags.append(CONFIDENTIALITY)
        if settings.impersonation is ImpersonationLevel.DELEGATION:
            flags.append(DELEGATE)
        elif settings.impersonation is ImpersonationLevel.IDENTIFICATION:
            flags.append(IDENTIFY)
        return flags

    def _stepped(self, token: bytes | None) -> bytes | None:
        mechanism = oid(SPNEGO if self._spnego else KERBEROS)
        done = self._g.init_sec_context(
            self._target, self._creds, self._context, mechanism, self._flags(), None, self._bindings(), token
        )
        self._context = done.context
        self.complete = not done.more_steps
        if self._settings.impersonation is ImpersonationLevel.DELEGATION and not int(done.flags) & DELEGATE:
            raise AuthenticationError(
                "the ticket can't be forwarded, and DELEGATION is asked for: get a forwardable one (kinit -f)",
                code=NOT_MET,
            )
        return bytes(done.token) if done.token else None

    def _demanded(self, level: ProtectionLevel, flags: int) -> None:
        super()._demanded(level, flags)
        if self._settings.mutual and not flags & MUTUAL:
            raise AuthenticationError("the server hasn't shown who it is, and mutual=True", code=DENIED)

    def _identity(self, about: Any, flags: int) -> Identity | None:
        return identity_of(shown(about.target_name)) if flags & MUTUAL else None

    def _is_bound(self, flags: int) -> bool:
        return self._binding is not None


class KerberosServer(KerberosContext):
    """A server's side: a ``SecurityContext``."""

    initiator = False
    _settings: ServerSettings

    def step(self, token: bytes | None) -> bytes | None:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        if token is None:
            raise ValueError("a token is due")
        if self.complete:
            if token:
                raise AuthenticationError("the client goes on after the end of the Kerberos authentication")
            return None
        g = self._g
        if self._creds is None:
            self._spnego = not isinstance(first_token(token), str)
            self._creds = self._acquired()
        else:
            self._looked_at(token)
        try:
            done = g.accept_sec_context(token, self._creds, self._context, self._bindings())
        except (g.GSSError, IndexError) as error:
            raise self._failed(error) from None
        self._context = done.context
        self.complete = not done.more_steps
        if done.delegated_creds is not None:
            self._delegated = done.delegated_creds
        if self.complete and self._settings.channel_binding == "require":
            self._require_bound(done.flags)
        return bytes(done.token) if done.token else None

    def _acquired(self) -> Any:
        g = self._g
        store = self._settings.credentials.acceptor_store()
        try:
            return self._only_kerberos(g.acquire_cred_from(store, None, mechs=None, usage="accept").creds)
        except g.GSSError as error:
            raise failure("the Kerberos server's keys can't be used", error) from None

    def _failed(self, error: Exception) -> AuthenticationError:
        """SPNEGO doesn't say why there are no keys: Kerberos does."""
        g = self._g
        if number_of(error, getattr(error, "token", None)) is None and not getattr(error, "token", None):
            store = self._settings.credentials.acceptor_store()
            try:
                g.acquire_cred_from(store, None, mechs=[oid(KERBEROS)], usage="accept")
            except g.GSSError as reason:
                told = failure("the Kerberos server's keys can't be used", reason)
                told.code = FAILED
                return told
        return failure("Kerberos has refused the client", error)

    def _require_bound(self, flags: Any) -> None:
        """Before the client hears of success."""
        if not int(flags) & CHANNEL_BOUND:
            raise AuthenticationError(
                "the client names no TLS connection (channel binding), and channel_binding='require'",
                code=DENIED,
            )

    def _demanded(self, level: ProtectionLevel, flags: int) -> None:
        super()._demanded(level, flags)
        if flags & ANONYMOUS:
            raise AuthenticationError(
                "the client's ticket is anonymous: it says nothing about who it is", code=DENIED
            )

    def _identity(self, about: Any, flags: int) -> Identity | None:
        from headrace.security.mechanisms import target_allowed

        target = shown(about.target_name)
        allowed = self._settings.allowed_targets
        if allowed and not target_allowed(target, allowed):
            raise AuthenticationError(
                f"the client asks for {target!r}, which isn't among allowed_targets", code=DENIED
            )
        return identity_of(shown(about.initiator_name), sids_of(about.initiator_name))

    def _is_bound(self, flags: int) -> bool:
        return bool(flags & CHANNEL_BOUND)

    def _impersonation(self, flags: int) -> ImpersonationLevel:
        level = super()._impersonation(flags)
        if level is ImpersonationLevel.DELEGATION and self._delegated is None:
            level = ImpersonationLevel.IMPERSONATION
        if level < self._settings.impersonation:
            raise AuthenticationError(
                f"the client allows {level.name}, and {self._settings.impersonation.name} is demanded",
                code=NOT_MET,
            )
        if self._delegated is not None:
            import gssapi

            self._delegated = gssapi.Credentials(base=self._delegated)
        return level
