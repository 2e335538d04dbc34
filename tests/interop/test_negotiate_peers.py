"""headrace's NegotiateStream with .NET's, of .NET 8 and .NET Core 3.1, as client and as server.

Each cell asserts the mechanism and the resulting flags at both ends, the names, and the SHA-256 of all bytes both ways.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from negotiate_peers import PATIENCE, RUNTIMES, DotNetPeer, missing

import headrace
from headrace.errors import AuthenticationError
from headrace.security.identity import ImpersonationLevel, ProtectionLevel
from realm import Realm

SIZE = 3_000_000  # bytes each way
WRITE = 1 << 20

# mechanism, what is asked for, and what comes out: (signed, encrypted)
CASES: dict[str, tuple[str, ProtectionLevel, tuple[bool, bool]]] = {
    "kerberos sealed": ("kerberos", ProtectionLevel.ENCRYPT_AND_SIGN, (True, True)),
    "kerberos signed": ("kerberos", ProtectionLevel.SIGN, (True, False)),
    "ntlm sealed": ("ntlm", ProtectionLevel.ENCRYPT_AND_SIGN, (True, True)),
    "ntlm signed": ("ntlm", ProtectionLevel.SIGN, (True, False)),
    "ntlm none": ("ntlm", ProtectionLevel.NONE, (False, False)),
}
DOTNET = {
    ProtectionLevel.NONE: "None",
    ProtectionLevel.SIGN: "Sign",
    ProtectionLevel.ENCRYPT_AND_SIGN: "EncryptAndSign",
}


@pytest.fixture(scope="module", params=RUNTIMES)
def process(request: pytest.FixtureRequest, realm: Realm) -> Iterator[DotNetPeer]:
    if reason := missing(request.param):
        pytest.skip(f"needs {reason}")
    made = DotNetPeer(request.param, realm.environment())
    made.start()
    yield made
    made.stop()


@pytest.fixture
def peer(process: DotNetPeer) -> DotNetPeer:
    process.start()
    return process


@pytest.fixture(params=["client", "server"])
def role(request: pytest.FixtureRequest) -> str:
    """The peer's."""
    return str(request.param)


class Exchange(headrace.Protocol):
    """Sends a payload and takes as many bytes."""

    def __init__(self, payload: bytes, expect: int, write: int) -> None:
        self.payload = payload
        self.expect = expect
        self.write = write
        self.digest = hashlib.sha256()
        self.received = 0
        self.security: Any = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.security = transport.get_extra_info("security")
        for position in range(0, len(self.payload), self.write):
            transport.write(self.payload[position : position + self.write])

    def lease_received(self, lease: headrace.Lease) -> None:
        with lease:
            self.digest.update(lease)
            self.received += len(lease)
        if self.received == self.expect and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the peer left"))


def task_of(
    realm: Realm, role: str, mechanism: str, protection: ProtectionLevel, **more: Any
) -> dict[str, Any]:
    """What the peer is told."""
    task = {
        "role": role,
        "protection": DOTNET[protection],
        "impersonation": "Identification",
        "target": realm.services[0] if mechanism == "kerberos" else "host/nosuch",
    }
    if mechanism == "ntlm" and role == "client":
        task |= {"user": realm.user, "password": realm.password, "domain": realm.ntlm_domain}
    return task | more


def ours(
    realm: Realm, role: str, mechanism: str, protection: ProtectionLevel, **more: Any
) -> headrace.Negotiate:
    """Our side, for a peer in that role."""
    options: dict[str, Any] = {"mechanisms": [mechanism], "protection": protection, **more}
    if role == "server":
        if mechanism == "kerberos":
            credentials = headrace.Credentials(ccache=realm.ccache)
        else:
            credentials = headrace.Credentials(
                principal=rf"{realm.ntlm_domain}\{realm.user}", password=realm.password
            )
        options |= {"target": realm.services[0], "credentials": credentials}
    return headrace.Negotiate(**options)


