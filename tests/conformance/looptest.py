"""Runs unittest suites in worker processes and adds up what came of them.

A worker prints one JSON line per event, so a hang or a crash costs only the test that caused it: the parent
notes it, ends the worker's process group and starts a new worker on the tests that are left.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
import unittest
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

OUTCOMES = ("pass", "skip", "xfail", "fail", "error", "timeout", "crash")
GOOD = {"pass", "skip", "xfail"}
DETAIL_CHARACTERS = 2500
ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]


# In the worker.


def resolve(spec: str) -> Callable[[], Any]:
    """The loop factory that ``module:factory`` names."""
    module, _, attribute = spec.partition(":")
    if not attribute:
        raise SystemExit(f"expected module:factory, got {spec!r}")
    target = importlib.import_module(module)
    for part in attribute.split("."):
        target = getattr(target, part)
    return target  # type: ignore[return-value]


class Reporter(unittest.TestResult):
    """Writes a JSON line when a test starts and when it ends."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.out = stream
        self.outcome: str | None = None
        self.detail = ""
        self.began = 0.0

    def emit(self, **event: Any) -> None:
        self.out.write(json.dumps(event) + "\n")
        self.out.flush()

    def note(self, outcome: str, detail: str = "") -> None:
        """The first thing that isn't a pass is the test's outcome."""
        if self.outcome in (None, "pass"):
            self.outcome, self.detail = outcome, detail

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.outcome, self.detail = None, ""
        self.began = time.monotonic()
        self.emit(start=test.id())

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self.emit(
            end=test.id(),
            outcome=self.outcome or "pass",
            detail=self.detail,
            seconds=round(time.monotonic() - self.began, 3),
        )

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.note("pass")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.note("skip", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: ExceptionInfo) -> None:
        self.note("xfail")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self.note("fail", "unexpected success")

    def addFailure(self, test: unittest.TestCase, err: ExceptionInfo) -> None:
        self.note("fail", self.describe(err))

    def addError(self, test: unittest.TestCase, err: ExceptionInfo) -> None:
        if not hasattr(test, "_testMethodName"):  # setUpModule, setUpClass: there is no start or stop
            self.emit(end=test.id(), outcome="error", seconds=0, detail=self.describe(err))
            return
        self.note("error", self.describe(err))

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        if err is None:
            return
        self.note("fail" if issubclass(err[0], test.failureException) else "error", self.describe(err))

    @staticmethod
    def describe(err: ExceptionInfo) -> str:
        return "".join(traceback.format_exception(*err))[-DETAIL_CHARACTERS:]


def flatten(suite: Iterable[Any]) -> Iterator[unittest.TestCase]:
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from flatten(item)
        else:
            yield item


def work(
    cases: Iterable[type[unittest.TestCase]],
    select: Sequence[str],
    skip: set[str],
    counts: Callable[[], dict[str, Any]] | None,
) -> None:
    """Runs the tests of ``cases`` that ``select`` matches and ``skip`` lacks; then reports ``counts()``."""
    loader = unittest.TestLoader()
    chosen = unittest.TestSuite()
    for case in cases:
        for test in flatten(loader.loadTestsFromTestCase(case)):
            if test.id() not in skip and any(fnmatch.fnmatchcase(test.id(), pattern) for pattern in select):
                chosen.addTest(test)
    # What the tests print must not mix with the events.
    with os.fdopen(os.dup(1), "w") as events:
        os.dup2(2, 1)
        reporter = Reporter(events)
        chosen.run(reporter)
        if counts is not None:
            reporter.emit(counts=counts())


# In the parent.


@dataclasses.dataclass
class Result:
    """What came of one suite."""

    suite: str
    seconds: float = 0.0
    tests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    made: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    turns: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    workers: int = 0
    counted: int = 0  # workers that lived to report their counts

    def outcomes(self) -> collections.Counter[str]:
        return collections.Counter(test["outcome"] for test in self.tests)

    def short(self, test: dict[str, Any]) -> str:
        return f"{self.suite}.{test['end'].rpartition('.')[2]}"


class Workers:
    """The process groups that run at the moment, so that none outlives the runner."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.groups: set[int] = set()
        self.closed = False

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with self.lock:
            if self.closed:
                raise RuntimeError("the runner is ending")
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            self.groups.add(child.pid)
            return child

    def end(self, child: subprocess.Popen[bytes]) -> int:
        """Ends what is left of the child's group (tests start processes too). Returns the child's status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
        with self.lock:
            self.groups.discard(child.pid)
        return code

    def close(self) -> None:
        with self.lock:
            self.closed = True
            for group in self.groups:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)


def events_of(child: subprocess.Popen[bytes], timeout: float) -> Iterator[dict[str, Any] | None]:
    """The worker's events until it closes its end; None when nothing came for ``timeout`` seconds."""
    assert child.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout):
                yield None
                return
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)


def run_worker(workers: Workers, argv: Sequence[str], timeout: float, done: set[str], result: Result) -> bool:
    """One worker on the tests that are not ``done``. True when another must go on with the rest."""
    child = workers.start([*argv, "--done", json.dumps(sorted(done))])
    assert child.stdout is not None
    result.workers += 1
    errors: list[bytes] = []
    drain = threading.Thread(target=lambda: errors.append(child.stderr.read()), daemon=True)  # type: ignore[union-attr]
    drain.start()
    running: str | None = None
    hung = False
    for event in events_of(child, timeout):
        if event is None:
            hung = True
        elif "start" in event:
            running = event["start"]
        elif "end" in event:
            running = None
            done.add(event["end"])
            result.tests.append(event)
        else:
            result.counted += 1
            result.made.update(event["counts"]["made"])
            result.turns.update(event["counts"]["turns"])
    if not hung:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout)  # its exit handlers may take a moment
    code = workers.end(child)
    drain.join(5)
    child.stdout.close()
    tail = b"".join(errors)[-DETAIL_CHARACTERS:].decode("utf-8", "replace")
    if running is None and code == 0:
        return False
    if running is not None:
        done.add(running)
    result.tests.append(
        {
            "end": running or "<worker>",
            "outcome": "timeout" if hung else "crash",
            "detail": tail or f"worker exit status {code}",
            "seconds": timeout if hung else 0,
        }
    )
    return running is not None


