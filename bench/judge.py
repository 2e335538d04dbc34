"""Medians, intervals and verdicts: what a set of rounds says about the targets, and whether it says anything.

A ratio is *reached* when the whole 90 % interval of its median lies at or above the target, *not reached*
when it lies below, *inconclusive* when it straddles. Fewer than ``ROUNDS_FOR_VERDICT`` rounds are always
inconclusive. The table of targets is ``targets.toml``.
"""

from __future__ import annotations

import random
import statistics
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from bench.rounds import Result, Row

__all__ = [
    "ROUNDS_FOR_VERDICT",
    "Estimate",
    "Judgement",
    "estimate",
    "judge",
    "limit_peer",
    "verdict_at_least",
    "verdict_at_most",
]

ROUNDS_FOR_VERDICT = 15
RESAMPLES = 2000
INTERVAL = 0.90

REACHED, NOT_REACHED, INCONCLUSIVE = "reached", "not reached", "inconclusive"


@dataclass(frozen=True)
class Estimate:
    """A median and its 90 % bootstrap interval, from ``count`` values."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def estimate(values: Sequence[float]) -> Estimate | None:
    """The percentile bootstrap of the median; None without values. The same values give the same interval."""
    if not values:
        return None
    chooser = random.Random(len(values))
    medians = sorted(statistics.median(chooser.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = (1 - INTERVAL) / 2
    low, high = medians[int(tail * RESAMPLES)], medians[int((1 - tail) * RESAMPLES) - 1]
    return Estimate(statistics.median(values), low, high, len(values))


def verdict_at_least(measured: Estimate, bound: float) -> str:
    """For ratios: more is better."""
    if measured.count < ROUNDS_FOR_VERDICT:
        return INCONCLUSIVE
    if measured.low >= bound:
        return REACHED
    return NOT_REACHED if measured.high < bound else INCONCLUSIVE


def verdict_at_most(measured: Estimate, bound: float) -> str:
    """For costs: less is better."""
    if measured.count < ROUNDS_FOR_VERDICT:
        return INCONCLUSIVE
    if measured.high <= bound:
        return REACHED
    return NOT_REACHED if measured.low > bound else INCONCLUSIVE


@dataclass(frozen=True)
class Judgement:
    """One target, what was measured for it, and what that means; no must or no goal, no verdict on one."""

    case: str
    peer: str
    figure: str  # "cost of uvloop / ours", or the name of a figure
    measured: Estimate
    must: float | None = None
    must_verdict: str | None = None
    goal: float | None = None
    goal_verdict: str | None = None

    @property
    def summary(self) -> str:
        """``must reached, goal inconclusive``."""
        verdicts = {"must": self.must_verdict, "goal": self.goal_verdict}
        return ", ".join(f"{name} {verdict}" for name, verdict in verdicts.items() if verdict)


def limit_peer(row: Row) -> str:
    """The plain C server that shows what is possible at all."""
    return "c-openssl" if row.tls else "c-uring"


@cache
def targets() -> dict[str, list[dict[str, Any]]]:
    """The table, as it stands in ``targets.toml``."""
    with (Path(__file__).parent / "targets.toml").open("rb") as file:
        return tomllib.load(file)


def within(value: float, bounds: Sequence[float] | None) -> bool:
    return bounds is None or bounds[0] <= value <= bounds[1]


def fits(target: dict[str, Any], row: Row, peer: str) -> bool:
    return (
        target.get("mode", row.kind) == row.mode  # a row over TLS needs a target that says so
        and within(row.size, target.get("sizes"))
        and within(row.connections, target.get("connections"))
        and target.get("rate", bool(row.rate)) == bool(row.rate)
        and any(fnmatch(peer, pattern) for pattern in target["peers"])
    )


def judge(result: Result) -> list[Judgement]:
    """Every target that fits the row, for every peer that was measured."""
    return [judgement for peer in result.peers for judgement in judge_peer(result, peer)]


def judge_peer(result: Result, peer: str) -> Iterator[Judgement]:
    fitting = (target for target in targets()["ratio"] if fits(target, result.row, peer))
    if target := next(fitting, None):
        yield from judge_ratio(result, peer, target)
    for target in targets()["at_most"]:
        if fits(target, result.row, peer):
            yield from judge_figure(result, peer, target)


def judge_ratio(result: Result, peer: str, target: dict[str, Any]) -> Iterator[Judgement]:
    reference = target["reference"]
    measured = estimate(result.ratios(peer, reference))
    if not measured:
        return
    must, goal = target["must"], target.get("goal")
    allowed = estimate(result.ratios(target["unless"], reference)) if "unless" in target else None
    if allowed:
        must = min(must, round(allowed.median, 2))
    yield Judgement(
        target["case"], peer, f"{reference} / this", measured,
        must, verdict_at_least(measured, must),
        goal, verdict_at_least(measured, goal) if goal is not None else None,
    )  # fmt: skip
    limit = limit_peer(result.row)
    share = estimate(result.ratios(peer, limit)) if "limit" in target else None
    if share:
        bound = target["limit"]
        verdict = verdict_at_least(share, bound)
        yield Judgement(target["case"], peer, f"{limit} / this", share, bound, verdict)
    rival = target.get("not_behind")
    even = estimate(result.ratios(peer, rival)) if rival else None
    if even:
        yield Judgement(
            target["case"], peer, f"{rival} / this", even, goal=1.0, goal_verdict=verdict_at_least(even, 1.0)
        )


def judge_figure(result: Result, peer: str, target: dict[str, Any]) -> Iterator[Judgement]:
    measured = estimate(result.values(peer, target["figure"]))
    if measured:
        must, goal = target["must"], target["goal"]
        yield Judgement(
            target["case"], peer, target["figure"], measured,
            must, verdict_at_most(measured, must), goal, verdict_at_most(measured, goal),
        )  # fmt: skip
