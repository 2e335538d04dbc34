"""The table in docs/conformance.md is made from results, and says no failure."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    folder = ROOT / "tests/conformance"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("table", folder / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "table", module)
    spec.loader.exec_module(module)
    return module


def result(engine: str, outcomes: list[str], suites: list[str], **changes: Any) -> dict[str, Any]:
    tests = [{"end": f"test_{index}", "outcome": outcome} for index, outcome in enumerate(outcomes)]
    return {
        "python": "3.11.9",
        "kernel": "6.18.3-generic",
        "date": "2026-01-02",
        "factory": f"factories:{engine}",
        "suites": {name: {"turns": {engine: 1000}, "made": {}, "tests": tests} for name in suites},
    } | changes


def write(folder: Path, *contents: dict[str, Any]) -> list[str]:
    paths = [folder / f"{index}.json" for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    return [str(path) for path in paths]


@pytest.fixture
def page(tmp_path: Path, script: ModuleType) -> Path:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}old\n{script.END}after\n")
    return page


def suites() -> list[str]:
    import run

    return list(run.SUITES)


def test_a_table_of_two_engines(script: ModuleType, page: Path, tmp_path: Path) -> None:
    outcomes = ["pass", "xfail", "skip", "fail", "error", "crash", "timeout"]
    contents = [
        result("epoll", outcomes, suites()),
        result("uring", ["pass"], suites(), date="2026-02-03"),
    ]
    for _ in range(2):  # again: it replaces what it wrote
        assert script.main([*write(tmp_path, *contents), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("Linux 6.18.3, 3 February 2026.") == 1
    assert "| suite | 3.11.9 `uring` | 3.11.9 `epoll` |" in text
    assert "| `events` | 1 / 0 / 0 / 0 / 0 | 2 / 1 / 1 / 2 / 1 |" in text
    count = len(suites())
    sums = " / ".join(str(count * each) for each in (2, 1, 1, 2, 1))
    assert f"| **all** | **{count} / 0 / 0 / 0 / 0** | **{sums}** |" in text


@pytest.mark.parametrize("fault", ["part of a run", "two kernels", "no markers"])
def test_what_makes_no_table_leaves_the_page_alone(
    script: ModuleType, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    first = result("uring", ["pass"], suites())
    second = result("epoll", ["pass"], suites())
    if fault == "part of a run":
        del second["suites"]["ssl"]
    elif fault == "two kernels":
        second["kernel"] = "5.10.0"
    else:
        page.write_text("nothing here\n")
    before = page.read_text()
    assert script.main([*write(tmp_path, first, second), "--page", str(page)]) == 1
    assert page.read_text() == before
    said = {"part of a run": "ssl", "two kernels": "5.10.0, 6.18.3", "no markers": "markers"}
    assert said[fault] in capsys.readouterr().err


def test_the_committed_table_says_no_failure() -> None:
    text = (ROOT / "docs/conformance.md").read_text("utf-8")
    (sums,) = re.findall(r"^\| \*\*all\*\* \|(.*)\|$", text, re.MULTILINE)
    cells = [re.findall(r"\d+", cell) for cell in sums.split("|")]
    assert len(cells) == 6  # three versions on two engines
    for passed, _skipped, *bad in cells:
        assert int(passed) > 500
        assert bad == ["0", "0", "0"]
