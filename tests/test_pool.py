"""The buffer pool, without a loop; `Probe` does what engines and transports, which are C, do to a pool."""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import textwrap
import threading
import weakref
from typing import Any

import pytest

from headrace._pool import BufferPool, Lease, Probe

PAGE = 4096


def small_pool(target: int = 1, maximum: int = 8, **options: Any) -> BufferPool:
    return BufferPool(PAGE, target, maximum, **options)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_LEAKS", raising=False)
    monkeypatch.delenv("HEADRACE_POISON", raising=False)


# --- the pool


def test_a_new_pool_has_no_memory_and_documented_defaults() -> None:
    pool = BufferPool()
    assert (pool.block_size, pool.target, pool.maximum) == (262144, 8, 256)
    assert pool.stats() == {
        "block_size": 262144,
        "maximum": 256,
        "allocated": 0,
        "free": 0,
        "posted": 0,
        "pinned": 0,
        "leased": 0,
        "outstanding": 0,
        "leases": 0,
        "copies": 0,
        "exhausted": 0,
        "collected_not_released": 0,
    }
    assert "0 of 256 x 262144 bytes" in repr(pool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": 4095}, "block_size"),
        ({"block_size": 4097}, "block_size"),
        ({"block_size": -4096}, "block_size"),
        ({"block_size": (1 << 30) + 4096}, "block_size"),
        ({"target": 0}, "target"),
        ({"target": 9, "maximum": 8}, "target"),
        ({"maximum": 0}, "maximum"),
        ({"maximum": 32769}, "maximum"),
        ({"maximum": 1 << 40}, "maximum"),
        ({"leak_level": "some"}, "leak_level"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BufferPool(**arguments)


def test_the_largest_pool_costs_nothing_until_it_is_used() -> None:
    pool = BufferPool(1 << 30, 1, 32768)
    assert pool.allocated == 0
    lease = pool._take_bytes(b"x")
    assert lease is not None
    assert pool.allocated == 1
    lease.release()


def test_it_grows_by_doubling_up_to_its_maximum() -> None:
    pool = small_pool(maximum=11)
    probe = Probe(pool)
    allocated = []
    for _ in range(11):
        assert probe.take() is not None
        allocated.append(pool.allocated)
    assert allocated == [1, 2, 4, 4, 8, 8, 8, 8, 11, 11, 11]
    assert probe.take() is None
    assert probe.take() is None
    assert pool.exhausted == 2


def test_indexes_are_distinct_and_start_at_zero() -> None:
    probe = Probe(small_pool(maximum=8))
    assert sorted(probe.take() for _ in range(8)) == list(range(8))


def test_the_warm_block_comes_first() -> None:
    probe = Probe(small_pool())
    first, second, third = (probe.take() for _ in range(3))
    for block in (second, third, first):
        probe.drop(block)
    assert [probe.take() for _ in range(3)] == [first, third, second]


def test_the_last_reference_puts_a_block_back_empty() -> None:
    pool = small_pool()
    probe = Probe(pool)
    block = probe.take()
    lease = probe.lease(block, b"abc")
    assert probe.references(block) == (2, 1, 3)
    probe.drop(block)
    assert (probe.references(block), pool.free) == ((1, 1, 3), 0)
    lease.release()
    assert (probe.references(block), pool.free) == ((0, 0, 0), 1)


def test_trim_returns_idle_memory_beyond_the_target_and_the_slots_are_used_again() -> None:
    pool = small_pool(target=2, maximum=8)
    probe = Probe(pool)
    blocks = [probe.take() for _ in range(8)]
    kept = probe.lease(blocks[0], b"kept")
    for block in blocks:
        probe.drop(block)
    probe.trim()
    assert (pool.allocated, pool.free) == (3, 2)
    assert kept == b"kept"
    # The warmest stay.
    assert {probe.take(), probe.take()} == set(blocks[-2:])
    assert len({probe.take() for _ in range(5)} & set(blocks[1:6])) == 5
    assert (pool.allocated, probe.take()) == (8, None)


def test_trim_leaves_a_pool_below_its_target_alone() -> None:
    pool = small_pool(target=4, maximum=8)
    probe = Probe(pool)
    blocks = [probe.take() for _ in range(4)]
    probe.trim()
    for block in blocks:
        probe.drop(block)
    probe.trim()
    assert (pool.allocated, pool.free) == (4, 4)


def test_trimmed_memory_is_gone_from_the_process() -> None:
    pool = BufferPool(1 << 20, 1, 32)
    probe = Probe(pool)

    def resident_pages() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1])

    before = resident_pages()
    blocks = [probe.take() for _ in range(32)]
    for block in blocks:
        probe.lease(block, bytes(1 << 20)).release()
    touched = resident_pages()
    for block in blocks:
        probe.drop(block)
    probe.trim()
    after = resident_pages()
    assert touched - before >= 24 * 256
    assert touched - after >= 24 * 256


