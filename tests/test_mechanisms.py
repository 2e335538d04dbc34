"""Kerberos and SPNEGO: our client and server against each other, and against plain python-gssapi."""

from __future__ import annotations

import datetime
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from headrace.errors import AuthenticationError, FramingError
from headrace.security.contexts import ContextResult, ImpersonationLevel, ProtectionLevel, SecurityContext
from headrace.security.credentials import Credentials
from headrace.security.gss import GssProtection
from headrace.security.mechanisms import (
    ClientSettings,
    Guarded,
    ServerSettings,
    client_context,
    server_context,
)
from headrace.security.spnego import (
    ACCEPT_INCOMPLETE,
    KERBEROS,
    REQUEST_MIC,
    NegTokenResp,
    first_token,
    pack_init,
    pack_mechanisms,
    pack_resp,
    unpack_resp,
)
from realm import ENCTYPES, Realm

SEALED, SIGNED, NONE = ProtectionLevel.ENCRYPT_AND_SIGN, ProtectionLevel.SIGN, ProtectionLevel.NONE
CLIENT = ClientSettings(target="test@localhost")
SERVER = ServerSettings()
BINDING = bytes(range(32))


@pytest.fixture(autouse=True)
def _in_the_realm(realm: Realm) -> Iterator[None]:
    with realm.applied():
        yield


@dataclass
class Pair:
    client: ContextResult
    server: ContextResult
    tokens: list[bytes]


def tokens_of(client: SecurityContext, server: SecurityContext) -> list[bytes]:
    """Lets both talk until both are complete."""
    tokens: list[bytes] = []
    token = client.step(None)
    while token is not None:
        tokens.append(token)
        answer = server.step(token)
        if answer is None:
            break
        tokens.append(answer)
        token = client.step(answer)
    assert client.complete
    assert server.complete
    return tokens


def meet(
    client: ClientSettings = CLIENT,
    server: ServerSettings = SERVER,
    ours: bytes | None = None,
    theirs: bytes | None = None,
) -> Pair:
    """One authentication, from both sides."""
    one, other = client_context(client, ours), server_context(server, theirs)
    tokens = tokens_of(one, other)
    return Pair(one.result(), other.result(), tokens)


def talk(pair: Pair) -> None:
    """Messages go both ways, whole and in order, and no others do."""
    here, there = pair.client.protection, pair.server.protection
    assert here is not None
    assert there is not None
    for size in (0, 1, 17, 4096, 12288):
        for one, other in ((here, there), (there, here)):
            data = bytes(size % 251 for _ in range(size))
            token = one.wrap(data)
            assert len(token) - size <= one.overhead
            assert (data in token) is not one.sealed or size < 17
            assert other.unwrap(token) == data
    first, second = here.wrap(b"first"), here.wrap(b"second")
    assert first != second
    with pytest.raises(FramingError):
        there.unwrap(second)


@pytest.mark.parametrize("spnego", [True, False], ids=["spnego", "raw"])
@pytest.mark.parametrize("protection", [SEALED, SIGNED, NONE], ids=lambda level: level.name)
@pytest.mark.parametrize("mutual", [True, False], ids=["mutual", "one-way"])
def test_kerberos(realm: Realm, spnego: bool, protection: ProtectionLevel, mutual: bool) -> None:
    client = replace(CLIENT, spnego=spnego, protection=protection, mutual=mutual)
    pair = meet(client, replace(SERVER, protection=protection))
    assert pair.tokens[0][4:].startswith(b"\x06\x06+" if spnego else b"\x06\x09*")
    for result in (pair.client, pair.server):
        assert result.mechanism == "kerberos"
        assert (result.is_signed, result.is_encrypted) == (protection >= SIGNED, protection == SEALED)
        assert result.is_mutually_authenticated is mutual
        assert result.impersonation_level is ImpersonationLevel.IDENTIFICATION
        assert result.channel_bound is False
        assert (result.protection is None) is (protection == NONE)
    who = pair.server.remote_identity
    assert who is not None
    assert who.name == realm.principal
    assert who.names == (f"principal:{realm.principal}", f"realm:{realm.name}")
    server = pair.client.remote_identity
    if mutual:
        assert server is not None
        assert server.names[0] == f"principal:test/localhost@{realm.name}"
    else:
        assert server is None
    if protection != NONE:
        talk(pair)


