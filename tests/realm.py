"""Kerberos realms that live as long as the test run; ``conftest.py`` makes the fixtures known to every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from headrace.testing.realm import DEFAULT, ENCTYPES, OTHER_ENCTYPES, Realm, needs

__all__ = ["ENCTYPES", "OTHER_ENCTYPES", "Realm", "needs", "realm", "realms"]


@pytest.fixture(scope="session")
def realms() -> Iterator[Callable[[str], Realm]]:
    """A realm by the name of its enctype, see ENCTYPES and OTHER_ENCTYPES; made when it's first asked for."""
    reason = needs()
    if reason is not None:
        pytest.skip(reason)
    made: dict[str, Realm] = {}

    def of(enctype: str) -> Realm:
        if enctype not in made:
            made[enctype] = Realm(enctype)
        return made[enctype]

    try:
        yield of
    finally:
        for one in made.values():
            one.stop()


@pytest.fixture(scope="session")
def realm(realms: Callable[[str], Realm]) -> Realm:
    """The realm that most tests use, with aes256-cts-hmac-sha1-96."""
    return realms(DEFAULT)