def run_suite(workers: Workers, suite: str, argv: Sequence[str], timeout: float) -> Result:
    """One suite to its end, through as many workers as it takes."""
    result, done, began = Result(suite), set[str](), time.monotonic()
    while run_worker(workers, [*argv, "--worker", suite], timeout, done, result):
        pass
    result.seconds = time.monotonic() - began
    return result


def run_suites(suites: Sequence[str], argv: Sequence[str], timeout: float, jobs: int) -> Iterator[Result]:
    """Suites in the given order, ``jobs`` at a time. Ends every worker when it is left early."""
    workers = Workers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(run_suite, workers, suite, argv, timeout) for suite in suites]
            for future in futures:
                yield future.result()
        finally:
            workers.close()
            pool.shutdown(cancel_futures=True)


# Judging.


def read_known(path: str | None) -> list[str]:
    """The globs of ``suite.test`` that may fail, one a line, with comments after ``#``."""
    if path is None:
        return []
    lines = (line.split("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def summary(result: Result) -> dict[str, Any]:
    """How many tests a suite has and which it skips: what a baseline keeps."""
    return {
        "tests": len(result.tests),
        "skipped": sorted({result.short(test) for test in result.tests if test["outcome"] == "skip"}),
    }


def compare(results: Iterable[Result], baseline: dict[str, Any]) -> list[str]:
    """What was run less, or skipped more, than the baseline has it."""
    complaints = []
    for result in results:
        reference = baseline["suites"].get(result.suite)
        if reference is None:
            complaints.append(f"{result.suite}: not in the baseline")
            continue
        if len(result.tests) != reference["tests"]:
            complaints.append(
                f"{result.suite}: {len(result.tests)} tests, the baseline has {reference['tests']}"
            )
        newly = set(summary(result)["skipped"]) - set(reference["skipped"])
        complaints += [f"{name}: newly skipped" for name in sorted(newly)]
    return complaints


def check_engine(results: Iterable[Result], engine: str) -> tuple[list[str], list[str]]:
    """Complaints, and the suites in which no loop ran, if every turn was to run on ``engine``."""
    complaints, idle = [], []
    for result in results:
        if result.counted == 0:
            complaints.append(f"{result.suite}: no worker lived to tell which engine ran")
        others = {name: turns for name, turns in result.turns.items() if name != engine and turns}
        if others:
            complaints.append(f"{result.suite}: turns on another engine: {others}")
        if not result.turns[engine]:
            idle.append(result.suite)
    if not any(result.turns[engine] for result in results):
        complaints.append(f"not one turn ran on {engine}")
    return complaints, idle


def print_row(name: str, counts: collections.Counter[str], seconds: float | None, turns: str) -> None:
    cells = "".join(f"{counts[outcome]:>8}" for outcome in OUTCOMES)
    print(f"{name:22}{cells}{'' if seconds is None else f'{seconds:.1f}':>8}  {turns}", flush=True)


def parser(description: str) -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("factory", help="module:factory making a new loop")
    parse.add_argument("--suite", action="append", default=[], help="run only these suites (repeatable)")
    parse.add_argument("--select", action="append", default=[], help="glob over test ids (repeatable)")
    parse.add_argument("-j", "--jobs", type=int, default=1, help="suites at a time")
    parse.add_argument("--timeout", type=float, default=40.0, help="seconds one test may take")
    parse.add_argument("--known", help="file of suite.test globs that may fail")
    parse.add_argument(
        "--compare",
        metavar="NAME",
        help="fail if fewer tests run, or more are skipped, than in baseline-NAME-3.N.json "
        "(made first by running asyncio itself, if this Python has another patch level)",
    )
    parse.add_argument("--record", metavar="NAME", help="write baseline-NAME-3.N.json from this run")
    parse.add_argument("--json", help="write every result here")
    parse.add_argument("--list", action="store_true", help="name the suites")
    parse.add_argument("-v", "--verbose", action="store_true", help="whole tracebacks")
    parse.add_argument("--worker", help=argparse.SUPPRESS)
    parse.add_argument("--done", default="[]", help=argparse.SUPPRESS)
    return parse


def report(results: Iterable[Result], known: Sequence[str], verbose: bool) -> tuple[list[Result], list[str]]:
    """Prints a table as the results come in. Returns them and the failures that are not known."""
    print(f"{'suite':22}" + "".join(f"{outcome:>8}" for outcome in OUTCOMES) + f"{'s':>8}  turns")
    everything, total = [], collections.Counter[str]()
    for result in results:
        total.update(result.outcomes())
        turns = " ".join(f"{name}={count}" for name, count in sorted(result.turns.items()))
        print_row(result.suite, result.outcomes(), result.seconds, turns)
        everything.append(result)
    print_row("TOTAL", total, None, "")
    unknown = []
    for result in everything:
        for test in result.tests:
            if test["outcome"] in GOOD:
                continue
            name = result.short(test)
            expected = any(fnmatch.fnmatchcase(name, pattern) for pattern in known)
            if not expected:
                unknown.append(name)
            last = (test["detail"].strip().splitlines() or [""])[-1][:130]
            print(f"{'known ' if expected else ''}{test['outcome']:8}{name}\n        {last}")
            if verbose:
                print(test["detail"])
    return everything, unknown
