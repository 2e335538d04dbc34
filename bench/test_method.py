"""The method itself: what counts as reached, what an interval is, how rows and profiles are read."""

from __future__ import annotations

import random
import sys
from xml.etree import ElementTree

import pytest

from bench import rounds
from bench.callgrind import Count, compare, parse
from bench.chart import chart
from bench.judge import estimate, judge, targets, verdict_at_least, verdict_at_most
from bench.peers import Peer, find_peer, standard_peers, tls_peers
from bench.report import figures, markdown
from bench.rounds import Placement, Result, Row, Settings
from bench.suite import Playback


def made_up(row: Row, costs: dict[str, list[float]]) -> Result:
    """A result whose peers cost what is given, round by round."""
    result = Result(row, Settings(), Placement(0, 1))
    rounds = max(map(len, costs.values()))
    for number in range(rounds):
        measured = {
            peer: {row.metric: values[number]} for peer, values in costs.items() if number < len(values)
        }
        result.rounds.append(measured)
    return result


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("echo -n 100 -s 64", Row("echo", 100, 64)),
        ("sink -s 65536 -n 10 -r 125e6", Row("sink", 10, 65536, 125e6)),
        ("source -n 10", Row("source", 10)),
        ("storm -n 10000", Row("storm", 10000)),
        ("tls-echo -n 10 -s 16384", Row("tls-echo", 10, 16384)),
        ("tls-sink -n 1 -s 65536 -r 125e6", Row("tls-sink", 1, 65536, 125e6)),
        ("tls-source -n 10", Row("tls-source", 10)),
        ("tls-handshake -n 10", Row("tls-handshake", 10)),
        ("tls-resume -n 10", Row("tls-resume", 10)),
        ("tls-idle -n 1000 -s 65536", Row("tls-idle", 1000, 65536)),
    ],
)
def test_rows_are_read(text: str, row: Row) -> None:
    assert Row.parse(text) == row
    assert Row.parse(str(row)) == row


@pytest.mark.parametrize(
    "text", ["", "ping", "echo -n", "echo -x 3", "micro", "echo -n many", "handshake", "tls-storm"]
)
def test_what_is_no_row(text: str) -> None:
    with pytest.raises(ValueError, match=r"row|literal|float"):
        Row.parse(text)


def test_ratios_pair_within_a_round_only() -> None:
    result = made_up(Row("echo", 100), {"uvloop": [10.0, 30.0, 12.0], "ours": [5.0, 10.0]})
    assert result.ratios("ours", "uvloop") == [2.0, 3.0]
    assert result.ratios("uvloop", "nobody") == []


def test_the_interval_of_a_median() -> None:
    chooser = random.Random(1)
    covered = 0
    for _ in range(100):
        measured = estimate([chooser.gauss(1.2, 0.1) for _ in range(15)])
        assert measured is not None
        assert measured.low <= measured.median <= measured.high
        covered += measured.low <= 1.2 <= measured.high
    assert 80 <= covered <= 100  # 90 of 100 are meant; the same hundred every time
    assert estimate([]) is None
    assert estimate([2.0] * 15) == estimate([2.0] * 15)


def test_verdicts() -> None:
    sure = estimate([1.2, 1.21, 1.22] * 5)
    unsure = estimate([1.0, 1.2, 1.4] * 5)
    few = estimate([1.2] * 14)
    assert sure is not None
    assert unsure is not None
    assert few is not None
    assert verdict_at_least(sure, 1.15) == "reached"
    assert verdict_at_least(sure, 1.3) == "not reached"
    assert verdict_at_least(unsure, 1.2) == "inconclusive"
    assert verdict_at_least(few, 1.0) == "inconclusive"
    assert verdict_at_most(sure, 1.3) == "reached"
    assert verdict_at_most(sure, 1.15) == "not reached"
    assert verdict_at_most(unsure, 1.2) == "inconclusive"
    assert verdict_at_most(few, 2.0) == "inconclusive"


def test_a_row_is_judged_by_the_first_target_that_fits() -> None:
    costs = {"uvloop": [10.0] * 15, "c-uring": [7.6] * 15, "headrace-uring-lease": [8.0] * 15}
    (share,) = (
        each for each in judge(made_up(Row("echo", 100, 64), costs)) if each.figure == "c-uring / this"
    )
    (ratio,) = (
        each for each in judge(made_up(Row("echo", 100, 64), costs)) if each.figure == "uvloop / this"
    )
    assert (ratio.case, ratio.must, ratio.goal) == ("echo <= 1 KiB, N = 100..1,000", 1.15, 1.3)
    assert ratio.summary == "must reached, goal not reached"
    assert share.measured.median == pytest.approx(0.95)