@pytest.mark.parametrize("enctype", list(ENCTYPES))
def test_every_enctype(realms: Callable[[str], Realm], enctype: str) -> None:
    with realms(enctype).applied():
        for protection in (SEALED, SIGNED):
            pair = meet(replace(CLIENT, protection=protection), replace(SERVER, protection=protection))
            assert getattr(pair.client.protection, "enctype", None) == ENCTYPES[enctype][1]
            talk(pair)


def test_an_enctype_that_only_gssapi_knows(realms: Callable[[str], Realm]) -> None:
    with realms("camellia256").applied():
        for protection in (SEALED, SIGNED):
            pair = meet(replace(CLIENT, protection=protection), replace(SERVER, protection=protection))
            assert isinstance(pair.server.protection, GssProtection)
            talk(pair)
        for at, said in ((2, "wrong side|protected"), (15, "next one"), (0, "Wrap token"), (40, "forged")):
            pair = meet()
            assert pair.client.protection is not None
            assert pair.server.protection is not None
            token = bytearray(pair.client.protection.wrap(bytes(64)))
            token[at] ^= 1
            with pytest.raises(FramingError, match=said):
                pair.server.protection.unwrap(token)
            with pytest.raises(FramingError, match="lost"):
                pair.server.protection.unwrap(token)


def test_an_enctype_that_is_too_weak(realms: Callable[[str], Realm]) -> None:
    with realms("rc4").applied():
        client, server = client_context(CLIENT), server_context(SERVER)
        tokens_of(client, server)
        for one in (client, server):
            with pytest.raises(AuthenticationError, match="too weak"):
                one.result()


@pytest.mark.parametrize(
    "target",
    ["test/localhost", "test@localhost", "test/localhost@HEADRACE.TEST", "host/localhost@HEADRACE.TEST"],
)
def test_targets(target: str) -> None:
    pair = meet(replace(CLIENT, target=target))
    assert pair.client.remote_identity is not None
    assert pair.client.remote_identity.name.startswith(target[:4])


def test_a_password_gets_a_ticket(realm: Realm) -> None:
    ours = Credentials(principal=realm.principal, password=realm.password)
    with realm.applied(KRB5CCNAME=str(realm.path("none"))):
        for spnego in (True, False):
            talk(meet(replace(CLIENT, credentials=ours, spnego=spnego)))


def test_a_client_keytab_gets_a_ticket(realm: Realm) -> None:
    ours = Credentials(
        principal="test/localhost", client_keytab=realm.keytab, ccache=f"MEMORY:{realm.path('memory').name}"
    )
    pair = meet(replace(CLIENT, target="host/localhost", credentials=ours))
    assert pair.server.remote_identity is not None
    assert pair.server.remote_identity.name == f"test/localhost@{realm.name}"


# ---- targets and keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "good"),
    [
        ((), True),
        (("test/localhost",), True),
        (("test/localhost@HEADRACE.TEST",), True),
        (("test@localhost",), True),
        (("host/localhost", "test/localhost"), True),
        (("host/localhost",), False),
        (("test/localhost@OTHER.TEST",), False),
        (("TEST/localhost",), False),
        (("test/localhos",), False),
    ],
)
def test_allowed_targets(allowed: tuple[str, ...], good: bool) -> None:
    server = replace(SERVER, allowed_targets=allowed)
    if good:
        meet(server=server)
    else:
        with pytest.raises(AuthenticationError, match="allowed_targets"):
            meet(server=server)


def test_a_ticket_says_what_it_is_for_by_its_key(realm: Realm) -> None:
    """The name in front of a ticket isn't protected: another one there gets nobody another target."""
    first = client_context(CLIENT).step(None)
    assert first is not None
    assert first.count(b"\x1b\x04test\x1b\x09localhost") == 1
    forged = first.replace(b"\x1b\x04test\x1b\x09localhost", b"\x1b\x04host\x1b\x09localhost")
    server = server_context(replace(SERVER, allowed_targets=("host/localhost",)))
    with pytest.raises(AuthenticationError):
        server.step(forged)
        server.result()


