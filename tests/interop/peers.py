"""Real TLS implementations as peers: each in a process of its own, as client or as server.

Every peer does the same: it secures one connection, sends a payload, reads to the end of the stream, and tells in one
line of JSON which version and cipher suite it had, how many bytes came and their SHA-256.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import pkcs12

from authorities import ca_file, folder, issued

HERE = Path(__file__).parent
PATIENCE = 40.0  # seconds: a virtual machine starts on a busy one
SUITES = {"TLSv1.2": "ECDHE-ECDSA-CHACHA20-POLY1305", "TLSv1.3": "TLS_CHACHA20_POLY1305_SHA256"}
SERVER, CLIENT = "server.example", "client.example"


@dataclass(frozen=True)
class Task:
    """What a peer is to do; ``port`` is where a client connects to."""

    role: str
    version: str  # "TLSv1.2" or "TLSv1.3"
    mutual: bool
    payload: Path
    port: int = 0

    @property
    def own(self) -> str:
        return SERVER if self.role == "server" else CLIENT


@dataclass(frozen=True)
class Outcome:
    """What a peer tells."""

    version: str
    cipher: str
    received: int
    sha256: str


@functools.cache
def pfx_of(name: str) -> Path:
    """The certificate of that name and its key, in one PKCS #12 file."""
    files = issued(name)
    key: Any = serialization.load_pem_private_key(files.key.read_bytes(), None)
    chain = x509.load_pem_x509_certificates(files.chain.read_bytes())
    path = folder() / f"{name}.pfx"
    path.write_bytes(
        pkcs12.serialize_key_and_certificates(
            name.encode(), key, chain[0], chain[1:], serialization.BestAvailableEncryption(b"interop")
        )
    )
    return path