def test_a_tls_row_is_judged_by_its_own_targets_and_limit() -> None:
    ours = "headrace-uring-bytes"
    costs = {
        "uvloop": [12.0] * 15,
        "c-openssl": [9.0] * 15,
        "aiofastnet-uvloop": [9.5] * 15,
        ours: [10.0] * 15,
    }
    uvloop, aiofastnet = judge(made_up(Row("tls-echo", 100, 64), costs))
    assert (uvloop.case, uvloop.must, uvloop.goal) == ("TLS echo 64 B, N = 100", 1.10, 1.25)
    assert uvloop.summary == "must reached, goal not reached"
    assert (aiofastnet.figure, aiofastnet.must) == ("aiofastnet-uvloop / this", None)
    assert aiofastnet.summary == "goal not reached"
    _, share = judge(made_up(Row("tls-sink", 1, 262144), costs))
    assert (share.figure, share.must, share.must_verdict) == ("c-openssl / this", 0.95, "not reached")


def test_idle_memory_is_judged_as_a_ratio_and_paced_load_as_a_figure() -> None:
    costs = {"uvloop": [248e3] * 15, "headrace-uring-lease": [31e3] * 15}
    (memory,) = judge(made_up(Row("tls-idle", 1000, 65536), costs))
    assert memory.measured.median == pytest.approx(8.0)
    assert memory.summary == "must reached"
    (paced,) = judge(made_up(Row("tls-sink", 1, 65536, 125e6), {"headrace-uring-lease": [16.0] * 15}))
    assert paced.summary == "must reached, goal not reached"


def test_peers_that_cannot_serve_a_mode_say_why(native_tls: None) -> None:
    assert find_peer("c-uring").missing("tls-echo") == "no TLS in c-uring"
    assert find_peer("c-openssl").missing("echo") == "no TCP in c-openssl"
    peer = Peer("made up", ("true",), needs="headrace", tls_needs="headrace.NoSuchName")
    assert peer.missing("echo") is None
    assert peer.missing("tls-echo") == "no headrace.NoSuchName in this version"
    assert Peer("absent", ("true",), needs="no_such_package").missing() == "no module no_such_package"


def test_where_c_is_behind_uvloop_no_more_is_asked() -> None:
    costs = {"uvloop": [8.0] * 15, "c-epoll": [10.0] * 15, "headrace-epoll-lease": [10.0] * 15}
    (judgement,) = judge(made_up(Row("echo", 1000, 100 * 1024), costs))
    assert judgement.must == 0.8
    assert judgement.must_verdict == "reached"


def test_every_target_names_peers_that_exist() -> None:
    peers = [
        *standard_peers(),
        *tls_peers(),
        "headrace-uring-streams",
        "headrace-epoll-streams",
        "uvloop-streams",
    ]
    for target in targets()["ratio"]:
        assert {target["reference"], target.get("not_behind", "uvloop")} <= set(peers)
        assert target["must"] <= target.get("goal", target["must"])
        for peer in target["peers"]:
            find_peer(peer)


def test_reports_hold_every_peer() -> None:
    result = made_up(Row("echo", 100), {"uvloop": [10.0] * 3, "headrace-uring-lease": [8.0] * 3})
    result.failures["rloop"] = "no module rloop"
    report = markdown(result)
    assert "1.25 (1.25..1.25)" in report
    assert "left out: rloop: no module rloop" in report
    assert figures(result)["medians"] == {
        "uvloop": {"cpu_us_per_request": 10.0},
        "headrace-uring-lease": {"cpu_us_per_request": 8.0},
    }
    assert figures(result)["ratio_uvloop"] == {
        "uvloop": [1.0, 1.0, 1.0],
        "headrace-uring-lease": [1.25, 1.25, 1.25],
    }


def test_the_chart_is_well_formed() -> None:
    result = made_up(Row("echo", 100), {"uvloop": [10.0] * 3, "a <b> & c": [8.0] * 3})
    root = ElementTree.fromstring(chart([result]))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <b> & c" in words
    assert "1.25" in words
    assert chart([]) == ""


