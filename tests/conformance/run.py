"""CPython's own asyncio tests, run over any event loop.

    python tests/conformance/run.py factories:uring --known tests/conformance/known.txt
    python tests/conformance/run.py asyncio:SelectorEventLoop --suite events

CPython writes most of its event-loop tests as mixins with one hook that makes the loop; this file subclasses
each mixin with the factory it was given. The rest call ``asyncio.new_event_loop()``, so the default policy is
taught to use the factory too. known.txt names the tests that look inside ``BaseEventLoop`` or mock
its private methods: they say nothing of another implementation.

A run is good when every test that isn't in ``--known`` passed, when as many ran as ``--compare`` says, and,
for the factories of factories.py, when every turn ran on the engine that was forced.
"""

from __future__ import annotations

import asyncio
import datetime
import importlib
import json
import platform
import signal
import subprocess
import sys
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import looptest

PACKAGE = "test.test_asyncio."
HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build"
Factory = Callable[[], Any]
Cases = list[type[unittest.TestCase]]


def install(factory: Factory) -> Factory:
    """Makes ``asyncio.new_event_loop`` and unittest's runner use ``factory``."""
    if factory in (asyncio.new_event_loop, asyncio.DefaultEventLoopPolicy):
        factory = asyncio.SelectorEventLoop
    policy: Any = asyncio.DefaultEventLoopPolicy
    original_factory = policy._loop_factory

    def make() -> Any:
        # A factory may itself call asyncio.new_event_loop().
        policy._loop_factory = original_factory
        try:
            return factory()
        finally:
            policy._loop_factory = staticmethod(make)

    policy._loop_factory = staticmethod(make)
    utils = load("utils")
    original = utils.TestCase.close_loop

    def close_loop(loop: Any) -> None:
        # CPython's version reads a private attribute of BaseEventLoop.
        if hasattr(loop, "_default_executor"):
            original(loop)
        elif not loop.is_closed():
            if not loop.is_running():
                loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    utils.TestCase.close_loop = staticmethod(close_loop)
    return factory


def load(name: str) -> Any:
    return importlib.import_module(PACKAGE + name)


def create_event_loop_case(module: str, *mixins: str) -> Callable[[Factory], Cases]:
    """A test case from mixins whose hook is ``create_event_loop()``."""

    def build(factory: Factory) -> Cases:
        source = load(module)
        bases = tuple(getattr(source, mixin) for mixin in mixins if hasattr(source, mixin))
        hook = {"create_event_loop": lambda self: factory()}
        return [type("LoopTests", (*bases, load("utils").TestCase), hook)]

    return build


def new_loop_case(module: str, *mixins: str) -> Callable[[Factory], Cases]:
    """A test case from mixins whose hook is ``new_loop()``."""

    def build(factory: Factory) -> Cases:
        source = load(module)
        bases = tuple(getattr(source, mixin) for mixin in mixins)
        hook = {"new_loop": lambda self: factory()}
        return [type("LoopTests", (*bases, unittest.TestCase), hook)]

    return build


def start_server_case(factory: Factory) -> Cases:
    hook = {"new_loop": lambda self: factory()}
    return [type("LoopTests", (load("test_server").SelectorStartServerTests,), hook)]


def policy_case(module: str, *names: str) -> Callable[[Factory], Cases]:
    """Whole test cases which make their loop through the policy."""

    def build(factory: Factory) -> Cases:
        source = load(module)
        if names:
            return [getattr(source, name) for name in names if hasattr(source, name)]
        return [
            case
            for case in vars(source).values()
            if isinstance(case, type)
            and issubclass(case, unittest.TestCase)
            and case.__module__ == source.__name__
        ]

    return build


def selector_case(module: str, *names: str) -> Callable[[Factory], Cases]:
    """Whole test cases which call ``asyncio.SelectorEventLoop()``."""

    def build(factory: Factory) -> Cases:
        asyncio.SelectorEventLoop = factory  # type: ignore[assignment]
        return policy_case(module, *names)(factory)

    return build


