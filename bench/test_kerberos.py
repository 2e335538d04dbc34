"""Kerberos around messages: Wrap tokens by headrace, and by MIT krb5 under python-gssapi and pyspnego.

Both ends are in this process, with real contexts of a throw-away realm that k5test starts. An event is one message.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from bench.rounds import Row
from bench.suite import CLOCK, Board, Workload, play_back, row_id

PEERS = ["headrace", "python-gssapi", "pyspnego"]
ENCTYPES = {
    "aes128-sha1": "aes128-cts-hmac-sha1-96",
    "aes256-sha1": "aes256-cts-hmac-sha1-96",
    "aes128-sha256": "aes128-cts-hmac-sha256-128",
    "aes256-sha384": "aes256-cts-hmac-sha384-192",
}
SIZES = {
    "1KiB": (1024, 500),
    "12KiB": (12_288, 100),
    "64512B": (64_512, 25),
}  # bytes, and how many messages a round
PROTECTIONS = {"sealed": True, "signed": False}
ROWS = [
    Row("micro", label=f"{what}_{protection}_{enctype}_{size}")
    for protection in PROTECTIONS
    for enctype in (ENCTYPES if protection == "sealed" else ["aes256-sha1"])
    for size in SIZES
    for what in ("wrap", "unwrap")
]
PORT = 25_000  # the realm's servers take ten from here on

Step = Callable[[bytes | None], bytes | None]
Ends = tuple[Callable[[bytes], bytes], Callable[[bytes], Any]]  # a client's wrap, a server's unwrap


def shake_hands(client: Step, server: Step) -> None:
    token = client(None)
    while token is not None:
        reply = server(token)
        token = None if reply is None else client(reply)


def gssapi_contexts(realm: Any) -> tuple[ModuleType, Any, Any]:
    import gssapi

    name = gssapi.Name(realm.host_princ, gssapi.NameType.kerberos_principal)
    wanted = gssapi.RequirementFlag
    flags = wanted.mutual_authentication | wanted.confidentiality | wanted.integrity
    client = gssapi.SecurityContext(name=name, flags=flags, usage="initiate")
    server = gssapi.SecurityContext(usage="accept")
    shake_hands(client.step, server.step)
    return gssapi, client, server


def headrace_ends(realm: Any, sealed: bool) -> Ends:
    from headrace.security.kerberos import KerberosProtection

    gssapi, *contexts = gssapi_contexts(realm)
    export = gssapi.raw.ext_krb5.krb5_export_lucid_sec_context
    client, server = (KerberosProtection.from_lucid(export(each, 1), sealed=sealed) for each in contexts)
    return client.wrap, server.unwrap


def gssapi_ends(realm: Any, sealed: bool) -> Ends:
    """The raw functions: those of SecurityContext cost 9 us more."""
    gssapi, client, server = gssapi_contexts(realm)
    wrap, unwrap = gssapi.raw.wrap, gssapi.raw.unwrap
    return lambda data: wrap(client, data, sealed).message, lambda token: unwrap(server, token).message


def pyspnego_ends(realm: Any, sealed: bool) -> Ends:
    import krb5  # noqa: F401  # what pyspnego needs for Kerberos: skipped by its name where it's missing
    import spnego

    wanted = spnego.ContextReq.mutual_auth | spnego.ContextReq.confidentiality | spnego.ContextReq.integrity
    client = spnego.client(hostname=realm.hostname, service="host", protocol="kerberos", context_req=wanted)
    server = spnego.server(hostname=realm.hostname, service="host", protocol="kerberos")
    shake_hands(client.step, server.step)
    return lambda data: client.wrap(data, encrypt=sealed).data, lambda token: server.unwrap(token).data


MAKERS: dict[str, Callable[[Any, bool], Ends]] = {
    "headrace": headrace_ends,
    "python-gssapi": gssapi_ends,
    "pyspnego": pyspnego_ends,
}


class Realms:
    """A realm for each encryption type, started when it's asked for; pyspnego can't be told which type to use."""

    def __init__(self) -> None:
        self.started: dict[str, Any] = {}

    def ends(self, enctype: str, peer: str, sealed: bool) -> Ends:
        if enctype not in self.started:
            self.started[enctype] = self.start(ENCTYPES[enctype], PORT + 10 * len(self.started))
        realm = self.started[enctype]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in realm.env.items():
                if name.startswith("KRB5"):
                    patch.setenv(name, value)
            return MAKERS[peer](realm, sealed)

    def start(self, name: str, port: int) -> Any:
        import k5test

        defaults = {"permitted_enctypes": name, "rdns": "false", "dns_canonicalize_hostname": "false"}
        keys = {"supported_enctypes": f"{name}:normal", "master_key_type": name}
        return k5test.K5Realm(
            portbase=port, krb5_conf={"libdefaults": defaults}, kdc_conf={"realms": {"$realm": keys}}
        )

    def stop(self) -> None:
        for realm in self.started.values():
            realm.stop()


@pytest.fixture(scope="module")
def realms() -> Iterator[Realms]:
    pytest.importorskip("gssapi", reason="needs gssapi")
    pytest.importorskip("k5test", reason="needs k5test")
    for program in ("krb5kdc", "kadmin.local", "kinit"):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            pytest.skip(f"needs {program}")
    made = Realms()
    yield made
    made.stop()


@contextmanager
def workload(realms: Realms, label: str, rounds: int, peer: str) -> Iterator[Callable[[], int]]:
    what, protection, enctype, size_name = label.split("_")
    size, events = SIZES[size_name]
    wrap, unwrap = realms.ends(enctype, peer, PROTECTIONS[protection])
    data = os.urandom(size)
    # Tokens can be unwrapped once, in their order: those of all rounds and the warm-up are made before.
    tokens = [[wrap(data) for _ in range(events)] for _ in range(rounds + 1)] if what == "unwrap" else []
    waiting = iter(tokens)

    def wrap_all() -> int:
        for _ in range(events):
            wrap(data)
        return events

    def unwrap_all() -> int:
        for token in next(waiting):
            unwrap(token)
        return events

    yield wrap_all if what == "wrap" else unwrap_all


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ROWS, ids=row_id)
@pytest.mark.parametrize("peer", PEERS)
def test_tokens(row: Row, peer: str, benchmark: Any, board: Board, realms: Realms) -> None:
    rounds = board.settings.rounds
    peers: dict[str, Callable[[], Workload]] = {
        name: partial(workload, realms, row.label, rounds, name) for name in PEERS
    }
    play_back(benchmark, board.micro_result(row, peers), peer)
