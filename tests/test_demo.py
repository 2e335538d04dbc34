"""``headrace demo``: small runs of the real thing, what it checks, and how it fails and ends."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cli import main, units
from headrace.cli.demo.histogram import LatencyHistogram
from headrace.cli.demo.limits import LimitError, ensure_descriptors
from headrace.cli.demo.options import PLANNED_SECURITY
from headrace.cli.demo.traffic import HEADER, MessageSource, StreamCheck, WrongBytesError, make_pattern

SVG = "{http://www.w3.org/2000/svg}"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "headrace.cli", "demo", *arguments]


def environment() -> dict[str, str]:
    """Warnings are errors in the demo's processes too; no engine is forced on ``--engine auto``."""
    kept = {name: value for name, value in os.environ.items() if name != "HEADRACE_ENGINE"}
    return kept | {"PYTHONWARNINGS": "error"}


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=50
    )


def document(folder: Path, name: str = "demo.json") -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / name).read_text())
    return loaded


def good(run: subprocess.CompletedProcess[str], folder: Path, name: str = "demo.json") -> dict[str, Any]:
    """The results of a run in which nothing failed but, on a machine that is busy with other things, the rate."""
    assert run.returncode in (0, 1), run.stdout + run.stderr
    assert run.stderr == ""
    result = document(folder, name)
    assert result["errors"] == 0, result["problems"]
    assert set(result["error_counts"].values()) == {0}
    assert run.returncode == (1 if result["problems"] else 0)
    assert all(problem.startswith("the mean rate was") for problem in result["problems"])
    return result


# ---- whole runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["oneway", "echo"])
def test_small_run_over_tls(tmp_path: Path, engine_name: str, mode: str) -> None:
    arguments = ("--connections", "50", "--seconds", "0.8", "--rate", "40Mbit", "--size", "16KiB")
    run = demo(tmp_path, *arguments, "--mode", mode, "--engine", engine_name, "--security", "tls")
    result = good(run, tmp_path)
    assert result["engine"] == engine_name
    assert result["security"] == "tls"
    assert result["messages"] + result["unsent_messages"] == 245