def subprocess_case(factory: Factory) -> Cases:
    source = load("test_subprocess")
    utils = load("utils")

    def setUp(self: Any) -> None:
        super(case, self).setUp()
        self.loop = factory()
        self.set_event_loop(self.loop)
        own = isinstance(self.loop, asyncio.SelectorEventLoop)
        if own and hasattr(asyncio, "ThreadedChildWatcher"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                watcher = asyncio.get_event_loop_policy().get_child_watcher()
                watcher.attach_loop(self.loop)

    case: Any = type("LoopTests", (source.SubprocessMixin, utils.TestCase), {"setUp": setUp})
    return [case]


def asyncgen_case(factory: Factory) -> Cases:
    source: Any = importlib.import_module("test.test_asyncgen")
    return [source.AsyncGenAsyncioTest]


SUITES: dict[str, Callable[[Factory], Cases]] = {
    # The event loop proper: these are the acceptance tests.
    "events": create_event_loop_case("test_events", "EventLoopTestsMixin", "SubprocessTestsMixin"),
    "sock_lowlevel": create_event_loop_case("test_sock_lowlevel", "BaseSockTestsMixin"),
    "sendfile": create_event_loop_case("test_sendfile", "SendfileTestsBase"),
    "buffered_proto": new_loop_case("test_buffered_proto", "BaseTestBufferedProtocol"),
    "server": start_server_case,
    "server_close": policy_case("test_server", "TestServer2"),
    "server_unix_cleanup": policy_case("test_server", "UnixServerCleanupTests"),
    "sslproto_start_tls": new_loop_case("test_sslproto", "BaseStartTLS"),
    "ssl": policy_case("test_ssl", "TestSSL"),
    "streams": policy_case("test_streams", "StreamTests"),
    "subprocess": subprocess_case,
    "unix_functional": policy_case("test_unix_events", "TestFunctional"),
    "unix_fork": policy_case("test_unix_events", "TestFork"),
    "unix_sockets": selector_case("test_unix_events", "SelectorEventLoopUnixSocketTests"),
    "running_loop": policy_case("test_base_events", "RunningLoopTests"),
    "eager_tasks": policy_case("test_eager_task_factory"),
    "asyncgen": asyncgen_case,
    "context": policy_case("test_context"),
    # What stands on the loop: a cheap check that nothing above it broke.
    "runners": policy_case("test_runners"),
    "threads": policy_case("test_threads"),
    "futures2": policy_case("test_futures2"),
    "locks": policy_case("test_locks"),
    "queues": policy_case("test_queues"),
    "taskgroups": policy_case("test_taskgroups"),
    "timeouts": policy_case("test_timeouts"),
    "waitfor": policy_case("test_waitfor"),
    "tasks": policy_case(
        "test_tasks",
        "RunCoroutineThreadsafeTests",
        "SleepTests",
        "CompatibilityTests",
        "CTask_Future_Tests",
        "CCurrentLoopTests",
    ),
}


def work(options: Any) -> None:
    """One suite, in a worker process."""
    module = importlib.import_module(options.factory.partition(":")[0])
    factory = install(looptest.resolve(options.factory))
    try:
        cases = SUITES[options.worker](factory)
    except ModuleNotFoundError as exc:  # a suite that is newer than this Python
        if not (exc.name or "").startswith("test.test_asyncio."):
            raise
        cases = []
    looptest.work(
        cases, options.select or ["*"], set(json.loads(options.done)), getattr(module, "counts", None)
    )


def command(factory: str) -> list[str]:
    return [sys.executable, "-Wignore::DeprecationWarning", __file__, factory]


def baseline_path(name: str) -> Path:
    return HERE / f"baseline-{name}-{sys.version_info.major}.{sys.version_info.minor}.json"


def baseline(name: str, jobs: int) -> dict[str, Any]:
    """The recorded baseline; where it is of another patch level than this Python, asyncio is run first."""
    path, made = baseline_path(name), BUILD / f"baseline-{name}-{platform.python_version()}.json"
    for candidate in (path, made):
        if candidate.exists():
            recorded: dict[str, Any] = json.loads(candidate.read_text(encoding="utf-8"))
            if recorded["python"] == platform.python_version():
                return recorded
    if name != "asyncio":
        raise SystemExit(f"{path.name}: not recorded for Python {platform.python_version()}")
    print(f"no baseline of Python {platform.python_version()}: running asyncio itself first", flush=True)
    argv = command("asyncio:SelectorEventLoop")
    results = list(looptest.run_suites(list(SUITES), argv, timeout=40.0, jobs=jobs))
    BUILD.mkdir(exist_ok=True)
    save(made, record(results))
    return record(results)


def record(results: list[looptest.Result]) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "suites": {result.suite: looptest.summary(result) for result in results},
    }


def save(path: str | Path, content: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def judge(options: Any, results: list[looptest.Result], failures: list[str]) -> list[str]:
    """Everything that makes this run a bad one."""
    complaints = [f"{name}: failed" for name in failures]
    if options.compare and not options.select:
        complaints += looptest.compare(results, options.baseline)
    forced = options.forced
    if forced:
        wrong, idle = looptest.check_engine(results, forced)
        complaints += wrong
        turns = sum(result.turns[forced] for result in results)
        print(f"engine {forced}: {turns} turns; suites in which no loop ran: {', '.join(idle) or 'none'}")
    return complaints


def main() -> int:
    # A shell's background job ignores SIGINT, and so would the workers, which interrupt themselves.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    options = looptest.parser(__doc__ or "").parse_args()
    if options.list:
        print("\n".join(SUITES))
        return 0
    if options.worker:
        work(options)
        return 0
    if subprocess.run([sys.executable, "-c", "import test.test_asyncio"], check=False).returncode:
        raise SystemExit("needs CPython's own test suite (Debian: libpython3-testsuite)")
    module, _, factory = options.factory.partition(":")
    options.forced = getattr(importlib.import_module(module), "FORCED", {}).get(factory)
    if options.compare:
        options.baseline = baseline(options.compare, options.jobs)
    argv = command(options.factory)
    for pattern in options.select:
        argv += ["--select", pattern]
    suites = options.suite or list(SUITES)
    known = looptest.read_known(options.known)
    running = looptest.run_suites(suites, argv, options.timeout, options.jobs)
    results, failures = looptest.report(running, known, options.verbose)
    complaints = judge(options, results, failures)
    if options.record:
        save(baseline_path(options.record), record(results))
    if options.json:
        save(
            options.json,
            {
                "python": platform.python_version(),
                "kernel": platform.release(),
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "factory": options.factory,
                "complaints": complaints,
                "suites": {
                    result.suite: {"turns": result.turns, "made": result.made, "tests": result.tests}
                    for result in results
                },
            },
        )
    ran = sum(len(result.tests) for result in results)
    print(
        f"{options.factory} on Python {platform.python_version()}: {ran} tests, {len(complaints)} complaints"
    )
    print("\n".join(complaints), end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
