"""Kerberos: configuration, keytab, KDC and clock, replay cache, the way to a target. And NTLM's file of users.

Nothing that MIT's library keeps is changed: a ticket that is got on the way goes into a cache in this process's memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from headrace.cli.doctor.certificate import readable_by_others
from headrace.cli.doctor.finding import Finding, fail, ok, skip, warn
from headrace.cli.doctor.kdc import Answer, ask, place_of
from headrace.cli.doctor.keytab import Key, KeytabError, keys_in
from headrace.cli.doctor.krb5_conf import Configuration, configured_files
from headrace.cli.doctor.options import DoctorOptions
from headrace.errors import AuthenticationError
from headrace.security.credentials import Credentials
from headrace.security.gss import KERBEROS, KerberosClient, failure, library, number_of, oid
from headrace.security.mechanisms import ClientSettings, check_target

__all__ = ["concerned", "configuration", "kdc", "keytab", "ntlm_users", "replay_cache", "target"]

DEFAULT_KEYTAB = "/etc/krb5.keytab"
CLOCK_SKEW = 300.0  # seconds that MIT and Active Directory allow
DRIFT = 30.0  # a clock that is set by NTP is never so far off
KDC_SECONDS = 2.0  # for one of them, twice where TCP is refused
KDC_DEADLINE = 6.0  # for all
ENCTYPES = {
    1: "des-cbc-crc",
    3: "des-cbc-md5",
    16: "des3-cbc-sha1",
    17: "aes128-cts-hmac-sha1-96",
    18: "aes256-cts-hmac-sha1-96",
    19: "aes128-cts-hmac-sha256-128",
    20: "aes256-cts-hmac-sha384-192",
    23: "arcfour-hmac",
    25: "camellia128-cts-cmac",
    26: "camellia256-cts-cmac",
}
WEAK = frozenset((1, 2, 3, 16, 23, 24))
# Kerberos' errors that only a KDC can have said; what MIT's library itself says is above 127 (see gss.REASONS).
FROM_KDC = range(1, 100)
MEMORY = "MEMORY:headrace-doctor"
NO_KEYS = "MEMORY:headrace-doctor-none"


def concerned(options: DoctorOptions) -> bool:
    """Whether Kerberos is checked. A krb5.conf in its usual place says nothing: distributions install one."""
    variables = ("KRB5_CONFIG", "KRB5_KTNAME", "KRB5_CLIENT_KTNAME")
    return options.negotiate or any(map(os.environ.get, variables)) or os.path.exists(DEFAULT_KEYTAB)


# ---- krb5.conf -------------------------------------------------------------------------------------------------


def configuration(options: DoctorOptions) -> Iterable[Finding]:
    """krb5.conf, the default realm, and whether names are changed on the way to the KDC."""
    if not concerned(options):
        yield skip("krb5-conf", "not checked: ask for it with --negotiate, --keytab or --target")
        return
    conf = Configuration(configured_files())
    shown = ", ".join(map(str, conf.files))
    if conf.missing:
        advice = "KRB5_CONFIG names the files, by default /etc/krb5.conf; they must be readable by the server's user"
        found = f"can't be read: {'; '.join(conf.missing)}"
        make = warn if conf.files else fail
        yield make("krb5-conf", found, advice, files=[str(file) for file in conf.files])
    else:
        yield ok("krb5-conf", shown, files=[str(file) for file in conf.files])
    realm = conf.first("libdefaults", "default_realm")
    if realm is None:
        yield warn(
            "realm", "there's no default realm", "default_realm = EXAMPLE.ORG in [libdefaults]", realm=None
        )
    else:
        yield ok("realm", f"{realm} is the default", realm=realm)
    yield canonicalisation(conf)


def canonicalisation(conf: Configuration) -> Finding:
    """MIT's default is to ask DNS for a server's "real" name, and then for its address' name."""
    said = (conf.first("libdefaults", "dns_canonicalize_hostname") or "true").lower()
    fallback = said == "fallback"
    forward = fallback or conf.flag("libdefaults", "dns_canonicalize_hostname", default=True)
    rdns = conf.flag("libdefaults", "rdns", default=True)
    values = {"dns_canonicalize_hostname": "fallback" if fallback else forward, "rdns": rdns}
    if not forward:
        return ok("canonicalisation", "off: tickets are asked for by the name that is given", **values)
    by = "DNS" if not rdns else "DNS, forth and back (rdns)"
    found = f"a target's host is replaced by what {by} says, which decides whose ticket is asked for"
    if fallback:
        found = f"where a ticket can't be had, the host is replaced by what {by} says, and it's tried again"
    return warn("canonicalisation", found, "dns_canonicalize_hostname = false in [libdefaults]", **values)


# ---- the keytab ------------------------------------------------------------------------------------------------


