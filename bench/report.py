"""Tables and a chart of results: what the terminal shows, Markdown, SVG."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from bench.judge import Estimate, Judgement, estimate, judge, limit_peer
from bench.rounds import Result

__all__ = ["figures", "judgement_table", "markdown", "markdown_table", "result_table"]

REFERENCE = "uvloop"

HANDSHAKE_COLUMNS = (
    ("CPU us/handshake", "cpu_us_per_request"),
    ("handshakes/s", "requests_per_second"),
    ("p50 us", "p50_us"),
    ("p99 us", "p99_us"),
)
# Heading and key of the columns, per mode: the metric first, then what puts it in a light.
COLUMNS = {
    "echo": (
        ("CPU us/req", "cpu_us_per_request"),
        ("req/s", "requests_per_second"),
        ("p50 us", "p50_us"),
        ("p99 us", "p99_us"),
    ),
    "sink": (("CPU s/GB", "cpu_seconds_per_gigabyte"), ("GB/s", "gigabytes_per_second")),
    "source": (("CPU s/GB", "cpu_seconds_per_gigabyte"), ("GB/s", "gigabytes_per_second")),
    "datagram-echo": (
        ("CPU us/datagram", "cpu_us_per_request"),
        ("echoes/s", "requests_per_second"),
        ("p50 us", "p50_us"),
        ("p99 us", "p99_us"),
    ),
    "datagram-sink": (("CPU us/datagram", "cpu_us_per_request"), ("datagrams/s", "requests_per_second")),
    "micro": (("CPU us/event", "cpu_us_per_event"),),
    "web": (("CPU us/req", "cpu_us_per_request"), ("req/s", "requests_per_second")),
    "client": (("CPU us/req", "cpu_us_per_request"), ("req/s", "requests_per_second")),
    "storm": (
        ("CPU us/conn", "cpu_us_per_connection"),
        ("accepts/s", "accepts_per_second"),
        ("idle B/conn", "bytes_per_connection"),
    ),
    "handshake": HANDSHAKE_COLUMNS,
    "resume": HANDSHAKE_COLUMNS,
    "idle": (("B/conn", "bytes_per_connection"), ("CPU us/conn", "cpu_us_per_connection")),
}
PACED_COLUMNS = (("% of core", "server_cpu_percent_of_core"), ("GB/s", "gigabytes_per_second"))


def columns(result: Result) -> Sequence[tuple[str, str]]:
    return PACED_COLUMNS if result.row.rate else COLUMNS[result.row.kind]


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def ratio(measured: Estimate | None) -> str:
    return str(measured) if measured else "-"


def references(result: Result) -> list[str]:
    """Whom the others are compared with: streams with uvloop's streams as well."""
    names = (REFERENCE, f"{REFERENCE}-streams", limit_peer(result.row))
    present = [name for name in names if name in result.peers]
    return present or result.peers[:1]


def result_table(result: Result) -> list[list[str]]:
    """Heading and one line per peer: medians, and ratios with their intervals."""
    shown = columns(result)
    others = references(result)
    heading = ["peer", *(name for name, _ in shown), *(f"{other}/this" for other in others)]
    lines = [heading]
    for peer in result.peers:
        medians = [
            figure(statistics.median(values)) if (values := result.values(peer, key)) else "-"
            for _, key in shown
        ]
        ratios = [ratio(estimate(result.ratios(peer, other))) for other in others]
        lines.append([peer, *medians, *ratios])
    return lines


def judgement_table(judgements: Iterable[Judgement]) -> list[list[str]]:
    """Heading and one line per target."""
    lines = [["case", "peer", "figure", "measured", "must", "goal", "verdict"]]
    for each in judgements:
        must, goal = ("-" if bound is None else f"{bound:g}" for bound in (each.must, each.goal))
        lines.append([each.case, each.peer, each.figure, str(each.measured), must, goal, each.summary])
    return lines


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up as plain text."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([row(lines[0]), rule, *(row(line) for line in lines[1:])])


def markdown(result: Result) -> str:
    """A row's section: its table, what was judged, who is missing, and how it was measured."""
    parts = [f"### {result.row}"]
    if result.peers:
        parts.append(markdown_table(result_table(result)))
    if judgements := judge(result):
        parts.append(markdown_table(judgement_table(judgements)))
    parts += [f"left out: {name}: {reason.splitlines()[-1]}" for name, reason in result.failures.items()]
    parts.append(method(result))
    return "\n\n".join(parts) + "\n"


def method(result: Result) -> str:
    """One line for below a table: how it was measured, and how to read the ratios."""
    how = (
        "CPU time in this process"
        if result.row.mode == "micro"
        else (f"{result.settings.seconds:g} s each, {result.placement.note}")
    )
    return (
        f"{len(result.rounds)} rounds, {how}; ratios are medians of same-round pairs with their 90 % "
        "bootstrap interval, above 1: cheaper than the other"
    )


def figures(result: Result) -> dict[str, object]:
    """The same as data, for pytest-benchmark's ``extra_info``."""

    def as_list(measured: Estimate | None) -> list[float] | None:
        return [round(x, 4) for x in (measured.median, measured.low, measured.high)] if measured else None

    shown, limit = columns(result), limit_peer(result.row)
    return {
        "row": str(result.row),
        "metric": result.row.metric,
        "rounds": len(result.rounds),
        "placement": result.placement.note,
        "cost": {peer: as_list(estimate(result.values(peer))) for peer in result.peers},
        f"ratio_{REFERENCE}": {
            peer: as_list(estimate(result.ratios(peer, REFERENCE))) for peer in result.peers
        },
        f"ratio_{limit}": {peer: as_list(estimate(result.ratios(peer, limit))) for peer in result.peers},
        "medians": {
            peer: {key: statistics.median(values) for _, key in shown if (values := result.values(peer, key))}
            for peer in result.peers
        },
        "verdicts": {f"{each.peer}: {each.case}: {each.figure}": each.summary for each in judge(result)},
        "left_out": dict(result.failures),
    }
