"""A pytest plugin for CI: a test that is skipped because a part of the machine is missing fails.

``pytest -p parts`` with this folder on PYTHONPATH. Such skips have a reason that starts with "needs " (a
compiler, another user, a namespace), or come from ``importorskip``. A developer without the
part may skip; where everything is installed, a skip means that set-up has rotted and nobody would notice.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

MISSING = ("needs ", "could not import ")


def _missing(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """The reason of a skip that is about a missing part."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    assert isinstance(report.longrepr, tuple)
    reason = report.longrepr[2].removeprefix("Skipped: ")
    return reason if reason.startswith(MISSING) else None


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = _missing(report)
    if reason is not None:
        report.outcome = "failed"
        report.longrepr = f"skipped, and nothing may be missing here: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail(report)
    return report
