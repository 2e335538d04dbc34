"""``headrace doctor``: the real command, on machines that are well and on ones that lack something."""

from __future__ import annotations

import datetime
import errno
import json
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from authorities import authority, ca_file, issued
from conftest import why_not
from headrace.cli import main
from headrace.cli.doctor import kdc as kdc_module
from headrace.cli.doctor import kerberos, limits
from headrace.cli.doctor.finding import Check, Finding, State, look, ok
from headrace.cli.doctor.kdc import ask, place_of
from headrace.cli.doctor.keytab import KeytabError, keys_in
from headrace.cli.doctor.krb5_conf import Configuration
from headrace.cli.doctor.options import DoctorOptions
from headrace.security.spnego import pack
from headrace.testing.realm import VARIABLES, Realm

FAULTS = Path(__file__).parent / "faults"

# What a machine of any kind passes, so that a report's state depends on what a test does.
MODEST = ("--connections", "10", "--backlog", "10")
# What tests can't choose: the machine's control group and kernel.
MACHINE = {"processors", "memory", "openssl", "io_uring", "locked-memory"}


@dataclass(frozen=True)
class Report:
    """What the command has said with ``--json``, and its status."""

    status: int
    document: dict[str, Any]
    text: str

    def __getitem__(self, check: str) -> dict[str, Any]:
        (finding,) = (one for one in self.document["findings"] if one["check"] == check)
        return dict(finding)

    def states(self, *checks: str) -> list[str]:
        return [self[check]["state"] for check in checks]

    def __contains__(self, check: str) -> bool:
        return any(one["check"] == check for one in self.document["findings"])


def environment(**changes: str) -> dict[str, str]:
    """This one's, without what chooses an engine, a pump or a realm."""
    left_out = {*VARIABLES, "HEADRACE_ENGINE", "HEADRACE_TLS_PUMP"}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"PYTHONWARNINGS": "error"} | changes


def run(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=env or environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )


def report_of(done: subprocess.CompletedProcess[str]) -> Report:
    """The report is all that is said, and agrees with the status."""
    assert done.stderr == "", done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"headrace", "python", "status", "findings"}
    wrong = [one for one in document["findings"] if one["state"] in ("warn", "fail")]
    assert done.returncode == document["status"] == bool(wrong), done.stdout
    for one in document["findings"]:
        assert list(one) == ["group", "check", "state", "found", "advice", "values"]
        assert one["found"]
        assert bool(one["advice"]) == (one in wrong), one
        assert "itself failed" not in one["found"], one
    return Report(done.returncode, document, done.stdout)


def doctor(*arguments: str, env: dict[str, str] | None = None) -> Report:
    return report_of(run([sys.executable, "-m", "headrace.cli", "doctor", "--json", *arguments], env))


def doctor_after(statement: str, *arguments: str) -> Report:
    """The same in a process that ``statement`` has restricted, see tests/faults/restrictions.py."""
    program = (
        f"import sys; sys.path.insert(0, {str(FAULTS)!r}); import restrictions\n"
        # Another user may not be able to read these later.
        "import headrace.cli.cert, headrace.cli.demo, headrace.cli.doctor, spnego\n"
        "headrace.cli.doctor.software.pump.reason()\n"
        f"{statement}\n"
        f"sys.exit(headrace.cli.main({['doctor', '--json', *arguments]!r}))\n"
    )
    return report_of(run([sys.executable, "-c", program]))


# ---- the machine -------------------------------------------------------------------------------------------


def test_healthy_machine(engine_name: str) -> None:
    report = doctor(*MODEST, "--engine", engine_name, env=environment(HEADRACE_TLS_PUMP="stdlib"))
    wrong = {one["check"] for one in report.document["findings"] if one["state"] in ("warn", "fail")}
    assert wrong <= MACHINE
    assert report["engine"]["values"]["engine"] == engine_name
    assert report["certificate"]["state"] == "skip"
    if engine_name == "uring":
        assert set(report["io_uring"]["values"]["features"]) == {
            "incremental_buffers",
            "receive_limit",
            "deferred_completions",
            "files",
        }


