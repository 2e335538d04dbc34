"""Kerberos by MIT's library and a KDC, NTLM by pyspnego: both ends headrace's, whole connections."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from typing import Any

import pytest

import headrace
import secured
from headrace.errors import AuthenticationError
from headrace.security.identity import ProtectionLevel
from realm import Realm
from streams import KINDS, Bytes, Leases

BIG = random.Random(2).randbytes(1_000_000)
NAME = "localhost"


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, 30))


def serving(protocol: Any, server: headrace.Negotiate, client: headrace.Negotiate) -> Any:
    return secured.serving(protocol, client, NAME, security=server)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protection", ProtectionLevel)
@pytest.mark.parametrize("mechanism", ["kerberos", "ntlm"])
def test_all_bytes_both_ways(
    loop: headrace.EventLoop, realm: Realm, kind: str, protection: ProtectionLevel, mechanism: str
) -> None:
    options: dict[str, Any] = {"mechanisms": [mechanism], "protection": protection}
    if mechanism == "ntlm":
        me = rf"{realm.ntlm_domain}\{realm.user}"
        own = headrace.Credentials(principal=me, password=realm.password)
        rule = rf"user:{me}"
    else:
        own = headrace.Credentials(ccache=realm.ccache)
        rule = f"principal:{realm.principal}"
    client_side = headrace.Negotiate(credentials=own, **options)
    server_side = headrace.Negotiate(accept=headrace.AccessList([rule]), **options)

    async def main() -> None:
        async with serving(KINDS[kind], server_side, client_side) as pair:
            client = KINDS[kind]()
            transport = await pair.connect(client)
            server = await pair.accepted.get()
            transport.write(BIG)
            server.transport.write(BIG)
            await server.until(lambda: len(server.data) == len(BIG))
            await client.until(lambda: len(client.data) == len(BIG))
            assert hashlib.sha256(client.data).digest() == hashlib.sha256(BIG).digest()
            assert server.data == client.data
            ours, theirs = (each.get_extra_info("security") for each in (server.transport, transport))
            assert ours.mechanism == theirs.mechanism == mechanism
            assert rule in ours.remote_identity.names
            assert theirs.is_mutually_authenticated == (mechanism == "kerberos")
            assert ours.protection == theirs.protection
            assert ours.is_encrypted or protection < ProtectionLevel.ENCRYPT_AND_SIGN
            assert ours.is_signed or protection < ProtectionLevel.SIGN
            transport.close()
            await client.seen("lost")
            await server.seen("lost")
            assert (client.error, server.error) == (None, None)

    with realm.applied():
        run(loop, main())


def test_a_wrong_password(loop: headrace.EventLoop, realm: Realm) -> None:
    own = headrace.Credentials(principal=rf"{realm.ntlm_domain}\{realm.user}", password="wrong")

    async def main() -> None:
        ntlm = headrace.Negotiate(mechanisms=["ntlm"])
        async with serving(Leases, ntlm, headrace.Negotiate(mechanisms=["ntlm"], credentials=own)) as pair:
            with pytest.raises(AuthenticationError) as info:
                await pair.connect(Bytes())
            assert "wrong" not in str(info.value)
            assert pair.accepted.empty()

    with realm.applied():
        run(loop, main())


def test_ntlm_is_not_fallen_back_to(loop: headrace.EventLoop, realm: Realm) -> None:
    own = headrace.Credentials(principal=rf"{realm.ntlm_domain}\{realm.user}", password=realm.password)

    async def main() -> None:
        client = headrace.Negotiate(mechanisms=["ntlm"], credentials=own)
        async with serving(Leases, headrace.Negotiate(), client) as pair:
            with pytest.raises(AuthenticationError):
                await pair.connect(Bytes())
            assert pair.accepted.empty()

    with realm.applied():
        run(loop, main())


def test_fifty_at_once(loop: headrace.EventLoop, realm: Realm) -> None:
    async def main() -> None:
        negotiate = headrace.Negotiate(credentials=headrace.Credentials(ccache=realm.ccache))
        async with serving(Leases, headrace.Negotiate(), negotiate) as pair:
            clients = [Bytes() for _ in range(50)]
            transports = await asyncio.gather(*(pair.connect(client) for client in clients))
            servers = [await pair.accepted.get() for _ in clients]
            for number, transport in enumerate(transports):
                transport.write(b"%d" % number)
            for server in servers:
                await server.until(lambda server=server: bool(server.data))
            assert sorted(int(server.data) for server in servers) == list(range(50))
            for transport in transports:
                transport.close()
            for server in servers:
                await server.seen("lost")
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)

    with realm.applied():
        run(loop, main())
