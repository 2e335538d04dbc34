"""Credentials and settings; what a PAC says; that secrets are shown by nothing."""

from __future__ import annotations

import base64
import logging
import os
import struct
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import AuthenticationError
from headrace.security.contexts import ImpersonationLevel
from headrace.security.credentials import Credentials
from headrace.security.gss import identity_of, realm_of
from headrace.security.kerberos import KerberosProtection
from headrace.security.mechanisms import (
    ClientSettings,
    ServerSettings,
    check_target,
    client_context,
    server_context,
    target_allowed,
)
from headrace.security.ntlm import NtlmProtection
from headrace.security.pac import sids
from headrace.security.spnego import first_token, kerberos_error, unpack_resp
from realm import Realm
from test_mechanisms import meet

# ---- credentials ---------------------------------------------------------------------------------------------


def test_a_password_is_not_shown() -> None:
    ours = Credentials(principal="alice", password="swordfish")
    assert "swordfish" not in repr(ours)
    assert "swordfish" not in repr(ClientSettings(target="a@b", credentials=ours))
    assert "swordfish" not in repr(ServerSettings(credentials=ours))


@pytest.mark.parametrize(
    "wrong",
    [
        {"password": "x"},
        {"principal": "a", "password": "x", "ccache": "/tmp/cc"},
        {"principal": "a", "password": "x", "client_keytab": "/tmp/kt"},
        {"principal": "a\0b"},
        {"principal": "a", "password": ""},
        {"keytab": ""},
        {"delegated": object(), "keytab": "/tmp/kt"},
    ],
)
def test_credentials_that_do_not_go_together(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Credentials(**wrong)


def test_stores() -> None:
    ours = Credentials(keytab=Path("/k"), client_keytab="FILE:/c", ccache="MEMORY:x", replay_cache="dfl:")
    assert ours.initiator_store() == {b"ccache": b"MEMORY:x", b"client_keytab": b"FILE:/c"}
    assert ours.acceptor_store() == {b"keytab": b"/k", b"rcache": b"dfl:"}
    assert Credentials().initiator_store() is None
    assert Credentials().acceptor_store() is None


# ---- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("HTTP/www.example.org", ("HTTP", "www.example.org", None)),
        ("HTTP/www.example.org@EXAMPLE.ORG", ("HTTP", "www.example.org", "EXAMPLE.ORG")),
        ("HTTP@www.example.org", ("HTTP", "www.example.org", None)),
    ],
)
def test_targets(target: str, parts: tuple[str, str, str | None]) -> None:
    assert check_target(target) == parts


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("HTTP/192.0.2.1", "IP address"),
        ("HTTP@192.0.2.1", "IP address"),
        ("HTTP/2001:db8::1", "IP address"),
        ("HTTP/[2001:db8::1]@EXAMPLE.ORG", "IP address"),
        ("www.example.org", "service/host"),
        ("HTTP/", "service/host"),
        ("/host", "service/host"),
        ("HTTP/host@", "realm"),
        ("HTTP/ho st", "blanks"),
        ("HTTP/host\0", "blanks"),
    ],
)
def test_what_is_no_target(target: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClientSettings(target=target)
    with pytest.raises(ValueError, match=said):
        ServerSettings(allowed_targets=(target,))


def test_allowed_targets_are_compared_exactly() -> None:
    allowed = ("HTTP/a.example", "ldap/b.example@X.EXAMPLE")
    assert target_allowed("HTTP/a.example@ANY", allowed)
    assert target_allowed("HTTP/a.example", allowed)
    assert target_allowed("ldap/b.example@X.EXAMPLE", allowed)
    for other in (
        "http/a.example",
        "HTTP/A.example",
        "ldap/b.example",
        "ldap/b.example@Y",
        "HTTP/a.example.",
        "x",
        "",
    ):
        assert not target_allowed(other, allowed)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mechanisms": ()},
        {"mechanisms": "kerberos"},
        {"mechanisms": ("kerberos", "kerberos")},
        {"mechanisms": ("negotiate",)},
        {"channel_binding": "sometimes"},
        {"mechanisms": ("kerberos", "ntlm")},  # and mutual
        {"mechanisms": ("ntlm",)},
        {"mechanisms": ("ntlm",), "mutual": False, "impersonation": ImpersonationLevel.DELEGATION},
    ],
)
def test_settings_that_do_not_go_together(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ClientSettings(target="a@b", **wrong)


def test_allowed_targets_are_several() -> None:
    with pytest.raises(ValueError, match="tuple"):
        ServerSettings(allowed_targets="a/b")  # type: ignore[arg-type]


# ---- both mechanisms -----------------------------------------------------------------------------------------

BOTH = ClientSettings(target="test@localhost", mechanisms=("kerberos", "ntlm"), mutual=False)
ANY = ServerSettings(mechanisms=("kerberos", "ntlm"))


def test_kerberos_goes_before_ntlm(realm: Realm) -> None:
    with realm.applied():
        assert meet(BOTH, ANY).server.mechanism == "kerberos"


def test_without_a_ticket_ntlm_is_used(realm: Realm, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with realm.applied(KRB5CCNAME=str(realm.path("none"))):
        pair = meet(BOTH, ANY)
        assert pair.client.mechanism == pair.server.mechanism == "ntlm"
        assert "no Kerberos for test@localhost" in caplog.text
        with pytest.raises(AuthenticationError, match="this server takes kerberos"):
            meet(BOTH, replace(ANY, mechanisms=("kerberos",)))


# ---- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("principal", "realm"),
    [
        ("alice@A.EXAMPLE", "A.EXAMPLE"),
        ("HTTP/host@A.EXAMPLE", "A.EXAMPLE"),
        (r"alice\@B.EXAMPLE@A.EXAMPLE", "A.EXAMPLE"),
        (r"alice\\@A.EXAMPLE", "A.EXAMPLE"),
        ("alice", ""),
    ],
)
def test_realms(principal: str, realm: str) -> None:
    assert realm_of(principal) == realm
    assert (f"realm:{realm}" in identity_of(principal).names) is bool(realm)


# ---- PAC -----------------------------------------------------------------------------------------------------

DOMAIN = (5, 21, 1001, 2002, 3003)


def sid_bytes(parts: tuple[int, ...]) -> bytes:
    rest = parts[1:]
    return (
        struct.pack("<IBB", len(rest), 1, len(rest))
        + parts[0].to_bytes(6, "big")
        + struct.pack(f"<{len(rest)}I", *rest)
    )


def text_bytes(text: str) -> bytes:
    raw = text.encode("utf-16-le")
    return struct.pack("<III", len(text), 0, len(text)) + raw + bytes(-len(raw) % 4)


def logon_info(
    user: int = 1105,
    groups: tuple[int, ...] = (513, 2001),
    extra: tuple[tuple[int, ...], ...] = ((5, 9), (18, 1)),
    resources: tuple[int, ...] = (3001,),
    name: str = "alice",
) -> bytes:
    """KERB_VALIDATION_INFO as [MS-PAC] section 2.5 and NDR have it."""
    texts = [name, "", "", "", "", ""]
    pointer = iter(range(0x20004, 0x30000, 4))

    def there(some: object) -> int:
        return next(pointer) if some else 0

    fixed = bytes(48)
    for text in texts:
        fixed += struct.pack("<HHI", 2 * len(text), 2 * len(text), next(pointer))
    fixed += struct.pack("<HHIIII", 1, 0, user, 513, len(groups), there(groups))
    fixed += bytes(4 + 16)
    for text in ("DC", "EXAMPLE"):
        fixed += struct.pack("<HHI", 2 * len(text), 2 * len(text), next(pointer))
    fixed += struct.pack("<I", next(pointer)) + bytes(8 + 4 + 4 + 16 + 4 + 4)
    fixed += struct.pack("<II", len(extra), there(extra))
    fixed += struct.pack("<III", there(resources), len(resources), there(resources))
    behind = b"".join(map(text_bytes, texts))
    if groups:
        behind += struct.pack("<I", len(groups)) + b"".join(struct.pack("<II", one, 7) for one in groups)
    behind += text_bytes("DC") + text_bytes("EXAMPLE") + sid_bytes(DOMAIN)
    if extra:
        behind += struct.pack("<I", len(extra)) + b"".join(
            struct.pack("<II", next(pointer), 7) for _ in extra
        )
        behind += b"".join(map(sid_bytes, extra))
    if resources:
        behind += sid_bytes((5, 21, 4, 4, 4))
        behind += struct.pack("<I", len(resources)) + b"".join(
            struct.pack("<II", one, 7) for one in resources
        )
    body = struct.pack("<I", 0x20000) + fixed + behind
    body += bytes(-len(body) % 8)
    return bytes.fromhex("01100800cccccccc") + struct.pack("<II", len(body), 0) + body


def test_the_sids_of_a_pac() -> None:
    assert sids(logon_info()) == (
        "S-1-5-21-1001-2002-3003-1105",
        "S-1-5-21-1001-2002-3003-513",
        "S-1-5-21-1001-2002-3003-2001",
        "S-1-5-9",
        "S-1-18-1",
        "S-1-5-21-4-4-4-3001",
    )
    assert sids(logon_info(groups=(), extra=(), resources=(), name="")) == (
        "S-1-5-21-1001-2002-3003-1105",
        "S-1-5-21-1001-2002-3003-513",
    )
    # Without a number of its own the account is the first of the extra SIDs.
    assert sids(logon_info(user=0, groups=(), extra=((5, 21, 9, 9),)))[0] == "S-1-5-21-9-9"
    assert sids(logon_info(name="odd"))[0].endswith("-1105")


def test_no_part_of_a_pac_is_taken() -> None:
    whole = logon_info()
    for size in range(len(whole) - 8):
        with pytest.raises(ValueError):
            sids(whole[:size])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_broken_pac_is_an_error_or_other_sids(changes: list[tuple[int, int]]) -> None:
    broken = bytearray(logon_info())
    for at, value in changes:
        broken[at % len(broken)] = value
    try:
        found = sids(bytes(broken))
    except ValueError:
        return
    assert all(one.startswith("S-1-") for one in found)


def test_a_count_that_is_huge_costs_nothing() -> None:
    whole = bytearray(logon_info())
    at = 20 + 48 + 48 + 4 + 8
    whole[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="arrays"):
        sids(bytes(whole))


# ---- SPNEGO --------------------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x60", b"\xa1", b"\x60\x10\x06\x06+\x06\x01\x05\x05\x02"]),
)
def test_any_token_is_taken_or_refused(rest: bytes, start: bytes) -> None:
    for read in (first_token, unpack_resp):
        try:
            read(start + rest)
        except AuthenticationError:
            pass
    kerberos_error(start + rest)


