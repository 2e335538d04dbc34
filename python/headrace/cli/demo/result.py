"""The result of a run: ``demo.json``, what was wrong, and the exit status."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass
from typing import Any

from headrace import __version__
from headrace.cli.demo.measure import PERCENTILES, Recorder
from headrace.cli.demo.options import DemoOptions
from headrace.cli.units import format_rate

__all__ = ["RunResult", "summarize"]

_NEEDED_SHARE = 0.95  # of the asked rate


@dataclass(frozen=True)
class RunResult:
    """``document`` is what demo.json holds; ``problems`` says in words what failed (nothing: a good run)."""

    document: dict[str, Any]
    problems: list[str]
    recorder: Recorder
    options: DemoOptions


def _meaning_of_latency(options: DemoOptions) -> str:
    begins = "it was given to the sender's transport" if options.rate is None else "it was due at the sender"
    what, ends = ("message", "it") if options.mode == "oneway" else ("round trip of a message", "its echo")
    return f"{what}, from when {begins} to when {ends} had arrived as a whole"


def _problems_of_connections(
    options: DemoOptions, server: dict[str, Any], load: dict[str, Any]
) -> tuple[list[str], dict[str, int]]:
    """What connections failed at, in words and in numbers."""
    counted = load if options.mode == "echo" else server
    received: dict[str, int] = counted["received"]
    sent: dict[str, int] = load["sent"]
    silent = options.connections - sum(1 for count in received.values() if count > 0)
    short = sum(1 for number, count in sent.items() if 0 < received.get(number, 0) != count)
    errors = {"failed": server["failed"] + load["failed"], "carried_nothing": silent, "incomplete": short}
    problems = [*server["failures"], *load["failures"]]
    hidden = errors["failed"] - len(problems)
    if hidden > 0:
        problems.append(f"... and {hidden:,} more failures of connections")
    if silent:
        problems.append(f"{silent:,} of {options.connections:,} connections carried nothing")
    if short:
        problems.append(f"{short:,} connections carried less than was sent on them")
    return problems, errors


def summarize(
    options: DemoOptions,
    recorder: Recorder,
    window: tuple[float, float],
    ready: dict[str, Any],
    server: dict[str, Any],
    load: dict[str, Any],
) -> RunResult:
    """Puts a finished run together.

    ``window`` is the length in seconds of the time of sending, and the processor seconds that the server used
    in it. ``ready`` is what the server said of its engine; ``server`` and ``load`` are the children's
    results.
    """
    problems, errors = _problems_of_connections(options, server, load)
    counted = load if options.mode == "echo" else server
    total = sum(counted["received"].values())
    # Bytes that arrive after the time of sending lengthen the time that the rate is taken over.
    seconds = max(options.seconds, (counted["last_arrival"] - recorder.began) / 1e9)
    throughput = total / seconds
    if options.rate is not None and throughput < _NEEDED_SHARE * options.rate:
        problems.append(
            f"the mean rate was {format_rate(throughput)}, {100 * throughput / options.rate:.1f} % of the "
            f"asked {format_rate(options.rate)} (needed: {100 * _NEEDED_SHARE:.0f} %)"
        )
    wall, processor = window
    core_percent = 100 * processor / wall
    processors = os.cpu_count() or 1
    latencies = recorder.latencies.percentiles(PERCENTILES)
    last = recorder.intervals[-1] if recorder.intervals else None
    document = {
        "headrace": __version__,
        "engine": ready["engine"],
        "engine_reason": ready["engine_reason"],
        "security": options.security,
        "mode": options.mode,
        "protocol": options.protocol,
        "connections": options.connections,
        "size_bytes": options.size,
        "target_bytes_per_second": options.rate,
        "errors": sum(errors.values()),
        "error_counts": errors,
        "problems": problems,
        "seconds": round(seconds, 6),
        "bytes": total,
        "messages": recorder.latencies.count,
        "unsent_messages": load["unsent"],
        "throughput_bytes_per_second": round(throughput, 3),
        "messages_per_second": round(recorder.latencies.count / seconds, 3),
        "server_cpu_percent_of_core": round(core_percent, 3),
        "server_cpu_percent_of_machine": round(core_percent / processors, 3),
        "server_cpu_seconds_per_gigabyte": round(
            (recorder.last[0].processor - recorder.first[0].processor) / max(total, 1), 6
        ),
        "server_memory_bytes": recorder.last[0].memory,
        "latency_seconds": {
            "p50": latencies[0],
            "p99": latencies[1],
            "p999": latencies[2],
            "max": recorder.latencies.largest / 1e9,
        },
        "latency_of": _meaning_of_latency(options),
        "server_loop": last.loop if last is not None else {},
        "samples": [
            {
                "ends": round(interval.ends, 3),
                "throughput_bytes_per_second": round(interval.throughput, 1),
                "messages_per_second": round(interval.messages, 1),
                "server_cpu_percent_of_core": round(interval.server_core_percent, 2),
                "load_cpu_percent_of_core": round(interval.load_core_percent, 2),
                "latency_seconds": dict(zip(("p50", "p99", "p999"), interval.latencies, strict=True)),
            }
            for interval in recorder.intervals
        ],
        "machine": {
            "processors": processors,
            "kernel": platform.release(),
            "python": sys.version.split()[0],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }
    return RunResult(document, problems, recorder, options)
