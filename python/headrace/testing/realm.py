"""A throw-away Kerberos realm: MIT's KDC, by k5test, with its keys and tickets, and a file of users for NTLM.

For tests of whatever uses Kerberos, and for ``headrace demo``. Everything it starts is bounded in time and ends, with
its files, when ``stop`` is called. It needs k5test and gssapi from PyPI, and Debian's krb5-kdc, krb5-admin-server and
krb5-user; ``needs`` tells what's missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["DEFAULT", "ENCTYPES", "OTHER_ENCTYPES", "Realm", "needs"]

# By the names that tests show: what MIT calls them, and their numbers (RFC 3962, RFC 8009).
ENCTYPES = {
    "aes128-sha1": ("aes128-cts-hmac-sha1-96", 17),
    "aes256-sha1": ("aes256-cts-hmac-sha1-96", 18),
    "aes128-sha256": ("aes128-cts-hmac-sha256-128", 19),
    "aes256-sha384": ("aes256-cts-hmac-sha384-192", 20),
}
# What headrace has no code of its own for: RFC 6803, and RFC 4757, which is too weak.
OTHER_ENCTYPES = {
    "camellia128": ("camellia128-cts-cmac", 25),
    "camellia256": ("camellia256-cts-cmac", 26),
    "rc4": ("arcfour-hmac", 23),
}
DEFAULT = "aes256-sha1"

# Seconds that one of Kerberos' programs may take, and the KDC until it listens.
PROGRAM = 30.0
START = 15.0

# Of MIT's client and server, Heimdal's and gss-ntlmssp's: none may come in from outside.
VARIABLES = (
    "KRB5_CONFIG",
    "KRB5_KDC_PROFILE",
    "KRB5CCNAME",
    "KRB5_KTNAME",
    "KRB5_CLIENT_KTNAME",
    "KRB5RCACHEDIR",
    "KRB5RCACHENAME",
    "KRB5RCACHETYPE",
    "KRB5_TRACE",
    "NTLM_USER_FILE",
)


def needs() -> str | None:
    """What a realm needs and this machine lacks, in words that a test's skip may give as its reason; or None."""
    try:
        import gssapi  # noqa: F401
        import k5test  # noqa: F401
    except (ImportError, OSError) as error:
        return f"needs k5test and gssapi: {error}"
    for program in ("krb5kdc", "kdb5_util", "kadmin.local", "kinit", "kvno"):
        if find(program) is None:
            return f"needs {program} (Debian's krb5-kdc, krb5-admin-server, krb5-user)"
    return None


def find(program: str) -> str | None:
    """Where a program is; administrators' programs may not be on a user's path."""
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")


def free_port() -> int:
    """A port of 127.0.0.1 that's free for TCP and UDP."""
    for _ in range(50):
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            port = int(tcp.getsockname()[1])
            try:
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free for TCP and UDP")


def enctype_is_weak(enctype: str) -> bool:
    """Whether MIT has to be told to use it at all."""
    return enctype.startswith("arcfour")


