"""NTLM by pyspnego, for who lists it: [MS-NLMP], raw or in SPNEGO, and the protection of messages after it.

Rules
-----
* pyspnego makes and checks NTLM's three messages, by its public API. SPNEGO around them and the signatures behind them
  are made here: what pyspnego's own SPNEGO offers isn't ours to choose, its wrap always encrypts, and its cipher
  can't be put back to its beginning after a mechListMIC but by its private parts.
* Only NTLMv2, whatever LM_COMPAT_LEVEL says: an environment variable never weakens authentication. Messages are
  signed and encrypted with 128 bits and extended session security, or the peer is refused.
* A client that says in its response that there's a MIC over the messages must have one (CVE-2019-1040: taking it out
  goes unnoticed otherwise). We check it over the bytes that were on the wire.
* The channel a client names (MsvAvChannelBindings) is under its response, so checked after that: another one is
  always refused; none, or zeros, only where a binding is required.
* Users are who NTLM_USER_FILE says, with the file's spelling: NTLM's names have no case, access lists do.
* A wrong password and an unknown user are told apart by nobody.
* pyspnego logs whole tokens at DEBUG. As long as one of our steps runs, on its thread, nothing below WARNING of
  its loggers goes anywhere; other users of pyspnego in the process are not affected.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from headrace.errors import AuthenticationError, FramingError
from headrace.security.contexts import ContextResult, ImpersonationLevel, ProtectionLevel
from headrace.security.identity import Identity
from headrace.security.spnego import (
    ACCEPT_COMPLETED,
    ACCEPT_INCOMPLETE,
    NTLM,
    NTLM_SIGNATURE,
    REJECT,
    REQUEST_MIC,
    NegTokenInit,
    NegTokenResp,
    pack_init,
    pack_mechanisms,
    pack_resp,
    unpack_resp,
)

if TYPE_CHECKING:
    from headrace.security.mechanisms import ClientSettings, ServerSettings

__all__ = ["NtlmClient", "NtlmProtection", "NtlmServer"]

Buffer: TypeAlias = bytes | bytearray | memoryview

NEGOTIATE, CHALLENGE, AUTHENTICATE = 1, 2, 3
# Flags ([MS-NLMP] section 2.2.2.5).
SIGN, SEAL, ALWAYS_SIGN = 0x10, 0x20, 0x8000
EXTENDED_SECURITY, KEY_128, KEY_EXCHANGE = 0x0008_0000, 0x2000_0000, 0x4000_0000
STRONG = EXTENDED_SECURITY | KEY_128 | KEY_EXCHANGE
# What is in a response's list of values ([MS-NLMP] section 2.2.2.1).
END_OF_LIST, AV_FLAGS, TARGET_NAME, CHANNEL_BINDINGS = 0, 6, 9, 10
HAS_MIC = 2
VALUES = 64  # in such a list; there are eleven kinds

SIGNATURE = struct.Struct("<I8sI")
SIGNATURE_SIZE = 16
# What stands for a signature where none was agreed on (as SSPI does).
NO_SIGNATURE = b"\x01" + bytes(15)

BAD_TOKEN, UNSUPPORTED, DENIED, NOT_MET = 0x80090308, 0x80090302, 0x8009030C, 1790


# ---- pyspnego's log ------------------------------------------------------------------------------------------


class Quiet(logging.Filter):
    """Holds back what pyspnego says about our tokens. One for the process; each thread has its own depth."""

    def __init__(self) -> None:
        super().__init__()
        self._local = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or not getattr(self._local, "ours", 0)

    @contextlib.contextmanager
    def while_ours(self) -> Iterator[None]:
        """Our own step runs on this thread as long as the block lasts."""
        # A filter counts for the logger it's at, not for those below it, and modules may have been loaded since.
        for name in list(logging.root.manager.loggerDict):
            if name == "spnego" or name.startswith("spnego."):
                logging.getLogger(name).addFilter(self)  # once: a second time does nothing
        self._local.ours = getattr(self._local, "ours", 0) + 1
        try:
            yield
        finally:
            self._local.ours -= 1


quiet = Quiet()


# ---- messages ------------------------------------------------------------------------------------------------


def message_type(token: bytes) -> int:
    """Which of NTLM's three messages a token is; AuthenticationError for none."""
    if len(token) < 32 or not token.startswith(NTLM_SIGNATURE):
        raise AuthenticationError("the peer's token isn't NTLM's")
    return int.from_bytes(token[8:12], "little")