def test_keys_rotate(realm: Realm) -> None:
    realm.add("turning/localhost")
    keytab = realm.export("turning/localhost", keytab=realm.path("keytab"))
    old = realm.kinit()
    realm.kvno("turning/localhost", ccache=old)
    server = replace(SERVER, credentials=Credentials(keytab=keytab))
    with_old = replace(CLIENT, target="turning@localhost", credentials=Credentials(ccache=old))
    meet(with_old, server)
    realm.rotate("turning/localhost", export=False)
    newest = realm.kinit()
    with_new = replace(CLIENT, target="turning@localhost", credentials=Credentials(ccache=newest))
    with pytest.raises(AuthenticationError, match="export its keytab anew"):
        meet(with_new, server)  # the keytab hasn't got it yet
    realm.export("turning/localhost", keytab=keytab)
    talk(meet(with_old, server))
    talk(meet(with_new, server))


# ---- time ----------------------------------------------------------------------------------------------------


def test_the_end_is_the_tickets_own(realm: Realm) -> None:
    ccache = realm.kinit(lifetime=4)
    asked = time.time()
    pair = meet(replace(CLIENT, credentials=Credentials(ccache=ccache)))
    for result in (pair.client, pair.server):
        assert result.expires_at is not None
        assert result.expires_at.tzinfo is datetime.UTC
        assert asked < result.expires_at.timestamp() <= asked + 5


def test_a_ticket_that_is_over_is_refused(realm: Realm) -> None:
    ccache = realm.kinit(lifetime=2)
    client = client_context(replace(CLIENT, credentials=Credentials(ccache=ccache)))
    server, late = server_context(SERVER), server_context(SERVER)
    first = client.step(None)
    assert first is not None
    answer = server.step(first)
    client.step(answer)
    time.sleep(3.1)  # tickets end at whole seconds
    for finished in (client, server):
        with pytest.raises(AuthenticationError, match="ticket has expired"):
            finished.result()
    # MIT itself would take it for five more minutes.
    with realm.applied(KRB5RCACHENAME="none:"):
        late.step(first)
        with pytest.raises(AuthenticationError, match="ticket has expired"):
            late.result()
    with pytest.raises(AuthenticationError, match="expired: get a new one"):
        client_context(replace(CLIENT, credentials=Credentials(ccache=ccache))).step(None)


def test_clock_skew(realm: Realm) -> None:
    with realm.applied(KRB5_CONFIG=str(realm.configuration(clockskew="1"))):
        first = client_context(CLIENT).step(None)
        time.sleep(2.5)
        with pytest.raises(AuthenticationError, match="clocks of client and server") as refused:
            server_context(SERVER).step(first)
        assert refused.value.token
        # And the client hears the same.
        client = client_context(CLIENT)
        client.step(None)
        with pytest.raises(AuthenticationError, match="clocks of client and server"):
            client.step(refused.value.token)


# ---- replays -------------------------------------------------------------------------------------------------

REPLAY = """
import sys
from headrace.errors import AuthenticationError
from headrace.security.gss import GssProtection
from headrace.security.mechanisms import ServerSettings, server_context
try:
    server_context(ServerSettings()).step(bytes.fromhex(sys.stdin.read()))
except AuthenticationError as error:
    print(error)
else:
    print("accepted")
"""