def test_text_says_the_same_as_json() -> None:
    arguments = (*MODEST, "--engine", "epoll")
    report = doctor(*arguments)
    done = run([sys.executable, "-m", "headrace.cli", "doctor", *arguments])
    assert (done.returncode, done.stderr) == (report.status, "")
    said = " ".join(done.stdout.split())
    for one in report.document["findings"]:
        assert f"{one['state']} {one['check']} " in said
        if one["check"] != "system-files":  # the number of open files changes
            assert " ".join(one["found"].split()) in said


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=["EPERM", "ENOSYS"])
def test_io_uring_denied_by_a_filter(error: int) -> None:
    report = doctor_after(f"restrictions.deny_io_uring({error})", *MODEST)
    assert report.status == 1
    assert report.states("engine", "io_uring") == ["warn", "warn"]
    assert report["engine"]["values"]["engine"] == "epoll"
    assert errno.errorcode[error] in report["io_uring"]["found"]
    assert ("seccomp" if error == errno.EPERM else "CONFIG_IO_URING") in report["io_uring"]["advice"]


def test_a_demanded_engine_that_cannot_start() -> None:
    for demand in (("--engine", "uring"), ()):
        statement = f"restrictions.deny_io_uring({errno.EPERM})"
        if not demand:
            statement += "; import os; os.environ['HEADRACE_ENGINE'] = 'uring'"
        report = doctor_after(statement, *MODEST, *demand)
        assert report["engine"]["state"] == "fail"
        assert "EPERM" in report["engine"]["found"]