@dataclass(frozen=True, slots=True)
class Response:
    """What we look at ourselves in an AUTHENTICATE message ([MS-NLMP] section 2.2.1.3)."""

    flags: int
    values: dict[int, bytes]
    mic: bytes | None
    mic_at: int

    @property
    def says_mic(self) -> bool:
        """Whether the response, which can't be forged, says that the messages have a MIC."""
        return bool(int.from_bytes(self.values.get(AV_FLAGS, b""), "little") & HAS_MIC)

    @property
    def bindings(self) -> bytes | None:
        """The channel that is named, if one is: zeros name none."""
        value = self.values.get(CHANNEL_BINDINGS)
        return value if value is not None and any(value) else None

    @property
    def target(self) -> str:
        """What the client believes to talk to; may be empty."""
        return self.values.get(TARGET_NAME, b"").decode("utf-16-le", errors="replace")


def unpack_response(token: bytes) -> Response:
    """Raises AuthenticationError for what isn't an AUTHENTICATE message with an NTLMv2 response."""
    if message_type(token) != AUTHENTICATE or len(token) < 64:
        raise AuthenticationError("the client's NTLM message isn't the response that was due")
    payload = len(token)
    parts: list[bytes] = []
    for at in range(12, 60, 8):
        size, _, offset = struct.unpack_from("<HHI", token, at)
        if size and (offset < 64 or offset + size > len(token)):
            raise AuthenticationError("the client's NTLM response is malformed")
        if size:
            payload = min(payload, offset)
        parts.append(token[offset : offset + size])
    response = parts[1]
    if len(response) < 48:
        raise AuthenticationError(
            "the client answers with NTLMv1, which is refused: it must use NTLMv2", code=DENIED
        )
    # Behind eight bytes of version, or (pyspnego's way) where that would be.
    mic_at = {80: 64}.get(payload, 72 if payload >= 88 else 0)
    return Response(
        flags=struct.unpack_from("<I", token, 60)[0],
        values=unpack_values(response[44:]),
        mic=token[mic_at : mic_at + 16] if mic_at else None,
        mic_at=mic_at,
    )


def unpack_values(data: bytes) -> dict[int, bytes]:
    """A list of values ([MS-NLMP] section 2.2.2.1): each kind once, ended properly."""
    found: dict[int, bytes] = {}
    at = 0
    while len(data) - at >= 4 and len(found) < VALUES:
        kind, size = struct.unpack_from("<HH", data, at)
        at += 4
        if kind == END_OF_LIST:
            return found
        if size > len(data) - at or kind in found:
            break
        found[kind] = data[at : at + size]
        at += size
    raise AuthenticationError("the client's NTLM response is malformed: its values don't end")


def application_data(binding: bytes) -> bytes:
    """What GSSAPI's channel bindings hold for a ``tls-server-end-point`` (RFC 5929 section 4)."""
    return b"tls-server-end-point:" + binding


def bindings_hash(binding: bytes) -> bytes:
    """MsvAvChannelBindings: MD5 over gss_channel_bindings_struct ([MS-NLMP] section 2.2.2.1)."""
    data = application_data(binding)
    whole = bytes(16) + len(data).to_bytes(4, "little") + data
    return hashlib.md5(whole, usedforsecurity=False).digest()


# ---- protection ----------------------------------------------------------------------------------------------


def rc4(key: bytes) -> Any:
    """A cipher's state at its beginning."""
    from cryptography.hazmat.primitives.ciphers import Cipher

    try:
        from cryptography.hazmat.decrepit.ciphers.algorithms import ARC4
    except ImportError:  # cryptography < 43
        from cryptography.hazmat.primitives.ciphers.algorithms import ARC4
    return Cipher(ARC4(key), mode=None).encryptor()


