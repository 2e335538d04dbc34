"""Access lists: which authenticated peers are let in.

Rules
-----
* A rule is a whole name with its kind before it, and fits exactly that: no wildcards, no suffixes, no fall-back from
  one kind to another.
* All names of a peer are asked. One that is denied keeps the peer out, whatever else is allowed.
* Who isn't allowed is kept out; an empty list keeps everybody out.
* A name with control characters, above all NUL, is nobody's: the peer is kept out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from headrace.security.identity import KINDS, Identity

__all__ = ["AccessList"]


class AccessList:
    """Who is let in.

    Parameters
    ----------
    allow : iterable of str
        Names with their kinds, as :class:`headrace.security.identity.Identity` has them: ``"dns:client.example.org"``,
        ``"principal:alice@EXAMPLE.ORG"``.
    deny : iterable of str
        Names that are kept out even when another name of the same peer is allowed.
    casefold : bool
        Compare without regard to case, and normalised to NFC. Off by default: with it, two names that differ for
        whoever issued them may be one here.

    Raises
    ------
    ValueError
        For a rule without a kind, an empty one, or one with control characters.

    May be used from any thread; never changes.
    """

    __slots__ = ("_allow", "_casefold", "_deny")

    def __init__(self, allow: Iterable[str], deny: Iterable[str] = (), *, casefold: bool = False) -> None:
        self._casefold = casefold
        self._allow = frozenset(self._key(checked(rule)) for rule in rules_of(allow, "allow"))
        self._deny = frozenset(self._key(checked(rule)) for rule in rules_of(deny, "deny"))

    def _key(self, name: str) -> str:
        if not self._casefold:
            return name
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

    def permits(self, identity: Identity | None) -> bool:
        """Whether this peer is let in."""
        return self._refusal(identity) is None

    def explain(self, identity: Identity | None) -> str:
        """The same in words, for a log."""
        refusal = self._refusal(identity)
        if identity is None:
            return "a peer without an identity is kept out"
        return (
            f"{identity.name!r} is let in" if refusal is None else f"{identity.name!r} is kept out: {refusal}"
        )

    def _refusal(self, identity: Identity | None) -> str | None:
        if identity is None:
            return "it has no identity"
        if any(has_control(name) for name in identity.names):
            return "one of its names has control characters"
        keys = {self._key(name): name for name in identity.names}
        for key in keys.keys() & self._deny:
            return f"{keys[key]!r} is denied"
        if not keys.keys() & self._allow:
            return "none of its names is allowed"
        return None

    def __repr__(self) -> str:
        return f"<headrace.AccessList allow={len(self._allow)} deny={len(self._deny)}>"


def rules_of(rules: Iterable[str], which: str) -> Iterable[str]:
    if isinstance(rules, str):
        raise ValueError(f"{which} must be a list of names, not one string: [{rules!r}]")
    return rules


def checked(rule: str) -> str:
    kind, colon, name = rule.partition(":")
    if not colon or kind not in KINDS or not name:
        raise ValueError(
            f"{rule!r} isn't a rule: a name with its kind before it is meant, such as 'dns:example.org' "
            f"(kinds: {', '.join(KINDS)})"
        )
    if has_control(rule):
        raise ValueError(f"{rule!r} isn't a rule: it has control characters")
    return rule


def has_control(name: str) -> bool:
    return any(unicodedata.category(character) == "Cc" for character in name)
