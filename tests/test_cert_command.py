"""``headrace cert``: files that a server and its clients can use at once, and nothing lost on the way."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

import headrace
from headrace.cli import main
from headrace.security.certificates import identity_of, leaf_of


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "folder"
    arguments = [
        "cert",
        "--out",
        str(out),
        "--name",
        "a.example",
        "--name",
        "192.0.2.1",
        "--client",
        "b@c.example",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "ca.pem",
        "client-b@c.example.key",
        "client-b@c.example.pem",
        "server.key",
        "server.pem",
    ]
    assert all(str(path) in said for path in out.iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.glob("*.key")} == {0o600}
    assert set(identity_of(leaf_of(out / "server.pem")).names) >= {"dns:a.example", "ip:192.0.2.1"}
    assert "email:b@c.example" in identity_of(leaf_of(out / "client-b@c.example.pem")).names
    server = headrace.TLS(
        certificate=out / "server.pem",
        private_key=out / "server.key",
        ca=out / "ca.pem",
        client_certificate="required",
    )
    server.server_contexts()


def test_nothing_is_overwritten_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cert", "--out", str(tmp_path)]
    assert main(arguments) == 0
    before = (tmp_path / "server.key").read_bytes()
    assert main(arguments) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "server.key").read_bytes() == before
    (tmp_path / "server.key").chmod(0o644)
    assert main([*arguments, "--force"]) == 0
    assert (tmp_path / "server.key").read_bytes() != before
    assert stat.S_IMODE((tmp_path / "server.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--days", "0"], "--days must be"),
        (["--name", "not a name!"], ""),
        (["--out", "/dev/null/x"], "[Errno 20] Not a directory: '/dev/null/x'"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cert", "--out", str(tmp_path / "x"), *arguments]) == 2
    assert f"headrace cert: {text}" in capsys.readouterr().err


def test_without_trustme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    assert main(["cert", "--out", str(tmp_path)]) == 2
    assert "pip install 'headrace[demo]'" in capsys.readouterr().err
