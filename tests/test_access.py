"""Access lists: whole names, nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import AccessList, Identity


def peer(*names: str) -> Identity:
    return Identity(names[0].partition(":")[2] if names else "nobody", names)


# (the rule, the peer's name, let in, let in with casefold)
PAIRS = [
    ("dns:a.example", "dns:a.example", True, True),
    ("dns:a.example", "dns:A.example", False, True),
    ("dns:A.EXAMPLE", "dns:a.example", False, True),
    ("dns:a.example", "dns:b.example", False, False),
    ("dns:a.example", "dns:a.example.", False, False),
    ("dns:a.example.", "dns:a.example", False, False),
    ("dns:a.example", "dns:a.example.evil", False, False),
    ("dns:a.example", "dns:xa.example", False, False),
    ("dns:a.example", "dns:a.exampl", False, False),
    ("dns:a.example", "dns: a.example", False, False),
    ("dns:a.example", "dns:a.example ", False, False),
    ("dns:a.example", "dns:sub.a.example", False, False),
    ("dns:example", "dns:a.example", False, False),
    ("dns:*.example", "dns:a.example", False, False),
    ("dns:*.example", "dns:*.example", True, True),
    ("dns:*", "dns:a", False, False),
    ("dns:.*", "dns:a", False, False),
    ("dns:a.example", "uri:a.example", False, False),
    ("dns:a.example", "email:a.example", False, False),
    ("dns:a.example", "subject:CN=a.example", False, False),
    ("dns:a.example", "principal:a.example", False, False),
    ("dns:a.example", "a.example", False, False),
    ("dns:192.0.2.1", "ip:192.0.2.1", False, False),
    ("ip:192.0.2.1", "ip:192.0.2.1", True, True),
    ("ip:192.0.2.1", "ip:192.0.2.10", False, False),
    ("ip:2001:db8::1", "ip:2001:db8::1", True, True),
    ("ip:2001:db8::1", "ip:2001:db8:0::1", False, False),
    ("uri:spiffe://a/b", "uri:spiffe://a/b", True, True),
    ("uri:spiffe://a/b", "uri:spiffe://a/b/", False, False),
    ("uri:spiffe://a/b", "uri:spiffe://a/b/c", False, False),
    ("uri:spiffe://a/b", "uri:spiffe://a//b", False, False),
    ("uri:spiffe://a/b", "uri:spiffe://a/%62", False, False),
    ("email:a@b.example", "email:a@b.example", True, True),
    ("email:a@b.example", "email:A@b.example", False, True),
    ("email:a@b.example", "email:a@b.example.evil", False, False),
    ("email:a@b.example", "email:a+x@b.example", False, False),
    ("subject:CN=a,O=b", "subject:CN=a,O=b", True, True),
    ("subject:CN=a,O=b", "subject:CN=a", False, False),
    ("subject:CN=a,O=b", "subject:O=b,CN=a", False, False),
    ("subject:CN=a", "subject:CN=a,O=b", False, False),
    ("subject:CN=a", "subject:CN=a\\,O\\=b", False, False),
    ("subject:CN=a", "subject:cn=a", False, True),
    ("principal:alice@EXAMPLE.ORG", "principal:alice@EXAMPLE.ORG", True, True),
    ("principal:alice@EXAMPLE.ORG", "principal:alice@example.org", False, True),
    ("principal:alice@EXAMPLE.ORG", "principal:Alice@EXAMPLE.ORG", False, True),
    ("principal:alice@EXAMPLE.ORG", "principal:alice@EVIL.ORG", False, False),
    ("principal:alice@EXAMPLE.ORG", "principal:alice/admin@EXAMPLE.ORG", False, False),
    ("principal:alice/admin@EXAMPLE.ORG", "principal:alice@EXAMPLE.ORG", False, False),
    ("principal:alice@EXAMPLE.ORG", "principal:alice\\@EXAMPLE.ORG", False, False),
    ("principal:alice", "principal:alice@EXAMPLE.ORG", False, False),
    ("dns:stra\u00dfe.example", "dns:strasse.example", False, True),
    ("dns:\u0130.example", "dns:i.example", False, False),
    ("dns:k.example", "dns:\u212a.example", False, True),  # the Kelvin sign
    ("dns:a.example", "dns:\u0430.example", False, False),  # a Cyrillic a
    ("dns:a.example", "dns:\uff41.example", False, False),  # a wide a: NFC leaves it
    ("dns:\u00e9.example", "dns:e\u0301.example", False, True),
    ("dns:e\u0301.example", "dns:\u00e9.example", False, True),
    ("dns:a.example", "dns:a.example\0", False, False),
    ("dns:a.example", "dns:a.example\0.evil", False, False),
    ("dns:a.example", "dns:a.\texample", False, False),
    ("dns:a.example", "dns:", False, False),
    ("dns:a.example", "", False, False),
]


@pytest.mark.parametrize(("rule", "name", "exact", "folded"), PAIRS)
def test_names(rule: str, name: str, exact: bool, folded: bool) -> None:
    assert len(PAIRS) >= 60
    assert AccessList([rule]).permits(peer(name)) is exact
    assert AccessList([rule], casefold=True).permits(peer(name)) is folded
    # The same rules keep out whom they name.
    assert AccessList([rule, "dns:other"], [rule]).permits(peer(name, "dns:other")) is (
        not exact and not any(ord(character) < 32 for character in name)
    )


def test_deny_beats_allow() -> None:
    access = AccessList(["dns:a", "dns:b"], deny=["email:x@y"])
    assert access.permits(peer("dns:a"))
    assert not access.permits(peer("dns:a", "email:x@y"))
    assert access.explain(peer("dns:a", "email:x@y")) == "'a' is kept out: 'email:x@y' is denied"
    assert access.explain(peer("dns:a")) == "'a' is let in"
    assert access.explain(peer("dns:c")) == "'c' is kept out: none of its names is allowed"
    assert "kept out" in access.explain(None)
    assert repr(access) == "<headrace.AccessList allow=2 deny=1>"


def test_an_empty_list_keeps_everybody_out() -> None:
    for identity in (None, peer(), peer("dns:a")):
        assert not AccessList([]).permits(identity)
    assert not AccessList(["dns:a"]).permits(None)
    assert not AccessList(["dns:a"]).permits(peer())


def test_a_name_with_nul_spoils_all_names() -> None:
    assert not AccessList(["dns:a"]).permits(peer("dns:a", "dns:b\0c"))


@pytest.mark.parametrize(
    "rule", ["a.example", "", "dns:", "host:a", "DNS:a", "dns:a\0", "dns:a\x7f", "principal:\n"]
)
def test_rules_that_are_none(rule: str) -> None:
    with pytest.raises(ValueError, match="isn't a rule"):
        AccessList([rule])
    with pytest.raises(ValueError, match="isn't a rule"):
        AccessList(["dns:a"], [rule])


def test_one_string_is_no_list() -> None:
    with pytest.raises(ValueError, match="must be a list of names"):
        AccessList("dns:a")


NAMES = st.sampled_from(["dns:a", "dns:A", "dns:b", "email:a@b", "ip:192.0.2.1", "subject:CN=a"])
LISTS = st.lists(NAMES, unique=True)


@given(LISTS, LISTS, LISTS, st.booleans())
def test_less_is_never_more(allow: list[str], deny: list[str], names: list[str], casefold: bool) -> None:
    """Taking an allowed name away, or denying one more, lets nobody in."""
    identity = peer(*names)
    if not AccessList(allow, deny, casefold=casefold).permits(identity):
        for index in range(len(allow)):
            fewer = allow[:index] + allow[index + 1 :]
            assert not AccessList(fewer, deny, casefold=casefold).permits(identity)
        for name in ("dns:a", "ip:192.0.2.1"):
            assert not AccessList(allow, [*deny, name], casefold=casefold).permits(identity)
