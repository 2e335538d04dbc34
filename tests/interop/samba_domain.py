"""A throw-away Active Directory domain of Samba's, with its KDC and nothing else of it: what signs PACs with groups."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from headrace.testing.realm import VARIABLES, free_port

__all__ = ["Domain", "missing"]

PROGRAM = 60.0  # seconds that one of Samba's programs may take
START = 20.0  # and its KDC until it listens
PROGRAMS = {
    "samba": "samba-ad-dc",
    "samba-tool": "samba-ad-dc",
    "ldbmodify": "ldb-tools",
    "kinit": "krb5-user",
}
AES_KEYS = 24  # msDS-SupportedEncryptionTypes ([MS-KILE] section 2.2.7): AES128 and AES256

CONFIGURATION = """\
[libdefaults]
    default_realm = {realm}
    dns_lookup_kdc = false
    dns_canonicalize_hostname = false
    rdns = false
[realms]
    {realm} = {{
        kdc = 127.0.0.1:{port}
    }}
[domain_realm]
    localhost = {realm}
"""


def find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def missing() -> str | None:
    """What isn't here."""
    absent = [package for program, package in PROGRAMS.items() if find(program) is None]
    if absent:
        return f"{', '.join(absent)} (Debian)"
    return "root, to make a domain of Samba's" if os.geteuid() else None


class Domain:
    """``alice``, who is in ``engineers``, and ``bob``, who isn't; ``host/localhost`` is in the keytab."""

    realm = "HEADRACE.AD"
    service = "host/localhost"

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-samba-"))
        self.port = free_port()
        self._kdc: subprocess.Popen[bytes] | None = None
        self._smb_conf = self.folder / "etc" / "smb.conf"
        self.env = {
            "KRB5_CONFIG": str(self.folder / "krb5.conf"),
            "KRB5_KTNAME": str(self.folder / "keytab"),
            "KRB5RCACHEDIR": str(self.folder),
        }
        try:
            self._provision()
            self._populate()
            self._start()
            for user in ("alice", "bob"):
                self._ran("kinit", "-c", str(self.ccache(user)), user, text=self._password(user))
        except BaseException:
            self.stop()
            raise

    def ccache(self, user: str) -> Path:
        """That user's tickets."""
        return self.folder / f"ccache-{user}"

    @staticmethod
    def _password(user: str) -> str:
        return f"Passw0rd-{user}-X7"

    def _provision(self) -> None:
        own = {
            "interfaces": "lo",
            "bind interfaces only": "yes",
            "log file": self.folder / "log",
            "pid directory": self.folder / "run",
            "ncalrpc dir": self.folder / "ncalrpc",
            "server services": "kdc",
            "krb5 port": self.port,
            "kpasswd port": 0,
        }
        self._ran(
            "samba-tool",
            *("domain", "provision", f"--realm={self.realm}", "--domain=HEADRACEAD", "--server-role=dc"),
            *("--dns-backend=NONE", f"--adminpass={self._password('admin')}", f"--targetdir={self.folder}"),
            *(f"--option={name}={value}" for name, value in own.items()),
        )
        text = CONFIGURATION.format(realm=self.realm, port=self.port)
        (self.folder / "krb5.conf").write_text(text, encoding="utf-8")

    def _populate(self) -> None:
        for user in ("alice", "bob", "service"):
            self.tool("user", "add", user, self._password(user))
        self.tool("group", "add", "engineers")
        self.tool("group", "addmembers", "engineers", "alice")
        # A new account has an RC4 key only, until it's known to take others and gets a password then.
        suffix = ",".join(f"DC={part}" for part in self.realm.lower().split("."))
        change = (
            f"dn: CN=service,CN=Users,{suffix}\nchangetype: modify\n"
            f"replace: msDS-SupportedEncryptionTypes\nmsDS-SupportedEncryptionTypes: {AES_KEYS}\n"
        )
        self._ran("ldbmodify", "-H", str(self.folder / "private" / "sam.ldb"), text=change)
        self.tool("user", "setpassword", "service", f"--newpassword={self._password('service')}-2")
        self.tool("spn", "add", self.service, "service")
        self.tool("domain", "exportkeytab", str(self.folder / "keytab"), f"--principal={self.service}")

    def _start(self) -> None:
        program, setpriv = find("samba"), find("setpriv")
        assert program is not None
        self._kdc = subprocess.Popen(
            [
                *([setpriv, "--pdeathsig", "TERM"] if setpriv else []),
                *(program, "-i", "-M", "single", "-s", str(self._smb_conf)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + START
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if self._kdc.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"Samba's KDC doesn't listen; it ended: {self._kdc.poll()}") from None
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """Ends the KDC and removes every file of the domain."""
        if self._kdc is not None:
            self._kdc.terminate()
            try:
                self._kdc.wait(10)
            except subprocess.TimeoutExpired:
                self._kdc.kill()
                self._kdc.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def tool(self, *words: str) -> str:
        """What ``samba-tool`` says."""
        return self._ran("samba-tool", *words, "-s", str(self._smb_conf))

    def sid(self, kind: str, name: str) -> str:
        """Of a ``user`` or a ``group``, as the directory has it."""
        found = re.search(r"objectSid: (S-[\d-]+)", self.tool(kind, "show", name))
        assert found is not None
        return found[1]

    def _ran(self, program: str, *words: str, text: str | None = None) -> str:
        path = find(program)
        assert path is not None
        done = subprocess.run(
            [path, *words],
            input=text if text is None else text + "\n",
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=PROGRAM,
            env={**os.environ, **self.env},
        )
        if done.returncode:
            raise RuntimeError(
                f"{program} {words[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """This process is in the domain as long as the block lasts."""
        before = {name: os.environ.pop(name, None) for name in VARIABLES}
        os.environ.update(self.env)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
