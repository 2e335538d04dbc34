"""The kernel, the engine that would run, and what io_uring gives here."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterable
from pathlib import Path

from headrace._uring import UringEngine
from headrace.cli import units
from headrace.cli.doctor.finding import Finding, fail, ok, skip, warn
from headrace.cli.doctor.options import DoctorOptions
from headrace.errors import EngineUnavailable
from headrace.loop import new_event_loop

__all__ = ["engines", "kernel", "locked_memory"]

# What docs/engines.md calls plenty: dozens of loops with rings of the default size.
PLENTY = 8 * 1024 * 1024
IPC_LOCK = 14  # the number of the capability that needs no RLIMIT_MEMLOCK

# By the names that UringEngine.features has.
FEATURES = {
    "incremental_buffers": "incremental buffers (Linux 6.12)",
    "receive_limit": "a limit on one receive (6.17)",
    "deferred_completions": "deferred completions (6.1)",
    "files": "files",
}


def kernel(options: DoctorOptions) -> Iterable[Finding]:
    """Only told: what counts is what works, which is tried."""
    release = os.uname().release
    yield ok("kernel", f"Linux {release}, {platform.machine()}", release=release)


def demanded(options: DoctorOptions) -> str:
    return options.engine or os.environ.get("HEADRACE_ENGINE", "")


def engines(options: DoctorOptions) -> Iterable[Finding]:
    """The engine as a loop chooses it, and io_uring itself."""
    wanted = demanded(options)
    try:
        name, reason = engine_of_a_loop(options.engine)
    except EngineUnavailable as error:
        advice = "change what it says, or don't demand an engine (--engine, HEADRACE_ENGINE)"
        yield fail("engine", f"{wanted} can't start: {error}", advice, engine=None, reason=str(error))
    else:
        values = {"engine": name, "reason": reason}
        if name == "uring" or wanted == "epoll":
            yield ok("engine", f"{name}: {reason}", **values)
        else:
            advice = (
                "epoll serves the same programs, for more processor time; what keeps io_uring away is below"
            )
            yield warn("engine", f"{name}: {reason}", advice, **values)
    yield skip("io_uring", "not checked: epoll is demanded") if wanted == "epoll" else io_uring()


def engine_of_a_loop(engine: str | None) -> tuple[str | None, str]:
    """What a loop takes, and why."""

    async def nothing() -> None:
        """Runs a loop once."""

    loop = new_event_loop(engine)
    try:
        loop.run_until_complete(nothing())
        return loop.engine_name, loop.engine_reason
    finally:
        loop.close()


def io_uring() -> Finding:
    """Whether a ring of ours starts, and what it found by trying."""
    engine = UringEngine()
    try:
        engine.start()
        features = engine.features
        engine.stop()
    except EngineUnavailable as error:
        return warn("io_uring", str(error), way_out(str(error)), available=False, reason=str(error))
    finally:
        engine.close()
    there = [text for name, text in FEATURES.items() if features[name]]
    missing = [text for name, text in FEATURES.items() if not features[name]]
    found = "multishot receive, " + ", ".join(there)
    if missing:
        found += "; without " + ", ".join(missing)
    disabled = disabled_for_others()
    if disabled:
        advice = (
            "if the server runs as another user: sysctl kernel.io_uring_disabled=0, or kernel.io_uring_group"
        )
        return warn("io_uring", f"{found}; {disabled}", advice, available=True, features=features)
    if not features["incremental_buffers"]:
        advice = "Linux 6.12 or newer fills large blocks piece by piece; here each receive takes 32 KiB"
        return warn("io_uring", found, advice, available=True, features=features)
    return ok("io_uring", found, available=True, features=features)


def disabled_for_others() -> str:
    """Root may use io_uring where the sysctl keeps others away from it."""
    try:
        level = Path("/proc/sys/kernel/io_uring_disabled").read_text().strip()
    except OSError:  # kernels before 6.6 have no such switch
        return ""
    if level == "0":
        return ""
    return f"but kernel.io_uring_disabled={level} keeps it from users without privileges"


def way_out(reason: str) -> str:
    """What to do, by the words that UringEngine has for it."""
    if "kernel.io_uring_disabled" in reason:
        return "sysctl kernel.io_uring_disabled=0 (1: only for root and the group kernel.io_uring_group)"
    if "EPERM" in reason:
        return (
            "allow io_uring_setup, io_uring_enter and io_uring_register: in a container by a seccomp profile of "
            "yours (docker run --security-opt seccomp=FILE), in a systemd unit by SystemCallFilter="
        )
    if "ENOSYS" in reason:
        return "a kernel with CONFIG_IO_URING, or a sandbox that doesn't hide it"
    if "RLIMIT_MEMLOCK" in reason:
        return "ulimit -l 8192; LimitMEMLOCK=8M in a systemd unit; docker run --ulimit memlock=8388608"
    if "RLIMIT_NOFILE" in reason:
        return "raise the limit of open files (ulimit -n)"
    return "Linux 6.0 or newer"


def locked_memory(options: DoctorOptions) -> Iterable[Finding]:
    """RLIMIT_MEMLOCK, which rings are charged to; counted by user, over all processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if demanded(options) == "epoll":
        yield skip("locked-memory", "not checked: epoll locks none")
        return
    values = {"soft": limit(soft), "hard": limit(hard)}
    shown = "unlimited" if values["soft"] is None else units.format_size(soft)
    if values["soft"] is None or soft >= PLENTY:
        yield ok("locked-memory", shown, **values)
    elif may_lock():
        yield ok("locked-memory", f"{shown}, which doesn't count for this user (CAP_IPC_LOCK)", **values)
    else:
        yield warn(
            "locked-memory",
            f"{shown}: loops may find too little for their rings, and fall back to epoll",
            "ulimit -l 8192; LimitMEMLOCK=8M in a systemd unit; docker run --ulimit memlock=8388608",
            **values,
        )


def limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def may_lock() -> bool:
    """Whether this process has CAP_IPC_LOCK."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> IPC_LOCK & 1)
    return False