def keytab(options: DoctorOptions) -> Iterable[Finding]:
    """Whose keys are in it, of which kind, and who can read it."""
    if not concerned(options):
        return
    conf = Configuration(configured_files())
    named = (
        options.keytab or os.environ.get("KRB5_KTNAME") or conf.first("libdefaults", "default_keytab_name")
    )
    kind, colon, place = (named or DEFAULT_KEYTAB).rpartition(":")
    if colon and kind not in ("FILE", "WRFILE"):
        yield skip("keytab", f"{named} isn't a file: not checked")
        return
    path = Path(place)
    if named is None and not path.exists():
        yield skip("keytab", f"no {path}: a server needs a keytab, a client doesn't")
        return
    try:
        keys = keys_in(path)
    except KeytabError as error:
        advice = "a server needs a keytab that its user can read: Credentials(keytab=), or KRB5_KTNAME"
        yield fail("keytab", f"{path}: {error}", advice, keytab=str(path))
        return
    yield contents(path, keys)
    others = readable_by_others(path)
    if others:
        advice = f"chmod 600 {path}; whoever has read it can be the server: make new keys"
        yield fail("keytab-mode", f"{path} {others}", advice)
    else:
        yield ok("keytab-mode", f"{path} isn't open to everybody")
    if options.target is not None:
        yield key_of(options.target, keys, path)


def contents(path: Path, keys: list[Key]) -> Finding:
    shown: dict[tuple[str, int], list[str]] = {}
    for key in keys:
        kinds = shown.setdefault((key.principal, key.version), [])
        kinds.append(ENCTYPES.get(key.enctype, f"type {key.enctype}"))
    listed = "; ".join(
        f"{who} ({', '.join(kinds)}; version {version})" for (who, version), kinds in shown.items()
    )
    values = {
        "keytab": str(path),
        "keys": [
            {"principal": key.principal, "version": key.version, "enctype": key.enctype} for key in keys
        ],
    }
    if not keys:
        return fail(
            "keytab", f"{path} has no keys in it", "export the service's keys to it (ktadd, ktpass)", **values
        )
    if all(key.enctype in WEAK for key in keys):
        return warn(
            "keytab", f"{path}: {listed}", "the keys are all DES or RC4: have AES keys made", **values
        )
    return ok("keytab", f"{path}: {listed}", **values)


def key_of(name: str, keys: list[Key], path: Path) -> Finding:
    service, host, realm = check_target(name)
    wanted = f"{service}/{host}"
    for key in keys:
        principal, _, of = key.principal.rpartition("@")
        if principal == wanted and realm in (None, of):
            return ok("keytab-target", f"{path} has a key of {key.principal}")
    advice = "export its key to the keytab, or ask for a name that is in it; letters' case counts"
    return fail("keytab-target", f"{path} has no key of {name}", advice)


# ---- the KDC ---------------------------------------------------------------------------------------------------


def kdc(options: DoctorOptions) -> Iterable[Finding]:
    """Whether one answers, and how far our clock is from its."""
    if not concerned(options):
        return
    conf = Configuration(configured_files())
    realm = check_target(options.target)[2] if options.target is not None else None
    realm = realm or conf.first("libdefaults", "default_realm")
    if realm is None:
        yield skip("kdc", "not checked: there's no default realm")
        yield skip("clock", "not checked: no KDC was asked")
        return
    named = conf.all("realms", realm, "kdc")
    places = [place for place in map(place_of, named) if place is not None]
    if not places:
        yield (
            found_by_library(realm)
            if not named
            else skip("kdc", f"not checked: {', '.join(named)} is a proxy")
        )
        yield skip("clock", "not checked: krb5.conf names no KDC that can be asked")
        return
    yield from asked(realm, places, conf)


def asked(realm: str, places: list[tuple[str, int]], conf: Configuration) -> Iterable[Finding]:
    answers: list[Answer] = []
    silent: list[str] = []
    end = time.monotonic() + KDC_DEADLINE
    for host, port in places:
        if time.monotonic() > end:
            silent.append(f"{host}:{port} (not asked: no time was left)")
            continue
        try:
            answers.append(ask(host, port, realm, KDC_SECONDS))
        except (OSError, AuthenticationError) as error:
            silent.append(f"{host}:{port} ({error})")
    found = f"{len(answers)} of {len(places)} of {realm} answer"
    if silent:
        found += f"; not {', '.join(silent)}"
    values = {"realm": realm, "kdcs": len(places), "answering": len(answers)}
    advice = "check the network, the firewall (port 88, TCP and UDP), and kdc = in krb5.conf's [realms]"
    if not answers:
        yield fail("kdc", found, advice, **values)
    elif silent:
        yield warn("kdc", found, advice, **values)
    else:
        yield ok("kdc", found, **values)
    offsets = [answer.offset for answer in answers if answer.offset is not None]
    if not offsets:
        yield skip("clock", "not checked: no KDC said its time")
    else:
        yield clock(max(offsets, key=abs), skew_of(conf))