def test_playback_hands_out_durations_in_order() -> None:
    clock = Playback()
    clock.load([0.5, 0.25])
    clock.advance()
    assert clock() == 0.5
    clock.advance()
    assert clock() == 0.75


LIAR = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as listener:
    print("READY", listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(bytes(len(data)))
            except ConnectionError:
                pass
"""


def test_a_server_that_sends_wrong_bytes_is_left_out(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "find_peer", lambda name: Peer(name, (sys.executable, "-c", LIAR)))
    result = rounds.run_row(Row("echo", 1, 3000), ["liar"], Settings(rounds=1, seconds=0.05))
    assert result.peers == []
    assert "wrong bytes" in result.failures["liar"]


def test_a_server_that_does_not_start_is_left_out(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = (sys.executable, "-c", "raise SystemExit('no such thing')")
    monkeypatch.setattr(rounds, "find_peer", lambda name: Peer(name, broken))
    result = rounds.run_row(Row("echo"), ["broken"], Settings(rounds=1, seconds=0.05))
    assert "no such thing" in result.failures["broken"]


# The words in capitals are replaced.
TLS_LIAR = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[3])
SETTINGS
with socket.create_server(("127.0.0.1", 0)) as listener:
    print("READY", listener.getsockname()[1], flush=True)
    while True:
        connection = context.wrap_socket(listener.accept()[0], server_side=True)
        data = connection.recv(65536)
        while data:
            connection.sendall(ANSWER)
            data = connection.recv(65536)
        ENDING
        connection.close()
"""


@pytest.mark.parametrize(
    ("row", "settings", "answer", "ending", "reason"),
    [
        (Row("tls-echo", 1, 3000), "", "bytes(len(data))", "connection.unwrap()", "wrong bytes"),
        (Row("tls-echo", 1, 3000), "", "data", "", "no close_notify from the server"),
        (
            Row("tls-echo", 1, 3000),
            "",
            "data",
            "connection.unwrap(); print('oh', file=sys.stderr, flush=True)",
            "oh",
        ),
        (Row("tls-handshake", 1), "", "b'?'", "connection.unwrap()", "wrong byte"),
        (Row("tls-resume", 1), "context.num_tickets = 0", "data", "connection.unwrap()", "doesn't resume"),
    ],
    ids=["wrong bytes", "no close_notify", "errors written", "wrong byte after a handshake", "no resumption"],
)
def test_a_tls_server_that_fails_is_left_out(
    row: Row,
    settings: str,
    answer: str,
    ending: str,
    reason: str,
    native_tls: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = TLS_LIAR.replace("SETTINGS", settings).replace("ANSWER", answer).replace("ENDING", ending)
    monkeypatch.setattr(rounds, "find_peer", lambda name: Peer(name, (sys.executable, "-c", code)))
    result = rounds.run_row(row, ["liar"], Settings(rounds=2, seconds=0.05))
    assert reason in result.failures["liar"]


@pytest.mark.parametrize(
    "row", ["tls-echo -n 2 -s 100000", "tls-handshake -n 2", "tls-resume -n 2", "tls-idle -n 2"]
)
def test_a_tls_server_is_measured(row: str, native_tls: None) -> None:
    result = rounds.run_row(Row.parse(row), ["asyncio"], Settings(rounds=1, seconds=0.05))
    assert result.failures == {}
    assert result.peers == ["asyncio"]
    assert result.values("asyncio")[0] > 0


PROFILE = """\
ob=(1) /usr/lib/libc.so.6
fl=(1) ???
fn=(1) read
0 10
+4 5
cob=(2) /site/headrace/_loop.cpython-311-x86_64-linux-gnu.so
cfn=(2) turn
calls=3 0
* 1000
fn=(3) write
0
ob=(2)
fn=(2)
0 300
+1 3
cob=(1)
calls=1 0
0 77
ob=(3) /site/other_headrace/_x.so
fn=(9)
0 1000
"""


def test_instructions_count_where_they_are_executed() -> None:
    assert parse(PROFILE) == Count(modules=303, total=1318)


def test_dearer_than_expected() -> None:
    expected = {"tolerance": 0.03, "workloads": {"a": {"modules": 1000.0}, "b": {"modules": 1000.0}}}
    counted = {"a": {"modules": 1029.0}, "b": {"modules": 1031.0}, "new": {"modules": 1.0}}
    (worse,) = compare(counted, expected)
    assert worse.startswith("b: 1031 instructions per event, +3.1%")
    assert compare({"a": {"modules": 500.0}}, expected) == []
