"""NTLM: our client and server against each other, against pyspnego and gss-ntlmssp, and against who cheats."""

from __future__ import annotations

import hmac
import logging
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import spnego
from spnego.channel_bindings import GssChannelBindings

from headrace.errors import AuthenticationError, FramingError
from headrace.security.contexts import ImpersonationLevel, ProtectionLevel
from headrace.security.credentials import Credentials
from headrace.security.mechanisms import ClientSettings, ServerSettings, client_context, server_context
from headrace.security.ntlm import unpack_response
from headrace.security.spnego import NegTokenResp, first_token, pack_resp, unpack_resp
from test_mechanisms import BINDING, BINDINGS, NONE, SEALED, SIGNED, meet, talk, tokens_of

PASSWORD = "a pass-word of 5 parts"
ALICE = Credentials(principal="HEADRACE\\alice", password=PASSWORD)
CLIENT = ClientSettings(target="test@localhost", credentials=ALICE, mechanisms=("ntlm",), mutual=False)
SERVER = ServerSettings(mechanisms=("ntlm",))


@pytest.fixture(autouse=True)
def _users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No KDC is needed for any of this."""
    users = tmp_path / "users"
    users.write_text(f"HEADRACE:alice:{PASSWORD}\n:bob@headrace.test:{PASSWORD}\n", encoding="utf-8")
    monkeypatch.setenv("NTLM_USER_FILE", str(users))
    for name in ("LM_COMPAT_LEVEL", "KRB5_CONFIG", "KRB5CCNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("wrapped", [True, False], ids=["spnego", "raw"])
@pytest.mark.parametrize("protection", [SEALED, SIGNED, NONE], ids=lambda level: level.name)
def test_ntlm(protection: ProtectionLevel, wrapped: bool) -> None:
    pair = meet(
        replace(CLIENT, protection=protection, spnego=wrapped), replace(SERVER, protection=protection)
    )
    raw = not wrapped or protection == NONE
    assert pair.tokens[0].startswith(b"NTLMSSP\0" if raw else b"\x60")
    assert len(pair.tokens) == (3 if raw else 4)
    for result in (pair.client, pair.server):
        assert result.mechanism == "ntlm"
        assert (result.is_signed, result.is_encrypted) == (protection >= SIGNED, protection == SEALED)
        assert not result.is_mutually_authenticated
        assert result.impersonation_level is ImpersonationLevel.IDENTIFICATION
        assert result.expires_at is None
        assert (result.protection is None) is (protection == NONE)
    assert pair.client.remote_identity is None
    who = pair.server.remote_identity
    assert who is not None
    assert who.name == "HEADRACE\\alice"
    assert who.names == ("user:HEADRACE\\alice", "domain:HEADRACE")
    if protection != NONE:
        talk(pair)


@pytest.mark.parametrize("principal", ["headrace\\ALICE", "HeadRace\\Alice", "HEADRACE\\alice"])
def test_a_user_is_spelled_as_in_the_file(principal: str) -> None:
    """A client chooses the case of its name; a deny rule must not be passed by by it."""
    ours = Credentials(principal=principal, password=PASSWORD)
    who = meet(replace(CLIENT, credentials=ours), SERVER).server.remote_identity
    assert who is not None
    assert who.names == ("user:HEADRACE\\alice", "domain:HEADRACE")


def test_a_user_without_a_domain() -> None:
    ours = Credentials(principal="BOB@headrace.test", password=PASSWORD)
    who = meet(replace(CLIENT, credentials=ours), SERVER).server.remote_identity
    assert who is not None
    assert who.names == ("user:bob@headrace.test",)


def test_a_client_without_credentials_takes_the_files() -> None:
    who = meet(replace(CLIENT, credentials=Credentials()), SERVER).server.remote_identity
    assert who is not None
    assert who.name == "HEADRACE\\alice"


@pytest.mark.parametrize("wrapped", [True, False], ids=["spnego", "raw"])
def test_wrong_passwords_and_unknown_users_look_the_same(wrapped: bool) -> None:
    said = set()
    for ours in (
        Credentials(principal="HEADRACE\\alice", password="wrong"),
        Credentials(principal="HEADRACE\\eve", password=PASSWORD),
    ):
        with pytest.raises(AuthenticationError) as refused:
            meet(replace(CLIENT, credentials=ours, spnego=wrapped), SERVER)
        said.add((str(refused.value), refused.value.code))
        assert refused.value.__context__ is None or PASSWORD not in repr(refused.value.__context__)
    assert said == {("NTLM: the user isn't known, or the password is wrong", 0x8009030C)}


def test_a_server_without_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NTLM_USER_FILE")
    with pytest.raises(AuthenticationError, match="NTLM_USER_FILE"):
        meet(CLIENT, SERVER)
    with pytest.raises(AuthenticationError, match="no credentials"):
        client_context(replace(CLIENT, credentials=Credentials())).step(None)


# ---- only where it's listed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False], ids=["spnego", "raw"])
def test_an_ntlm_client_is_refused_before_a_challenge(wrapped: bool) -> None:
    pytest.importorskip("gssapi", reason="needs gssapi")
    first = client_context(replace(CLIENT, spnego=wrapped)).step(None)
    server = server_context(ServerSettings())
    with pytest.raises(
        AuthenticationError, match="the client offers ntlm, and this server takes kerberos"
    ) as refused:
        server.step(first)
    assert refused.value.code == 0x80090302
    assert refused.value.token is None


def test_settings_that_ntlm_cannot_have() -> None:
    with pytest.raises(ValueError, match="mutual"):
        replace(CLIENT, mutual=True)
    with pytest.raises(ValueError, match="DELEGATION"):
        replace(CLIENT, impersonation=ImpersonationLevel.DELEGATION)
    with pytest.raises(ValueError, match="DELEGATION"):
        replace(SERVER, impersonation=ImpersonationLevel.DELEGATION)


@pytest.mark.parametrize("level", ["0", "1", "2"])
def test_an_environment_variable_weakens_nothing(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyspnego makes NTLMv1 of it, and takes it."""
    monkeypatch.setenv("LM_COMPAT_LEVEL", level)
    with pytest.raises(AuthenticationError):
        meet(CLIENT, SERVER)
    client = pyspnego_client("ntlm")
    server = server_context(SERVER)
    with pytest.raises(AuthenticationError):
        server.step(client.step(server.step(client.step())))


