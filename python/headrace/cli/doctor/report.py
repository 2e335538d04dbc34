"""Findings as text and as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from headrace import __version__
from headrace.cli.doctor.finding import Finding, State

__all__ = ["as_json", "as_text", "status_of"]

NAME_WIDTH = 21
WIDEST = 110


def status_of(findings: Sequence[Finding]) -> int:
    """0: nothing limits a server, or couldn't be told; else 1."""
    return int(any(finding.state in (State.WARN, State.FAIL) for finding in findings))


def as_text(groups: Mapping[str, Sequence[Finding]]) -> str:
    """The report for people: a paragraph for each group that has findings."""
    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    lines = [f"headrace {__version__} doctor"]
    for title, findings in groups.items():
        if findings:
            lines += ["", title]
        for finding in findings:
            head = f"  {finding.state:<4}  {finding.check:<{NAME_WIDTH}}"
            lines += wrapped(finding.found, head, width)
            if finding.advice:
                lines += wrapped(finding.advice, " " * (len(head) - 3) + "-> ", width)
    everything = [finding for findings in groups.values() for finding in findings]
    counts = [f"{sum(finding.state is state for finding in everything)} {state}" for state in State]
    verdict = "something limits a server here" if status_of(everything) else "all good"
    return "\n".join([*lines, "", f"{verdict}: {', '.join(counts)}"])


def wrapped(text: str, head: str, width: int) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        max(width, len(head) + 30),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def as_json(groups: Mapping[str, Sequence[Finding]]) -> str:
    """The report for programs; docs/doctor.md has the format."""
    everything = [(title, finding) for title, findings in groups.items() for finding in findings]
    document: dict[str, Any] = {
        "headrace": __version__,
        "python": sys.version.split()[0],
        "status": status_of([finding for _, finding in everything]),
        "findings": [
            {
                "group": title,
                "check": finding.check,
                "state": finding.state.value,
                "found": finding.found,
                "advice": finding.advice,
                "values": dict(finding.values),
            }
            for title, finding in everything
        ],
    }
    return json.dumps(document, indent=2)