class Direction:
    """Signatures and encryption of one direction ([MS-NLMP] sections 3.4.4.2, 3.4.5.2 and 3.4.5.3)."""

    __slots__ = ("_key", "_mac", "_rc4", "_sequence")

    def __init__(self, session_key: bytes, direction: bytes) -> None:
        sign, seal = (
            hashlib.md5(
                session_key + b"session key to " + direction + what + b" key magic constant\0",
                usedforsecurity=False,
            ).digest()
            for what in (b" signing", b" sealing")
        )
        self._key = seal
        self._mac = hmac.new(sign, digestmod="md5")
        self._rc4 = rc4(seal)
        self._sequence = 0

    def begin_again(self) -> None:
        """The cipher's state goes back, the numbers go on: so it is after a mechListMIC ([MS-SPNG] section 3.3.5.1)."""
        self._rc4 = rc4(self._key)

    def crypt(self, data: Buffer) -> bytes:
        return bytes(self._rc4.update(data))

    def signature(self, data: Buffer) -> bytes:
        """The signature of the next message; comes after its encryption."""
        mac = self._mac.copy()
        mac.update(self._sequence.to_bytes(4, "little"))
        mac.update(data)
        whole = SIGNATURE.pack(1, self._rc4.update(mac.digest()[:8]), self._sequence)
        self._sequence = (self._sequence + 1) & 0xFFFF_FFFF
        return whole


class NtlmProtection:
    """Messages after NTLM: 16 bytes of signature, then the data, encrypted if ``sealed``: a ``MessageProtection``.

    Not thread-safe; nothing in it blocks. After the first error every call fails.
    """

    __slots__ = ("_in", "_lost", "_out", "overhead", "sealed")

    def __init__(self, session_key: bytes, *, initiator: bool, sealed: bool) -> None:
        client, server = (Direction(session_key, name) for name in (b"client-to-server", b"server-to-client"))
        self._out, self._in = (client, server) if initiator else (server, client)
        self._lost = False
        self.sealed = sealed
        self.overhead = SIGNATURE_SIZE

    def wrap(self, data: Buffer) -> bytes:
        """The next token, around ``data``."""
        if self._lost:
            raise FramingError("the connection's protection is lost after an error")
        body = self._out.crypt(data) if self.sealed else bytes(data)
        return self._out.signature(data) + body

    def unwrap(self, token: Buffer) -> bytes:
        """What is in the peer's next token; FramingError for one that isn't whole or isn't the next."""
        if self._lost:
            raise FramingError("the connection's protection is lost after an error")
        view = memoryview(token)
        data = bytes(view[SIGNATURE_SIZE:])
        if self.sealed:
            data = self._in.crypt(data)
        if not hmac.compare_digest(bytes(view[:SIGNATURE_SIZE]), self._in.signature(data)):
            self._lost = True
            raise FramingError(
                "a message's NTLM signature is wrong: it was changed, repeated or left out on the way"
            )
        return data

    # ---- SPNEGO's mechListMIC, before the first message ------------------------------------------------------

    def sign_list(self, listed: bytes) -> bytes:
        """Our mechListMIC."""
        signature = self._out.signature(listed)
        self._out.begin_again()
        return signature

    def verify_list(self, listed: bytes, mic: bytes) -> bool:
        """Whether the peer's mechListMIC is right."""
        signature = self._in.signature(listed)
        self._in.begin_again()
        return hmac.compare_digest(signature, mic)

    def __repr__(self) -> str:
        return f"<NtlmProtection {'sealed' if self.sealed else 'signed'}>"


# ---- contexts ------------------------------------------------------------------------------------------------


