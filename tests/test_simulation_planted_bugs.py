"""The planted bugs: a simulator that stops catching them has rotted.

Each of the twelve is caught within ``BUDGET`` seeds, by the oracle that is meant for it; the correct model passes them
all. More seeds for the correct model: ``HEADRACE_SEEDS=20000 pytest tests/test_simulation_planted_bugs.py``.
"""

from __future__ import annotations

import os

import pytest

from headrace._model import BUGS
from headrace.testing import replay, run_scenario, run_seeds
from headrace.testing.scenarios import oracle_of

BUDGET = 500
CLEAN_SEEDS = int(os.environ.get("HEADRACE_SEEDS", "1000"))

# Which oracle must speak up. Where two may, the bug has two faces: bytes that are lost are missed at the
# end of the stream, or, when more follow them, seen as a gap.
CAUGHT_BY = {
    "enobufs-not-rearmed": {"liveness"},
    "partial-send-ignored": {"bytes", "complete"},
    "two-sends-in-flight": {"contract"},
    "released-before-copied": {"bytes"},
    "one-byte-too-many": {"bytes"},
    "reset-taken-as-clean-end": {"reset"},
    "buffer-leaked-after-loss": {"contract"},  # the sum over the blocks, at the next step
    "send-reset-swallowed": {"reset"},
    "close-before-flush": {"complete"},
    "not-cancelled-on-loss": {"liveness"},
    "rearmed-after-loss": {"contract"},
    "silent-failure-in-overflow": {"bytes", "complete"},
}


def test_every_planted_bug_has_its_oracle() -> None:
    assert set(CAUGHT_BY) == set(BUGS)
    assert len(BUGS) == 12


@pytest.mark.parametrize("bug", sorted(CAUGHT_BY))
def test_planted_bug_is_caught(bug: str) -> None:
    report = run_seeds(0, BUDGET, lambda seed: run_scenario(seed, bug=bug), stop_after=3)
    assert report.failures, f"{bug} wasn't caught in {BUDGET} seeds"
    assert {oracle_of(error) for _, error in report.failures} <= CAUGHT_BY[bug]
    for seed, error in report.failures:
        assert f"[seed {seed}]" in str(error)


@pytest.mark.parametrize("bug", sorted(CAUGHT_BY))
def test_planted_bug_replays_from_its_seed(bug: str) -> None:
    report = run_seeds(0, BUDGET, lambda seed: run_scenario(seed, bug=bug), stop_after=1)
    seed, first = report.failures[0]
    with pytest.raises(type(first)) as again:
        replay(seed, bug=bug)
    assert str(again.value) == str(first)
    assert f"events of seed {seed}" in again.value.__notes__[0]


@pytest.mark.timeout(300)
def test_the_correct_model_is_clean() -> None:
    injected: dict[str, int] = {}
    silent_failures = 0

    def scenario(seed: int) -> None:
        nonlocal silent_failures
        engine = run_scenario(seed)
        for name, count in engine.injected.items():
            injected[name] = injected.get(name, 0) + count
        silent_failures += engine.silent_failures

    report = run_seeds(0, CLEAN_SEEDS, scenario, stop_after=5)
    assert report.failures == []
    # Clean because it was tried, not because nothing happened.
    never = [name for name, count in injected.items() if not count and name not in ("latency", "delay")]
    assert never == []
    assert silent_failures > 0