@pytest.mark.parametrize("protocol", ["lease", "bytes"])
@pytest.mark.parametrize("mode", ["oneway", "echo"])
def test_small_run(tmp_path: Path, engine_name: str, mode: str, protocol: str) -> None:
    arguments = ("--connections", "50", "--seconds", "0.8", "--rate", "40Mbit", "--size", "16KiB")
    run = demo(tmp_path, *arguments, "--mode", mode, "--engine", engine_name, "--protocol", protocol)
    result = good(run, tmp_path)
    assert result["engine"] == engine_name
    assert result["security"] == "none"
    assert result["connections"] == 50
    assert result["mode"] == mode
    assert result["protocol"] == protocol
    # 40 Mbit/s for 0.8 s are 244.1 messages of 16 KiB; message 0 is due at the start, message 244 before the end.
    assert result["messages"] + result["unsent_messages"] == 245
    assert result["messages"] >= 50
    assert result["bytes"] == result["messages"] * 16384
    assert result["seconds"] >= 0.8
    assert result["throughput_bytes_per_second"] == pytest.approx(
        result["bytes"] / result["seconds"], rel=1e-3
    )
    assert result["server_cpu_percent_of_core"] > 0
    latency = result["latency_seconds"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["p999"]
    assert result["server_loop"]["pool"]["leased"] == 0


def test_says_what_runs_and_writes_a_chart(tmp_path: Path) -> None:
    run = demo(tmp_path, "--connections", "5", "--seconds", "0.5", "--rate", "10Mbit", "--json", "out.json")
    result = good(run, tmp_path, "out.json")
    assert f"on engine {result['engine']}: {result['engine_reason']}" in run.stdout
    assert "0 errors, every byte checked" in run.stdout
    # No terminal: a line for each interval, and none of a terminal's control sequences.
    assert "\x1b" not in run.stdout
    assert len([line for line in run.stdout.splitlines() if "msg/s" in line]) == len(result["samples"]) > 1

    chart = ElementTree.parse(tmp_path / "out.svg").getroot()
    assert chart.tag == f"{SVG}svg"
    texts = {element.text for element in chart.iter(f"{SVG}text")}
    assert {"throughput", "latency p50", "latency p99", "latency p99.9", "latency"} <= texts
    assert "processor time, % of one core" in texts
    # Throughput, load, server, and three percentiles; every point within the picture.
    curves = list(chart.iter(f"{SVG}polyline"))
    assert len(curves) == 6
    for curve in curves:
        points = [tuple(map(float, point.split(","))) for point in curve.attrib["points"].split()]
        assert len(points) == len(result["samples"]) + 1
        assert all(0 <= x <= 960 and 0 <= y <= 756 for x, y in points)


@pytest.mark.parametrize("mode", ["oneway", "echo"])
def test_unpaced_run(tmp_path: Path, mode: str) -> None:
    arguments = ("--connections", "20", "--seconds", "0.5", "--rate", "max", "--size", "4kB")
    run = demo(tmp_path, *arguments, "--mode", mode)
    result = good(run, tmp_path)
    assert run.returncode == 0
    assert result["target_bytes_per_second"] is None
    assert result["bytes"] >= 20 * 4000
    assert result["bytes"] % 4000 == 0


def test_messages_of_a_header_only(tmp_path: Path) -> None:
    run = demo(tmp_path, "--connections", "3", "--seconds", "0.3", "--rate", "100kbit", "--size", "16")
    result = good(run, tmp_path)
    assert result["messages"] + result["unsent_messages"] == 235
    assert result["bytes"] == 16 * result["messages"]


def test_live_view_on_a_terminal(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    ours, theirs = os.openpty()
    arguments = command("--connections", "5", "--seconds", "0.5", "--rate", "10Mbit")
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env=environment() | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(ours)
    _, errors = process.communicate(timeout=20)
    assert process.returncode in (0, 1)
    assert errors == b""
    assert document(tmp_path)["errors"] == 0
    assert b"\x1b[" in shown
    for label in ("throughput", "latency p99.9", "of a core", "of the machine", "completions/s", "leases/s"):
        assert label.encode() in shown


# ---- failures ----------------------------------------------------------------------------------------------


def test_rate_that_cannot_be_reached_fails(tmp_path: Path) -> None:
    # Far beyond what a processor can copy; the results are written all the same.
    run = demo(tmp_path, "--connections", "4", "--seconds", "0.5", "--rate", "100Tbit", "--size", "1MiB")
    assert run.returncode == 1, run.stdout + run.stderr
    result = document(tmp_path)
    assert any("mean rate" in problem for problem in result["problems"])
    assert result["errors"] == 0  # slow, but not one byte was wrong
    assert "FAILED" in run.stdout
    assert (tmp_path / "demo.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "option", "hint"),
    [
        (["--connections", "0"], "--connections", "between 1 and"),
        (["--connections", "many"], "--connections", "no whole number"),
        (["--seconds", "-1"], "--seconds", "between 0.1 and"),
        (["--seconds", "soon"], "--seconds", "no number of seconds"),
        (["--rate", "fast"], "--rate", "1Gbit"),
        (["--rate", "1000"], "--rate", "1Gbit"),
        (["--size", "8"], "--size", "16 bytes"),
        (["--size", "64KX"], "--size", "64KiB"),
        (["--size", "1GiB"], "--size", "64 MiB"),
        (["--mode", "twoway"], "--mode", "oneway"),
        (["--engine", "iocp"], "--engine", "uring"),
        (["--protocol", "udp"], "--protocol", "lease"),
        (["--security", "rot13"], "--security", "none"),
        (["--rate", "1Mbit", "--connections", "1000"], "--rate", "Lower --size"),
        (["--json", "no/such/folder/demo.json"], "--json", "no folder"),
        (["--json", "x.svg"], "--json", "--chart"),
        *((["--security", name], "--security", "later version") for name in PLANNED_SECURITY),
    ],
)
def test_bad_option_is_named_with_what_helps(
    arguments: list[str],
    option: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *arguments])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {option}" in said
    assert hint in said
    assert list(tmp_path.iterdir()) == []


def test_engine_that_cannot_start_is_one_clear_line(tmp_path: Path) -> None:
    run = subprocess.run(
        command("--engine", "auto", "--connections", "2", "--seconds", "0.5", "--rate", "10Mbit"),
        cwd=tmp_path,
        env=environment() | {"HEADRACE_ENGINE": "steam"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert run.returncode == 1
    assert run.stderr.startswith(
        "headrace demo: the server process: HEADRACE_ENGINE must be one of uring, epoll"
    )
    assert "Traceback" not in run.stderr


def started(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A demo that is in the middle of its run, and its children."""
    process = subprocess.Popen(
        command("--connections", "10", "--seconds", "30", "--rate", "20Mbit"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "msg/s" in line:
            break
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    return process, children


def role_of(child: psutil.Process) -> str:
    return next(part.rpartition(".")[2] for part in child.cmdline() if part.startswith("headrace.cli.demo."))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "kill"]
)
def test_interrupted_demo_leaves_no_process(tmp_path: Path, number: signal.Signals, status: int) -> None:
    process, children = started(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert errors == "headrace demo: interrupted; nothing was written\n"
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert list(tmp_path.iterdir()) == []


def test_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    process, children = started(tmp_path)
    process.kill()
    process.communicate(timeout=20)
    assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.parametrize("role", ["server", "load"])
def test_death_of_a_child_is_reported(tmp_path: Path, role: str) -> None:
    process, children = started(tmp_path)
    next(child for child in children if role_of(child) == role).kill()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Traceback" not in errors
    # Whoever notices first: the parent, or (not for long) the other child, whose connections break.
    assert f"the {role} process was ended by signal 9" in errors
    assert psutil.wait_procs(children, timeout=5)[1] == []


# ---- limits ------------------------------------------------------------------------------------------------


def in_new_process(function: str, *arguments: object) -> str:
    """What a function of this module prints in an interpreter of its own, whose limits may be changed."""
    code = f"import test_demo; print(test_demo.{function}(*{arguments!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return run.stdout.strip()


def soft_limit_after(soft: int, hard: int, connections: int) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    ensure_descriptors(connections)
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_descriptor_limit_is_raised_where_allowed() -> None:
    assert in_new_process("soft_limit_after", 100, 4096, 1000) == "1064"
    assert in_new_process("soft_limit_after", 2000, 4096, 1000) == "2000"


def outcome_at_the_hard_limit(limit: int, connections: int, user: int) -> str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if user:
        os.setuid(user)
    try:
        ensure_descriptors(connections)
    except LimitError as error:
        return str(error)
    return f"raised to {resource.getrlimit(resource.RLIMIT_NOFILE)}"


def may_raise_hard_limits() -> bool:
    """CAP_SYS_RESOURCE: what root has, except in many containers."""
    status = Path("/proc/self/status").read_text().splitlines()
    effective = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    return bool(int(effective, 16) & 1 << 24)


def assert_explained(text: str) -> None:
    assert "need 1,064 open files" in text
    assert "the limit is 256" in text
    assert "ulimit -n 1064" in text
    assert "--connections 192" in text


def test_hard_descriptor_limit_is_raised_or_explained() -> None:
    outcome = in_new_process("outcome_at_the_hard_limit", 256, 1000, 0)
    if may_raise_hard_limits():
        assert outcome == "raised to (1064, 1064)"
    else:
        assert_explained(outcome)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_hard_descriptor_limit_is_explained_to_an_ordinary_user() -> None:
    assert_explained(in_new_process("outcome_at_the_hard_limit", 256, 1000, 65534))


# ---- the parts ---------------------------------------------------------------------------------------------


def stream(connection: int, size: int, count: int, stamp: int = 1) -> bytes:
    source = MessageSource(size)
    return b"".join(source.message(connection, number, stamp) for number in range(count))


def check_of(connection: int, size: int) -> StreamCheck:
    return StreamCheck(connection, size, make_pattern(size), LatencyHistogram())


@settings(max_examples=200, deadline=None)
@given(size=st.integers(16, 200), count=st.integers(1, 5), data=st.data())
def test_check_takes_any_division_into_chunks(size: int, count: int, data: st.DataObject) -> None:
    sent = stream(7, size, count)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=8)))
    check = check_of(7, size)
    for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        check.feed(memoryview(sent)[begin:end])
        assert check.received == end
    assert check.messages == count


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(16, 200), where=st.integers(0, 10**6), bit=st.integers(0, 7), chunk=st.integers(1, 300)
)
def test_check_finds_any_wrong_bit(size: int, where: int, bit: int, chunk: int) -> None:
    sent = bytearray(stream(3, size, 4))
    sent[where % len(sent)] ^= 1 << bit
    check = check_of(3, size)
    with pytest.raises(WrongBytesError, match="connection 3"):
        for begin in range(0, len(sent), chunk):
            check.feed(bytes(sent[begin : begin + chunk]))


@pytest.mark.parametrize("size", [16, 17, 64, 5000])
def test_check_finds_lost_doubled_and_foreign_messages(size: int) -> None:
    sent = stream(3, size, 4)
    for wrong in (
        sent[size:],
        sent[:size] + sent[: 2 * size],
        sent[:size] + sent[2 * size :],
        sent[: size + 8] + sent[size + 9 :] + sent[:1],
        stream(4, size, 2),
    ):
        with pytest.raises(WrongBytesError):
            check_of(3, size).feed(wrong)


def test_latency_is_taken_when_a_message_is_complete() -> None:
    latencies = LatencyHistogram()
    check = StreamCheck(0, 32, make_pattern(32), latencies)
    sent = stream(0, 32, 1, stamp=time.monotonic_ns() - 5_000_000)
    check.feed(sent[:31])
    assert latencies.count == 0
    check.feed(sent[31:])
    assert latencies.count == 1
    assert latencies.percentiles([50])[0] >= 0.0049


def test_histogram_percentiles_are_within_half_a_percent() -> None:
    randomness = random.Random(1)
    values = sorted(int(10 ** randomness.uniform(0, 11)) for _ in range(20_000))
    histogram = LatencyHistogram()
    for value in values:
        histogram.record(value)
    copied = LatencyHistogram()
    copied.add(json.loads(json.dumps(histogram.take())))
    assert histogram.count == 0
    assert histogram.take() == {}
    assert copied.count == len(values)
    wanted = [1.0, 25.0, 50.0, 90.0, 99.0, 99.9, 100.0]
    for percent, found in zip(wanted, copied.percentiles(wanted), strict=True):
        exact = values[max(0, math.ceil(len(values) * percent / 100) - 1)] / 1e9
        assert found == pytest.approx(exact, rel=0.005)


def test_histogram_bounds() -> None:
    histogram = LatencyHistogram()
    assert histogram.percentiles([50.0]) == [0.0]
    histogram.record(-5)
    histogram.record(1 << 60)
    low, high = histogram.percentiles([50.0, 100.0])
    assert low == 0.0
    assert high == pytest.approx((1 << 40) / 1e9, rel=0.005)
    for bad in ({"999999": 1}, {"-1": 1}, {"3": -1}):
        with pytest.raises(IndexError):
            histogram.add(bad)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536),
        ("64KiB", 65536),
        ("64 kib", 65536),
        ("64kB", 64000),
        ("1.5MB", 1_500_000),
        ("16B", 16),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1Gbit", 125e6),
        ("1gbit/s", 125e6),
        ("1Gbps", 125e6),
        ("1Gb/s", 125e6),
        ("125MB", 125e6),
        ("125MB/s", 125e6),
        ("0.5Gbits", 62.5e6),
        ("800bit", 100.0),
        ("0", None),
        ("max", None),
    ],
)
def test_rates(text: str, rate: float | None) -> None:
    assert units.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "1", "-1Gbit", "Gbit", "1Xbit", "1Gbit/h", "0Gbit", "nan", "1e9bit"])
def test_no_rates(text: str) -> None:
    with pytest.raises(ValueError):
        units.parse_rate(text)


def test_figures_are_readable() -> None:
    assert units.format_rate(125e6) == "1 Gbit/s"
    assert units.format_rate(124.9999999e6) == "1 Gbit/s"
    assert units.format_size(65536) == "64 KiB"
    assert units.format_size(100) == "100 B"
    assert units.format_time(0.00125) == "1.25 ms"
    assert units.format_time(3e-7) == "300 ns"
    assert units.format_time(12) == "12 s"


def test_header_is_what_the_smallest_size_says() -> None:
    assert HEADER.size == 16


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--version"], "headrace "),
        (["--help"], "demo"),
        (["demo", "--help"], "--rate"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert expected in capsys.readouterr().out