class NtlmContext:
    """What client and server have in common: pyspnego's context, SPNEGO around it, the result."""

    initiator: bool

    def __init__(self, settings: ClientSettings | ServerSettings, binding: bytes | None) -> None:
        self.complete = False
        self._settings = settings
        self._binding = binding if settings.channel_binding != "never" else None
        self._context: Any = None
        self._spnego = False
        self._listed = pack_mechanisms(NTLM)
        self._mic_due = False
        self._response: Response | None = None
        self._protection: NtlmProtection | None = None
        self._seen: list[bytes] = []

    def dispose(self) -> None:
        """Forgets keys; any time, and more than once."""
        self._context = self._protection = self._response = None
        self._seen.clear()

    def _pyspnego(self, token: bytes | None) -> bytes | None:
        """A step of pyspnego's. Its errors say too much, or nothing, and may hold tokens: none is passed on."""
        if token is not None:
            self._seen.append(token)
        failed = ""
        out: bytes | None = None
        with quiet.while_ours():
            try:
                if self._context is None:
                    self._context = self._make()
                out = self._context.step(token)
            except AuthenticationError:
                raise
            except Exception as error:  # whatever its parsers raise for what a peer may have sent
                failed = type(error).__name__
        if failed:
            raise self._failure(failed)
        if out is not None:
            self._seen.append(out)
        return out

    def _make(self) -> Any:
        raise NotImplementedError

    def _failure(self, kind: str) -> AuthenticationError:
        raise NotImplementedError

    def _agreed(self) -> None:
        """After the third message: what has been agreed on, and the keys."""
        response = self._response = unpack_response(self._seen[2])
        flags = response.flags
        if flags & (SIGN | SEAL):
            if flags & STRONG != STRONG:
                raise AuthenticationError(
                    "the peer's NTLM has no 128 bits, key exchange or extended session security, which are demanded",
                    code=UNSUPPORTED,
                )
            key = self._context.session_key
            self._protection = NtlmProtection(key, initiator=self.initiator, sealed=bool(flags & SEAL))

    def _list_mic(self) -> bytes:
        if self._protection is None or not self._signs:
            return NO_SIGNATURE
        return self._protection.sign_list(self._listed)

    def _check_list_mic(self, mic: bytes) -> None:
        if self._protection is None or not self._signs:
            right = hmac.compare_digest(mic, NO_SIGNATURE)
        else:
            right = self._protection.verify_list(self._listed, mic)
        if not right:
            raise AuthenticationError(
                "SPNEGO's list of mechanisms was changed on the way: its MIC is wrong", code=DENIED
            )

    @property
    def _signs(self) -> bool:
        return self._response is not None and bool(self._response.flags & SIGN)

    def _finished(self, *, bound: bool, identity: Identity | None) -> ContextResult:
        response, protection = self._response, self._protection
        if not self.complete or response is None:
            raise AuthenticationError(
                "the NTLM authentication isn't finished, or its result was taken before"
            )
        signed, sealed = bool(response.flags & (SIGN | SEAL)), bool(response.flags & SEAL)
        level = ProtectionLevel(int(signed) + int(sealed))
        if level < self._settings.protection:
            raise AuthenticationError(
                f"the peer's NTLM offers {level.name}, and {self._settings.protection.name} is demanded: lower"
                " protection=, or have the peer ask for more",
                code=NOT_MET,
            )
        self.dispose()
        return ContextResult(
            mechanism="ntlm",
            remote_identity=identity,
            is_signed=signed,
            is_encrypted=sealed,
            is_mutually_authenticated=False,
            impersonation_level=ImpersonationLevel.IDENTIFICATION,
            expires_at=None,
            channel_bound=bound,
            protection=protection,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'complete' if self.complete else 'under way'}>"