def test_epoll_is_what_was_demanded() -> None:
    statement = f"restrictions.deny_io_uring({errno.EPERM})"
    report = doctor_after(statement, *MODEST, "--engine", "epoll")
    assert report.states("engine", "io_uring", "locked-memory") == ["ok", "skip", "skip"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.skipif(why_not("uring") is not None, reason="needs io_uring")
def test_an_ordinary_user_who_may_lock_no_memory() -> None:
    report = doctor_after("restrictions.become_nobody(4096)", *MODEST)
    assert report.states("engine", "io_uring", "locked-memory") == ["warn", "warn", "warn"]
    assert "RLIMIT_MEMLOCK" in report["io_uring"]["found"]
    assert report["locked-memory"]["values"] == {"soft": 4096, "hard": 4096}


def test_few_descriptors() -> None:
    command = [sys.executable, "-m", "headrace.cli", "doctor", "--json", "--connections", "1_000"]
    report = report_of(run(["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *command]))
    assert report["open-files"]["state"] == "warn"
    assert report["open-files"]["values"] == {"soft": 256, "hard": 256, "connections": 204}
    assert "204 connections" in report["open-files"]["found"]
    assert "LimitNOFILE=1250" in report["open-files"]["advice"]


def test_queues_and_ports_that_are_too_small() -> None:
    report = doctor("--connections", "90_000_000", "--backlog", "90_000_000")
    assert report.states("accept-queue", "local-ports") == ["warn", "warn"]
    assert report["accept-queue"]["advice"] == "sysctl net.core.somaxconn=90000000"


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text + "\n")


@pytest.mark.parametrize(
    ("limits_set", "states", "words"),
    [
        ({"cpu_max": "max 100000", "memory_max": "max"}, ["ok", "ok"], "no limit"),
        ({"cpu_max": "150000 100000", "memory_max": "2147483648"}, ["warn", "ok"], "quota is 1.5"),
        ({"cpu_max": "400000 100000", "memory_max": "104857600"}, ["ok", "warn"], "100 MiB"),
    ],
)
def test_control_group(tmp_path: Path, limits_set: dict[str, str], states: list[str], words: str) -> None:
    group(tmp_path / "unit" / "server")  # its own controllers are off: the limits are its parent's
    group(tmp_path / "unit", **limits_set)
    found = list(limits.group_limits(tmp_path, "/unit/server", 4))
    assert [one.state.value for one in found] == states
    assert words in " ".join(one.found for one in found)


# ---- certificates ------------------------------------------------------------------------------------------


def write(folder: Path, certificate: trustme.LeafCert) -> tuple[str, str]:
    chain, key = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    return str(chain), str(key)


def expiring(days: float) -> trustme.LeafCert:
    now = datetime.datetime.now(datetime.UTC)
    begin, end = now - datetime.timedelta(days=400), now + datetime.timedelta(days=days)
    return authority("main").issue_cert("server.example", not_before=begin, not_after=end)


def test_good_certificate(tmp_path: Path) -> None:
    certificate = authority("main").issue_cert("*.server.example", "192.0.2.1")
    chain, key = write(tmp_path, certificate)
    report = doctor(*MODEST, "--certificate", chain, "--private-key", key, "--ca", str(ca_file()))
    names = ("certificate", "private-key-file", "certificate-names", "certificate-chain", "certificate-trust")
    assert report.states(*names, "certificate-expiry") == ["ok"] * 6
    assert report["certificate-names"]["values"]["names"] == ["dns:*.server.example", "ip:192.0.2.1"]
    assert "BEGIN" not in report.text


@pytest.mark.parametrize(("days", "state"), [(-1, "fail"), (29, "warn"), (31, "ok")])
def test_expiry(tmp_path: Path, days: float, state: str) -> None:
    chain, key = write(tmp_path, expiring(days))
    report = doctor(*MODEST, "--certificate", chain, "--private-key", key)
    assert report["certificate-expiry"]["state"] == state
    assert report["certificate"]["state"] == ("fail" if days < 0 else "ok")


def test_key_of_another_certificate() -> None:
    one, other = issued("one.example"), issued("other.example")
    report = doctor(
        *MODEST, "--certificate", str(one.chain), "--private-key", str(other.key), "--ca", str(ca_file())
    )
    assert report["certificate"]["state"] == "fail"
    assert "doesn't match" in report["certificate"]["found"]
    assert report.states("certificate-expiry", "certificate-trust") == ["ok", "skip"]


def test_authority_that_clients_do_not_trust() -> None:
    files = issued("one.example")
    report = doctor(
        *MODEST,
        "--certificate",
        str(files.chain),
        "--private-key",
        str(files.key),
        "--ca",
        str(ca_file("stranger")),
    )
    assert report["certificate-trust"]["state"] == "fail"


def test_certificate_alone_and_chain_in_disorder(tmp_path: Path) -> None:
    chain = tmp_path / "chain.pem"
    chain.write_bytes(issued("one.example").chain.read_bytes() + issued("other.example").chain.read_bytes())
    report = doctor(*MODEST, "--certificate", str(chain))
    assert report.states("certificate", "certificate-chain", "certificate-names") == ["skip", "fail", "ok"]


def test_no_certificate_in_the_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pem", Path(__file__)):
        assert doctor(*MODEST, "--certificate", str(path))["certificate"]["state"] == "fail"


# ---- Kerberos ----------------------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter; pytest's own are for its user alone."""
    with tempfile.TemporaryDirectory(prefix="headrace-doctor-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def in_realm(realm: Realm, **changes: str | None) -> dict[str, str]:
    whole = realm.environment(**changes) | {"PYTHONWARNINGS": "error"}
    whole.pop("HEADRACE_ENGINE", None)
    return whole


def test_realm_in_order(realm: Realm) -> None:
    before = realm.ccache.read_bytes()
    report = doctor(*MODEST, "--keytab", str(realm.keytab), "--target", "test/localhost", env=in_realm(realm))
    checks = ("gssapi", "krb5-conf", "realm", "canonicalisation", "keytab", "keytab-mode", "keytab-target")
    assert report.states(*checks) == ["ok"] * 7
    assert report.states("kdc", "clock", "replay-cache", "target", "ntlm-users") == ["ok"] * 5
    listed = {(key["principal"], key["enctype"]) for key in report["keytab"]["values"]["keys"]}
    assert listed == {(f"{service}@{realm.name}", realm.enctype_number) for service in realm.services}
    assert realm.ccache.read_bytes() == before  # the ticket for the target isn't in it
    assert realm.password not in report.text


def test_kerberos_is_checked_where_it_is_configured(realm: Realm) -> None:
    assert doctor(*MODEST, env=in_realm(realm))["kdc"]["state"] == "ok"
    if not os.path.exists(kerberos.DEFAULT_KEYTAB):
        assert doctor(*MODEST)["krb5-conf"]["state"] == "skip"


def test_no_keytab(realm: Realm, tmp_path: Path) -> None:
    report = doctor(*MODEST, "--keytab", str(tmp_path / "none"), env=in_realm(realm))
    assert report["keytab"]["state"] == "fail"
    assert "No such file" in report["keytab"]["found"]
    assert report["kdc"]["state"] == "ok"


def test_keytab_that_everybody_can_read(realm: Realm, open_folder: Path) -> None:
    keytab = open_folder / "keytab"
    shutil.copy(realm.keytab, keytab)
    keytab.chmod(0o644)
    report = doctor(*MODEST, "--keytab", str(keytab), env=in_realm(realm))
    assert report.states("keytab", "keytab-mode") == ["ok", "fail"]
    assert "0644" in report["keytab-mode"]["found"]


def test_keytab_of_another_service(realm: Realm) -> None:
    report = doctor(*MODEST, "--keytab", str(realm.keytab), "--target", "http/localhost", env=in_realm(realm))
    assert report.states("keytab-target", "target") == ["fail", "fail"]
    assert "doesn't know the target" in report["target"]["found"]


def test_names_that_dns_decides(realm: Realm) -> None:
    for value, words in (("true", "is replaced"), ("fallback", "tried again")):
        conf = realm.configuration(dns_canonicalize_hostname=value)
        report = doctor(*MODEST, env=in_realm(realm, KRB5_CONFIG=str(conf)))
        assert report["canonicalisation"]["state"] == "warn"
        assert words in report["canonicalisation"]["found"]


def test_replay_cache_off(realm: Realm) -> None:
    assert doctor(*MODEST, env=in_realm(realm, KRB5RCACHENAME="none:"))["replay-cache"]["state"] == "warn"


def test_kdc_stopped(realm: Realm) -> None:
    realm.stop_kdc()
    try:
        report = doctor(*MODEST, "--negotiate", env=in_realm(realm))
    finally:
        realm.start_kdc()
    assert report.states("kdc", "clock") == ["fail", "skip"]
    assert f"127.0.0.1:{realm.port}" in report["kdc"]["found"]


def test_no_ticket(realm: Realm, tmp_path: Path) -> None:
    env = in_realm(realm, KRB5CCNAME=str(tmp_path / "none"))
    report = doctor(*MODEST, "--target", "test/localhost", env=env)
    assert report["target"]["state"] == "skip"
    assert "kinit" in report["target"]["found"]


def test_kdc_that_only_dns_could_name(realm: Realm) -> None:
    """It isn't there: MIT's library looks, and says so."""
    conf = realm.configuration()
    conf.write_text(re.sub(r"(?m)^\s*kdc = .*$", "", conf.read_text()))
    report = doctor(*MODEST, env=in_realm(realm, KRB5_CONFIG=str(conf)))
    assert report.states("kdc", "clock") == ["fail", "skip"]


def test_configuration_that_is_not_there(tmp_path: Path) -> None:
    report = doctor(*MODEST, env=environment(KRB5_CONFIG=str(tmp_path / "krb5.conf")))
    assert report.states("krb5-conf", "realm", "kdc") == ["fail", "warn", "skip"]


def test_users_of_ntlm(open_folder: Path) -> None:
    users = open_folder / "users"
    users.write_text("EXAMPLE:alice:open-sesame\n")
    for mode, state in ((0o644, "fail"), (0o600, "ok")):
        users.chmod(mode)
        report = doctor(*MODEST, env=environment(NTLM_USER_FILE=str(users)))
        assert report["ntlm-users"]["state"] == state
        assert "open-sesame" not in report.text
    users.unlink()
    assert doctor(*MODEST, env=environment(NTLM_USER_FILE=str(users)))["ntlm-users"]["state"] == "fail"


# ---- the parts of it ---------------------------------------------------------------------------------------


def refusal(behind: float) -> bytes:
    """A KRB-ERROR of a KDC whose clock is so many seconds behind."""
    time = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=behind)
    fields = (
        pack(0xA0, kdc_module.integer(5)),
        pack(0xA1, kdc_module.integer(30)),
        pack(0xA4, pack(kdc_module.TIME, time.strftime("%Y%m%d%H%M%SZ").encode())),
        pack(0xA5, kdc_module.integer(time.microsecond)),
        pack(0xA6, kdc_module.integer(6)),
    )
    return pack(kdc_module.KRB_ERROR, pack(0x30, *fields))


@pytest.fixture
def fake_kdc() -> Iterator[Any]:
    """A server of 127.0.0.1 that answers every request with its ``answer``; ``port`` is where."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            size = int.from_bytes(self.rfile.read(4), "big")
            assert len(self.rfile.read(size)) == size
            answer = server.answer  # type: ignore[attr-defined]
            self.wfile.write(len(answer).to_bytes(4, "big") + answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def krb5_conf(folder: Path, *kdcs: str) -> str:
    lines = "".join(f"  kdc = {place}\n" for place in kdcs)
    path = folder / "krb5.conf"
    path.write_text(f"[libdefaults]\ndefault_realm = A.TEST\n[realms]\nA.TEST = {{\n{lines}}}\n")
    return str(path)


@pytest.mark.parametrize(("behind", "state"), [(0, "ok"), (60, "warn"), (-60, "warn"), (400, "fail")])
def test_clock(
    fake_kdc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: float, state: str
) -> None:
    fake_kdc.answer = refusal(behind)
    port = fake_kdc.server_address[1]
    monkeypatch.setenv("KRB5_CONFIG", krb5_conf(tmp_path, f"127.0.0.1:{port}"))
    reached, clock = kerberos.kdc(DoctorOptions())
    assert (reached.state, clock.state) == ("ok", state)
    assert round(clock.values["offset"], -1) == behind


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request", refusal(0)[:-4]], ids=["empty", "http", "cut off"]
)
def test_what_is_no_kdc(
    fake_kdc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    fake_kdc.answer = answer
    port = fake_kdc.server_address[1]
    monkeypatch.setenv("KRB5_CONFIG", krb5_conf(tmp_path, f"127.0.0.1:{port}"))
    reached, clock = kerberos.kdc(DoctorOptions())
    assert (reached.state, clock.state) == ("fail", "skip")


def test_one_of_two_kdcs_is_silent(fake_kdc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kdc.answer = refusal(0)
    monkeypatch.setattr(kerberos, "KDC_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        places = [f"127.0.0.1:{port}" for port in (silent.getsockname()[1], fake_kdc.server_address[1])]
        monkeypatch.setenv("KRB5_CONFIG", krb5_conf(tmp_path, *places))
        reached, clock = kerberos.kdc(DoctorOptions())
    assert (reached.state, clock.state) == ("warn", "ok")
    assert reached.values == {"realm": "A.TEST", "kdcs": 2, "answering": 1}


def test_kdc_on_udp_alone() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve() -> None:
            _, peer = server.recvfrom(4096)
            server.sendto(refusal(0), peer)

        thread = threading.Thread(target=serve)
        thread.start()
        offset = ask("127.0.0.1", server.getsockname()[1], "A.TEST", 10).offset
        thread.join()
    assert offset is not None
    assert abs(offset) < 10


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("kdc.example", ("kdc.example", 88)),
        ("kdc.example:750", ("kdc.example", 750)),
        ("[2001:db8::1]:750", ("2001:db8::1", 750)),
        ("2001:db8::1", ("2001:db8::1", 88)),
        ("https://proxy.example/KdcProxy", None),
        ("kdc.example:kerberos", None),
    ],
)
def test_places_of_kdcs(text: str, place: tuple[str, int] | None) -> None:
    assert place_of(text) == place


def test_configuration_files(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "site.conf").write_text("[libdefaults]\nrdns = off\nforwardable = yes\n")
    (tmp_path / "d" / "ignored~").write_text("[libdefaults]\nclockskew = 1\n")
    first = tmp_path / "krb5.conf"
    first.write_text(
        f'# a comment\n[libdefaults]\n  default_realm = "A.TEST"\n  rdns = true\nincludedir {tmp_path}/d\n'
        "[realms]\n A.TEST = {\n  kdc = one\n  sub = {\n   kdc = no\n  }\n  kdc* = two:88\n }\n"
        "[libdefaults]\n default_realm = B.TEST\n"
    )
    conf = Configuration([first, tmp_path / "missing"])
    assert conf.all("realms", "A.TEST", "kdc") == ["one", "two:88"]
    assert conf.all("libdefaults", "default_realm") == ["A.TEST", "B.TEST"]
    assert conf.flag("libdefaults", "rdns", default=False)
    assert conf.flag("libdefaults", "forwardable", default=False)
    assert conf.first("libdefaults", "clockskew") is None
    assert [text.partition(":")[2] for text in conf.missing] == [" No such file or directory"]


def test_keytab_that_is_cut_off(realm: Realm, tmp_path: Path) -> None:
    """At every byte: fewer keys, or an error that says so; nothing else."""
    whole = realm.keytab.read_bytes()
    path = tmp_path / "keytab"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            assert len(keys_in(path)) < len(realm.services)
        except KeytabError:
            pass


def test_a_check_that_fails_is_a_finding() -> None:
    def broken(options: DoctorOptions) -> Iterator[Finding]:
        yield ok("first", "was found")
        raise RuntimeError("a bug")

    first, second = look(Check("broken", broken), DoctorOptions())
    assert first.check == "first"
    assert (second.check, second.state) == ("broken", State.WARN)
    assert "this check itself failed: RuntimeError: a bug" in second.found


def test_a_check_that_hangs_is_left_alone() -> None:
    ended = threading.Event()

    def hangs(options: DoctorOptions) -> Iterator[Finding]:
        ended.wait(30)
        yield ok("hangs", "too late")

    (finding,) = look(Check("hangs", hangs, seconds=0.05), DoctorOptions())
    ended.set()
    assert finding.state is State.WARN
    assert "didn't end within 0.05 s" in finding.found


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--private-key", "key.pem"], "go with a --certificate"),
        (["--target", "HTTP/192.0.2.1"], "names an IP address"),
        (["--target", "nobody"], "a target is"),
        (["--connections", "0"], "must be between"),
        (["--backlog", "many"], "no whole number"),
        (["--engine", "iocp"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err
