"""Whose credentials authenticate us, and where they are; what ``credentials=`` takes.

Rules
-----
* It's a description: nothing is read before a connection needs it, on the thread that may block, and it's read anew for
  each connection. So a new ticket, a rotated key and a changed keytab are used without a restart.
* headrace never writes ``os.environ``. What isn't given here is found by MIT's own rules: KRB5CCNAME, KRB5_KTNAME,
  KRB5_CLIENT_KTNAME, KRB5RCACHENAME; KRB5_CONFIG is per process and can't be given at all.
* The password is shown by nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Credentials"]

# What a replay cache is called that isn't one (MIT, krb5_rc_resolve); "dfl:" is the machine's own.
NO_REPLAY_CACHE = "none:"

PLACES = ("principal", "password", "keytab", "client_keytab", "ccache", "replay_cache")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Where our tickets, keys or password are. Immutable, and safe to share between threads.

    Parameters
    ----------
    principal : str, optional
        Who we are: ``"alice@EXAMPLE.ORG"``; for NTLM ``"DOMAIN\\\\alice"`` or ``"alice@example.org"``. Without it:
        whose ticket is in the cache, any key of the keytab, the first user in NTLM_USER_FILE.
    password : str, optional
        Needs ``principal``. A client gets its ticket with it, in memory, once for each connection.
    keytab : path, optional
        A server's keys, in MIT's words (``"FILE:/etc/app.keytab"`` or a path); by default KRB5_KTNAME's.
    client_keytab : path, optional
        A client's key, with which tickets are got and renewed; by default KRB5_CLIENT_KTNAME's.
    ccache : path, optional
        A client's tickets (``"FILE:/tmp/cc"``, ``"MEMORY:app"`` or a path); by default KRB5CCNAME's.
    replay_cache : str, optional
        Where a server remembers what it has accepted (``"dfl:"``, ``"file2:/var/lib/app/rcache"``). ``"none:"`` has it
        forget: whoever can record a client's first message can then replay it, and is only stopped by the
        protection of messages. It's warned about, and refused where messages aren't protected.
    delegated : gssapi.Credentials, optional
        What a client has forwarded to us (:attr:`headrace.SecurityInfo.delegated`): we are that client at the next
        server. Kerberos only, a client only, and instead of all the others.

    Raises
    ------
    ValueError
        For what doesn't go together.
    """

    principal: str | None = None
    password: str | None = field(default=None, repr=False)
    keytab: str | os.PathLike[str] | None = None
    client_keytab: str | os.PathLike[str] | None = None
    ccache: str | os.PathLike[str] | None = None
    replay_cache: str | None = None
    delegated: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.password is not None and self.principal is None:
            raise ValueError("a password needs the principal whose it is")
        if self.password is not None and (self.ccache is not None or self.client_keytab is not None):
            raise ValueError("give a password, or a ccache or client_keytab: not both")
        given = {name: getattr(self, name) for name in PLACES}
        if self.delegated is not None and any(value is not None for value in given.values()):
            raise ValueError("delegated credentials stand for themselves: give nothing beside them")
        for name, value in given.items():
            if value is not None and ("\0" in os.fspath(value) or not os.fspath(value)):
                raise ValueError(f"{name} is empty or has a NUL in it")

    @property
    def replays_unnoticed(self) -> bool:
        """Whether a server's replay cache is off: by ``replay_cache``, else by KRB5RCACHENAME or KRB5RCACHETYPE."""
        if self.replay_cache is not None:
            return self.replay_cache.startswith(NO_REPLAY_CACHE)
        name = os.environ.get("KRB5RCACHENAME")
        if name is not None:
            return name.startswith(NO_REPLAY_CACHE)
        return os.environ.get("KRB5RCACHETYPE") == NO_REPLAY_CACHE.rstrip(":")

    def initiator_store(self) -> dict[bytes, bytes] | None:
        """MIT's credential store for a client; None for its defaults."""
        return self._store(ccache=self.ccache, client_keytab=self.client_keytab)

    def acceptor_store(self) -> dict[bytes, bytes] | None:
        """MIT's credential store for a server; None for its defaults."""
        return self._store(keytab=self.keytab, rcache=self.replay_cache)

    @staticmethod
    def _store(**places: str | os.PathLike[str] | None) -> dict[bytes, bytes] | None:
        given = {name.encode(): os.fsencode(place) for name, place in places.items() if place is not None}
        return given or None