class NtlmClient(NtlmContext):
    """A client's side: a ``SecurityContext``."""

    initiator = True
    _settings: ClientSettings

    def __init__(self, settings: ClientSettings, binding: bytes | None) -> None:
        super().__init__(settings, binding)
        # .NET's way; and where nothing is signed, SPNEGO's list can't be either.
        self._spnego = settings.spnego and settings.protection is not ProtectionLevel.NONE

    def _make(self) -> Any:
        import spnego
        from spnego.channel_bindings import GssChannelBindings

        from headrace.security.mechanisms import check_target

        settings = self._settings
        asked = spnego.ContextReq.none
        if settings.protection is not ProtectionLevel.NONE:
            asked |= (
                spnego.ContextReq.integrity
                | spnego.ContextReq.sequence_detect
                | spnego.ContextReq.replay_detect
            )
        if settings.protection is ProtectionLevel.ENCRYPT_AND_SIGN:
            asked |= spnego.ContextReq.confidentiality
        service, host, _ = check_target(settings.target)
        bindings = None
        if self._binding is not None:
            bindings = GssChannelBindings(application_data=application_data(self._binding))
        return spnego.client(
            settings.credentials.principal,
            settings.credentials.password,
            hostname=host,
            service=service,
            channel_bindings=bindings,
            context_req=asked,
            protocol="ntlm",
            options=spnego.NegotiateOptions.use_ntlm,
        )

    def _failure(self, kind: str) -> AuthenticationError:
        if self._context is None:
            return AuthenticationError(
                f"NTLM has no credentials ({kind}): give Credentials(principal=, password=), or a user in the file"
                " that NTLM_USER_FILE names",
                code=DENIED,
            )
        return AuthenticationError(f"the server's NTLM message is malformed ({kind})")

    def step(self, token: bytes | None) -> bytes | None:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        if self.complete:
            if token:
                raise AuthenticationError("the server goes on after the end of the NTLM authentication")
            return None
        if not self._seen:
            first = self._pyspnego(None)
            assert first is not None
            return pack_init(self._listed, first) if self._spnego else first
        if token is None:
            raise ValueError("a token is due")
        if not self._spnego:
            return self._respond(token)
        return self._spnego_step(unpack_resp(token))

    def _respond(self, challenge: bytes) -> bytes:
        if message_type(challenge) != CHALLENGE:
            raise AuthenticationError("the server's NTLM message isn't the challenge that was due")
        response = self._pyspnego(challenge) or b""
        if unpack_response(response).flags & (SIGN | SEAL | KEY_EXCHANGE) == KEY_EXCHANGE:
            response = self._seen[2] = self._with_key(response)
        self._agreed()
        self.complete = not self._spnego
        return response

    def _with_key(self, response: bytes) -> bytes:
        """Where nothing is signed no session key is exchanged ([MS-NLMP] section 3.1.5.1.2), so pyspnego sends none.

        But gss-ntlmssp, and so .NET on Linux, uses what is there (and ends the process where nothing is). The key that
        there is without an exchange, encrypted with itself, has both kinds of server come to the same.
        """
        key = self._context.session_key
        field = struct.pack("<HHI", 16, 16, len(response))
        response = response[:52] + field + response[60:] + bytes(rc4(key).update(key))
        told = unpack_response(response)
        if told.says_mic and told.mic_at:
            start, end = told.mic_at, told.mic_at + 16
            whole = b"".join((*self._seen[:2], response[:start], bytes(16), response[end:]))
            response = response[:start] + hmac.digest(key, whole, "md5") + response[end:]
        return response

    def _spnego_step(self, resp: NegTokenResp) -> bytes | None:
        if resp.state == REJECT:
            raise AuthenticationError(
                "the server refuses NTLM, or this user's password: list another mechanism, or check the credentials",
                code=DENIED,
            )
        if resp.mechanism not in (None, NTLM):
            raise AuthenticationError("the server chose a mechanism that wasn't offered", code=UNSUPPORTED)
        if self._response is None:
            if not resp.token:
                raise AuthenticationError("the server's SPNEGO token has no NTLM challenge in it")
            answer = self._respond(resp.token)
            self._mic_due = self._response is not None and (
                self._response.says_mic or resp.state == REQUEST_MIC
            )
            mic = self._list_mic() if self._mic_due else None
            return pack_resp(NegTokenResp(ACCEPT_INCOMPLETE, None, answer, mic))
        if resp.state != ACCEPT_COMPLETED or resp.token:
            raise AuthenticationError("the server goes on where SPNEGO was to end")
        if resp.mic is not None:
            self._check_list_mic(resp.mic)
        elif self._mic_due:
            raise AuthenticationError("the server doesn't sign SPNEGO's list of mechanisms, and was asked to")
        self.complete = True
        return None

    def result(self) -> ContextResult:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        return self._finished(bound=self._binding is not None, identity=None)


