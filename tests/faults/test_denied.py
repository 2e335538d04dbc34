"""Where io_uring is missing, forbidden or short of memory: epoll, said once; or an error, if io_uring was forced."""

from __future__ import annotations

import errno

import pytest
from faults_support import needs_root, needs_uring, run_program

REASONS = {errno.EPERM: "io_uring is denied (EPERM)", errno.ENOSYS: "io_uring is missing (ENOSYS)"}


def assert_said_once(said: list[str], reason: str) -> None:
    assert len(said) == 1, said
    assert "epoll" in said[0]
    assert reason in said[0]


@pytest.mark.parametrize("error", REASONS, ids=["EPERM", "ENOSYS"])
def test_seccomp_filter_leads_to_epoll_and_one_line(error: int) -> None:
    outcome = run_program("denied_by_seccomp", error=error, runs=3)
    assert [run["engine"] for run in outcome.result] == ["epoll"] * 3
    assert all(REASONS[error] in run["reason"] for run in outcome.result)
    assert_said_once(outcome.said, REASONS[error])


@pytest.mark.parametrize("error", REASONS, ids=["EPERM", "ENOSYS"])
def test_child_processes_under_a_filter_without_pidfd_open(error: int, engine_name: str) -> None:
    """asyncio's own way serves them, quietly."""
    outcome = run_program("processes_without_pidfds", error=error, engine=engine_name)
    assert outcome.result == [0, 1, 2, 3, 4]
    assert outcome.said == []


@needs_root
@needs_uring
def test_no_lockable_memory_leads_to_epoll_and_one_line() -> None:
    outcome = run_program("denied_by_memlock", locked_memory=4096, runs=3)
    assert [run["engine"] for run in outcome.result] == ["epoll"] * 3
    assert_said_once(outcome.said, "RLIMIT_MEMLOCK")


@needs_root
@needs_uring
def test_64_kib_of_lockable_memory_run_quietly_or_on_epoll_with_one_line() -> None:
    """Older kernels charge all of a ring, newer ones less: a smaller ring may fit."""
    outcome = run_program("denied_by_memlock", locked_memory=64 * 1024, runs=3)
    engines = {run["engine"] for run in outcome.result}
    if engines == {"uring"}:
        assert outcome.said == []
    else:
        assert engines == {"epoll"}
        assert_said_once(outcome.said, "RLIMIT_MEMLOCK")


@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize("error", REASONS, ids=["EPERM", "ENOSYS"])
def test_forced_uring_under_a_filter_is_an_error(error: int, by: str) -> None:
    if by == "argument":
        outcome = run_program("denied_by_seccomp", error=error, engine="uring")
    else:
        outcome = run_program("denied_by_seccomp", error=error, environment={"HEADRACE_ENGINE": "uring"})
    assert [list(run) for run in outcome.result] == [["error"]]
    assert REASONS[error] in outcome.result[0]["error"]
    assert outcome.said == []


@needs_root
@needs_uring
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_forced_uring_without_lockable_memory_is_an_error(by: str) -> None:
    if by == "argument":
        outcome = run_program("denied_by_memlock", locked_memory=4096, engine="uring")
    else:
        environment = {"HEADRACE_ENGINE": "uring"}
        outcome = run_program("denied_by_memlock", locked_memory=4096, environment=environment)
    assert "RLIMIT_MEMLOCK" in outcome.result[0]["error"]
    assert outcome.said == []


@needs_root
@needs_uring
def test_500_runs_in_a_row_as_an_ordinary_user_are_all_on_uring() -> None:
    outcome = run_program("many_runs", count=500, locked_memory=8 * 1024 * 1024)
    assert outcome.result == {"uring": 500}
    assert outcome.said == []


@needs_root
def test_an_ordinary_user_under_a_filter_like_docker_s() -> None:
    outcome = run_program("restricted_server", error=errno.EPERM, locked_memory=64 * 1024)
    assert outcome.result["engine"] == "epoll"
    assert_said_once(outcome.said, REASONS[errno.EPERM])