def skew_of(conf: Configuration) -> float:
    text = conf.first("libdefaults", "clockskew") or ""
    return float(text) if text.isdecimal() else CLOCK_SKEW


def clock(offset: float, skew: float) -> Finding:
    side = "ahead of" if offset > 0 else "behind"
    found = f"{abs(offset):.1f} s {side} the KDC's; {skew:g} s are allowed"
    advice = "set the clocks, by NTP (chrony, systemd-timesyncd)"
    if abs(offset) > skew:
        return fail("clock", found, advice, offset=offset)
    if abs(offset) > min(DRIFT, skew / 2):
        return warn("clock", found, advice, offset=offset)
    return ok("clock", found, offset=offset)


def found_by_library(realm: str) -> Finding:
    """MIT's own way to a KDC that krb5.conf doesn't name: DNS. A password for nobody is tried there."""
    values = {"realm": realm}
    try:
        g = library()
    except AuthenticationError as error:
        return skip("kdc", f"not checked: krb5.conf names none for {realm}, and {error}", **values)
    try:
        name = g.import_name(f"headrace-doctor@{realm}".encode(), g.NameType.kerberos_principal)
        g.acquire_cred_with_password(name, b"none", usage="initiate", mechs=[oid(KERBEROS)])
    except g.GSSError as error:
        if (number_of(error, None) or 0) in FROM_KDC:
            return ok("kdc", f"one of {realm} answers, which DNS names", **values)
        advice = "kdc = in krb5.conf's [realms], or SRV records _kerberos._udp and _kerberos._tcp in DNS"
        return fail("kdc", str(failure(f"none of {realm} answers", error)), advice, **values)
    return ok("kdc", f"one of {realm} answers, which DNS names", **values)


# ---- replays, targets, users -----------------------------------------------------------------------------------


def replay_cache(options: DoctorOptions) -> Iterable[Finding]:
    """By environment; a server's ``Credentials(replay_cache=)`` is its own."""
    if not concerned(options):
        return
    if Credentials().replays_unnoticed:
        found = "off: who records a client's first message can send it again"
        yield warn("replay-cache", found, "unset KRB5RCACHENAME and KRB5RCACHETYPE")
    else:
        yield ok("replay-cache", os.environ.get("KRB5RCACHENAME") or "on, in its usual place")


def target(options: DoctorOptions) -> Iterable[Finding]:
    """Gets a ticket for the target, as a client of ours would, and makes the first token with it; nothing is sent."""
    if options.target is None:
        return
    try:
        g = library()
    except AuthenticationError as error:
        yield skip("target", f"not checked: {error}")
        return
    try:
        credentials = in_memory(g)
    except g.GSSError as error:
        yield skip("target", f"not asked for: {failure('no credentials', error)}")
        return
    try:
        context = KerberosClient(ClientSettings(target=options.target, credentials=credentials), None)
        context.step(None)
        context.dispose()
    except AuthenticationError as error:
        yield fail(
            "target", str(error), "see what it says; the KDC's own log may tell more", target=options.target
        )
    else:
        yield ok("target", f"the KDC gives a ticket for {options.target}", target=options.target)


def in_memory(g: Any) -> Credentials:
    """A client's credentials, so that whatever comes along with their use stays in this process."""
    own_keys = os.environ.get("KRB5_CLIENT_KTNAME")
    if own_keys:
        return Credentials(client_keytab=own_keys, ccache=MEMORY)
    # With a client keytab of the machine's, MIT would renew the cache that is looked at: there's none for us.
    mechanisms = [oid(KERBEROS)]
    there = g.acquire_cred_from(
        {b"client_keytab": NO_KEYS.encode()}, mechs=mechanisms, usage="initiate"
    ).creds
    g.store_cred_into({b"ccache": MEMORY.encode()}, there, usage="initiate", overwrite=True)
    return Credentials(ccache=MEMORY, client_keytab=NO_KEYS)


def ntlm_users(options: DoctorOptions) -> Iterable[Finding]:
    """NTLM_USER_FILE, where it's set: passwords in the clear."""
    name = os.environ.get("NTLM_USER_FILE")
    if not name:
        return
    if not os.path.isfile(name) or not os.access(name, os.R_OK):
        yield fail(
            "ntlm-users", f"{name} isn't a file that can be read", "NTLM_USER_FILE must name one, or be unset"
        )
        return
    others = readable_by_others(name)
    if others:
        advice = f"chmod 600 {name}; the passwords in it may be known"
        yield fail("ntlm-users", f"{name} {others}, and has passwords in it", advice)
    else:
        yield ok("ntlm-users", f"{name} isn't open to everybody")
