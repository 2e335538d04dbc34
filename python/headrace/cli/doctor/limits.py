"""Limits of the system that a server meets: descriptors, queues, ports, and what its control group allows."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Iterable
from pathlib import Path

from headrace.cli import units
from headrace.cli.doctor.finding import Finding, ok, skip, warn
from headrace.cli.doctor.options import DoctorOptions

__all__ = ["control_group", "group_limits", "network", "open_files", "system_files"]

# Of a process's descriptors: the rest is for files, pipes, and peers of the server's own.
SHARE = 0.8
# What a worker needs at least: a loop's pool may grow to 64 MiB, and an interpreter with its modules is as large.
WORKER_MEMORY = 128 * 1024 * 1024


def number(name: str, position: int = 0) -> int | None:
    """A number of a sysctl's; None where the kernel, or a sandbox, doesn't show it."""
    try:
        return int(Path("/proc/sys", name.replace(".", "/")).read_text().split()[position])
    except OSError:
        return None


# ---- descriptors -----------------------------------------------------------------------------------------------


def open_files(options: DoctorOptions) -> Iterable[Finding]:
    """RLIMIT_NOFILE: a connection is a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    if soft == infinite:
        yield ok("open-files", "unlimited", soft=None, hard=None, connections=None)
        return
    room = int(soft * SHARE)
    values = {"soft": soft, "hard": None if hard == infinite else hard, "connections": room}
    found = (
        f"{soft:,} a process (at most {'unlimited' if hard == infinite else f'{hard:,}'}): "
        f"room for {room:,} connections, with {1 - SHARE:.0%} for everything else"
    )
    if room >= options.connections:
        yield ok("open-files", found, **values)
        return
    needed = math.ceil(options.connections / SHARE)
    advice = f"for {options.connections:,} connections: LimitNOFILE={needed} in a systemd unit, or ulimit -n {needed}"
    if hard != infinite and hard < needed:
        advice += f" after a line '* - nofile {needed}' in /etc/security/limits.conf"
    ceiling = number("fs.nr_open")
    if ceiling is not None and ceiling < needed:
        advice += f"; before that, sysctl fs.nr_open={needed} (it's {ceiling:,})"
    yield warn("open-files", found, advice, **values)


def system_files(options: DoctorOptions) -> Iterable[Finding]:
    """fs.file-max: of all processes together."""
    used, most = number("fs.file-nr"), number("fs.file-nr", 2)
    if used is None or most is None:
        yield skip("system-files", "not checked: fs.file-nr isn't shown here")
        return
    found = (
        f"{used:,} files are open on the whole system, of {most:,}" if most < 2**62 else f"{used:,}, no limit"
    )
    if most - used >= options.connections:
        yield ok("system-files", found, used=used, most=most)
    else:
        wanted = used + 2 * options.connections
        yield warn("system-files", found, f"sysctl fs.file-max={wanted}", used=used, most=most)


# ---- the network -----------------------------------------------------------------------------------------------


def network(options: DoctorOptions) -> Iterable[Finding]:
    """Queues of a listener, and the ports for connections of our own making."""
    backlog = options.backlog
    yield at_least(
        "accept-queue",
        "net.core.somaxconn",
        backlog,
        f"connections that wait to be accepted, a listener; backlog={backlog:,}",
    )
    yield at_least(
        "syn-queue",
        "net.ipv4.tcp_max_syn_backlog",
        backlog,
        f"connections whose handshake isn't over, a listener; backlog={backlog:,}",
    )
    first, last = number("net.ipv4.ip_local_port_range"), number("net.ipv4.ip_local_port_range", 1)
    if first is None or last is None:
        yield skip("local-ports", "not checked: net.ipv4.ip_local_port_range isn't shown here")
        return
    ports = last - first + 1
    found = f"{ports:,} ({first} to {last}): as many connections to one address and port of another server"
    if ports >= options.connections:
        yield ok("local-ports", found, ports=ports)
    else:
        advice = "only for clients and proxies: sysctl net.ipv4.ip_local_port_range='1024 65535', or more addresses"
        yield warn("local-ports", found, advice, ports=ports)


def at_least(check: str, name: str, wanted: int, meaning: str) -> Finding:
    value = number(name)
    if value is None:
        return skip(check, f"not checked: {name} isn't shown here")
    found = f"{name}={value:,}: {meaning}"
    if value >= wanted:
        return ok(check, found, value=value)
    return warn(check, found, f"sysctl {name}={wanted}", value=value)


# ---- the control group -----------------------------------------------------------------------------------------


def control_group(options: DoctorOptions) -> Iterable[Finding]:
    """Limits that a container or a systemd unit has set (cgroup v2)."""
    processors = len(os.sched_getaffinity(0))
    own = [
        line.removeprefix("0::")
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::")
    ]
    mount = Path("/sys/fs/cgroup")
    if not own or not (mount / "cgroup.controllers").exists():
        yield skip(
            "processors", f"{processors}; a quota isn't checked: no cgroup v2 here", processors=processors
        )
        yield skip("memory", "not checked: no cgroup v2 here")
        return
    yield from group_limits(mount, own[0], processors)


def group_limits(mount: Path, own: str, processors: int) -> Iterable[Finding]:
    """The tightest limits from the group ``own`` up to the root of what is mounted."""
    folders = [mount / own.strip("/")]
    while folders[-1] != mount:
        folders.append(folders[-1].parent)
    quota = tightest(folders, "cpu.max", quota_of)
    if quota is None:
        yield ok("processors", f"{processors}, without a quota", processors=processors, quota=None)
    elif quota >= processors:
        yield ok("processors", f"{processors}, a quota of {quota:g}", processors=processors, quota=quota)
    else:
        workers = max(1, int(quota))
        yield warn(
            "processors",
            f"{processors} are visible, and the group's quota is {quota:g}: all stop when it's used up",
            f"run {workers} worker{'s' if workers > 1 else ''}, not one a processor; or raise cpu.max (CPUQuota=)",
            processors=processors,
            quota=quota,
        )
    memory = tightest(folders, "memory.max", bytes_of)
    if memory is None:
        yield ok("memory", "no limit on the group", memory=None)
        return
    memory = int(memory)
    found = f"the group may have {units.format_size(memory)}"
    workers = max(1, min(processors, int(quota) if quota is not None else processors))
    wanted = workers * WORKER_MEMORY
    if memory >= wanted:
        yield ok("memory", found, memory=memory)
    else:
        advice = (
            f"{units.format_size(wanted)} for {workers} worker{'s' if workers > 1 else ''} (each one's receive pool "
            "may grow to 64 MiB): raise memory.max (MemoryMax=), or give loops a smaller BufferPool(maximum=)"
        )
        yield warn("memory", found, advice, memory=memory)


def tightest(folders: Iterable[Path], name: str, parse: Callable[[str], float | None]) -> float | None:
    found = []
    for folder in folders:
        try:
            value = parse((folder / name).read_text())
        except FileNotFoundError:  # the root has no limits, and a controller may be off
            continue
        if value is not None:
            found.append(value)
    return min(found, default=None)


def quota_of(text: str) -> float | None:
    """``"150000 100000"`` is one processor and a half."""
    quota, period = text.split()
    return None if quota == "max" else int(quota) / int(period)


def bytes_of(text: str) -> float | None:
    return None if text.strip() == "max" else int(text)