class NtlmServer(NtlmContext):
    """A server's side: a ``SecurityContext``."""

    initiator = False
    _settings: ServerSettings

    def __init__(self, settings: ServerSettings, binding: bytes | None, first: NegTokenInit | None) -> None:
        super().__init__(settings, binding)
        self._first = first
        self._spnego = first is not None
        if first is not None:
            self._listed = first.listed
            # Another mechanism would have been the client's first choice: only the MIC shows that it listed that.
            self._mic_due = first.mechanisms[0] != NTLM
        self._user = ""
        self._bound = False

    def _make(self) -> Any:
        import spnego

        if not os.environ.get("NTLM_USER_FILE") or not os.path.isfile(os.environ["NTLM_USER_FILE"]):
            raise AuthenticationError(
                "an NTLM server needs a file of users (DOMAIN:USER:PASSWORD lines) that NTLM_USER_FILE names",
                code=0x80090304,
            )
        return spnego.server(protocol="ntlm", options=spnego.NegotiateOptions.use_ntlm)

    def _failure(self, kind: str) -> AuthenticationError:
        if len(self._seen) < 3:
            return AuthenticationError(f"the client's NTLM message is malformed ({kind})")
        return AuthenticationError("NTLM: the user isn't known, or the password is wrong", code=DENIED)

    def step(self, token: bytes | None) -> bytes | None:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        if token is None:
            raise ValueError("a token is due")
        if self.complete:
            if token:
                raise AuthenticationError("the client goes on after the end of the NTLM authentication")
            return None
        if not self._spnego:
            return self._message(token)
        first, self._first = self._first, None
        if first is None:
            return self._spnego_step(unpack_resp(token))
        if self._mic_due:  # its token is another mechanism's
            return pack_resp(NegTokenResp(REQUEST_MIC, NTLM))
        challenge = self._message(first.token) if first.token else None
        return pack_resp(NegTokenResp(ACCEPT_INCOMPLETE, NTLM, challenge))

    def _message(self, token: bytes) -> bytes | None:
        due = AUTHENTICATE if self._seen else NEGOTIATE
        if message_type(token) != due:
            raise AuthenticationError("the client's NTLM message isn't the one that was due")
        if due == NEGOTIATE:
            return self._pyspnego(token)
        response = unpack_response(token)
        self._pyspnego(token)
        self._verified(token, response)
        self._agreed()
        self.complete = not self._spnego
        return None

    def _verified(self, token: bytes, response: Response) -> None:
        """What pyspnego doesn't look at, once the response itself is right."""
        if response.says_mic:
            blank = token[: response.mic_at] + bytes(16) + token[response.mic_at + 16 :]
            expected = hmac.digest(self._context.session_key, self._seen[0] + self._seen[1] + blank, "md5")
            if response.mic is None or not hmac.compare_digest(response.mic, expected):
                raise AuthenticationError(
                    "NTLM's messages were changed on the way: their MIC is wrong or was taken out",
                    code=DENIED,
                )
        required = self._settings.channel_binding == "require"
        if self._binding is not None:
            self._bound = response.bindings is not None
            if self._bound and not hmac.compare_digest(
                response.bindings or b"", bindings_hash(self._binding)
            ):
                raise AuthenticationError(
                    "the client names another TLS connection than this one (channel binding): somebody is between, or"
                    " TLS ends before this server",
                    code=DENIED,
                )
        if required and not self._bound:
            raise AuthenticationError(
                "the client names no TLS connection (channel binding), and channel_binding='require'",
                code=DENIED,
            )
        self._check_target(response.target)
        self._user = spelled(self._context.client_principal or "")

    def _check_target(self, named: str) -> None:
        from headrace.security.mechanisms import target_allowed

        if (
            named
            and self._settings.allowed_targets
            and not target_allowed(named, self._settings.allowed_targets)
        ):
            raise AuthenticationError(
                f"the client asks for {named!r}, which isn't among allowed_targets", code=DENIED
            )

    def _spnego_step(self, resp: NegTokenResp) -> bytes | None:
        if self._response is not None or resp.state == REJECT or not resp.token:
            raise AuthenticationError("the client's SPNEGO token has no NTLM message in it")
        answer = self._message(resp.token)
        response = self._response
        if response is None:
            return pack_resp(NegTokenResp(ACCEPT_INCOMPLETE, None, answer))
        mic = None
        if resp.mic is not None:
            self._check_list_mic(resp.mic)
            mic = self._list_mic()
        elif self._mic_due or (response.says_mic and self._signs):
            raise AuthenticationError(
                "the client doesn't sign SPNEGO's list of mechanisms: another one may have been taken out of it",
                code=DENIED,
            )
        self.complete = True
        return pack_resp(NegTokenResp(ACCEPT_COMPLETED, None, None, mic))

    def result(self) -> ContextResult:
        """See :class:`headrace.security.contexts.SecurityContext`."""
        if self._settings.impersonation is ImpersonationLevel.DELEGATION:
            raise AuthenticationError(
                "NTLM forwards no credentials, and DELEGATION is demanded", code=NOT_MET
            )
        domain, _, user = self._user.rpartition("\\")
        names = (f"user:{self._user}", f"domain:{domain}") if domain else (f"user:{user}",)
        return self._finished(bound=self._bound, identity=Identity(self._user, names))


def spelled(principal: str) -> str:
    """A user as NTLM_USER_FILE has it: the client's spelling is its own choice, and access lists look at case."""
    wanted = principal.upper()
    lines: list[str] = []
    with contextlib.suppress(OSError, UnicodeDecodeError, KeyError):  # it was there a moment ago
        lines = Path(os.environ["NTLM_USER_FILE"]).read_text(encoding="utf-8").splitlines()
    for line in lines:
        parts = line.split(":")
        known = ""
        if len(parts) == 3:
            known = f"{parts[0]}\\{parts[1]}" if parts[0] else parts[1]
        elif len(parts) == 6:
            known = parts[0]
        if known and known.upper() == wanted:
            return known
    raise AuthenticationError("NTLM: the user isn't known, or the password is wrong", code=DENIED)