# ---- secrets -------------------------------------------------------------------------------------------------


class Everything(logging.Handler):
    """Keeps all that any logger says, with tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.said: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))
        self.said.append(repr(record.__dict__))


@pytest.fixture
def everything() -> Iterator[Everything]:
    """All loggers at DEBUG."""
    handler = Everything()
    root = logging.getLogger()
    before = {name: logging.getLogger(name).level for name in (None, "headrace", "spnego", "gssapi")}
    for name in before:
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def forms(secret: bytes) -> set[str]:
    """How a secret may look in a text."""
    shown = {secret.hex(), base64.b64encode(secret).decode().rstrip("="), repr(secret)[2:-1]}
    return {one for form in shown for one in (form, form.upper())} | {secret.decode("latin-1")}


def remember_keys(monkeypatch: pytest.MonkeyPatch, keys: list[bytes]) -> None:
    """Puts the keys of the protections that are made into the list."""
    of_kerberos, of_ntlm = KerberosProtection.__init__, NtlmProtection.__init__

    def kerberos(self: KerberosProtection, **given: Any) -> None:
        keys.append(given["key"])
        of_kerberos(self, **given)

    def ntlm(self: NtlmProtection, session_key: bytes, **given: Any) -> None:
        keys.append(session_key)
        of_ntlm(self, session_key, **given)

    monkeypatch.setattr(KerberosProtection, "__init__", kerberos)
    monkeypatch.setattr(NtlmProtection, "__init__", ntlm)


@pytest.mark.parametrize("mechanism", ["kerberos", "ntlm"])
@pytest.mark.parametrize("good", [True, False], ids=["right", "wrong"])
def test_no_secret_is_shown(
    realm: Realm, everything: Everything, mechanism: Any, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = realm.password if good else "wrong-" + os.urandom(8).hex()
    principal = realm.principal if mechanism == "kerberos" else f"{realm.ntlm_domain}\\{realm.user}"
    ours = Credentials(principal=principal, password=password)
    client_side = ClientSettings(
        target="test@localhost", credentials=ours, mechanisms=(mechanism,), mutual=mechanism == "kerberos"
    )
    seen: list[str] = []
    secrets = [password.encode(), password.encode("utf-16-le")]
    keys: list[bytes] = []
    remember_keys(monkeypatch, keys)
    with realm.applied():
        client = client_context(client_side)
        server = server_context(ServerSettings(mechanisms=(mechanism,)))
        token: bytes | None = None
        try:
            token = client.step(None)
            while token:
                secrets.append(token[16:])
                seen += [repr(client), repr(server)]
                answer = server.step(token)
                if not answer:
                    break
                secrets.append(answer[16:])
                token = client.step(answer)
            for one in (client, server):
                result = one.result()
                seen += [repr(result), repr(result.protection)]
        except AuthenticationError as error:
            assert not good
            seen += [repr(error), "".join(traceback.format_exception(error)), repr(error.args)]
        else:
            assert good
            assert len(keys) >= 2
    secrets += keys
    text = "\n".join(everything.said + seen)
    assert text
    for secret in secrets:
        for part in {secret[:24], secret[-24:]}:
            if len(part) >= 8:
                for form in forms(part):
                    assert form not in text