async def meet(
    loop: headrace.EventLoop, peer: DotNetPeer, task: dict[str, Any], security: Any, protocol: Exchange
) -> dict[str, Any]:
    """One connection; what the peer says about it."""
    any_loop: Any = loop
    if task["role"] == "client":
        server = await any_loop.create_server(lambda: protocol, "127.0.0.1", 0, security=security)
        async with server:
            peer.give(**task, port=server.sockets[0].getsockname()[1])
            outcome = await peer.answer()
            if "failed" not in outcome:
                await protocol.done
                protocol.transport.close()
        return outcome
    peer.give(**task)
    port = (await peer.answer())["port"]
    try:
        await any_loop.create_connection(lambda: protocol, "127.0.0.1", port, security=security)
        await protocol.done
    except BaseException:
        protocol.done.cancel()
        await peer.answer()
        raise
    outcome = await peer.answer()
    protocol.transport.close()
    return outcome


@pytest.mark.parametrize("case", CASES)
def test_transfer(
    loop: headrace.EventLoop, realm: Realm, peer: DotNetPeer, role: str, case: str, tmp_path: Path
) -> None:
    mechanism, protection, flags = CASES[case]
    if peer.runtime == "3.1" and case == "ntlm signed":
        # Its own client and server don't understand each other either: what one signs the other can't verify.
        protection, flags = ProtectionLevel.ENCRYPT_AND_SIGN, (True, True)
    if role == "client" and case == "kerberos signed":
        flags = True, True  # .NET's clients on Linux always ask MIT's library for both
    payload = random.Random(case).randbytes(SIZE)
    (tmp_path / "payload").write_bytes(payload)
    task = task_of(
        realm,
        role,
        mechanism,
        protection,
        payload=str(tmp_path / "payload"),
        write=WRITE,
        expect=SIZE,
    )

    async def main() -> None:
        protocol = Exchange(payload, SIZE, WRITE)
        outcome = await meet(loop, peer, task, ours(realm, role, mechanism, protection), protocol)
        if (peer.runtime, role, case) == ("3.1", "client", "kerberos signed"):
            # It authenticates, and then its first Write says that it can't sign without sealing on Linux.
            assert protocol.security.is_mutually_authenticated
            assert outcome["failed"] == "PlatformNotSupportedException", outcome
            return
        assert "failed" not in outcome, outcome
        digest = hashlib.sha256(payload).hexdigest()
        assert (outcome["received"], outcome["sha256"]) == (SIZE, digest)
        assert (protocol.received, protocol.digest.hexdigest()) == (SIZE, digest)
        info = protocol.security
        assert info.mechanism == mechanism
        assert (info.is_signed, info.is_encrypted) == flags
        assert (outcome["signed"], outcome["encrypted"]) == flags
        assert info.is_mutually_authenticated == outcome["mutual"] == (mechanism == "kerberos")
        if role == "client":
            names = {
                "kerberos": f"principal:{realm.principal}",
                "ntlm": rf"user:{realm.ntlm_domain}\{realm.user}",
            }
            assert names[mechanism] in info.remote_identity.names
        elif peer.runtime == "8":
            who = realm.principal if mechanism == "kerberos" else rf"{realm.ntlm_domain}\{realm.user}"
            assert (outcome["type"].lower(), outcome["name"]) == (mechanism, who)

    with realm.applied():
        loop.run_until_complete(asyncio.wait_for(main(), PATIENCE))


@pytest.mark.parametrize("size", [1, 64_512])
def test_frames_of_other_sizes(
    loop: headrace.EventLoop, realm: Realm, peer: DotNetPeer, role: str, size: int, tmp_path: Path
) -> None:
    """.NET's frames are as long as its writes, up to 64,512 bytes; ours are what ``frame_size`` says."""
    protection = ProtectionLevel.ENCRYPT_AND_SIGN
    payload = random.Random(size).randbytes(min(20 * size, 500_000))
    (tmp_path / "payload").write_bytes(payload)
    expect = len(payload)
    task = task_of(
        realm, role, "kerberos", protection, payload=str(tmp_path / "payload"), write=size, expect=expect
    )

    async def main() -> None:
        protocol = Exchange(payload, expect, size)
        security = ours(realm, role, "kerberos", protection, frame_size=size)
        outcome = await meet(loop, peer, task, security, protocol)
        digest = hashlib.sha256(payload).hexdigest()
        assert outcome.get("sha256") == protocol.digest.hexdigest() == digest, outcome

    with realm.applied():
        loop.run_until_complete(asyncio.wait_for(main(), PATIENCE))


# ---- what goes wrong -------------------------------------------------------------------------------------------


