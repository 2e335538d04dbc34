"""Instructions per event of headrace's thin layers, counted by valgrind: a figure that noise doesn't touch.

    python -m bench.callgrind                     counts, and compares with bench/instructions.json
    python -m bench.callgrind --update            writes what was counted as the new expectation
    python -m bench.callgrind --workloads echo-epoll-lease,call-soon

Each workload runs twice under ``valgrind --tool=callgrind``, with few and with many events; the difference of the
instructions by the difference of the events is what one event costs, and start and end of the interpreter cancel
out. ``modules`` counts only what is executed inside headrace's extension modules themselves: it doesn't depend on
the interpreter's build, and it is what the comparison gates. ``total`` has the interpreter and the C library in it
(not the kernel) and is for reading.

Exit: 0 within tolerance, 1 when a workload costs more than expected (by ``tolerance`` of instructions.json), 2 when
nothing could be counted. Cheaper than expected is said, and is no failure: run --update.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).parent / "instructions.json"
TOLERANCE = 0.03
FEW, MANY = 200, 1200
NOT_HERE = 77  # exit status of a workload whose engine this machine lacks
RUN_TIMEOUT = 240  # seconds; a run takes about ten on an idle machine
MESSAGE = b"x" * 64
MODULES = re.compile(r"/headrace/_\w+\.[\w.-]*so$")

# ---- workloads: run under valgrind, in a process of their own -------------------------------------------------


class Client(asyncio.Protocol):
    """Sends the message again whenever it is back; ends the loop after so many."""

    def __init__(self, events: int) -> None:
        self.left = events

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(MESSAGE)

    def data_received(self, data: bytes) -> None:
        self.left -= 1
        if self.left:
            self.transport.write(MESSAGE)
        else:
            self.transport.close()
            asyncio.get_running_loop().stop()


def echo_protocol(kind: str) -> type[asyncio.BaseProtocol]:
    """The server's side: an echo on leases or on bytes."""
    import headrace

    class LeaseEcho(headrace.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def lease_received(self, lease: headrace.Lease) -> None:
            self.transport.write(lease)

    class BytesEcho(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    return LeaseEcho if kind == "lease" else BytesEcho


def echo(engine: str, kind: str, events: int) -> None:
    """A round trip per event over a real connection: two sends, two receives, two callbacks.

    Both ends are on one loop, so every turn has exactly one completion, whatever the machine does.
    """
    import headrace

    loop = headrace.new_event_loop(engine)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()

    async def connect() -> None:
        await loop.connect_accepted_socket(echo_protocol(kind), server)
        await loop.create_connection(lambda: Client(events), sock=client)

    loop.create_task(connect())
    loop.run_forever()
    loop.close()


def call_soon(events: int) -> None:
    """A callback that schedules itself: a turn, a handle and a call per event."""
    import headrace

    loop = headrace.new_event_loop("epoll")
    left = events

    def again() -> None:
        nonlocal left
        left -= 1
        if left:
            loop.call_soon(again)
        else:
            loop.stop()

    loop.call_soon(again)
    loop.run_forever()
    loop.close()


def timers(events: int) -> None:
    """A timer that is set and cancelled per event."""
    import headrace

    loop = headrace.new_event_loop("epoll")
    for _ in range(events):
        loop.call_later(60, int).cancel()
    loop.close()


WORKLOADS: dict[str, Callable[[int], None]] = {
    "echo-epoll-lease": lambda events: echo("epoll", "lease", events),
    "echo-epoll-bytes": lambda events: echo("epoll", "bytes", events),
    "echo-uring-lease": lambda events: echo("uring", "lease", events),
    "call-soon": call_soon,
    "timers": timers,
}


def run_workload(name: str, events: int) -> int:
    """The part that runs under valgrind."""
    from headrace.errors import EngineUnavailable

    gc.disable()  # when it runs depends on what was imported
    try:
        WORKLOADS[name](events)
    except EngineUnavailable as error:
        print(error, file=sys.stderr)
        return NOT_HERE
    return 0


# ---- counting -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """Instructions of one run."""

    modules: int
    total: int


class NotHereError(RuntimeError):
    """The engine of a workload can't run on this machine: no figure, and no failure."""


class CountingError(RuntimeError):
    """A workload couldn't be run or counted; the text says why."""


def count(workload: str, events: int) -> Count:
    """Runs a workload under callgrind."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "callgrind.out"
        command = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={output}", "--error-exitcode=99",
            sys.executable, "-m", "bench.callgrind", "--run", workload, str(events),
        ]  # fmt: skip
        # One seed for hashes: the same dicts collide in the same way, every time.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("HEADRACE_ENGINE", None)
        try:
            finished = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CountingError(f"{workload} didn't end in {RUN_TIMEOUT} s") from error
        if finished.returncode == NOT_HERE:
            raise NotHereError(f"{workload}: left out: {finished.stderr.splitlines()[-1]}")
        if finished.returncode:
            raise CountingError(f"{workload} failed under valgrind:\n{finished.stderr[-2000:]}")
        return parse(output.read_text(errors="replace"))


def parse(profile: str) -> Count:
    """Sums a callgrind profile: every line's own cost, by the object file it lies in.

    The format (valgrind's manual, "Callgrind Format Specification"): ``ob=(1) /path`` names an object and gives it
    a number, ``ob=(1)`` means it again; ``calls=`` is followed by one line with the cost of the callee, which is
    counted where the callee stands.
    """
    names: dict[str, str] = {}
    modules = total = 0
    inside = False
    skip_next = False
    for line in profile.splitlines():
        if line.startswith("ob="):
            number, _, name = line[3:].partition(" ")
            if name:
                names[number] = name
            inside = bool(MODULES.search(names[number]))
        elif line.startswith(("cob=", "cobject=")):
            number, _, name = line.partition("=")[2].partition(" ")
            if name:
                names[number] = name
        elif line.startswith("calls="):
            skip_next = True
        elif line[:1].isdigit() or line[:1] in "+-*":
            if skip_next:
                skip_next = False
                continue
            _, _, cost_text = line.partition(" ")
            cost = int(cost_text or 0)  # trailing zeros are left out
            total += cost
            modules += cost if inside else 0
    return Count(modules, total)


def per_event(workload: str) -> dict[str, float]:
    """What one event of a workload costs, in instructions."""
    few, many = count(workload, FEW), count(workload, MANY)
    events = MANY - FEW
    return {
        "modules": round((many.modules - few.modules) / events, 1),
        "total": round((many.total - few.total) / events, 1),
    }


def count_all(workloads: list[str]) -> dict[str, dict[str, float]]:
    """The counts of those workloads that can run here."""
    counted = {}
    for name in workloads:
        if name not in WORKLOADS:
            raise CountingError(f"no workload {name!r}: {', '.join(WORKLOADS)}")
        try:
            counted[name] = per_event(name)
        except NotHereError as error:
            print(error, file=sys.stderr)
    if not counted:
        raise CountingError("nothing could be counted")
    return counted


# ---- judging --------------------------------------------------------------------------------------------------


def compare(counted: dict[str, dict[str, float]], expected: dict[str, Any]) -> list[str]:
    """What is dearer than expected, in words."""
    tolerance = expected.get("tolerance", TOLERANCE)
    worse = []
    for workload, counts in counted.items():
        known = expected.get("workloads", {}).get(workload)
        if known is None:
            print(f"{workload}: no expectation yet; --update writes one", file=sys.stderr)
            continue
        change = counts["modules"] / known["modules"] - 1
        if change > tolerance:
            worse.append(
                f"{workload}: {counts['modules']:g} instructions per event, {change:+.1%} on {known['modules']:g}"
            )
        elif change < -tolerance:
            print(f"{workload}: cheaper than expected, {change:+.1%}; --update keeps it so", file=sys.stderr)
    return worse


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.callgrind",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="which ones (%(default)s)")
    parser.add_argument("--update", action="store_true", help="write the counts to instructions.json")
    parser.add_argument("--run", nargs=2, metavar=("WORKLOAD", "EVENTS"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    arguments = parse_arguments(words)
    if arguments.run:
        return run_workload(arguments.run[0], int(arguments.run[1]))
    if not shutil.which("valgrind"):
        print("needs valgrind (Debian: apt install valgrind)", file=sys.stderr)
        return 2
    expected: dict[str, Any] = (
        json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {"tolerance": TOLERANCE, "workloads": {}}
    )
    try:
        counted = count_all(arguments.workloads.split(","))
    except CountingError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(counted, indent=2))
    if arguments.update:
        expected["workloads"].update(counted)
        EXPECTED.write_text(json.dumps(expected, indent=2) + "\n")
        return 0
    worse = compare(counted, expected)
    for line in worse:
        print(line, file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
