"""A mechanism without any security, for tests of what is around mechanisms: it can be slow, fail, or say anything.

Its tokens are JSON: what a side is, and what it wants.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from headrace.errors import AuthenticationError, FramingError
from headrace.security import negotiate
from headrace.security.contexts import ContextResult
from headrace.security.identity import Identity, ImpersonationLevel, ProtectionLevel

__all__ = ["Script", "ToyContext", "ToyProtection", "installed"]


class ToyProtection:
    """``digest(4) number(4) message``; the digest is what notices a changed bit."""

    def __init__(self, sealed: bool) -> None:
        self.sealed = sealed
        self.overhead = 8
        self.sent = self.received = 0
        self.failed = False

    def wrap(self, data: Any) -> bytes:
        numbered = self.sent.to_bytes(4, "big") + bytes(data)
        self.sent += 1
        return hashlib.sha256(numbered).digest()[:4] + numbered

    def unwrap(self, token: Any) -> bytes:
        assert not self.failed
        token = bytes(token)
        numbered = self.received.to_bytes(4, "big") + token[8:]
        if token != hashlib.sha256(numbered).digest()[:4] + numbered:
            self.failed = True
            raise FramingError("a token isn't the next")
        self.received += 1
        return token[8:]


@dataclass
class Script:
    """What both sides do."""

    user: str = "alice@TOY"
    server: str = "host/toy@TOY"
    rounds: int = 1  # tokens of the client's
    protection: ProtectionLevel = ProtectionLevel.ENCRYPT_AND_SIGN
    impersonation: ImpersonationLevel = ImpersonationLevel.IDENTIFICATION
    mutual: bool = True
    bound: bool = False
    expires_at: datetime.datetime | None = None
    client_fails_at: int = -1
    server_fails_at: int = -1
    # Steps wait for this, if it's there.
    gate: threading.Event | None = None
    gated: str = "both"
    contexts: list[ToyContext] = field(default_factory=list)
    bindings: list[bytes | None] = field(default_factory=list)


class ToyContext:
    """One side. A client with one round and its server are Kerberos' way; with two, raw NTLM's."""

    def __init__(self, script: Script, initiator: bool) -> None:
        self.script = script
        self.initiator = initiator
        self.complete = False
        self.disposed = 0
        self.steps = 0
        script.contexts.append(self)

    def step(self, token: bytes | None) -> bytes | None:
        script = self.script
        side = "client" if self.initiator else "server"
        if script.gate is not None and script.gated in (side, "both"):
            script.gate.wait(30)
        assert (token is None) == (self.initiator and self.steps == 0)
        if self.steps == (script.client_fails_at if self.initiator else script.server_fails_at):
            raise AuthenticationError(f"the toy's {side} fails", code=0x80090308)
        self.steps += 1
        if token is not None:
            assert json.loads(token)["from"] != side
        if self.initiator:
            # One round: done with the server's answer. More: done with the last token that is sent.
            self.complete = (
                self.steps == script.rounds + 1 if script.rounds == 1 else self.steps == script.rounds
            )
        else:
            self.complete = self.steps == script.rounds
        silent = self.complete and (script.rounds == 1) == self.initiator
        return None if silent else json.dumps({"from": side, "step": self.steps}).encode()

    def result(self) -> ContextResult:
        script = self.script
        assert self.complete
        name = script.server if self.initiator else script.user
        return ContextResult(
            mechanism="kerberos",
            remote_identity=Identity(name, (f"principal:{name}", "realm:TOY")),
            is_signed=script.protection >= ProtectionLevel.SIGN,
            is_encrypted=script.protection is ProtectionLevel.ENCRYPT_AND_SIGN,
            is_mutually_authenticated=script.mutual,
            impersonation_level=script.impersonation,
            expires_at=script.expires_at,
            channel_bound=script.bound,
            protection=ToyProtection(script.protection is ProtectionLevel.ENCRYPT_AND_SIGN)
            if script.protection
            else None,
        )

    def dispose(self) -> None:
        self.disposed += 1


def installed(monkeypatch: pytest.MonkeyPatch, script: Script) -> Script:
    """Every ``headrace.Negotiate`` authenticates so."""

    def side(initiator: bool) -> Any:
        def make(settings: Any, binding: bytes | None) -> ToyContext:
            script.bindings.append(binding)
            return ToyContext(script, initiator)

        return make

    monkeypatch.setattr(negotiate, "client_context", side(True))
    monkeypatch.setattr(negotiate, "server_context", side(False))
    return script