def test_a_failed_mmap_is_exhaustion_not_an_error() -> None:
    script = """
        import resource
        from headrace._pool import BufferPool, Probe
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * 4096
        pool = BufferPool(64 << 20, 1, 1024)
        probe = Probe(pool)
        resource.setrlimit(resource.RLIMIT_AS, (size + 560 * 2**20, -1))
        blocks = []
        while (block := probe.take()) is not None:
            blocks.append(block)
        assert 4 <= len(blocks) <= 8, blocks
        assert pool.exhausted == 1 and pool.allocated == len(blocks), pool.stats()
        # What could be had is all there is: half of it may be pinned.
        leases = []
        while not probe.low():
            leases.append(probe.lease(blocks[len(leases)], b"x"))
        assert len(leases) == len(blocks) // 2, (leases, blocks)
        # With the limit gone the pool grows on.
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        assert probe.take() is not None and not probe.low()
    """
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer needs its address space")
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=30)


def test_a_pool_goes_with_its_last_lease() -> None:
    pool = small_pool()
    gone = threading.Event()
    weakref.finalize(pool, gone.set)
    lease = pool._take_bytes(b"abc")
    assert lease is not None
    del pool
    assert not gone.is_set()
    assert lease == b"abc"
    lease.release()
    del lease
    assert gone.is_set()


def test_poison_fills_a_block_that_nobody_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_POISON", "1")
    pool = small_pool()
    probe = Probe(pool)
    block = probe.take()
    lease = probe.lease(block, b"secret")
    probe.drop(block)
    assert lease == b"secret"
    lease.release()
    assert probe.peek(block, PAGE) == b"\xdb" * PAGE


# --- starving engines


def test_a_returned_block_wakes_a_starving_engine_once() -> None:
    pool = small_pool(maximum=2)
    probe = Probe(pool)
    blocks = [probe.take(), probe.take()]
    assert probe.take() is None
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        probe.starve(wake)
        probe.drop(blocks[0])
        assert os.eventfd_read(wake) == 1
        assert not probe.starving()
        probe.drop(blocks[1])
        with pytest.raises(BlockingIOError):
            os.eventfd_read(wake)
    finally:
        probe.starve(-1)
        os.close(wake)


def test_an_engine_without_an_eventfd_stays_starving() -> None:
    pool = small_pool()
    probe = Probe(pool)
    block = probe.take()
    probe.starve(-1)
    probe.drop(block)
    assert probe.starving()


def test_a_lease_released_in_another_thread_wakes_an_engine_that_sleeps() -> None:
    pool = small_pool(maximum=1)
    lease = pool._take_bytes(b"x")
    assert lease is not None
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        Probe(pool).starve(wake)
        releaser = threading.Thread(target=lease.release)
        releaser.start()
        assert select.select([wake], [], [], 30)[0] == [wake]
        releaser.join()
        assert pool.free == 1
    finally:
        Probe(pool).starve(-1)
        os.close(wake)


# --- low: nobody can pin more than half


@pytest.mark.parametrize("maximum", [1, 2, 3, 8, 9, 256])
def test_a_hoarder_pins_half_of_the_pool_at_most(maximum: int) -> None:
    pool = small_pool(target=maximum, maximum=maximum)
    probe = Probe(pool)
    posted = [probe.take() for _ in range(maximum)]
    assert probe.take() is None
    hoard = []
    for block in posted:  # one byte in each block: the worst a hoarder can do
        if not probe.low():
            hoard.append(probe.lease(block, b"x"))
        probe.drop(block)
    assert len(hoard) == pool.pinned == maximum // 2
    assert pool.free == maximum - maximum // 2 >= 1
    for lease in hoard:
        lease.release()
    assert probe.low() == (maximum == 1)
    assert pool.pinned == 0


