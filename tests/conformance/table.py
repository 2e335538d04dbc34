"""Writes the table of docs/conformance.md from the results of tests/conformance/run.py.

    python tests/conformance/table.py RESULT.json...

Each file is what ``run.py --json`` wrote: one Python version on one engine. The table replaces what is between the
markers in docs/conformance.md. All of them make one table, so all have to be given: after
.ci/run they are build/ci/conformance-*.json. Nothing is written, and the exit status is 1, if a file isn't of a whole
run or they are of different kernels.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs/conformance.md"
BEGIN = "<!-- table: written by tests/conformance/table.py -->\n"
END = "<!-- end of the table -->\n"
# Expected failures are CPython's own statement about its tests; a crash of the worker is an error.
COLUMNS = {
    "pass": ("pass", "xfail"),
    "skip": ("skip",),
    "fail": ("fail",),
    "error": ("error", "crash"),
    "timeout": ("timeout",),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One Python version on one engine."""

    python: str
    engine: str
    kernel: str
    date: datetime.date
    suites: dict[str, Any]

    @property
    def minor(self) -> tuple[int, ...]:
        return tuple(map(int, self.python.split(".")[:2]))

    def counts(self, suite: str) -> collections.Counter[str]:
        return collections.Counter(test["outcome"] for test in self.suites[suite]["tests"])

    def cell(self, suite: str) -> str:
        """pass / skip / fail / error / timeout; a dash where the interpreter has no such suite yet."""
        counts = self.counts(suite)
        return numbers(counts) if counts else "-"

    def total(self) -> collections.Counter[str]:
        return sum((self.counts(suite) for suite in self.suites), collections.Counter[str]())

    def turns(self) -> int:
        return sum(suite["turns"].get(self.engine, 0) for suite in self.suites.values())


def numbers(counts: collections.Counter[str]) -> str:
    return " / ".join(str(sum(counts[outcome] for outcome in outcomes)) for outcomes in COLUMNS.values())


def read(path: Path, suites: set[str]) -> Run:
    content = json.loads(path.read_text(encoding="utf-8"))
    if missing := suites - set(content["suites"]):
        raise ValueError(f"{path}: not a whole run, it lacks {', '.join(sorted(missing))}")
    return Run(
        content["python"],
        content["factory"].rpartition(":")[2],
        content["kernel"].partition("-")[0],  # the rest is the distribution's
        datetime.date.fromisoformat(content["date"]),
        content["suites"],
    )


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def table(runs: list[Run]) -> str:
    """The text between the markers."""
    kernels = {run.kernel for run in runs}
    if len(kernels) > 1:
        raise ValueError(f"results of different kernels can't share a table: {', '.join(sorted(kernels))}")
    runs = sorted(runs, key=lambda run: (run.minor, run.engine != "uring"))
    date = max(run.date for run in runs)
    lines = [
        f"Linux {kernels.pop()}, {date:%-d %B %Y}. Each cell: {' / '.join(COLUMNS)}.\n\n",
        row(["suite", *(f"{run.python} `{run.engine}`" for run in runs)]),
        row(["---"] * (len(runs) + 1)),
    ]
    lines += [row([f"`{suite}`", *(run.cell(suite) for run in runs)]) for suite in runs[0].suites]
    lines.append(row(["**all**", *(f"**{numbers(run.total())}**" for run in runs)]))
    lines.append(row(["turns counted on the engine", *(f"{run.turns():,}" for run in runs)]))
    return "".join(lines)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write (%(default)s)")
    options = parser.parse_args(words)
    from run import SUITES

    try:
        text = table([read(path, set(SUITES)) for path in options.results])
        page = options.page.read_text(encoding="utf-8")
        before, begin, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{options.page}: the markers of the table are missing")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    options.page.write_text(before + begin + "\n" + text + "\n" + end + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
