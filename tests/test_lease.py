"""Leases, without a loop: in place and as copies, where that makes a difference."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import threading
from typing import Any

import pytest

from headrace._pool import BufferPool, Lease, Ledger, Probe

RELEASED = "released lease"
PAGE = 4096


def small_pool(target: int = 1, maximum: int = 8, **options: Any) -> BufferPool:
    return BufferPool(PAGE, target, maximum, **options)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_LEAKS", raising=False)
    monkeypatch.delenv("HEADRACE_POISON", raising=False)


# --- leases


@pytest.fixture(params=["in place", "copy"])
def make(request: pytest.FixtureRequest) -> Any:
    """Makes a lease of either kind on a pool of its own."""

    def make(data: bytes, pool: BufferPool | None = None) -> Lease:
        pool = pool or small_pool()
        lease = pool._copy(data) if request.param == "copy" else pool._take_bytes(data)
        assert lease is not None
        assert lease.copied == (request.param == "copy")
        return lease

    return make


def test_a_lease_reads_like_bytes(make: Any) -> None:
    data = bytes(range(256))
    lease = make(data)
    assert bytes(lease) == lease.tobytes() == memoryview(lease).tobytes() == data
    assert b"".join([lease, lease]) == data * 2
    assert bytearray(lease) == data
    assert len(lease) == lease.nbytes == 256
    assert list(lease) == list(data)
    assert [lease[i] for i in range(-256, 256)] == [data[i] for i in range(-256, 256)]
    assert 255 in lease
    assert int.from_bytes(lease[:2], "big") == 1
    lease.release()


@pytest.mark.parametrize("index", [3, -4, 1 << 70, -(1 << 70)])
def test_an_index_outside_is_an_index_error(make: Any, index: int) -> None:
    lease = make(b"abc")
    with pytest.raises(IndexError):
        lease[index]


def test_an_index_that_is_none_is_a_type_error(make: Any) -> None:
    with pytest.raises(TypeError):
        make(b"abc")["0"]


def test_an_empty_lease_is_false_and_has_no_items(make: Any) -> None:
    lease = make(b"")
    assert not lease
    assert bytes(lease) == b"" == lease
    assert list(lease) == []
    with pytest.raises(IndexError):
        lease[0]


def test_comparison_is_by_content(make: Any) -> None:
    lease = make(b"abc")
    for same in (b"abc", bytearray(b"abc"), memoryview(b"abc"), make(b"abc"), memoryview(b"axbxc")[::2]):
        assert lease == same
        assert same == lease
        assert not lease != same  # noqa: SIM202 - it is __ne__ that is tested
    for other in (b"abd", b"ab", b"abcd", b"", "abc", None, 3, [97, 98, 99], memoryview(b"axbxd")[::2]):
        assert lease != other
        assert other != lease
    with pytest.raises(TypeError):
        lease < b"abd"  # noqa: B015 - it raises
    closed = memoryview(b"abc")
    closed.release()
    with pytest.raises(ValueError, match="memoryview"):
        lease == closed  # noqa: B015 - it raises


def test_a_lease_is_not_hashable_and_not_pickled(make: Any) -> None:
    lease = make(b"abc")
    with pytest.raises(TypeError, match="unhashable"):
        hash(lease)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(lease)
    with pytest.raises(TypeError, match="pickle"):
        copy.copy(lease)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(small_pool())


def test_only_a_pool_makes_leases() -> None:
    with pytest.raises(TypeError, match="made by a pool"):
        Lease()
    hollow = Lease.__new__(Lease)
    assert hollow.released
    with pytest.raises(ValueError, match=RELEASED):
        len(hollow)
    hollow.release()


def test_the_buffer_is_read_only_contiguous_bytes(make: Any) -> None:
    lease = make(b"abcd")
    with memoryview(lease) as view:
        assert (view.format, view.itemsize, view.ndim, view.shape, view.strides) == ("B", 1, 1, (4,), (1,))
        assert view.readonly
        assert view.contiguous
        assert view.obj is lease
        with pytest.raises(TypeError):
            view[0] = 1
    wide = memoryview(lease).cast("H")
    assert len(wide) == 2
    wide.release()


def test_nobody_writes_through_a_lease(make: Any) -> None:
    lease = make(b"abcd")
    reading, writing = os.pipe()
    try:
        os.write(writing, b"zzzz")
        with (
            open(reading, "rb", buffering=0, closefd=False) as file,
            pytest.raises(TypeError, match="read-write"),
        ):
            file.readinto(lease)
    finally:
        os.close(reading)
        os.close(writing)
    assert lease == b"abcd"


def test_leases_and_pools_are_not_tracked_by_the_collector(make: Any) -> None:
    pool = small_pool()
    assert not gc.is_tracked(pool)
    assert not gc.is_tracked(make(b"abc", pool))
    assert not gc.is_tracked(Ledger())


def test_repr_shows_size_and_state() -> None:
    pool = small_pool()
    lease = pool._take_bytes(b"abc")
    assert lease is not None
    assert repr(lease) == "<Lease 3 bytes, in place>"
    view = memoryview(lease)
    assert repr(lease) == "<Lease 3 bytes, in place, 1 exported>"
    view.release()
    Probe(pool).pin(lease)
    lease.release()
    assert repr(lease) == "<Lease 3 bytes, in place, released, 1 being sent>"
    Probe(pool).unpin(lease)
    assert repr(pool._copy(b"x" * 10)) == "<Lease 10 bytes, a copy>"


# --- slices


def test_a_slice_is_a_lease_of_its_own(make: Any) -> None:
    pool = small_pool()
    lease = make(b"hello world", pool)
    word = lease[6:]
    assert isinstance(word, Lease)
    assert word.copied == lease.copied
    lease.release()
    assert word == b"world"
    again = word[-3:-1]
    word.release()
    assert again == b"rl"
    again.release()
    assert pool.outstanding == 0
    assert pool.free == pool.allocated


@pytest.mark.parametrize("start", [None, 0, 2, 5, 9, -2, -9, 1 << 70])
@pytest.mark.parametrize("stop", [None, 0, 2, 5, 9, -2, -9, -(1 << 70)])
def test_slices_are_those_of_bytes(make: Any, start: int | None, stop: int | None) -> None:
    data = b"abcde"
    lease = make(data)
    part = lease[start:stop]
    assert part == data[start:stop]
    assert len(part) == len(data[start:stop])


@pytest.mark.parametrize("step", [2, -1, 7])
def test_a_slice_with_a_step_is_refused(make: Any, step: int) -> None:
    with pytest.raises(ValueError, match="step"):
        make(b"abcde")[::step]


def test_an_empty_slice_pins_no_block() -> None:
    pool = small_pool()
    lease = pool._take_bytes(b"abc")
    assert lease is not None
    empty = lease[3:]
    lease.release()
    assert (pool.free, pool.outstanding, len(empty)) == (1, 1, 0)
    empty.release()
    assert pool.outstanding == 0


def test_slices_count_in_the_ledger_as_what_they_hold() -> None:
    pool = small_pool()
    ledger = Ledger()
    lease = pool._take_bytes(b"hello world", ledger)
    assert lease is not None
    word = lease[:5]
    assert ledger.leased == pool.stats()["leased"] == 16
    lease.release()
    assert ledger.leased == pool.stats()["leased"] == 5
    del word
    assert ledger.leased == pool.stats()["leased"] == 0


def test_copies_and_their_slices_count_as_no_leased_bytes() -> None:
    pool = small_pool()
    lease = pool._copy(b"hello world")
    part = lease[:5]
    assert (pool.leased_bytes, pool.outstanding, pool.copies, pool.leases, pool.allocated) == (0, 2, 1, 0, 0)
    part.release()
    lease.release()
    assert pool.outstanding == 0


# --- release


def test_release_gives_the_block_back_and_ends_all_use(make: Any) -> None:
    pool = small_pool()
    lease = make(b"abc", pool)
    copied = lease.copied
    lease.release()
    lease.release()
    assert (lease.released, lease.copied, pool.outstanding, pool.free) == (True, copied, 0, pool.allocated)
    uses: list[Any] = [
        len,
        bytes,
        memoryview,
        list,
        iter,
        Lease.tobytes,
        Lease.detach,
        Lease.touch,
        Lease.__enter__,
        lambda lease: lease[0],
        lambda lease: lease[:1],
        lambda lease: lease == b"abc",
        lambda lease: lease.nbytes,
    ]
    for use in uses:
        with pytest.raises(ValueError, match=RELEASED):
            use(lease)


def test_a_with_block_releases(make: Any) -> None:
    lease = make(b"abc")
    with lease as same:
        assert same is lease
        assert not lease.released
    assert lease.released
    failing = make(b"abc")
    with pytest.raises(ZeroDivisionError), failing:
        raise ZeroDivisionError
    assert failing.released


def test_the_last_reference_releases_and_is_counted(make: Any) -> None:
    pool = small_pool()
    lease = make(b"abc", pool)
    del lease
    assert (pool.outstanding, pool.collected, pool.free) == (0, 1, pool.allocated)
    make(b"abc", pool).release()
    assert pool.stats()["collected_not_released"] == 1


def test_bytes_that_somebody_looks_at_cannot_be_released(make: Any) -> None:
    lease = make(b"abc")
    first, second = memoryview(lease), memoryview(lease)
    with pytest.raises(BufferError, match="2 buffers still look at this lease"):
        lease.release()
    second.release()
    with pytest.raises(BufferError, match="1 buffer still looks at this lease"):
        lease.detach()
    assert not lease.released
    assert lease == b"abc"
    first.release()
    lease.release()


def test_a_memoryview_alone_keeps_the_bytes(make: Any) -> None:
    pool = small_pool()
    view = memoryview(make(b"abc", pool))
    assert pool.outstanding == 1
    for _ in range(20):
        other = make(b"xyz", pool)
        other.release()
    assert view == b"abc"
    view.release()
    assert pool.outstanding == 0


def test_a_release_during_a_send_takes_effect_when_the_send_is_done() -> None:
    pool = small_pool()
    probe = Probe(pool)
    ledger = Ledger()
    lease = pool._take_bytes(b"abc", ledger)
    assert lease is not None
    probe.pin(lease)
    probe.pin(lease)
    lease.release()
    assert lease.released
    with pytest.raises(ValueError, match=RELEASED):
        bytes(lease)
    assert (pool.free, pool.outstanding, ledger.leased) == (0, 1, 3)
    probe.unpin(lease)
    assert pool.free == 0
    probe.unpin(lease)
    assert (pool.free, pool.outstanding, ledger.leased, pool.collected) == (1, 0, 0, 0)
    del lease
    assert (pool.free, pool.outstanding, pool.collected) == (1, 0, 0)


def test_a_sent_lease_stays_usable_until_it_is_released() -> None:
    pool = small_pool()
    probe = Probe(pool)
    lease = pool._take_bytes(b"abc")
    assert lease is not None
    probe.pin(lease)
    probe.unpin(lease)
    assert lease == b"abc"
    assert pool.free == 0
    lease.release()
    assert pool.free == 1


def test_a_lease_that_was_sent_and_let_go_of_is_no_leak(caplog: pytest.LogCaptureFixture) -> None:
    pool = small_pool(leak_level="all")
    probe = Probe(pool)
    lease = pool._take_bytes(b"abc")
    assert lease is not None
    probe.pin(lease)
    probe.unpin(lease)
    del lease
    assert (pool.free, pool.outstanding, pool.collected, pool.report(), caplog.records) == (1, 0, 0, [], [])


def test_detach_keeps_the_bytes_and_gives_the_block_back(make: Any) -> None:
    pool = small_pool()
    with make(b"hello", pool) as lease:
        kept = lease.detach()
        assert lease.released
    assert kept.copied
    assert kept == b"hello"
    assert (pool.free, pool.pinned, pool.outstanding) == (pool.allocated, 0, 1)
    kept.release()
    assert (pool.outstanding, pool.collected) == (0, 0)


def test_detach_during_a_send() -> None:
    pool = small_pool()
    probe = Probe(pool)
    lease = pool._take_bytes(b"hello")
    assert lease is not None
    probe.pin(lease)
    kept = lease.detach()
    assert (kept, pool.free) == (b"hello", 0)
    probe.unpin(lease)
    assert pool.free == 1


def test_leases_may_be_released_in_any_thread() -> None:
    pool = small_pool(maximum=64)
    probe = Probe(pool)
    ledger = Ledger()
    leases = []
    for _ in range(64):
        block = probe.take()
        leases += [probe.lease(block, b"%4d" % i, ledger) for i in range(100)]
        probe.drop(block)
    failures = []

    def work(share: list[Lease]) -> None:
        try:
            for number, lease in enumerate(share):
                part = lease[1:3]
                data = bytes(lease)
                lease.release()
                assert part == data[1:3]
                if number % 2:
                    part.release()
        except BaseException as error:
            failures.append(error)
            raise

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(leases[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert (pool.free, pool.outstanding, pool.leased_bytes, ledger.leased) == (64, 0, 0, 0)
    assert pool.collected == 3200