class Process:
    """A peer that runs."""

    told_to_speak = ("", "")  # version and cipher suite, where it doesn't say itself

    def __init__(self, command: list[str], stdin: Path | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        # Stays open: to some programs the end of their input is the end of the connection.
        self.input, self.process.stdin = self.process.stdin, None
        if stdin is not None:
            threading.Thread(target=self.feed, args=(stdin.read_bytes(),), daemon=True).start()
        self.collector: threading.Thread | None = None
        self.written: list[tuple[bytes, bytes]] = []
        self.timer = threading.Timer(PATIENCE, self.process.kill)
        self.timer.daemon = True
        self.timer.start()

    def feed(self, data: bytes) -> None:
        assert self.input is not None
        try:
            self.input.write(data)
            self.input.flush()
        except BrokenPipeError:
            pass  # it has ended, and says why

    def ready(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith(b"READY"):
            raise AssertionError(f"no READY but {line!r}: {self.finish()}")
        self.collect()
        return int(line.split()[1])

    def collect(self) -> None:
        """Reads what it writes from now on: a full pipe would stop it."""
        self.collector = threading.Thread(target=lambda: self.written.append(self.process.communicate()))
        self.collector.start()

    def finish(self) -> tuple[int, bytes, str]:
        """(exit status, what it wrote, what it said on stderr)"""
        if self.collector is None:
            self.collect()
        assert self.collector is not None
        self.collector.join()
        output, errors = self.written[0]
        self.timer.cancel()
        if self.input is not None:
            with contextlib.suppress(BrokenPipeError):
                self.input.close()
        return self.process.returncode, output, errors.decode(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.finish()


def told(process: Process) -> Outcome:
    """What a peer of ours has told in JSON."""
    status, output, errors = process.finish()
    assert status == 0, errors
    data = json.loads(output.splitlines()[-1])
    version = {"Tls12": "TLSv1.2", "Tls13": "TLSv1.3"}.get(data["version"], data["version"])
    return Outcome(version, data["cipher"], data["received"], data["sha256"])


# ---- OpenSSL's own programs --------------------------------------------------------------------------------------


class OpenSSL:
    """``openssl s_client`` and ``s_server``; OpenSSL's names of cipher suites."""

    name = "openssl"

    @staticmethod
    def missing() -> str | None:
        return None if shutil.which("openssl") else "the openssl program"

    def start(self, task: Task) -> Process:
        files = issued(task.own)
        version = "-tls1_3" if task.version == "TLSv1.3" else "-tls1_2"
        common = [version, "-CAfile", str(ca_file()), "-verify_return_error"]
        mine = ["-cert", str(files.chain), "-cert_chain", str(files.chain), "-key", str(files.key)]
        if task.role == "client":
            command = ["openssl", "s_client", "-connect", f"127.0.0.1:{task.port}", "-servername", SERVER]
            command += [*common, "-verify_hostname", SERVER, "-ign_eof", "-nocommands", "-brief"]
            return Process([*command, *(mine if task.mutual else [])], task.payload)
        port = free_port()
        command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-naccept", "1"]
        common += ["-cipher", SUITES["TLSv1.2"], "-ciphersuites", SUITES["TLSv1.3"]]
        process = Process(
            [*command, *common, *mine, *(["-Verify", "1"] if task.mutual else [])], task.payload
        )
        process.told_to_speak = (task.version, SUITES[task.version])
        process.ready = lambda: listening(process, port)  # type: ignore[method-assign]
        return process

    def outcome(self, process: Process) -> Outcome:
        _, output, errors = process.finish()
        # s_server tells neither; it was told to speak one version and one cipher suite. What came is digits alone.
        version = re.search(r"Protocol version: (\S+)", errors)
        cipher = re.search(r"Ciphersuite: (\S+)", errors)
        data = max(re.findall(rb"\d+", output), key=len)
        told = (version[1], cipher[1]) if version and cipher else process.told_to_speak
        return Outcome(*told, len(data), hashlib.sha256(data).hexdigest())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(process: Process, port: int) -> int:
    """Returns when the port is listened on, without connecting to it: that would be the one connection."""
    wanted = f"0100007F:{port:04X} 00000000:0000 0A"
    while process.process.poll() is None:
        if wanted in Path("/proc/net/tcp").read_text():
            process.collect()
            return port
        threading.Event().wait(0.01)
    raise AssertionError(process.finish())


# ---- Python ------------------------------------------------------------------------------------------------------


class Python:
    """CPython's blocking sockets; OpenSSL's names of cipher suites."""

    name = "python"

    @staticmethod
    def missing() -> str | None:
        return None

    def start(self, task: Task) -> Process:
        command = [sys.executable, str(HERE / "python_peer.py"), json.dumps(arguments(task))]
        return Process(command)

    outcome = staticmethod(told)


def arguments(task: Task) -> dict[str, Any]:
    files = issued(task.own)
    return {
        "role": task.role,
        "port": task.port,
        "version": task.version,
        "mutual": task.mutual,
        "payload": str(task.payload),
        "name": SERVER,
        "ca": str(ca_file()),
        "chain": str(files.chain),
        "key": str(files.key),
        "pfx": str(pfx_of(task.own)),
    }


# ---- .NET and Java -----------------------------------------------------------------------------------------------


class DotNet:
    """.NET 8's SslStream; IANA's names of cipher suites."""

    name = "dotnet"
    slow = True  # to start

    @staticmethod
    def missing() -> str | None:
        modules = [
            module
            for module in ("dnv", "pythonnet", "clr_loader")
            if importlib.util.find_spec(module) is None
        ]
        return f"{', '.join(modules)} (the extra interop)" if modules else None

    def start(self, task: Task) -> Process:
        return Process([sys.executable, str(HERE / "dotnet_peer.py"), json.dumps(arguments(task))])

    outcome = staticmethod(told)


class Java:
    """The JDK's SSLSocket; IANA's names of cipher suites."""

    name = "java"
    slow = True

    @staticmethod
    def missing() -> str | None:
        return None if shutil.which("javac") else "a JDK (Debian: default-jdk-headless)"

    def start(self, task: Task) -> Process:
        words = [task.role, str(task.port), task.version, str(pfx_of(task.own)), str(ca_file())]
        words += [str(task.mutual).lower(), SERVER, str(task.payload)]
        return Process(["java", "-cp", str(compiled()), "-Xshare:auto", "JavaPeer", *words])

    outcome = staticmethod(told)


@functools.cache
def compiled() -> Path:
    """Where JavaPeer.class lies."""
    subprocess.run(["javac", "-d", str(folder()), str(HERE / "JavaPeer.java")], check=True, timeout=60)
    return folder()


PEERS: list[Any] = [OpenSSL(), Python(), DotNet(), Java()]
