"""Passwords, keys and tokens are shown by nothing: whole connections, with all logs on, that succeed or fail."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

import headrace
import secured
from between import Between, Frame, Heard
from headrace.security import negotiate
from headrace.security.kerberos import KerberosProtection
from realm import Realm
from streams import Bytes
from test_credentials import Everything, everything, forms, remember_keys

__all__ = ["everything"]  # a fixture

NAME = "localhost"
ORDER = bytes(range(40, 104))
PART = 24  # bytes of a secret that would be noticed


@dataclass
class Findings:
    """What must not be shown, and what was."""

    secrets: dict[str, bytes] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)

    def secret(self, what: str, value: bytes) -> None:
        if len(value) >= 8:
            self.secrets[f"{what} {len(self.secrets)}"] = value

    def error(self, error: BaseException | None) -> None:
        if error is not None:
            self.shown += [repr(error), str(error), "".join(traceback.format_exception(error))]

    def hits(self, text: str) -> list[str]:
        """Which secrets are in a text: their beginning, middle or end, in any of the usual forms."""
        found: list[str] = []
        for what, value in self.secrets.items():
            middle = (len(value) - PART) // 2
            parts = {value[:PART], value[-PART:], value[max(middle, 0) :][:PART]}
            if any(form in text for part in parts for form in forms(part)):
                found.append(what)
        return found


def remember_session_keys(monkeypatch: pytest.MonkeyPatch, findings: Findings) -> None:
    """A ticket's session key isn't always the one that messages are protected with."""
    of_lucid = KerberosProtection.from_lucid.__func__  # type: ignore[attr-defined]

    def remembering(cls: Any, lucid: Any, *, sealed: bool) -> Any:
        findings.secret("session key", lucid.cfx_kd.ctx_key)
        findings.secret("subkey", lucid.cfx_kd.acceptor_subkey or b"")
        return of_lucid(cls, lucid, sealed=sealed)

    monkeypatch.setattr(KerberosProtection, "from_lucid", classmethod(remembering))


def remember_contexts(monkeypatch: pytest.MonkeyPatch, findings: Findings) -> None:
    """Settings and contexts as they are made, and what contexts look like after each step."""
    for name in ("client_context", "server_context"):
        make = getattr(negotiate, name)

        def making(settings: Any, binding: bytes | None, make: Any = make) -> Any:
            made = make(settings, binding)
            step = made.step

            def stepping(token: bytes | None) -> bytes | None:
                try:
                    answer: bytes | None = step(token)
                except headrace.AuthenticationError as error:
                    findings.secret("error token", (error.token or b"")[16:])
                    raise
                finally:
                    findings.shown += [repr(made), str(vars(made))]
                findings.secret("token", (answer or b"")[16:])
                return answer

            made.step = stepping
            findings.shown += [repr(settings), str(settings), repr(made)]
            return made

        monkeypatch.setattr(negotiate, name, making)


def of_way(way: str, realm: Realm, password: str) -> headrace.Negotiate:
    """A client's settings."""
    ways: dict[str, Callable[[], headrace.Credentials]] = {
        "ccache": lambda: headrace.Credentials(ccache=realm.ccache),
        "keytab": lambda: headrace.Credentials(
            principal="test/localhost",
            client_keytab=realm.keytab,
            ccache=f"MEMORY:{realm.path('memory').name}",
        ),
        "password": lambda: headrace.Credentials(principal=realm.principal, password=password),
        "ntlm": lambda: headrace.Credentials(
            principal=rf"{realm.ntlm_domain}\{realm.user}", password=password
        ),
    }
    if way == "ntlm":
        return headrace.Negotiate(credentials=ways[way](), mechanisms=["ntlm"])
    return headrace.Negotiate(credentials=ways[way]())


def changed(frame: Frame) -> bytes:
    whole = frame.wire
    return whole[:-1] + bytes([whole[-1] ^ 1]) if frame.is_first_data("client") else whole


def broken_token(frame: Frame) -> bytes:
    whole = frame.wire
    return whole[:-40] + bytes(40) if frame.kind is not None and frame.side == "client" else whole