@pytest.mark.parametrize("spnego", [True, False], ids=["spnego", "raw"])
def test_a_replay_is_refused(realm: Realm, spnego: bool) -> None:
    """In the same process, and in one that was started later."""
    recorded = client_context(replace(CLIENT, spnego=spnego)).step(None)
    assert recorded is not None
    server = server_context(SERVER)
    assert server.step(recorded)
    assert server.complete
    again = server_context(SERVER)
    with pytest.raises(AuthenticationError, match="is a replay") as refused:
        again.step(recorded)
    assert not again.complete
    assert refused.value.token  # which isn't an answer
    with pytest.raises(AuthenticationError):
        again.result()
    other = subprocess.run(
        [sys.executable, "-c", REPLAY],
        input=recorded.hex(),
        env=realm.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "is a replay" in other.stdout


def test_no_replay_cache_is_warned_about(
    realm: Realm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = Credentials(replay_cache="none:")
    settings = ServerSettings(credentials=off)
    assert "replay cache is off" in caplog.text
    with pytest.raises(ValueError, match="replay"):
        ServerSettings(credentials=off, protection=NONE)
    recorded = client_context(CLIENT).step(None)
    for _ in range(2):
        assert server_context(settings).step(recorded)
    caplog.clear()
    monkeypatch.setenv("KRB5RCACHENAME", "none:")
    ServerSettings()
    assert "replay cache is off" in caplog.text
    with pytest.raises(ValueError, match="replay"):
        ServerSettings(protection=NONE)
    ServerSettings(protection=NONE, credentials=Credentials(replay_cache="dfl:"))


# ---- delegation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_spnego", [True, False], ids=["spnego-first", "raw-first"])
@pytest.mark.parametrize("second_spnego", [True, False], ids=["spnego-then", "raw-then"])
def test_a_forwarded_ticket_opens_the_next_door(
    realm: Realm, first_spnego: bool, second_spnego: bool
) -> None:
    wanted = ImpersonationLevel.DELEGATION
    at_first = replace(CLIENT, impersonation=wanted, spnego=first_spnego)
    pair = meet(at_first, replace(SERVER, impersonation=wanted))
    assert pair.server.impersonation_level is wanted
    assert pair.client.impersonation_level is wanted
    forwarded = Credentials(delegated=pair.server.delegated)
    for _ in range(2):  # they aren't used up
        there = meet(replace(CLIENT, credentials=forwarded, spnego=second_spnego))
        who = there.server.remote_identity
        assert who is not None
        assert who.name == realm.principal


def test_delegation_needs_a_forwardable_ticket(realm: Realm) -> None:
    ours = Credentials(ccache=realm.kinit(forwardable=False))
    with pytest.raises(AuthenticationError, match="can't be forwarded"):
        client_context(replace(CLIENT, credentials=ours, impersonation=ImpersonationLevel.DELEGATION)).step(
            None
        )


@pytest.mark.parametrize("asked", [ImpersonationLevel.IDENTIFICATION, ImpersonationLevel.IMPERSONATION])
def test_impersonation_levels(asked: ImpersonationLevel) -> None:
    pair = meet(replace(CLIENT, impersonation=asked))
    assert pair.server.impersonation_level is asked
    assert pair.server.delegated is None
    with pytest.raises(AuthenticationError, match="DELEGATION is demanded") as refused:
        meet(
            replace(CLIENT, impersonation=asked), replace(SERVER, impersonation=ImpersonationLevel.DELEGATION)
        )
    assert refused.value.code == 1790


# ---- protection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "demanded"), [(NONE, SIGNED), (NONE, SEALED), (SIGNED, SEALED)])
def test_too_little_protection_is_refused(asked: ProtectionLevel, demanded: ProtectionLevel) -> None:
    client, server = (
        client_context(replace(CLIENT, protection=asked)),
        server_context(replace(SERVER, protection=demanded)),
    )
    tokens_of(client, server)
    with pytest.raises(AuthenticationError, match=f"{demanded.name} is demanded") as refused:
        server.result()
    assert refused.value.code == 1790


# ---- channel bindings ----------------------------------------------------------------------------------------

BINDINGS = [  # client's, server's, what "when-supported" and "require" of the server say
    (BINDING, BINDING, True, True),
    (None, BINDING, True, False),
    (BINDING, None, True, None),
    (BINDING, BINDING[::-1], False, False),
]


@pytest.mark.parametrize("spnego", [True, False], ids=["spnego", "raw"])
@pytest.mark.parametrize(("ours", "theirs", "supported", "required"), BINDINGS)
def test_channel_bindings(
    spnego: bool, ours: bytes | None, theirs: bytes | None, supported: bool, required: bool | None
) -> None:
    client = replace(CLIENT, spnego=spnego)
    if supported:
        pair = meet(client, SERVER, ours, theirs)
        assert pair.server.channel_bound is (ours == theirs)
        assert pair.client.channel_bound is (ours is not None)
    else:
        with pytest.raises(AuthenticationError, match="channel binding"):
            meet(client, SERVER, ours, theirs)
    strict = replace(SERVER, channel_binding="require")
    if required:
        assert meet(client, strict, ours, theirs).server.channel_bound
    else:
        with pytest.raises(AuthenticationError, match=r"channel.binding"):
            meet(client, strict, ours, theirs)
    meet(client, replace(SERVER, channel_binding="never"), ours, theirs)


def test_a_client_that_requires_a_binding_must_have_one() -> None:
    with pytest.raises(AuthenticationError, match="channel_binding='require'"):
        client_context(replace(CLIENT, channel_binding="require"))
    assert meet(replace(CLIENT, channel_binding="require"), SERVER, BINDING, BINDING).client.channel_bound
    assert not meet(replace(CLIENT, channel_binding="never"), SERVER, BINDING, BINDING).server.channel_bound


# ---- plain python-gssapi as a peer ---------------------------------------------------------------------------


def gssapi_client(
    mechanisms: list[str], flags: int = 0x3E
) -> Callable[[bytes | None], tuple[bytes | None, Any]]:
    """A client of python-gssapi's, whose SPNEGO lists these mechanisms in this order."""
    import gssapi.raw as g

    name = g.import_name(b"test@localhost", g.NameType.hostbased_service)
    creds = g.acquire_cred_from(None, None, mechs=None, usage="initiate").creds
    g.set_neg_mechs(creds, [g.OID.from_int_seq(one) for one in mechanisms])
    context = None

    def step(token: bytes | None) -> tuple[bytes | None, Any]:
        nonlocal context
        spnego = g.OID.from_int_seq("1.3.6.1.5.5.2")
        done = g.init_sec_context(name, creds, context, spnego, [flags], None, None, token)
        context = done.context
        return done.token, context

    return step


KRB5 = "1.2.840.113554.1.2.2"


def test_a_plain_client() -> None:
    import gssapi.raw as g

    client, server = gssapi_client([KRB5]), server_context(SERVER)
    _, context = client(server.step(client(None)[0]))
    ours = server.result().protection
    assert ours is not None
    assert ours.unwrap(g.wrap(context, b"in", True).message) == b"in"
    assert g.unwrap(context, ours.wrap(b"out")).message == b"out"


def test_a_client_that_reselects(realm: Realm) -> None:
    """Its first choice isn't ours: SPNEGO signs the list of mechanisms, which uses up a number in each direction."""
    import gssapi.raw as g

    unknown = bytes.fromhex("2b0601040182370202ff01")
    listed = pack_mechanisms(unknown, KERBEROS[0])
    server = server_context(SERVER)
    chosen = unpack_resp(server.step(pack_init(listed, b"not for you")) or b"")
    assert (chosen.state, chosen.mechanism) == (REQUEST_MIC, KERBEROS[0])

    name = g.import_name(b"test@localhost", g.NameType.hostbased_service)
    krb5 = g.OID.from_int_seq(KRB5)
    began = g.init_sec_context(name, None, None, krb5, [0x3E])
    answer = unpack_resp(server.step(pack_resp(NegTokenResp(token=began.token))) or b"")
    assert not server.complete
    context = g.init_sec_context(name, None, began.context, krb5, [0x3E], input_token=answer.token).context
    mic = g.get_mic(context, listed)
    last = server.step(pack_resp(NegTokenResp(ACCEPT_INCOMPLETE, mic=mic)))
    g.verify_mic(context, listed, unpack_resp(last).mic if last else answer.mic)
    assert server.complete
    ours = server.result().protection
    assert ours is not None
    for number in range(3):
        assert ours.unwrap(g.wrap(context, b"in %d" % number, True).message) == b"in %d" % number
        assert g.unwrap(context, ours.wrap(b"out %d" % number)).message == b"out %d" % number


def test_a_server_that_has_the_list_signed(realm: Realm) -> None:
    """The same, with us as the client: the server signs the list, and has used up a number as well."""
    import gssapi.raw as g

    client = client_context(CLIENT)
    first = first_token(client.step(None) or b"")
    assert not isinstance(first, str)
    creds = g.acquire_cred_from(None, None, mechs=[g.OID.from_int_seq(KRB5)], usage="accept").creds
    done = g.accept_sec_context(first.token, creds)
    mic = g.get_mic(done.context, first.listed)
    token = client.step(pack_resp(NegTokenResp(ACCEPT_INCOMPLETE, KERBEROS[0], done.token, mic)))
    g.verify_mic(done.context, first.listed, unpack_resp(token or b"").mic)
    assert client.complete
    ours = client.result().protection
    assert ours is not None
    for number in range(3):
        assert ours.unwrap(g.wrap(done.context, b"in %d" % number, True).message) == b"in %d" % number
        assert g.unwrap(done.context, ours.wrap(b"out %d" % number)).message == b"out %d" % number


def test_ntlm_first_then_kerberos(realm: Realm) -> None:
    """What a client lists first is another mechanism's, with its token: the list says that it can do better."""
    import gssapi.raw as g

    ntlm = "1.3.6.1.4.1.311.2.2.10"
    try:
        client = gssapi_client([ntlm, KRB5])
        token, context = client(None)
    except g.GSSError as error:
        pytest.skip(f"needs gss-ntlmssp: {error}")
    assert b"NTLMSSP" in (token or b"")
    server = server_context(SERVER)
    while token and (answer := server.step(token)):
        token, context = client(answer)
    result = server.result()
    assert result.mechanism == "kerberos"
    assert result.protection is not None
    assert result.protection.unwrap(g.wrap(context, b"in", True).message) == b"in"
    assert g.unwrap(context, result.protection.wrap(b"out")).message == b"out"


def test_a_plain_server(realm: Realm) -> None:
    import gssapi.raw as g

    creds = g.acquire_cred_from(None, None, mechs=None, usage="accept").creds
    client = client_context(CLIENT)
    done = g.accept_sec_context(client.step(None), creds)
    client.step(done.token)
    ours = client.result().protection
    assert ours is not None
    assert ours.unwrap(g.wrap(done.context, b"in", True).message) == b"in"
    assert g.unwrap(done.context, ours.wrap(b"out")).message == b"out"


def test_a_client_without_replay_detection_is_taken() -> None:
    client, server = gssapi_client([KRB5], 0x32), server_context(SERVER)
    client(server.step(client(None)[0]))
    assert server.result().is_encrypted


# ---- errors that say what to do ------------------------------------------------------------------------------


@pytest.mark.parametrize("spnego", [True, False], ids=["spnego", "raw"])
def test_errors_of_a_client(realm: Realm, spnego: bool) -> None:
    base = replace(CLIENT, spnego=spnego)
    nobody = Credentials(ccache=realm.path("none"))
    cases = [
        (replace(base, target="nope@localhost"), "KDC doesn't know the target"),
        (replace(base, target="test/localhost@NO.WHERE"), "KDC doesn't know the target|no KDC is known"),
        (replace(base, credentials=nobody), "there's no ticket"),
        (replace(base, credentials=Credentials(principal="alice", password="wrong")), "password is wrong"),
        (
            replace(base, credentials=Credentials(principal="eve", password="wrong")),
            "doesn't know the client",
        ),
        (replace(base, credentials=Credentials(principal="eve@NO.WHERE", password="x")), "no KDC is known"),
        (replace(base, credentials=Credentials(principal="eve")), "another principal's|there's no ticket"),
    ]
    for settings, said in cases:
        with pytest.raises(AuthenticationError, match=said) as refused:
            client_context(settings).step(None)
        assert "wrong-secret" not in str(refused.value)


def test_a_kdc_that_is_down(realm: Realm) -> None:
    realm.add("unseen/localhost")
    realm.stop_kdc()
    try:
        for ours in (Credentials(), Credentials(principal="alice", password=realm.password)):
            with pytest.raises(AuthenticationError, match="no KDC can be reached"):
                client_context(replace(CLIENT, target="unseen@localhost", credentials=ours)).step(None)
    finally:
        realm.start_kdc()


def test_a_server_without_keys(realm: Realm) -> None:
    first = client_context(CLIENT).step(None)
    with pytest.raises(AuthenticationError, match="keytab") as refused:
        server_context(replace(SERVER, credentials=Credentials(keytab=realm.path("none")))).step(first)
    assert refused.value.code == 0x80090304
    realm.add("elsewhere/localhost")
    other = realm.export("elsewhere/localhost", keytab=realm.path("keytab"))
    with pytest.raises(AuthenticationError, match="no key for the ticket's target"):
        server_context(replace(SERVER, credentials=Credentials(keytab=other))).step(first)


@pytest.mark.parametrize(
    "first", [b"", b"\x60", b"GET / HTTP/1.1\r\n", b"NTLMSSP\0\1\0\0\0" + bytes(40), bytes(700)]
)
def test_what_is_no_first_token(first: bytes) -> None:
    with pytest.raises(AuthenticationError):
        server_context(SERVER).step(first)


CUTS = """
import sys
from headrace.errors import AuthenticationError
from headrace.security.gss import GssProtection
from headrace.security.mechanisms import ServerSettings, server_context
first = bytes.fromhex(sys.stdin.read())
accepted = 0
def attempt(token):
    global accepted
    server = server_context(ServerSettings())
    try:
        server.step(token)
        accepted += server.complete
    except AuthenticationError:
        pass
for size in range(len(first)):
    attempt(first[:size])
for at in range(0, len(first)):
    broken = bytearray(first)
    broken[at] ^= 1 << at % 8
    attempt(bytes(broken))
print(accepted)
"""


@pytest.mark.parametrize("spnego", [True, False], ids=["spnego", "raw"])
def test_broken_first_tokens(realm: Realm, spnego: bool) -> None:
    """In a process of its own: C code reads them. Whoever is let in has used only bits that nothing protects."""
    first = client_context(replace(CLIENT, spnego=spnego)).step(None)
    assert first is not None
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", CUTS],
        input=first.hex(),
        env=realm.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1  # the first of them, then it's a replay


# ---- one at a time -------------------------------------------------------------------------------------------


def test_a_context_fails_once() -> None:
    server = server_context(SERVER)
    with pytest.raises(AuthenticationError):
        server.step(b"nonsense")
    with pytest.raises(AuthenticationError, match="failed before"):
        server.step(client_context(CLIENT).step(None))
    server.dispose()
    server.dispose()


def test_giving_up_waits_for_nobody() -> None:
    """A context that is disposed of while its step runs is done with when the step is."""
    begun, goes_on = threading.Event(), threading.Event()
    disposed: list[bool] = []

    class Slow:
        complete = False

        def step(self, token: bytes | None) -> bytes | None:
            begun.set()
            assert goes_on.wait(30)
            assert not disposed
            return b"token"

        def result(self) -> ContextResult:
            raise AssertionError

        def dispose(self) -> None:
            disposed.append(True)

    context = Guarded(Slow())
    thread = threading.Thread(target=context.step, args=(None,))
    thread.start()
    assert begun.wait(30)
    with pytest.raises(RuntimeError, match="one step at a time"):
        context.step(None)
    context.dispose()
    assert not disposed
    goes_on.set()
    thread.join(30)
    assert disposed
    with pytest.raises(AuthenticationError, match="given up"):
        context.step(None)


def test_results_come_once() -> None:
    client, server = client_context(CLIENT), server_context(SERVER)
    with pytest.raises(AuthenticationError):
        server_context(SERVER).result()
    tokens_of(client, server)
    client.result()
    with pytest.raises(AuthenticationError, match="taken before"):
        client.result()