def failing(
    loop: headrace.EventLoop, realm: Realm, peer: DotNetPeer, task: dict[str, Any], security: Any
) -> tuple[dict[str, Any] | None, BaseException | None]:
    """What each end says: the peer's outcome where we are the server, our exception where we are the client."""

    async def main() -> tuple[dict[str, Any] | None, BaseException | None]:
        protocol = Exchange(b"", 1, 1)
        try:
            outcome = await meet(loop, peer, task, security, protocol)
        except (AuthenticationError, ConnectionError, OSError) as exc:
            return None, exc
        finally:
            protocol.done.cancel()
        assert protocol.security is None  # the protocol never heard of it
        return outcome, None

    with realm.applied():
        return loop.run_until_complete(asyncio.wait_for(main(), PATIENCE))


def test_a_clients_wrong_password(loop: headrace.EventLoop, realm: Realm, peer: DotNetPeer) -> None:
    level = ProtectionLevel.ENCRYPT_AND_SIGN
    task = task_of(realm, "client", "ntlm", level, password="wrong", expect=1)
    outcome, _ = failing(loop, realm, peer, task, ours(realm, "client", "ntlm", level))
    assert outcome is not None
    assert outcome["failed"] in ("AuthenticationException", "InvalidCredentialException"), outcome


def test_our_wrong_password(loop: headrace.EventLoop, realm: Realm, peer: DotNetPeer) -> None:
    level = ProtectionLevel.ENCRYPT_AND_SIGN
    me = headrace.Credentials(principal=rf"{realm.ntlm_domain}\{realm.user}", password="wrong")
    security = headrace.Negotiate(mechanisms=["ntlm"], credentials=me, target="host/nosuch")
    _, exc = failing(loop, realm, peer, task_of(realm, "server", "ntlm", level, expect=1), security)
    assert isinstance(exc, (AuthenticationError, ConnectionError))


def test_a_client_that_is_not_on_the_list(loop: headrace.EventLoop, realm: Realm, peer: DotNetPeer) -> None:
    level = ProtectionLevel.ENCRYPT_AND_SIGN
    security = ours(realm, "client", "kerberos", level, accept=headrace.AccessList(["realm:ELSEWHERE"]))
    task = task_of(realm, "client", "kerberos", level, expect=1)
    outcome, _ = failing(loop, realm, peer, task, security)
    assert outcome is not None
    assert "failed" in outcome


def test_a_client_without_enough_protection(loop: headrace.EventLoop, realm: Realm, peer: DotNetPeer) -> None:
    task = task_of(realm, "client", "ntlm", ProtectionLevel.SIGN, expect=1)
    security = ours(realm, "client", "ntlm", ProtectionLevel.ENCRYPT_AND_SIGN)
    outcome, _ = failing(loop, realm, peer, task, security)
    assert outcome is not None
    assert outcome["failed"] in ("AuthenticationException", "InvalidCredentialException"), outcome


def test_a_client_that_does_not_delegate(loop: headrace.EventLoop, realm: Realm, peer: DotNetPeer) -> None:
    level = ProtectionLevel.ENCRYPT_AND_SIGN
    security = ours(realm, "client", "kerberos", level, impersonation=ImpersonationLevel.DELEGATION)
    task = task_of(realm, "client", "kerberos", level, expect=1)
    outcome, _ = failing(loop, realm, peer, task, security)
    assert outcome is not None
    assert "failed" in outcome


def test_a_server_that_wants_delegation(loop: headrace.EventLoop, realm: Realm, peer: DotNetPeer) -> None:
    if peer.runtime == "3.1":
        return  # it doesn't take that demand (its own ArgumentOutOfRangeException)
    level = ProtectionLevel.ENCRYPT_AND_SIGN
    task = task_of(realm, "server", "kerberos", level, impersonation="Delegation", expect=1)
    _, exc = failing(loop, realm, peer, task, ours(realm, "server", "kerberos", level))
    assert isinstance(exc, AuthenticationError)
    assert exc.code == 1790


def test_an_unknown_target(loop: headrace.EventLoop, realm: Realm, peer: DotNetPeer) -> None:
    """.NET goes on with NTLM, silently; here it's an error."""
    level = ProtectionLevel.ENCRYPT_AND_SIGN
    security = headrace.Negotiate(
        target="nosuch/localhost", credentials=headrace.Credentials(ccache=realm.ccache)
    )
    _, exc = failing(loop, realm, peer, task_of(realm, "server", "kerberos", level, expect=1), security)
    assert isinstance(exc, AuthenticationError)
    assert "target" in str(exc)