# What goes wrong: the server's settings, and what somebody in between does.
FAILURES: dict[str, tuple[dict[str, Any], Any]] = {
    "nothing": ({}, None),
    "wrong password": ({}, None),
    "changed frame": ({}, changed),
    "broken token": ({}, broken_token),
    "access denied": ({"accept": headrace.AccessList([])}, None),
    "no keys": ({"credentials": headrace.Credentials(keytab="/nonexistent/keytab")}, None),
}


CASES = [
    (way, failure)
    for way in ("ccache", "keytab", "password", "ntlm")
    for failure in FAILURES
    # Who has no password has no wrong one, and NTLM's server no keytab.
    if not (failure == "wrong password" and way in ("ccache", "keytab"))
    and not (failure == "no keys" and way == "ntlm")
]


@pytest.mark.parametrize(("way", "failure"), CASES)
def test_no_secret_is_shown(
    loop: headrace.EventLoop,
    realm: Realm,
    everything: Everything,  # the fixture
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    failure: str,
) -> None:
    """In no log, traceback or repr: of the password, the keys, the tokens and the data, raw, hex, base64 or escaped."""
    findings = Findings()
    keys: list[bytes] = []
    remember_keys(monkeypatch, keys)
    remember_session_keys(monkeypatch, findings)
    remember_contexts(monkeypatch, findings)
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0  # every callback is told of
    options, change = FAILURES[failure]
    password = "wrong password of mine" if failure == "wrong password" else realm.password
    for encoding in ("utf-8", "utf-16-le"):
        findings.secret("password", password.encode(encoding))
    findings.secret("data", ORDER)
    client_side = of_way(way, realm, password)
    server_side = headrace.Negotiate(mechanisms=client_side.mechanisms, **options)

    async def main() -> None:
        heard = Heard()
        async with (
            secured.serving(heard, client_side, NAME, security=server_side) as pair,
            Between(pair.address, change) as between,
        ):
            await talk(between, client_side, heard, findings)
        for frame in between.frames:
            findings.secret("frame", frame.body[16:])

    with realm.applied():
        loop.run_until_complete(asyncio.wait_for(main(), 60))
    for key in keys:
        findings.secret("key", key)
    findings.shown += [repr(client_side), repr(server_side), str(client_side.credentials), repr(loop)]
    text = "\n".join(everything.said + findings.shown)
    assert "NegotiateLayer" in text
    assert findings.hits(text) == []
    assert ("received" in text.split("\n")) is (failure == "nothing")
    looked_for = {what.rpartition(" ")[0] for what in findings.secrets}
    assert looked_for >= {"password", "data"} | ({"key", "token", "frame"} if failure == "nothing" else set())


async def talk(between: Between, client_side: Any, heard: Heard, findings: Findings) -> None:
    """One connection, however it ends."""
    loop: Any = asyncio.get_running_loop()
    client = Bytes()
    try:
        transport, _ = await loop.create_connection(
            lambda: client, *between.address, security=client_side, server_hostname=NAME
        )
    except headrace.HeadraceError as error:
        findings.error(error)
    else:
        findings.shown += [repr(transport), repr(transport.get_extra_info("security"))]
        transport.write(ORDER)
        transport.close()
        await client.seen("lost")
    for server in heard.made:
        if server.events:
            await server.seen("lost")
            findings.shown += [repr(server.transport), repr(server.transport.get_extra_info("security"))]
        findings.shown += server.events
        findings.error(server.error)
    findings.error(client.error)


def test_what_would_be_found(everything: Everything) -> None:  # the fixture
    """The search itself: a secret in a log, whichever way it's written."""
    findings = Findings()
    findings.secret("key", bytes(range(100, 132)))
    findings.secret("password", b"a password")
    shown = [
        ("key 0", bytes(range(100, 132)).hex()),
        ("key 0", repr(bytes(range(100, 132)))),
        ("key 0", bytes(range(90, 140)).hex().upper()),
        ("password 1", "a password"),
        ("password 1", "YSBwYXNzd29yZA=="),
    ]
    for what, text in shown:
        everything.said.clear()
        logging.getLogger("headrace.anywhere").debug("look: %s", text)
        assert findings.hits("\n".join(everything.said)) == [what]
    assert findings.hits("nothing of the kind") == []
