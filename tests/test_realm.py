"""The realm that other tests stand on: it does what it says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest

from headrace.testing.realm import ENCTYPES, Realm, find


@pytest.mark.parametrize("enctype", list(ENCTYPES))
def test_tickets_are_of_the_chosen_enctype(realms: Callable[[str], Realm], enctype: str) -> None:
    realm = realms(enctype)
    ccache = realm.kinit()
    realm.kvno("test/localhost", ccache=ccache)
    klist = subprocess.run(
        [find("klist") or "klist", "-e", str(ccache)],
        env=realm.environment(),
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert b"test/localhost" in klist.stdout
    assert (
        klist.stdout.count(realm.enctype.encode()) == 4
    )  # session key and ticket, of the TGT and the service


def test_the_environment_comes_back(realm: Realm) -> None:
    before = dict(os.environ)
    with realm.applied(KRB5CCNAME="elsewhere", KRB5_KTNAME=None):
        assert os.environ["KRB5_CONFIG"] == realm.env["KRB5_CONFIG"]
        assert os.environ["KRB5CCNAME"] == "elsewhere"
        assert "KRB5_KTNAME" not in os.environ
    assert dict(os.environ) == before


def test_keys_rotate(realm: Realm) -> None:
    realm.add("rotated/localhost")
    keytab = realm.export("rotated/localhost")
    realm.rotate("rotated/localhost")
    listed = subprocess.run(
        [find("klist") or "klist", "-k", str(keytab)],
        env=realm.environment(),
        capture_output=True,
        timeout=30,
        check=True,
    )
    numbers = {line.split()[0] for line in listed.stdout.splitlines() if b"rotated/localhost" in line}
    assert numbers == {b"1", b"2"}


def test_a_failed_query_is_noticed(realm: Realm) -> None:
    with pytest.raises(RuntimeError, match="already exists"):
        realm.add("host/localhost")
