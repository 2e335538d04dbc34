"""What a check says, and how one is run: bounded in time, and its own failure is a finding like any other."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.cli.doctor.options import DoctorOptions

__all__ = ["Check", "Finding", "State", "fail", "look", "ok", "skip", "warn"]


class State(enum.StrEnum):
    """What a finding means; WARN and FAIL make the exit status 1."""

    OK = "ok"
    WARN = "warn"  # it works, with a limit or a risk; or nobody knows, because the check itself failed
    FAIL = "fail"  # what was asked for doesn't work, or isn't safe
    SKIP = "skip"  # not checked, and why


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report.

    ``check`` is its name, which stays the same from release to release; ``values`` are the figures for programs.
    """

    check: str
    state: State
    found: str
    advice: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def ok(check: str, found: str, **values: Any) -> Finding:
    return Finding(check=check, state=State.OK, found=found, values=values)


def skip(check: str, found: str, **values: Any) -> Finding:
    return Finding(check=check, state=State.SKIP, found=found, values=values)


def warn(check: str, found: str, advice: str, **values: Any) -> Finding:
    return Finding(check=check, state=State.WARN, found=found, advice=advice, values=values)


def fail(check: str, found: str, advice: str, **values: Any) -> Finding:
    return Finding(check=check, state=State.FAIL, found=found, advice=advice, values=values)


@dataclass(frozen=True, slots=True)
class Check:
    """A row of the table of checks.

    ``find`` may give several findings; ``seconds`` is what it may take, for whatever it waits for.
    """

    name: str
    find: Callable[[DoctorOptions], Iterable[Finding]]
    seconds: float = 5.0


def look(check: Check, options: DoctorOptions) -> list[Finding]:
    """What a check finds. Never raises what the check raises, and never waits longer than it may take.

    On a thread of its own, because what hangs (a name server, a file system behind a network) can't be
    interrupted; a daemon, because nobody waits for it at the end.
    """
    found: list[Finding] = []
    finished = threading.Event()

    def work() -> None:
        try:
            found.extend(check.find(options))
        except Exception as error:
            found.append(broken(check, f"{type(error).__name__}: {error}"))
        finished.set()

    threading.Thread(target=work, name=f"doctor-{check.name}", daemon=True).start()
    if finished.wait(check.seconds):
        return found
    # What it had found by then stands; a copy, because the thread may go on.
    return [*found, broken(check, f"it didn't end within {check.seconds:g} s")]


def broken(check: Check, why: str) -> Finding:
    return warn(
        check.name, f"this check itself failed: {why}", "look into it by hand; everything else was checked"
    )