@pytest.mark.parametrize(("asked", "demanded"), [(NONE, SIGNED), (NONE, SEALED), (SIGNED, SEALED)])
def test_too_little_protection_is_refused(asked: ProtectionLevel, demanded: ProtectionLevel) -> None:
    client = client_context(replace(CLIENT, protection=asked))
    server = server_context(replace(SERVER, protection=demanded))
    tokens_of(client, server)
    with pytest.raises(AuthenticationError, match=f"{demanded.name} is demanded") as refused:
        server.result()
    assert refused.value.code == 1790


# ---- channel bindings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False], ids=["spnego", "raw"])
@pytest.mark.parametrize(("ours", "theirs", "supported", "required"), BINDINGS)
def test_channel_bindings(
    wrapped: bool, ours: bytes | None, theirs: bytes | None, supported: bool, required: bool | None
) -> None:
    client = replace(CLIENT, spnego=wrapped)
    if supported:
        pair = meet(client, SERVER, ours, theirs)
        assert pair.server.channel_bound is (ours is not None and ours == theirs)
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


@pytest.mark.parametrize(("target", "good"), [("test@localhost", True), ("host/localhost", False)])
def test_a_target_that_is_named_is_checked(target: str, good: bool) -> None:
    server = replace(SERVER, allowed_targets=("test/localhost",))
    if good:
        meet(replace(CLIENT, target=target), server)
    else:
        with pytest.raises(AuthenticationError, match="allowed_targets"):
            meet(replace(CLIENT, target=target), server)


