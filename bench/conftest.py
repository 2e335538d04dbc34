"""Selects, measures and reports; ``suite.py`` says how rounds and pytest-benchmark go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.chart import chart
from bench.judge import ROUNDS_FOR_VERDICT, judge
from bench.native.build import CompilerMissingError, build_directory, program
from bench.report import judgement_table, markdown, markdown_table
from bench.rounds import Row
from bench.suite import TEST_TIMEOUT, Board, current_settings, play_back

BOARD = pytest.StashKey[Board]()
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    raw = build_directory() / "raw.jsonl"
    config.stash[BOARD] = Board(current_settings(), raw)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A row of many peers takes longer than a unit test may."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only now is it known which peers -k has left of each row."""
    board = session.config.stash[BOARD]
    for item in session.items:
        params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
        if "row" in params and "peer" in params:
            board.select(params["row"], params["peer"])


def pytest_report_header(config: pytest.Config) -> str:
    settings = config.stash[BOARD].settings
    text = f"headrace bench: {settings.rounds} rounds of {settings.seconds:g} s for each peer and row"
    if settings.rounds < ROUNDS_FOR_VERDICT:
        text += f"; verdicts need {ROUNDS_FOR_VERDICT}: HEADRACE_BENCH=full"
    return text


@pytest.fixture(scope="session")
def board(pytestconfig: pytest.Config) -> Board:
    """The session's results."""
    board = pytestconfig.stash[BOARD]
    board.raw.parent.mkdir(parents=True, exist_ok=True)
    board.raw.unlink(missing_ok=True)
    return board


@pytest.fixture(scope="session")
def native() -> None:
    """The C programs, compiled; without a compiler nothing can be measured."""
    try:
        program("loadgen")
    except CompilerMissingError as error:
        pytest.skip(f"needs a C compiler: {error}")


@pytest.fixture(scope="session")
def native_tls(native: None) -> None:
    """Those that need OpenSSL as well."""
    try:
        program("tls_loadgen")
        program("tls_server")
    except CompilerMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def measure(benchmark: Any, board: Board, native: None) -> Callable[[Row, str], None]:
    """``measure(row, peer)``: the body of a test of servers."""

    def run(row: Row, peer: str) -> None:
        play_back(benchmark, board.result(row), peer)

    return run


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> Iterator[None]:
    """The tables, after pytest-benchmark's own; and as files."""
    yield
    results = list(config.stash[BOARD].results.values())
    if not results:
        return
    report = "\n".join(markdown(result) for result in results)
    terminalreporter.section("headrace: interleaved rounds")
    terminalreporter.write_line(report)
    judgements = [judgement for result in results for judgement in judge(result)]
    if judgements:
        summary = markdown_table(judgement_table(judgements))
        terminalreporter.section("headrace: targets")
        terminalreporter.write_line(summary)
        report += f"\n## Targets\n\n{summary}\n"
    directory = build_directory()
    (directory / "report.md").write_text(report)
    (directory / "chart.svg").write_text(chart(results))
    terminalreporter.write_line(f"\nwritten: {directory}/report.md, chart.svg, raw.jsonl")