class Realm:
    """A realm with its KDC, one user and two services on localhost.

    ``env`` is what a child process needs on top of its own environment; ``applied()`` does the same to this process.
    The user is ``alice``, with a forwardable ticket in ``ccache``; the services ``host/localhost`` and
    ``test/localhost`` are in ``keytab``. NTLM knows ``HEADRACE\\alice`` with the same password.
    """

    user = "alice"
    ntlm_domain = "HEADRACE"
    services = ("host/localhost", "test/localhost")

    def __init__(self, enctype: str = DEFAULT) -> None:
        self.enctype, self.enctype_number = {**ENCTYPES, **OTHER_ENCTYPES}[enctype]
        self.name = "HEADRACE.TEST"
        self.port = free_port()
        self._kdc: subprocess.Popen[bytes] | None = None
        self._files = 0
        self._k5 = self._database()
        self.folder = Path(self._k5.tmpdir)
        self.password = f"p-{os.urandom(12).hex()}"
        self.principal = f"{self.user}@{self.name}"
        self.keytab = self.folder / "keytab"
        self.ccache = self.folder / "ccache"
        self.ntlm_users = self.folder / "ntlm-users"
        self.ntlm_users.write_text(f"{self.ntlm_domain}:{self.user}:{self.password}\n", encoding="utf-8")
        self.env = {
            "KRB5_CONFIG": self._k5.env["KRB5_CONFIG"],
            "KRB5CCNAME": str(self.ccache),
            "KRB5_KTNAME": str(self.keytab),
            "KRB5RCACHEDIR": str(self.folder),
            "NTLM_USER_FILE": str(self.ntlm_users),
        }
        try:
            self.add(self.user, self.password)
            for service in self.services:
                self.add(service)
                self.export(service)
            self.start_kdc()
            self.kinit(ccache=self.ccache, forwardable=True)
        except BaseException:
            self.stop()
            raise

    def _database(self) -> Any:
        from k5test.realm import MITRealm

        bounded = type("Bounded", (MITRealm,), {"run": bounded_run})
        enctypes = {
            "default_tkt_enctypes": self.enctype,
            "default_tgs_enctypes": self.enctype,
            "permitted_enctypes": self.enctype,
        }
        libdefaults = {
            "dns_lookup_kdc": "false",
            "dns_lookup_realm": "false",
            "dns_canonicalize_hostname": "false",
            "rdns": "false",
            "forwardable": "false",
            **dict.fromkeys(("allow_weak_crypto", "allow_rc4"), str(enctype_is_weak(self.enctype)).lower()),
            **enctypes,
        }
        at = f"127.0.0.1:{self.port}"
        of_realm = {"kdc": at, "admin_server": at, "kpasswd_server": at}
        of_kdc = {
            "kdc_listen": at,
            "kdc_tcp_listen": at,
            "kdc_ports": None,
            "kdc_tcp_ports": None,
            "supported_enctypes": f"{self.enctype}:normal",
            "master_key_type": self.enctype,
        }
        return bounded(
            realm=self.name,
            portbase=self.port,
            krb5_conf={
                "libdefaults": libdefaults,
                "realms": {"$realm": of_realm},
                "domain_realm": {"localhost": "$realm"},
            },
            kdc_conf={"realms": {"$realm": of_kdc}},
            create_user=False,
            create_host=False,
            start_kdc=False,
            get_creds=False,
        )

    # ---- the KDC ---------------------------------------------------------------------------------------------

    def start_kdc(self) -> None:
        """Starts the KDC, and waits until it listens."""
        program = find("krb5kdc")
        assert program is not None
        # A process that crashes must not leave a KDC behind.
        setpriv = find("setpriv")
        self._kdc = subprocess.Popen(
            [*([setpriv, "--pdeathsig", "TERM"] if setpriv else []), program, "-n"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._k5.env,
        )
        end = time.monotonic() + START
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if self._kdc.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the KDC doesn't listen; it ended with {self._kdc.poll()}") from None
                time.sleep(0.05)
            else:
                return

    def stop_kdc(self) -> None:
        """Ends the KDC; nobody gets a ticket until ``start_kdc``."""
        kdc, self._kdc = self._kdc, None
        if kdc is None:
            return
        kdc.terminate()
        try:
            kdc.wait(PROGRAM)
        except subprocess.TimeoutExpired:
            kdc.kill()
            kdc.wait(PROGRAM)

    def stop(self) -> None:
        """Ends the KDC and removes every file of the realm."""
        self.stop_kdc()
        shutil.rmtree(self._k5.tmpdir, ignore_errors=True)

    # ---- principals, keys, tickets ---------------------------------------------------------------------------

    def admin(self, *query: str) -> bytes:
        """What ``kadmin.local`` says to a query, given as its words."""
        return bytes(self._k5.run_kadminl(list(query)))

    def path(self, stem: str) -> Path:
        """A name in the realm's folder that nothing has yet."""
        self._files += 1
        return self.folder / f"{stem}-{self._files}"

    def add(self, principal: str, password: str | None = None, *options: str) -> None:
        """A new principal, with a random key if there's no password; options are kadmin's (``+ok_as_delegate``)."""
        key = ["-pw", password] if password is not None else ["-randkey"]
        self.admin("addprinc", *options, *key, principal)

    def export(self, *principals: str, keytab: Path | None = None) -> Path:
        """Adds the keys of these to a keytab (by default the realm's), and leaves them as they are."""
        keytab = keytab or self.keytab
        for principal in principals:
            self.admin("ktadd", "-k", str(keytab), "-norandkey", principal)
        return keytab

    def rotate(self, principal: str, *, export: bool = True, keep: bool = True) -> None:
        """A new key for a service; old tickets go on working as long as the keytab keeps (``keep``) its old key."""
        self.admin("cpw", "-randkey", *(["-keepold"] if keep else []), principal)
        if export:
            if not keep:
                self.admin("ktremove", "-k", str(self.keytab), principal, "all")
            self.export(principal)

    def kinit(
        self,
        principal: str | None = None,
        password: str | None = None,
        *,
        ccache: Path | None = None,
        lifetime: int | None = None,
        forwardable: bool = False,
        addressless: bool = True,
    ) -> Path:
        """A ticket in a cache (by default a new one), which lasts ``lifetime`` seconds; alice's by default."""
        ccache = ccache or self.path("ccache")
        flags = ["-c", str(ccache), "-f" if forwardable else "-F"]
        flags += ["-A"] if addressless else ["-a"]
        flags += ["-l", f"{lifetime}s"] if lifetime is not None else []
        self._k5.kinit(principal or self.user, password or self.password, flags=flags, verbose=False)
        return ccache

    def kvno(self, service: str, *, ccache: Path | None = None) -> None:
        """Gets a service's ticket into a cache, so that what follows needs no KDC."""
        ran([find("kvno") or "kvno", "-c", str(ccache or self.ccache), service], self._k5.env)

    # ---- environments ----------------------------------------------------------------------------------------

    def environment(self, **changes: str | None) -> dict[str, str]:
        """The whole environment of a child process: this one's, the realm's, and changes (None: without it)."""
        whole = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        whole.update(self.env)
        for name, value in changes.items():
            if value is None:
                whole.pop(name, None)
            else:
                whole[name] = value
        return whole

    @contextlib.contextmanager
    def applied(self, **changes: str | None) -> Iterator[None]:
        """This process is in the realm as long as the block lasts."""
        before = {name: os.environ.get(name) for name in {*VARIABLES, *changes}}
        wanted = self.environment(**changes)
        try:
            for name in before:
                if name in wanted:
                    os.environ[name] = wanted[name]
                else:
                    os.environ.pop(name, None)
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def configuration(self, **libdefaults: str) -> Path:
        """A ``krb5.conf`` for KRB5_CONFIG that differs from the realm's in these lines of ``[libdefaults]``."""
        text = Path(self.env["KRB5_CONFIG"]).read_text(encoding="utf-8")
        kept = [line for line in text.splitlines() if line.split("=")[0].strip() not in libdefaults]
        at = kept.index("[libdefaults]") + 1
        kept[at:at] = [f"\t{name} = {value}" for name, value in libdefaults.items()]
        path = self.path("krb5.conf")
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")
        return path


def bounded_run(
    self: Any,
    args: list[str],
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    expected_code: int = 0,
) -> bytes:
    """In the place of k5test's own ``run``, whose names these are: what it starts ends in time."""
    return ran(args, env or self.env, input, expected_code)


def ran(args: list[str], env: Mapping[str, str], text: str | None = None, expected: int = 0) -> bytes:
    """What a program prints; a RuntimeError with it when it ends otherwise than expected."""
    done = subprocess.run(
        args,
        input=text.encode() if text is not None else b"",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": os.environ.get("PATH", ""), **env},
        timeout=PROGRAM,
        check=False,
    )
    output = done.stdout
    # kadmin.local ends with 0 whatever happened.
    failed = done.returncode != expected or (
        "kadmin" in args[0] and (b" while " in output or b"No entry" in output)
    )
    if failed:
        raise RuntimeError(
            f"{Path(args[0]).name} ended with {done.returncode}: {output.decode(errors='replace')}"
        )
    return output