# ---- cheating ------------------------------------------------------------------------------------------------


def raw_exchange() -> tuple[Any, bytes]:
    """A server that waits for the third message, and that message."""
    client, server = client_context(replace(CLIENT, spnego=False)), server_context(SERVER)
    response = client.step(server.step(client.step(None)))
    assert response is not None
    return server, response


def test_a_mic_that_was_taken_out() -> None:
    """CVE-2019-1040: version and MIC removed, everything else moved up."""
    server, response = raw_exchange()
    told = unpack_response(response)
    assert told.says_mic
    assert told.mic is not None
    gone = told.mic_at + 16 - 64
    header = bytearray(response[:64])
    for at in range(12, 60, 8):
        (offset,) = struct.unpack_from("<I", header, at + 4)
        struct.pack_into("<I", header, at + 4, offset - gone)
    with pytest.raises(AuthenticationError, match="MIC"):
        server.step(bytes(header) + response[64 + gone :])
    assert not server.complete


def test_a_mic_of_zeros() -> None:
    server, response = raw_exchange()
    at = unpack_response(response).mic_at
    with pytest.raises(AuthenticationError):
        server.step(response[:at] + bytes(16) + response[at + 16 :])


def test_no_changed_response_is_taken() -> None:
    for at in range(raw_exchange()[1].__len__()):
        server, response = raw_exchange()
        if at >= len(response):
            break
        broken = bytearray(response)
        broken[at] ^= 1 << at % 8
        with pytest.raises(AuthenticationError):
            server.step(bytes(broken))
            server.result()


def test_no_part_of_a_response_is_taken() -> None:
    for size in range(0, len(raw_exchange()[1]), 3):
        server, response = raw_exchange()
        with pytest.raises(AuthenticationError):
            server.step(response[:size])


def test_a_list_of_mechanisms_that_was_changed() -> None:
    """Kerberos is taken out of the list on the way: what is signed is the client's own list."""
    client, server = pyspnego_client("negotiate"), server_context(SERVER)
    token = client.step()
    assert token is not None
    init = first_token(token)
    assert not isinstance(init, str)
    listed = init.listed
    other = listed.replace(b"\x0a", b"\x0b")  # as long
    changed = token.replace(listed, listed[:2] + listed[2:])
    assert changed == token
    answer = server.step(token)
    response = client.step(answer)
    assert response is not None
    told = unpack_resp(response)
    assert told.mic is not None
    forged = pack_resp(NegTokenResp(told.state, told.mechanism, told.token, bytes(16)))
    assert other != listed
    with pytest.raises(AuthenticationError, match="MIC"):
        server.step(forged)
    # And without it at all.
    client, server = pyspnego_client("negotiate"), server_context(SERVER)
    told = unpack_resp(client.step(server.step(client.step())))
    with pytest.raises(AuthenticationError, match="doesn't sign"):
        server.step(pack_resp(NegTokenResp(told.state, told.mechanism, told.token, None)))


def test_every_changed_message_is_refused() -> None:
    for protection in (SEALED, SIGNED):
        for at in range(16 + 8):
            pair = meet(replace(CLIENT, protection=protection), replace(SERVER, protection=protection))
            assert pair.client.protection is not None
            assert pair.server.protection is not None
            token = bytearray(pair.client.protection.wrap(b"12345678"))
            token[at] ^= 1 << at % 8
            with pytest.raises(FramingError):
                pair.server.protection.unwrap(bytes(token))
            with pytest.raises(FramingError):  # and the connection is lost
                pair.server.protection.unwrap(pair.client.protection.wrap(b"12345678"))
    pair = meet(CLIENT, SERVER)
    assert pair.server.protection is not None
    with pytest.raises(FramingError):
        pair.server.protection.unwrap(b"short")