def test_many_leases_on_one_block_pin_one_block() -> None:
    pool = small_pool(maximum=4)
    probe = Probe(pool)
    block = probe.take()
    leases = [probe.lease(block, bytes([i])) for i in range(100)]
    assert pool.pinned == 1
    assert not probe.low()
    slices = [lease[:] for lease in leases]
    for lease in leases:
        lease.release()
    assert (pool.pinned, probe.references(block)[:2]) == (1, (101, 100))
    for lease in slices:
        lease.release()
    assert (pool.pinned, probe.references(block)[:2]) == (0, (1, 0))


# --- the leak detector


def leased(pool: BufferPool) -> Lease:
    lease = pool._take_bytes(b"abc")
    assert lease is not None
    return lease


def forgetful(pool: BufferPool) -> None:
    lease = pool._take_bytes(b"lost")
    assert lease is not None
    assert lease[0] == ord("l")


def test_a_lost_lease_is_logged_once_per_place(caplog: pytest.LogCaptureFixture) -> None:
    pool = small_pool(leak_level="all")
    with caplog.at_level(logging.WARNING, "headrace.pool"):
        for _ in range(3):
            forgetful(pool)
    assert [record.name for record in caplog.records] == ["headrace.pool"]
    message = caplog.messages[0]
    assert "a lease of 4 bytes was collected without release()" in message
    assert message.count("in forgetful") == 2  # where it was made, and where it was last used
    assert "test_pool.py" in message
    assert pool.collected == 3
    with caplog.at_level(logging.WARNING, "headrace.pool"):
        pool._copy(b"another place")
    assert len(caplog.records) == 2


def test_released_leases_are_no_leaks(caplog: pytest.LogCaptureFixture) -> None:
    pool = small_pool(leak_level="all")
    lease = leased(pool)
    part = lease[1:]
    assert [size for _, size in pool.report()] == [3, 2]
    part.release()
    with lease:
        pass
    assert pool.report() == []
    del lease, part
    assert caplog.records == []


def test_the_report_says_where_a_lease_was_made_and_last_used() -> None:
    pool = small_pool(leak_level="all")
    lease = leased(pool)
    ((site, size),) = pool.report()
    assert size == 3
    assert site.startswith("made at ")
    assert "in leased" in site
    assert "last used" not in site

    def user() -> None:
        bytes(lease)

    user()
    assert "in user" in pool.report()[0][0].partition("last used at ")[2]
    lease.touch("frame decoder, waiting for 2 bytes")
    assert pool.report()[0][0].endswith("last used at frame decoder, waiting for 2 bytes")
    lease.release()


def test_a_pinned_released_lease_is_no_leak() -> None:
    pool = small_pool(leak_level="all")
    probe = Probe(pool)
    lease = pool._take_bytes(b"abc")
    assert lease is not None
    probe.pin(lease)
    lease.release()
    assert pool.report() == []
    probe.unpin(lease)


def test_sampling_observes_one_lease_in_128() -> None:
    pool = small_pool(leak_level="sampled")
    leases = [pool._copy(b"x") for _ in range(1280)]
    assert len(pool.report()) == 10
    for lease in leases:
        lease.release()
    assert pool.report() == []


def test_off_observes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pool = small_pool()
    lease = pool._take_bytes(b"x")
    assert lease is not None
    lease.touch("here")
    assert pool.report() == []
    del lease
    assert (pool.collected, caplog.records) == (1, [])


def test_the_level_comes_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LEAKS", "all")
    with small_pool()._copy(b"x"):
        pass
    pool = small_pool()
    lease = pool._copy(b"x")
    assert len(pool.report()) == 1
    lease.release()
    pool = small_pool(leak_level="off")
    lease = pool._copy(b"x")
    assert pool.report() == []
    lease.release()
    monkeypatch.setenv("HEADRACE_LEAKS", "")
    assert small_pool().report() == []
    monkeypatch.setenv("HEADRACE_LEAKS", "everything")
    with pytest.raises(ValueError, match="HEADRACE_LEAKS"):
        small_pool()
