"""Access lists: which authenticated peers are let in.

Rules
-----
* A rule is a whole name with its kind before it, and fits exactly that: no wildcards, no suffixes, no fall-back from
  one kind to another.
* All names of a peer are asked. One that is denied keeps the peer out, whatever else is allowed.
* Who isn't allowed is kept out; an empty list keeps everybody out.
* A function may decide about those whom no rule names: neither denied nor allowed.
* A name with control characters, above all NUL, is nobody's: the peer is kept out.
"""

from __future__ import annotations

import contextlib
import threading
import unicodedata
import weakref
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from headrace.security.identity import KINDS, Identity

if TYPE_CHECKING:
    from headrace.security.layer import SecurityLayer

__all__ = ["AccessList"]

NOT_ALLOWED = "none of its names is allowed"

Decide: TypeAlias = Callable[[Identity], bool | Awaitable[bool]]


class AccessList:
    """Who is let in.

    Parameters
    ----------
    allow : iterable of str
        Names with their kinds, as :class:`headrace.security.identity.Identity` has them: ``"dns:client.example.org"``,
        ``"principal:alice@EXAMPLE.ORG"``, ``"realm:EXAMPLE.ORG"``, ``"sid:S-1-5-21-1-2-3-512"``.
    deny : iterable of str
        Names that are kept out even when another name of the same peer is allowed.
    decide : callable, optional
        Asked about a peer whom no rule names: takes its :class:`headrace.security.identity.Identity` and says whether
        it's let in, at once or as an awaitable, in the loop's thread. The time counts as the handshake's.
    casefold : bool
        Compare without regard to case, and normalised to NFC. Off by default: with it, two names that differ for
        whoever issued them may be one here.

    Raises
    ------
    ValueError
        For a rule without a kind, an empty one, or one with control characters.

    May be used from any thread, ``update`` included.
    """

    def __init__(
        self,
        allow: Iterable[str] = (),
        deny: Iterable[str] = (),
        *,
        decide: Decide | None = None,
        casefold: bool = False,
    ) -> None:
        self._casefold = casefold
        self._decide = decide
        self._rules = self._parsed(allow, deny)
        self._lock = threading.Lock()
        self._watching: weakref.WeakSet[SecurityLayer] = weakref.WeakSet()

    def _parsed(self, allow: Iterable[str], deny: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
        return (
            frozenset(self._key(checked(rule)) for rule in rules_of(allow, "allow")),
            frozenset(self._key(checked(rule)) for rule in rules_of(deny, "deny")),
        )

    def update(self, allow: Iterable[str], deny: Iterable[str] = ()) -> None:
        """Replaces all rules, and closes the connections of those who are kept out now.

        Raises ValueError as the constructor does; the old rules stay then.
        """
        rules = self._parsed(allow, deny)
        with self._lock:
            self._rules = rules
            watching = list(self._watching)
        for layer in watching:
            with contextlib.suppress(RuntimeError):  # its loop is closed, and it with it
                layer._loop.call_soon_threadsafe(layer._recheck_access)

    def _watch(self, layer: SecurityLayer) -> None:
        """A connection that was let in, and is asked about again when the rules change."""
        with self._lock:
            self._watching.add(layer)

    def _unwatch(self, layer: SecurityLayer) -> None:
        with self._lock:
            self._watching.discard(layer)

    def _key(self, name: str) -> str:
        if not self._casefold:
            return name
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

    def permits(self, identity: Identity | None) -> bool:
        """Whether the rules let this peer in; ``decide`` isn't asked."""
        return self._refusal(identity) is None

    def ask(self, identity: Identity | None) -> bool | Awaitable[bool]:
        """Whether this peer is let in: by the rules, or by ``decide`` where none of them names it."""
        refusal = self._refusal(identity)
        if refusal is None:
            return True
        if self._decide is None or identity is None or refusal is not NOT_ALLOWED:
            return False
        answer = self._decide(identity)
        return answer if isinstance(answer, Awaitable) else bool(answer)

    def explain(self, identity: Identity | None) -> str:
        """The same in words, for a log."""
        refusal = self._refusal(identity)
        if identity is None:
            return "a peer without an identity is kept out"
        return (
            f"{identity.name!r} is let in" if refusal is None else f"{identity.name!r} is kept out: {refusal}"
        )

    def denies(self, identity: Identity | None) -> bool:
        """Whether a rule keeps this peer out, whatever ``decide`` says."""
        return self._refusal(identity) not in (None, NOT_ALLOWED)

    def _refusal(self, identity: Identity | None) -> str | None:
        if identity is None:
            return "it has no identity"
        if any(has_control(name) for name in identity.names):
            return "one of its names has control characters"
        allow, deny = self._rules
        keys = {self._key(name): name for name in identity.names}
        for key in keys.keys() & deny:
            return f"{keys[key]!r} is denied"
        if not keys.keys() & allow:
            return NOT_ALLOWED
        return None

    def __repr__(self) -> str:
        allow, deny = self._rules
        return f"<headrace.AccessList allow={len(allow)} deny={len(deny)}>"


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
