"""Accounts and groups of an Active Directory domain: signed by Samba's KDC, and what access lists go by."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from samba_domain import Domain, missing

import headrace
from headrace.errors import AuthenticationError
from secured import serving
from streams import Leases

PATIENCE = 30.0


@pytest.fixture(scope="module")
def domain() -> Iterator[Domain]:
    if reason := missing():
        pytest.skip(f"needs {reason}")
    made = Domain()
    with made.applied():
        yield made
    made.stop()


async def who_arrives(domain: Domain, user: str, accept: headrace.AccessList) -> headrace.SecurityInfo:
    """What the server knows of that user."""
    own = headrace.Credentials(ccache=domain.ccache(user))
    client = headrace.Negotiate(target=domain.service, credentials=own)
    async with serving(Leases, client, "localhost", security=headrace.Negotiate(accept=accept)) as pair:
        transport = await pair.connect(Leases())
        server = await pair.accepted.get()
        info: headrace.SecurityInfo = server.transport.get_extra_info("security")
        transport.close()
        await server.seen("lost")
        return info


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, PATIENCE))


def test_sids_of_the_account_and_its_groups(loop: headrace.EventLoop, domain: Domain) -> None:
    info = run(loop, who_arrives(domain, "alice", headrace.AccessList([f"realm:{domain.realm}"])))
    assert info.mechanism == "kerberos"
    assert info.is_encrypted
    names = info.remote_identity.names
    assert info.remote_identity.name == f"alice@{domain.realm}"
    alice, engineers = domain.sid("user", "alice"), domain.sid("group", "engineers")
    domain_users = f"{alice.rpartition('-')[0]}-513"
    assert {f"sid:{alice}", f"sid:{engineers}", f"sid:{domain_users}"} <= set(names)


def test_access_by_group(loop: headrace.EventLoop, domain: Domain) -> None:
    accept = headrace.AccessList([f"sid:{domain.sid('group', 'engineers')}"])
    info = run(loop, who_arrives(domain, "alice", accept))
    assert info.remote_identity.name == f"alice@{domain.realm}"
    with pytest.raises(AuthenticationError) as refused:
        run(loop, who_arrives(domain, "bob", accept))
    assert refused.value.code == 0x8009030C


def test_deny_by_group(loop: headrace.EventLoop, domain: Domain) -> None:
    rule = f"sid:{domain.sid('group', 'engineers')}"
    accept = headrace.AccessList([f"realm:{domain.realm}"], deny=[rule])
    assert run(loop, who_arrives(domain, "bob", accept)).remote_identity.name == f"bob@{domain.realm}"
    with pytest.raises(AuthenticationError) as refused:
        run(loop, who_arrives(domain, "alice", accept))
    assert refused.value.code == 0x8009030C
