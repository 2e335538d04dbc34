"""Real servers for the tests of applications: a private PostgreSQL cluster, a private Redis."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

START_PATIENCE = 40.0  # seconds


@dataclass(frozen=True)
class Postgres:
    """Where a cluster listens: on TCP, and on a Unix socket in a folder."""

    host: str
    port: int
    folder: str
    user: str = "tester"
    database: str = "postgres"


def program(name: str, package: str, *folders: str) -> str:
    """The path of a program; the test is skipped if it isn't there."""
    found = shutil.which(name)
    for folder in folders:
        for candidate in sorted(Path("/").glob(f"{folder}/{name}"), reverse=True):
            found = found or str(candidate)
    if found is None:
        pytest.skip(f"needs {name}: apt-get install {package}")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ordinary_user() -> pwd.struct_passwd | None:
    """Who runs PostgreSQL, which refuses root: nobody in particular. None where we are no root ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    pytest.skip("needs an ordinary user named postgres or nobody")


def wait_until(ready: Callable[[], bool], server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_PATIENCE
    while not ready():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{server.args!r} didn't start:\n{log.read_text(errors='replace')}")
        time.sleep(0.05)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def stop(server: subprocess.Popen[bytes], patience: float = 20) -> None:
    server.terminate()
    try:
        server.wait(patience)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextmanager
def postgres_cluster() -> Iterator[Postgres]:
    """A cluster of its own in a temporary folder; nobody else's is touched."""
    folders = ("usr/lib/postgresql/*/bin", "usr/local/pgsql/bin")
    initdb = program("initdb", "postgresql", *folders)
    postgres = program("postgres", "postgresql", *folders)
    user = ordinary_user()
    with tempfile.TemporaryDirectory(prefix="headrace-postgres-", dir="/tmp") as home:
        if user is not None:
            os.chown(home, user.pw_uid, user.pw_gid)
        other = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data, log = f"{home}/data", Path(home, "log")
        made = subprocess.run(
            [initdb, "-D", data, "-U", "tester", "--auth=trust", "-E", "UTF8", "--locale=C", "--no-sync"],
            cwd=home, capture_output=True, timeout=START_PATIENCE, **other,  # type: ignore[call-overload]
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        where = Postgres("127.0.0.1", free_port(), home)
        settings = {
            "listen_addresses": where.host,
            "port": where.port,
            "unix_socket_directories": home,
            "max_connections": 200,
            "fsync": "off",
        }
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with log.open("wb") as output:
            server = subprocess.Popen(
                [postgres, "-D", data, *options],
                cwd=home, stdout=output, stderr=output, stdin=subprocess.DEVNULL, **other,  # type: ignore[call-overload]
            )  # fmt: skip
        try:
            ready = "database system is ready to accept connections"
            wait_until(lambda: ready in log.read_text(errors="replace"), server, log)
            yield where
        finally:
            server.send_signal(2)  # SIGINT: a fast shutdown, which doesn't wait for its clients
            stop(server)


@contextmanager
def redis_instance() -> Iterator[int]:
    """A Redis that keeps nothing; its port on 127.0.0.1."""
    redis = program("redis-server", "redis-server")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="headrace-redis-") as home:
        log = Path(home, "log")
        with log.open("wb") as output:
            server = subprocess.Popen(
                [redis, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
                cwd=home,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
        try:
            wait_until(lambda: answers(port), server, log)
            yield port
        finally:
            stop(server)