# ---- pyspnego as a peer --------------------------------------------------------------------------------------


def pyspnego_client(protocol: str, asked: spnego.ContextReq | None = None, **options: Any) -> Any:
    """A client of pyspnego's, which has credentials for NTLM only."""
    if asked is None:
        asked = spnego.ContextReq.integrity | spnego.ContextReq.confidentiality
    nothing_else = spnego.NegotiateOptions.use_ntlm
    if protocol == "negotiate":
        nothing_else = spnego.NegotiateOptions.use_negotiate
    return spnego.client(
        "HEADRACE\\alice",
        PASSWORD,
        hostname="localhost",
        service="test",
        context_req=asked,
        protocol=protocol,
        options=nothing_else,
        **options,
    )


@pytest.mark.parametrize("protocol", ["ntlm", "negotiate"])
def test_a_pyspnego_client(protocol: str) -> None:
    client, server = pyspnego_client(protocol), server_context(SERVER)
    token = client.step()
    while token:
        answer = server.step(token)
        token = client.step(answer) if answer else None
    assert client.complete
    assert server.complete
    ours = server.result().protection
    assert ours is not None
    for number in range(3):
        assert ours.unwrap(client.wrap(b"in %d" % number).data) == b"in %d" % number
        assert client.unwrap(ours.wrap(b"out %d" % number)).data == b"out %d" % number


@pytest.mark.parametrize("wrapped", [True, False], ids=["spnego", "raw"])
@pytest.mark.parametrize("protection", [SEALED, SIGNED], ids=lambda level: level.name)
def test_a_pyspnego_server(wrapped: bool, protection: ProtectionLevel) -> None:
    client = client_context(replace(CLIENT, spnego=wrapped, protection=protection))
    server = spnego.server(
        protocol="negotiate" if wrapped else "ntlm",
        options=spnego.NegotiateOptions.use_negotiate if wrapped else spnego.NegotiateOptions.use_ntlm,
    )
    token = client.step(None)
    while token:
        answer = server.step(token)
        token = client.step(answer) if answer else None
    assert client.complete
    assert server.complete
    ours = client.result().protection
    assert ours is not None
    for number in range(3):
        data = b"data %d" % number
        if protection == SEALED:
            assert ours.unwrap(server.wrap(data).data) == data
            assert server.unwrap(ours.wrap(data)).data == data
        else:
            assert ours.unwrap(server.sign(data) + data) == data
            token = ours.wrap(data)
            server.verify(token[16:], token[:16])
            assert token[16:] == data


def test_pyspnegos_bindings_are_ours() -> None:
    bindings = GssChannelBindings(application_data=b"tls-server-end-point:" + BINDING)
    client = pyspnego_client("ntlm", channel_bindings=bindings)
    server = server_context(replace(SERVER, channel_binding="require"), BINDING)
    server.step(client.step(server.step(client.step())))
    assert server.result().channel_bound


# ---- gss-ntlmssp as a peer: what .NET uses on Linux ----------------------------------------------------------

NTLM_OID, SPNEGO_OID = "1.3.6.1.4.1.311.2.2.10", "1.3.6.1.5.5.2"
MESSAGE_FLAGS = {SEALED: 0x3E, SIGNED: 0x2E, NONE: 0}


def gss_ntlmssp(usage: str, wrapped: bool) -> tuple[Any, Any, Any]:
    """``gssapi.raw``, a mechanism, and credentials that are NTLM's only."""
    g = pytest.importorskip("gssapi.raw", reason="needs gssapi")
    ntlm, spnego_oid = (g.OID.from_int_seq(one) for one in (NTLM_OID, SPNEGO_OID))
    if ntlm not in g.indicate_mechs():
        pytest.skip("needs gss-ntlmssp")
    mechanism = spnego_oid if wrapped else ntlm
    if usage == "accept":
        creds = g.acquire_cred_from(None, None, mechs=None if wrapped else [ntlm], usage="accept").creds
    else:
        user = g.import_name(b"HEADRACE\\alice", g.NameType.user)
        creds = g.acquire_cred_with_password(
            user, PASSWORD.encode(), usage="initiate", mechs=[mechanism]
        ).creds
    if wrapped:
        g.set_neg_mechs(creds, [ntlm])
    return g, mechanism, creds


