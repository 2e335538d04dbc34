"""The pool against a model: engine, transports and users act in any order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from headrace._pool import BufferPool, Lease, Ledger, Probe

PAGE = 4096
RELEASED = "released lease"


class Held:
    """What the model knows of a lease."""

    def __init__(self, lease: Lease, data: bytes, block: int | None, ledger: int | None) -> None:
        self.lease, self.data, self.block, self.ledger = lease, data, block, ledger
        self.views: list[memoryview] = []
        self.pins = 0
        self.released = False

    @property
    def holds(self) -> bool:
        return not self.released or self.pins > 0


class PoolMachine(RuleBasedStateMachine):
    """An engine, transports and users do as they like; bytes that somebody holds never change.

    Freed blocks are poisoned, so memory that is given back too early shows as wrong bytes.
    """

    leases = Bundle("leases")
    blocks = Bundle("blocks")

    @initialize(maximum=st.integers(1, 9), posted=st.integers(1, 9), leaks=st.sampled_from(["off", "all"]))
    def start(self, maximum: int, posted: int, leaks: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HEADRACE_POISON", "1")
            self.pool = BufferPool(PAGE, min(posted, maximum), maximum, leaks)
        self.probe = Probe(self.pool)
        self.ledgers = [Ledger(), Ledger()]
        self.held: list[Held] = []
        self.engine: Counter[int] = Counter()  # references that the engine has, by block
        self.byte = 0

    def fresh(self, size: int) -> bytes:
        self.byte = self.byte % 200 + 1  # never the poison
        return bytes([self.byte]) * size

    @rule(target=blocks)
    def take(self) -> int | None:
        before = self.pool.exhausted
        block = self.probe.take()
        if block is None:
            assert self.pool.exhausted == before + 1
            assert len(self.in_use()) == self.pool.maximum
        else:
            assert self.engine[block] == 0
            assert block not in self.in_use()
            self.engine[block] += 1
        return block

    @rule(block=consumes(blocks))
    def drop(self, block: int | None) -> None:
        if block is not None:
            self.engine[block] -= 1
            self.probe.drop(block)

    @rule(target=leases, block=blocks, size=st.integers(0, 1500), ledger=st.sampled_from([None, 0, 1]))
    def receive(self, block: int | None, size: int, ledger: int | None) -> Held:
        data = self.fresh(size)
        if block is None or self.probe.room(block) < size or self.probe.low():
            held = Held(self.pool._copy(data), data, None, None)
        else:
            account = None if ledger is None else self.ledgers[ledger]
            held = Held(self.probe.lease(block, data, account), data, block, ledger)
        self.held.append(held)
        return held

    @rule(target=leases, held=leases, start=st.integers(-3, 1600), stop=st.integers(-3, 1600))
    def cut(self, held: Held, start: int, stop: int) -> Held:
        if held.released:
            with pytest.raises(ValueError, match=RELEASED):
                held.lease[start:stop]
            return held
        data = held.data[start:stop]
        block, ledger = (held.block, held.ledger) if data else (None, None)
        part = Held(held.lease[start:stop], data, block, ledger)
        self.held.append(part)
        return part

    @rule(held=leases)
    def release(self, held: Held) -> None:
        if held.views and not held.released:
            with pytest.raises(BufferError):
                held.lease.release()
            return
        held.lease.release()
        held.released = True
        assert held.lease.released

    @rule(target=leases, held=leases)
    def detach(self, held: Held) -> Held:
        if held.released or held.views:
            with pytest.raises((ValueError, BufferError)):
                held.lease.detach()
            return held
        moved = Held(held.lease.detach(), held.data, None, None)
        held.released = True
        self.held.append(moved)
        return moved

    @rule(held=leases)
    def export(self, held: Held) -> None:
        if held.released:
            with pytest.raises(ValueError, match=RELEASED):
                memoryview(held.lease)
        else:
            held.views.append(memoryview(held.lease))

    @rule(held=leases)
    def stop_looking(self, held: Held) -> None:
        if held.views:
            held.views.pop().release()

    @rule(held=leases, times=st.integers(1, 2))
    def send(self, held: Held, times: int) -> None:
        if not held.released:
            for _ in range(times):
                self.probe.pin(held.lease)
            held.pins += times

    @rule(held=leases)
    def sent(self, held: Held) -> None:
        if held.pins:
            held.pins -= 1
            self.probe.unpin(held.lease)

    @rule()
    def trim(self) -> None:
        self.probe.trim()
        assert self.pool.free <= max(self.pool.target, 0)

    def in_use(self) -> set[int]:
        engine = {block for block, references in self.engine.items() if references}
        return engine | {held.block for held in self.held if held.holds and held.block is not None}

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool, held = self.pool, [held for held in self.held if held.holds]
        on_blocks = [one for one in held if one.block is not None]
        by_block = Counter(one.block for one in on_blocks)
        for block in self.in_use():
            references, leases, _ = self.probe.references(block)
            assert references == self.engine[block] + by_block[block]
            assert leases == by_block[block]
        assert pool.free + len(self.in_use()) == pool.allocated <= pool.maximum
        assert pool.outstanding == len(held)
        assert pool.leased_bytes == sum(len(one.data) for one in on_blocks)
        for number, ledger in enumerate(self.ledgers):
            assert ledger.leased == sum(len(one.data) for one in on_blocks if one.ledger == number)
        assert pool.pinned == len(by_block)
        assert self.probe.low() == (len(by_block) >= pool.maximum // 2)

    @invariant()
    def bytes_stay_what_they_were(self) -> None:
        for held in getattr(self, "held", ()):
            if not held.released:
                assert held.lease == held.data
            for view in held.views:
                assert view == held.data

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for held in self.held:
            while held.pins:
                self.sent(held)
            for view in held.views:
                view.release()
            held.lease.release()
        for block, references in self.engine.items():
            for _ in range(references):
                self.probe.drop(block)
        stats = self.pool.stats()
        assert stats["free"] == stats["allocated"]
        assert stats["outstanding"] == stats["leased"] == stats["pinned"] == 0
        assert stats["collected_not_released"] == 0
        assert self.pool.report() == []


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestPoolMachine = PoolMachine.TestCase