def exchange(g: Any, context: Any, ours: Any, sealed: bool) -> None:
    """Messages both ways."""
    for number in range(3):
        data = b"data %d" % number
        if sealed:
            assert ours.unwrap(g.wrap(context, data, True).message) == data
            assert g.unwrap(context, ours.wrap(data)).message == data
        else:
            assert ours.unwrap(g.get_mic(context, data) + data) == data
            token = ours.wrap(data)
            g.verify_mic(context, token[16:], token[:16])


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
@pytest.mark.parametrize(
    ("wrapped", "protection"),
    [(True, SEALED), (True, SIGNED), (False, SEALED), (False, SIGNED), (False, NONE)],
)
def test_a_gss_ntlmssp_client(wrapped: bool, protection: ProtectionLevel, bound: bool) -> None:
    g, mechanism, creds = gss_ntlmssp("initiate", wrapped)
    name = g.import_name(b"test@localhost", g.NameType.hostbased_service)
    bindings = g.ChannelBindings(application_data=b"tls-server-end-point:" + BINDING) if bound else None
    server = server_context(
        replace(SERVER, protection=protection, channel_binding="require" if bound else "when-supported"),
        BINDING,
    )
    context = token = None
    while True:
        done = g.init_sec_context(
            name, creds, context, mechanism, [MESSAGE_FLAGS[protection]], None, bindings, token
        )
        context = done.context
        if not done.token or (token := server.step(done.token)) is None:
            break
    result = server.result()
    assert result.is_encrypted is (protection == SEALED)
    assert result.channel_bound is bound
    assert (result.protection is None) is (protection == NONE)
    if result.protection is not None:
        exchange(g, context, result.protection, result.is_encrypted)


@pytest.mark.parametrize(
    ("wrapped", "protection"),
    [(True, SEALED), (True, SIGNED), (False, SEALED), (False, SIGNED), (False, NONE)],
)
def test_a_gss_ntlmssp_server(wrapped: bool, protection: ProtectionLevel) -> None:
    g, _, creds = gss_ntlmssp("accept", wrapped)
    client = client_context(replace(CLIENT, spnego=wrapped, protection=protection))
    token, context = client.step(None), None
    while token:
        done = g.accept_sec_context(token, creds, context)
        context = done.context
        token = client.step(done.token) if done.token else None
    assert client.complete
    result = client.result()
    assert result.is_encrypted is (protection == SEALED)
    assert (result.protection is None) is (protection == NONE)
    if result.protection is not None:
        exchange(g, context, result.protection, result.is_encrypted)


# ---- what nobody may see -------------------------------------------------------------------------------------


def test_pyspnegos_log_stays_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Of our contexts nothing; of others in the same process all that there was before."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="spnego")
    tokens_of(client_context(CLIENT), server_context(SERVER))
    assert not [record for record in caplog.records if record.name.startswith("spnego")]
    pyspnego_client("ntlm").step()
    assert [record for record in caplog.records if record.name.startswith("spnego")]


def test_signatures_are_those_of_the_specification() -> None:
    """[MS-NLMP] section 4.2.4.4: NTLMv2 with a random session key of 0x55."""
    from headrace.security.ntlm import NtlmProtection

    ours = NtlmProtection(b"\x55" * 16, initiator=True, sealed=True)
    assert ours.wrap("Plaintext".encode("utf-16-le")).hex() == (
        "010000007fb38ec5c55d49760000000054e50165bf1936dc996020c1811b0f06fb5f"
    )
    assert hmac.compare_digest(repr(ours), "<NtlmProtection sealed>")
