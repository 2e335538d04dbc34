"""The engine contract, line by line, over every engine: ``uring``, ``epoll`` and ``simulated``.

A *world* makes an engine, connected descriptors for it, and the peers at their other ends. The real engines get
real sockets, the simulated one virtual descriptors. Nothing here sleeps: the only way to let time pass is the engine's
own ``wait``, and a limit on that is a failure, never a pace.
"""

from __future__ import annotations

import errno
import functools
import gc
import itertools
import os
import signal
import socket
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conftest import descriptors, why_not
from headrace._driver import Driver, Record
from headrace._pool import BufferPool, Lease
from headrace.errors import EngineError
from worlds import Simulation, Sockets, VirtualPeer, World

LIMIT = 30.0  # seconds that nothing here comes near
MOMENT = 0.02  # a wait that is to run out


@pytest.fixture(params=["uring", "epoll", "simulated"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "simulated":
        world: World = Simulation()
    else:
        reason = why_not(request.param)
        if reason is not None:
            pytest.skip(f"needs io_uring: {reason}")
        world = Sockets(request.param)
    with world.cleanup:
        yield world


@pytest.fixture
def epoll_world() -> Iterator[Sockets]:
    world = Sockets("epoll")
    with world.cleanup:
        yield world


@pytest.fixture
def real_world(engine_name: str) -> Iterator[Sockets]:
    world = Sockets(engine_name)
    with world.cleanup:
        yield world


@pytest.fixture
def driver(world: World) -> Driver:
    return Driver(world.engine())


def pattern(size: int) -> bytes:
    """Bytes that tell where they belong."""
    words = range(size // 4 + 1)
    return b"".join(word.to_bytes(4, "little") for word in words)[:size]


def content(records: list[Record], token: int) -> bytes:
    """What a receive has brought."""
    return b"".join(record.data for record in records if record.token == token and record.data)


def terminal(records: list[Record], token: int) -> Record:
    """The record that ends a request: the last one."""
    own = [record for record in records if record.token == token]
    # Among those before, multishot operations may have ended with a success, and were submitted anew by the driver.
    assert all(record.more or record.result > 0 for record in own[:-1])
    assert not own[-1].more
    return own[-1]


def turns(
    driver: Driver, until: Callable[[list[Record]], bool], records: list[Record] | None = None
) -> list[Record]:
    """Short turns until something holds of the records so far; all records."""
    records = records if records is not None else []
    for _ in range(10_000):
        if until(records):
            return records
        records += driver.wait(0.002)
    raise AssertionError(
        f"never happened; active: {[driver.state(token) for token in driver.active]}; {records}"
    )


def read_all(driver: Driver, peer: Any, size: int, records: list[Record] | None = None) -> bytes:
    """Reads at the peer's end until `size` bytes are there, or the end, with turns between."""
    data = bytearray()

    def enough(_: object) -> bool:
        while (piece := peer.receive(size - len(data))) is not None:
            data.extend(piece)
            if not piece or len(data) == size:
                return True
        return False

    turns(driver, enough, records)
    return bytes(data)


def write_all(driver: Driver, peer: Any, data: bytes) -> list[Record]:
    """Sends everything from the peer's end, with turns between."""
    rest = memoryview(data)

    def done(_: object) -> bool:
        nonlocal rest
        while rest and (sent := peer.send(bytes(rest[:65536]))):
            rest = rest[sent:]
        return not rest

    return turns(driver, done)


def gather(driver: Driver, size: int, records: list[Record] | None = None) -> list[Record]:
    """Turns until this many bytes were received, counting those of `records`; all records."""
    return turns(driver, lambda all_records: received(all_records) >= size, records)


def received(records: list[Record]) -> int:
    return sum(len(record.data) for record in records if record.data)


def runs_out(driver: Driver, seconds: float = MOMENT) -> None:
    """A wait that nothing ends: it takes its time, and brings nothing."""
    before = driver.now()
    assert driver.wait(seconds) == []
    assert driver.now() - before >= seconds - 1e-9  # the virtual clock is a sum of floats


# ---- receiving ----------------------------------------------------------------------------------------------


def test_a_receive_completes_many_times_in_order_and_ends_with_the_stream(
    world: World, driver: Driver
) -> None:
    near, peer = world.pair()
    token = driver.receive(near)
    records: list[Record] = []
    sent = b""
    for number in range(50):
        piece = pattern(100 + number)
        assert peer.send(piece) == len(piece)
        sent += piece
        records += driver.collect()
    assert content(records, token) == sent
    assert all(record.more for record in records)
    assert driver.state(token) == "in flight"
    peer.close()
    records += driver.end(token)
    assert terminal(records, token).result == 0
    assert content(records, token) == sent
    assert driver.state(token) == "idle"
    driver.close(near)


def test_a_stream_larger_than_the_pool(world: World) -> None:
    driver = Driver(world.engine(BufferPool(block_size=8192, target=2, maximum=4)))
    near, peer = world.pair()
    token = driver.receive(near)
    data = pattern(1_000_000)
    records = write_all(driver, peer, data)
    peer.finish()
    records += driver.end(token)
    assert content(records, token) == data
    driver.close(near)


def test_many_connections_each_get_their_own_bytes(world: World, driver: Driver) -> None:
    ends = [world.quick_pair() for _ in range(100)]
    tokens = [driver.receive(near) for near, _ in ends]
    sent = [b"%d " % number * 20 for number in range(100)]
    for (_, peer), data in zip(ends, sent, strict=True):
        assert peer.send(data) == len(data)
    records = gather(driver, sum(map(len, sent)))
    assert [content(records, token) for token in tokens] == sent


def test_bytes_in_a_lease_stay_what_they_are(world: World) -> None:
    driver = Driver(world.engine(), hold=True)
    near, peer = world.pair()
    token = driver.receive(near)
    held: list[tuple[Lease, bytes]] = []
    for number in range(200):
        peer.send(pattern(number + 50))
        for record in driver.collect():
            assert record.lease is not None
            assert record.data is not None
            held.append((record.lease, record.data))
    assert all(bytes(lease) == data for lease, data in held)
    assert len({data for _, data in held}) > 100
    for lease, _ in held:
        lease.release()
    driver.cancel_now(token)
    driver.end(token)


# ---- waiting ------------------------------------------------------------------------------------------------


def test_a_wait_without_time_still_reaps(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    token = driver.receive(near)
    driver.wait(0)
    peer.send(b"there")
    records: list[Record] = []
    for _ in range(1_000_000):
        records += driver.wait(0)
        if records:
            break
    assert content(records, token) == b"there"


def test_what_submit_completes_is_delivered_by_deliver_alone(world: World, driver: Driver) -> None:
    near, _ = world.pair()
    seen: list[Record] = []
    driver.on_completion = seen.append
    token = driver.send(near, b"at once")
    driver.flush()
    driver.cancel(token)
    assert seen == []
    assert terminal(driver.end(token), token).result in (7, -errno.ECANCELED)
    assert len(seen) == 1


def test_a_wait_does_not_sleep_over_queued_completions(world: World, driver: Driver) -> None:
    near, _ = world.pair()
    token = driver.send(near, b"x")
    turns_until_queued = iter(range(10000))
    while not driver.queued:
        driver.enter(0)
        next(turns_until_queued)
    before = driver.now()
    driver.enter(LIMIT)
    assert driver.now() - before < LIMIT
    assert terminal(driver.deliver(), token).result == 1


@pytest.mark.parametrize("seconds", [0.0002, 0.001, 0.0355, 0.1])
def test_a_wait_is_never_early(driver: Driver, seconds: float) -> None:
    driver.wait(0)
    waits = driver.engine.waits
    runs_out(driver, seconds)
    assert driver.engine.waits == waits + 1


def test_a_wait_is_not_ended_by_an_interest_that_is_over(world: World, driver: Driver) -> None:
    """Readiness that nobody waits for any more must neither end a wait nor make it spin."""
    near, peer = world.pair()
    token = driver.receive(near)
    peer.send(b"before")
    gather(driver, 6)
    driver.cancel(token)
    driver.end(token)
    peer.send(b"while nobody receives")
    runs_out(driver)
    peer.close()
    calls = driver.engine.calls
    runs_out(driver)
    runs_out(driver)
    assert driver.engine.calls - calls < 20
    token = driver.receive(near)
    records = driver.end(token)
    assert content(records, token) == b"while nobody receives"


def test_a_reset_that_nobody_waits_for_does_not_spin(world: World, driver: Driver) -> None:
    """A hang-up can't be masked: epoll would tell of it again and again."""
    near, peer = world.pair()
    token = driver.receive(near)
    driver.wait(0)
    driver.cancel(token)
    driver.end(token)
    if isinstance(peer, VirtualPeer):
        peer.engine.reset(near)
    else:
        peer.end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
    calls = driver.engine.calls
    runs_out(driver)
    runs_out(driver)
    assert driver.engine.calls - calls < 20
    token = driver.receive(near)
    assert terminal(driver.end(token), token).result == -errno.ECONNRESET


def test_wake_from_another_thread_ends_a_wait_without_limit(driver: Driver) -> None:
    for _ in range(20):
        thread = threading.Thread(target=driver.engine.wake)
        thread.start()
        assert driver.wait(-1) == []
        thread.join()
    runs_out(driver)


def test_a_wake_before_the_wait_is_not_lost(driver: Driver) -> None:
    driver.wait(0)
    driver.engine.wake()
    assert driver.wait(-1) == []
    runs_out(driver)


def test_a_thousand_wakes_are_one(driver: Driver) -> None:
    driver.wait(0)
    calls = driver.engine.calls
    for _ in range(1000):
        driver.engine.wake()
    assert driver.wait(-1) == []
    assert driver.engine.calls - calls < 20
    runs_out(driver)


def test_wakes_and_completions_from_a_busy_thread(world: World, driver: Driver) -> None:
    """Each wake is answered by a return of ``wait`` after it, however they interleave."""
    asked = answered = 0
    go = threading.Semaphore(0)

    def ask() -> None:
        nonlocal asked
        for _ in range(300):
            asked += 1
            driver.engine.wake()
            assert go.acquire(timeout=LIMIT)

    thread = threading.Thread(target=ask)
    thread.start()
    while answered < 300:
        driver.wait(-1)
        while answered < asked:
            answered += 1
            go.release()
    thread.join()


@pytest.fixture
def usr1() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Installs what SIGUSR1 does."""
    old = signal.getsignal(signal.SIGUSR1)
    yield lambda action: signal.signal(signal.SIGUSR1, lambda number, frame: action())  # type: ignore[misc]
    signal.signal(signal.SIGUSR1, old)


def kicker() -> threading.Thread:
    """A thread, not started, that sends SIGUSR1 to this one."""
    return threading.Thread(target=signal.pthread_kill, args=(threading.get_ident(), signal.SIGUSR1))


def test_an_exception_from_a_signal_handler_leaves_the_wait(
    world: World, driver: Driver, usr1: Callable[[Callable[[], None]], None]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    usr1(interrupt)
    near, peer = world.pair()
    token = driver.receive(near)
    for _ in range(10):
        thread = kicker()
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            while True:
                driver.wait(LIMIT)
        thread.join()
    peer.send(b"goes on")
    assert content(gather(driver, 7), token) == b"goes on"


def test_a_signal_ends_the_wait(driver: Driver, usr1: Callable[[Callable[[], None]], None]) -> None:
    handled: list[bool] = []
    usr1(lambda: handled.append(True))
    before = driver.now()
    thread = kicker()
    thread.start()
    while not handled:
        assert driver.wait(LIMIT) == []
    if driver.engine.name != "simulated":
        assert driver.now() - before < LIMIT
    thread.join()


# ---- cancelling ---------------------------------------------------------------------------------------------


def test_cancel_only_asks(world: World, driver: Driver) -> None:
    near, _ = world.pair()
    token = driver.receive(near)
    driver.wait(0)
    driver.cancel(token)
    assert driver.state(token) != "idle"
    driver.cancel(token)
    records = driver.end(token)
    assert terminal(records, token).result == -errno.ECANCELED
    driver.cancel(token)
    runs_out(driver)


def test_a_receive_that_is_cancelled_before_it_began(world: World, driver: Driver) -> None:
    near, _ = world.pair()
    token = driver.receive(near)
    driver.cancel(token)
    assert terminal(driver.end(token), token).result == -errno.ECANCELED


def test_no_byte_is_lost_or_told_twice_when_cancel_loses_the_race(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    sent = read = b""
    for number in range(200):
        token = driver.receive(near)
        records = driver.wait(0) if number % 3 else []
        piece = b"%d " % number
        assert peer.send(piece) == len(piece)
        sent += piece
        if number % 2:
            driver.enter(0)
        driver.cancel(token)
        records += driver.end(token)
        assert terminal(records, token).result == -errno.ECANCELED
        read += content(records, token)
    token = driver.receive(near)
    peer.finish()
    records = driver.end(token)
    assert read + content(records, token) == sent


def test_no_connection_is_lost_when_cancelling_an_accept_loses_the_race(world: World, driver: Driver) -> None:
    fd, connect = world.listener()
    accepted: list[int] = []
    peers = []
    for number in range(60):
        token = driver.accept(fd)
        records = driver.wait(0) if number % 3 else []
        peers.append(connect())
        if number % 2:
            driver.enter(0)
        driver.cancel(token)
        records += driver.end(token)
        assert terminal(records, token).result == -errno.ECANCELED
        accepted += [record.result for record in records if record.result >= 0]
    token = driver.accept(fd)
    accepted += [r.result for r in turns(driver, lambda records: len(accepted) + len(records) >= 60)]
    assert len(set(accepted)) == len(accepted) == 60
    driver.cancel_now(token)
    driver.end(token)
    for accepted_fd in (*accepted, fd):
        driver.close(accepted_fd)


@pytest.mark.parametrize("data", [b"", b"perhaps"])
def test_cancel_now_ends_it_here_and_now(world: World, driver: Driver, data: bytes) -> None:
    near, peer = world.pair()
    token = driver.receive(near)
    driver.wait(0)
    peer.send(data)
    driver.cancel_now(token)
    assert driver.state(token) == "ending"
    driver.close(near)
    records = driver.deliver()
    assert terminal(records, token).result == -errno.ECANCELED
    assert content(records, token) in (b"", data)
    if not data:  # what's received but not read turns the end into a reset
        assert read_all(driver, peer, 1) == b""


def test_a_cancelled_send_tells_how_far_it_came(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    data = pattern(4_000_000)
    token = driver.send(near, data)
    for _ in range(20):
        driver.wait(0.001)
    driver.cancel(token)
    result = terminal(driver.end(token), token).result
    assert 0 < result < len(data)
    driver.shutdown(near)
    assert read_all(driver, peer, len(data)) == data[:result]


# ---- descriptors --------------------------------------------------------------------------------------------


def test_the_peer_sees_the_end_when_the_descriptor_is_closed(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    token = driver.receive(near)
    driver.wait(0)
    driver.cancel(token)
    driver.end(token)
    driver.close(near)
    assert read_all(driver, peer, 1) == b""


def test_late_completions_of_a_former_descriptor_reach_nobody_else(world: World, driver: Driver) -> None:
    """Ten thousand connections under the same descriptor numbers, closed with events still on their way."""
    expected: dict[int, bytes] = {}
    records: list[Record] = []
    numbers: set[int] = set()
    for number in range(10_000):
        near, peer = world.quick_pair()
        numbers.add(near)
        token = driver.receive(near)
        expected[token] = b"<%d>" % number
        if number % 3 == 0:
            driver.enter(0)
        peer.send(expected[token])
        if number % 2 == 0:
            driver.enter(0)
        driver.cancel_now(token)
        driver.close(near)
        peer.close()
        if number % 5 == 0:
            records += driver.wait(0)
    records += driver.wait(0)
    assert driver.active == []
    assert len(numbers) < 100
    results: dict[int, list[Record]] = {token: [] for token in expected}
    for record in records:
        results[record.token].append(record)
    for token, own in results.items():
        terminal(own, token)
        assert content(own, token) in (b"", expected[token])
    # Epoll looks only in `enter`; io_uring also collects while it cancels.
    assert received(records) > 0


# ---- sending ------------------------------------------------------------------------------------------------


def test_a_send_completes_once_with_all_its_bytes(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    token = driver.send(near, b"hello")
    assert driver.end(token) == [Record(token, "send", 5, False, None, None)]
    assert read_all(driver, peer, 5) == b"hello"


def test_a_silent_success_is_silent(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    driver.wait(0)
    silent_sends = driver.engine.silent_sends
    token = driver.send(near, b"nobody waits", silent=True)
    runs_out(driver)
    assert driver.silent == [token]
    assert driver.active == []
    assert driver.engine.silent_sends == silent_sends + 1
    assert read_all(driver, peer, 12) == b"nobody waits"


def test_a_silent_send_is_decided_by_flush(world: World, driver: Driver) -> None:
    near, _ = world.pair()
    token = driver.send(near, b"decided", silent=True)
    driver.flush()
    assert driver.silent == [token]
    assert driver.state(token) == "idle"


def test_a_silent_failure_is_told_and_ends_the_wait(world: World, driver: Driver) -> None:
    near, _ = world.pair()
    driver.shutdown(near)
    token = driver.send(near, b"too late", silent=True)
    before = driver.now()
    records = driver.wait(LIMIT)
    assert terminal(records, token).result == -errno.EPIPE
    assert driver.now() - before < LIMIT
    assert driver.silent == []
    assert driver.engine.silent_failures == 1


def test_a_silent_send_never_waits_and_tells_what_went_out(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    data = pattern(4_000_000)
    out = 0
    results = []
    for _ in range(3):
        token = driver.send(near, data[out:], silent=True)
        results.append(terminal(driver.end(token), token).result)
        out += max(results[-1], 0)
    assert results[0] > 0
    assert set(results[1:]) & {-errno.EAGAIN} or out < len(data)
    assert driver.engine.silent_failures == 3
    token = driver.send(near, data[out:])
    records: list[Record] = []
    assert read_all(driver, peer, len(data), records) == data
    records += driver.end(token)
    assert terminal(records, token).result == len(data) - out


@pytest.mark.parametrize("vectored", [False, True])
def test_a_send_of_all_goes_on_until_all_is_out(world: World, driver: Driver, vectored: bool) -> None:
    near, peer = world.pair()
    data = pattern(3_000_001)
    if vectored:
        cuts = sorted({0, 1, 2, 70_000, 70_001, len(data), *range(0, len(data), 52_631)})
        pieces = [data[a:b] for a, b in itertools.pairwise(cuts)]
        pieces.insert(3, b"")
        assert len(pieces) <= 64
        token = driver.send_vector(near, pieces)
    else:
        token = driver.send(near, data)
    records: list[Record] = []
    arrived = b""
    while len(arrived) < len(data):  # a slow reader
        arrived += read_all(driver, peer, min(9_999, len(data) - len(arrived)), records)
        records += driver.wait(0)
    assert arrived == data
    records += driver.end(token)
    assert [record.result for record in records] == [len(data)]


@pytest.mark.parametrize("vectored", [False, True])
def test_a_send_completes_with_its_first_progress_unless_all_is_asked_for(
    world: World, driver: Driver, vectored: bool
) -> None:
    near, peer = world.pair()
    data = pattern(2_000_000)
    out = 0
    arrived = bytearray()
    cut_short = 0
    while out < len(data):
        if vectored:
            half = (len(data) - out) // 2
            token = driver.send_vector(near, [data[out : out + half], data[out + half :]], all=False)
        else:
            token = driver.send(near, data[out:], all=False)
        records: list[Record] = []
        while token in driver.active:
            arrived += peer.receive(100_000) or b""
            records += driver.wait(0.001)
        result = terminal(records, token).result
        assert 0 < result <= len(data) - out
        cut_short += result < len(data) - out
        out += result
    arrived += read_all(driver, peer, len(data) - len(arrived))
    assert arrived == data
    assert cut_short > 0


def test_a_blocked_send_ends_when_the_peer_goes(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    token = driver.send(near, bytes(4_000_000))
    for _ in range(20):
        driver.wait(0.001)
    peer.close()  # with bytes unread: a reset
    result = terminal(driver.end(token), token).result
    assert result in (-errno.EPIPE, -errno.ECONNRESET) or 0 < result < 4_000_000
    token = driver.send(near, b"x")
    assert terminal(driver.end(token), token).result in (-errno.EPIPE, -errno.ECONNRESET)


def test_both_directions_at_once(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    data = pattern(1_000_000)
    receiving = driver.receive(near)
    sending = driver.send(near, data)
    arrived = bytearray()
    to_send = memoryview(data)
    records: list[Record] = []
    for _ in range(20_000):
        arrived += peer.receive() or b""
        to_send = to_send[peer.send(bytes(to_send[:10_000])) :]
        records += driver.wait(0 if to_send else 0.001)
        if len(arrived) == received(records) == len(data):
            break
    assert arrived == data
    assert content(records, receiving) == data
    records += driver.end(sending)
    assert terminal(records, sending).result == len(data)


def test_unsent_tells_what_the_peer_has_not_taken(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    assert driver.unsent(near) == 0
    token = driver.send(near, bytes(2_000_000), all=False)
    driver.end(token)
    turns(driver, lambda _: driver.unsent(near) > 0)
    driver.shutdown(near)
    read_all(driver, peer, 2_000_000)
    turns(driver, lambda _: driver.unsent(near) == 0)


# ---- without buffers ----------------------------------------------------------------------------------------


STREAM = 100_000


def starve(world: World, blocks: int = 2) -> tuple[Driver, int, Any, bytes, list[Record]]:
    """A receive that is parked, since the records of its own bytes hold all blocks; what's still to be sent."""
    driver = Driver(world.engine(BufferPool(block_size=8192, target=1, maximum=blocks)), hold=True)
    near, peer = world.pair()
    token = driver.receive(near)
    data = pattern(STREAM)
    records: list[Record] = []
    sent = 0
    while True:
        sent += peer.send(data[sent : sent + 3000])
        more = driver.wait(0.002)
        records += more
        # io_uring parks for a moment until it has posted the next block: not what is meant.
        if driver.state(token) == "parked" and driver.engine.pool.free == 0 and not more:
            return driver, token, peer, data[sent:], records


def release(records: list[Record]) -> None:
    for record in records:
        if record.lease is not None:
            record.lease.release()


def test_a_receive_without_a_buffer_is_parked_and_does_not_spin(world: World) -> None:
    driver, token, _, _, records = starve(world)
    assert driver.engine.parked_count >= 1
    driver.wait(0)
    calls = driver.engine.calls
    runs_out(driver)
    runs_out(driver)
    assert driver.engine.calls - calls < 20
    assert driver.state(token) == "parked"
    release(records)
    assert all(record.more for record in driver.collect())
    release(records)


def test_a_parked_receive_goes_on_when_a_lease_is_released(world: World) -> None:
    driver, token, peer, rest, records = starve(world)
    everything = list(records)
    while received(everything) < STREAM:
        release(records)
        rest = rest[peer.send(rest) if rest else 0 :]
        records = driver.wait(0.002)
        everything += records
    release(records)
    assert content(everything, token) == pattern(STREAM)


def test_a_parked_receive_goes_on_when_another_thread_releases(world: World) -> None:
    driver, token, _, _, records = starve(world)
    before = received(records)
    waiting = threading.Event()

    def let_go() -> None:
        assert waiting.wait(LIMIT)
        release(records)

    thread = threading.Thread(target=let_go)
    thread.start()
    waiting.set()
    more: list[Record] = []
    while not more:
        more += driver.wait(-1)
    thread.join()
    assert content(more, token) == pattern(STREAM)[before : before + received(more)]
    release(more)


def test_a_parked_receive_can_be_cancelled(world: World) -> None:
    driver, token, _, _, records = starve(world)
    driver.cancel(token)
    records += driver.end(token)
    assert terminal(records, token).result == -errno.ECANCELED
    assert content(records, token) == pattern(received(records))
    release(records)
    driver.wait(0)
    runs_out(driver)


def test_a_parked_receive_is_served_in_its_turn(world: World) -> None:
    """Many wait for a block, one block comes back, again and again: all get their bytes."""
    driver = Driver(world.engine(BufferPool(block_size=8192, target=1, maximum=2)), hold=True)
    ends = [world.quick_pair() for _ in range(20)]
    tokens = [driver.receive(near) for near, _ in ends]
    driver.wait(0)
    for _, peer in ends:
        peer.send(pattern(5000))
    everything: list[Record] = []
    while received(everything) < 20 * 5000:
        records = driver.collect()
        everything += records
        release(records)
    assert [content(everything, token) for token in tokens] == [pattern(5000)] * 20


def test_a_fast_sender_does_not_starve_its_neighbour(world: World) -> None:
    driver = Driver(world.engine(BufferPool(block_size=65536, target=8, maximum=8)), hold=True)
    fast, fast_peer = world.pair()
    slow, slow_peer = world.pair()
    flood = driver.receive(fast)
    trickle = driver.receive(slow)
    driver.wait(0)
    while fast_peer.send(bytes(65536)):
        pass
    slow_peer.send(b"me too")
    everything: list[Record] = []
    for _ in range(100):
        while fast_peer.send(bytes(65536)):
            pass
        records = driver.wait(0.001)
        everything += records
        if content(everything, trickle):
            break
        release(records)
    assert content(everything, trickle) == b"me too"
    release(everything)
    driver.cancel_now(flood)
    driver.cancel_now(trickle)
    release(driver.deliver())


# ---- accepting ----------------------------------------------------------------------------------------------


def test_an_accept_completes_for_each_connection(world: World, driver: Driver) -> None:
    fd, connect = world.listener()
    token = driver.accept(fd)
    peers = [connect() for _ in range(100)]
    accepted = [record.result for record in turns(driver, lambda records: len(records) >= 100)]
    assert len(set(accepted)) == 100
    if isinstance(world, Sockets):
        assert not any(os.get_blocking(new) or os.get_inheritable(new) for new in accepted)
    receiving = [driver.receive(new) for new in accepted]
    for number, peer in enumerate(peers):
        peer.send(b"%3d" % number)
    records = gather(driver, 300)
    assert sorted(content(records, one) for one in receiving) == [b"%3d" % number for number in range(100)]
    assert driver.state(token) == "in flight"
    for new, one in zip(accepted, receiving, strict=True):
        driver.cancel_now(one)
        driver.close(new)
    driver.cancel_now(token)
    driver.close(fd)


def test_an_accept_ends_when_no_descriptor_is_left_and_can_be_submitted_again(
    world: World, driver: Driver
) -> None:
    fd, connect = world.listener()
    peers = [connect() for _ in range(4)]
    with world.without_descriptors():
        # io_uring keeps to the limit that was in force at the submission.
        token = driver.accept(fd)
        assert [record.result for record in driver.end(token)] == [-errno.EMFILE]
        calls = driver.engine.calls
        runs_out(driver)
        assert driver.engine.calls - calls < 20
    assert driver.resubmit(token) == token
    accepted = [record.result for record in turns(driver, lambda records: len(records) >= 4)]
    assert len(set(accepted)) == 4
    driver.cancel_now(token)
    driver.end(token)
    for new in (*accepted, fd):
        driver.close(new)
    for peer in peers:
        peer.close()


# ---- polling ------------------------------------------------------------------------------------------------


def test_a_poll_that_is_submitted_again_is_level_triggered(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    token = driver.poll(near)
    runs_out(driver)
    peer.send(b"xy")
    assert terminal(driver.end(token), token).result > 0
    runs_out(driver)  # nobody asks
    for _ in range(5):
        driver.resubmit(token)
        assert terminal(driver.end(token), token).result > 0
    world.read(near, 1)
    driver.resubmit(token)
    assert terminal(driver.end(token), token).result > 0
    world.read(near, 1)
    driver.resubmit(token)
    runs_out(driver)
    peer.send(b"z")
    assert terminal(driver.end(token), token).result > 0
    driver.resubmit(token)
    driver.cancel_now(token)
    driver.end(token)
    driver.close(near)


def test_polling_what_is_ready_costs_epoll_one_call_a_turn(epoll_world: Sockets) -> None:
    """As the loop does it with its selector: one shot, submitted again in each turn."""
    world = epoll_world
    driver = Driver(world.engine())
    near, peer = world.pair()
    peer.send(b"x")
    token = driver.poll(near)
    driver.end(token)
    calls = driver.engine.calls
    for _ in range(100):
        driver.resubmit(token)
        driver.end(token)
    assert driver.engine.calls - calls == 100


def test_epoll_says_that_a_regular_file_cannot_be_polled(epoll_world: Sockets) -> None:
    """io_uring polls it, and says that it's ready."""
    driver = Driver(epoll_world.engine())
    with tempfile.TemporaryFile() as file:
        token = driver.poll(file.fileno())
        assert terminal(driver.end(token), token).result == -errno.EPERM


# ---- life ---------------------------------------------------------------------------------------------------


def run_in_thread(function: Callable[[], object]) -> None:
    """In a new thread, to its end; raises what it raises."""
    failures: list[BaseException] = []

    def target() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "other threads"])
def test_operations_survive_stop_and_start(world: World, elsewhere: bool) -> None:
    """A stream in each direction, over an engine that is stopped and started again in mid-stream."""
    driver = Driver(world.engine())
    near, peer = world.pair()
    data = pattern(600_000)
    receiving, sending = driver.receive(near), driver.send(near, data)
    sent = 0
    arrived = bytearray()
    records: list[Record] = []
    out = 0

    def session() -> None:
        nonlocal sent, sending, out
        driver.engine.start()
        for _ in range(25):
            sent += peer.send(data[sent : sent + 5000])
            arrived.extend(peer.receive(5000) or b"")
            records.extend(driver.wait(0.0005))
        driver.engine.stop()
        records.extend(driver.deliver())
        if sending not in driver.active and out < len(data):
            # A send may end with a stop, or be suspended: then it goes on by itself.
            result = terminal(records, sending).result
            out += max(result, 0)
            if out < len(data):
                sending = driver.send(near, data[out:])

    driver.engine.stop()
    records += driver.deliver()
    for _ in range(400):
        if sent == len(arrived) == len(data) == received(records):
            break
        if elsewhere:
            run_in_thread(session)
        else:
            session()
    assert content(records, receiving) == data
    assert arrived == data
    if elsewhere:
        run_in_thread(lambda: (driver.engine.start(), driver.cancel_now(receiving), driver.engine.stop()))
    else:
        driver.cancel(receiving)


def test_what_is_submitted_or_cancelled_while_stopped(world: World) -> None:
    driver = Driver(world.engine())
    near, peer = world.pair()
    other, _ = world.pair()
    driver.engine.stop()
    receiving = driver.receive(near)
    polling = driver.poll(other)
    sending = driver.send(other, b"later")
    driver.cancel(polling)
    driver.engine.start()
    peer.send(b"data")
    records = driver.end(polling) + driver.end(sending)
    records = gather(driver, 4, records)
    assert terminal(records, polling).result == -errno.ECANCELED
    assert terminal(records, sending).result == 5
    assert content(records, receiving) == b"data"


def test_close_with_everything_in_flight_leaks_nothing(world: World) -> None:
    world.engine()  # what's kept once per thread (a closed ring) is there then
    world.cleanup.close()
    gc.collect()
    before = descriptors()
    engine = world.engine()
    pool = engine.pool
    driver = Driver(engine)
    near, peer = world.pair()
    fd, connect = world.listener()
    polled, polled_peer = world.pair()
    full, full_peer = world.pair()
    driver.receive(near)
    driver.accept(fd)
    driver.poll(polled)
    driver.send(full, bytes(4_000_000))
    driver.wait(0.001)
    peer.send(b"received but not delivered")
    peer_of_accepted = connect()
    turns_to_queue = iter(range(10000))
    while driver.queued < 2:
        driver.enter(0.001)
        next(turns_to_queue)
    ended = weakref.ref(driver)
    for each in (peer, polled_peer, full_peer, peer_of_accepted):
        each.close()
    engine.stop()
    engine.close()
    assert engine.closed
    if isinstance(world, Sockets):
        for each_fd in (near, fd, polled, full):
            os.close(each_fd)
    world.cleanup.pop_all().close()
    del driver
    gc.collect()
    assert ended() is None, "a reference to an owner is left"
    assert pool.free == pool.allocated
    if isinstance(world, Sockets):
        assert descriptors() == before
    else:
        assert world.made.descriptors() == sorted((near, fd, polled, full))


def test_close_when_nobody_else_holds_the_operations(world: World) -> None:
    """Completions that wait for delivery point to operations that go with their owners, and those with close()."""
    engine = world.engine()
    driver = Driver(engine)
    near, peer = world.pair()
    fd, connect = world.listener()
    driver.receive(near)
    driver.accept(fd)
    driver.wait(0)
    peer.send(b"received but not delivered")
    connect()
    for _ in range(10_000):
        if driver.queued >= 2:
            break
        driver.enter(0.001)
    before = descriptors() if isinstance(world, Sockets) else world.made.descriptors()
    engine.stop()
    assert driver.queued >= 2
    driver.abandon()
    engine.close()
    after = descriptors() if isinstance(world, Sockets) else world.made.descriptors()
    assert len(after) < len(before), "the accepted connection is still open"
    assert engine.pool.free == engine.pool.allocated


def test_what_a_closed_engine_says(world: World) -> None:
    driver = Driver(world.engine())
    near, _ = world.pair()
    with pytest.raises(EngineError):
        driver.engine.start()
    with pytest.raises(EngineError):
        driver.engine.close()
    driver.engine.stop()
    driver.engine.stop()
    driver.engine.close()
    driver.engine.close()
    with pytest.raises(EngineError):
        driver.receive(near)
    with pytest.raises(EngineError):
        driver.engine.start()
    driver.engine.wake()
    if isinstance(world, Sockets):
        os.close(near)


def test_an_engine_is_of_no_use_in_a_forked_child(real_world: Sockets) -> None:
    world = real_world
    driver = Driver(world.engine())
    near, peer = world.pair()
    token = driver.receive(near)
    driver.wait(0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            driver.engine.forked()
            refused = 0
            for use in (functools.partial(driver.receive, peer.end.fileno()), driver.engine.start):
                try:
                    use()
                except EngineError:
                    refused += 1
            driver.engine.wake()
            driver.engine.close()
            code = 0 if refused == 2 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    peer.send(b"intact")
    assert content(gather(driver, 6), token) == b"intact"
    driver.engine.wake()
    assert driver.wait(-1) == []


# ---- delivering ---------------------------------------------------------------------------------------------


def test_an_exception_from_an_endpoint_leaves_the_rest_queued(world: World, driver: Driver) -> None:
    ends = [world.pair() for _ in range(5)]
    tokens = [driver.send(near, b"x") for near, _ in ends]
    turns_until_queued = iter(range(10000))
    while driver.queued < 5:
        driver.enter(0.001)
        next(turns_until_queued)

    def complain(record: Record) -> None:
        if record.token in tokens[:3]:
            raise KeyboardInterrupt(record.token)

    driver.on_completion = complain
    raised = []
    records: list[Record] = []
    while len(records) < 5:
        try:
            records += driver.deliver()
        except KeyboardInterrupt as error:
            raised.append(error.args[0])
    assert sorted(raised) == tokens[:3]
    assert sorted(record.token for record in records) == tokens
    assert driver.active == []


def test_what_is_submitted_from_within_a_completion(world: World, driver: Driver) -> None:
    """An echo, each answer sent from within the delivery."""
    near, peer = world.pair()
    token = driver.receive(near)
    answers: list[int] = []

    def echo(record: Record) -> None:
        if record.data:
            answers.append(driver.send(near, record.data, silent=True))

    driver.on_completion = echo
    for number in range(200):
        peer.send(b"%4d" % number)
        assert read_all(driver, peer, 4) == b"%4d" % number
    driver.flush()
    assert driver.silent == answers
    assert len(answers) >= 200
    driver.on_completion = None
    driver.cancel_now(token)
    driver.end(token)


def test_the_counters_count(world: World, driver: Driver) -> None:
    near, peer = world.pair()
    token = driver.receive(near)
    driver.end(driver.send(near, b"x"))
    peer.send(b"y")
    driver.collect()
    driver.cancel_now(token)
    driver.end(token)
    stats = driver.engine.stats()
    assert stats["submitted"] == 2
    assert stats["completed"] == 3
    assert stats["waits"] >= 2
    if world.name != "simulated":
        assert stats["calls"] >= 2


# ---- epoll's own --------------------------------------------------------------------------------------------


def test_pausing_and_resuming_costs_epoll_no_call(epoll_world: Sockets) -> None:
    driver = Driver(epoll_world.engine())
    near, _ = epoll_world.pair()
    token = driver.receive(near)
    calls = driver.engine.calls
    for _ in range(100):
        driver.cancel(token)
        driver.deliver()
        driver.resubmit(token)
    assert driver.engine.calls == calls


def test_what_a_turn_may_receive_is_limited_and_the_rest_comes_first(epoll_world: Sockets) -> None:
    """Sixteen connections have 64 KiB each: more than a turn takes. Nobody is served twice before all are."""
    driver = Driver(epoll_world.engine())
    ends = [epoll_world.quick_pair() for _ in range(16)]
    tokens = [driver.receive(near) for near, _ in ends]
    data = pattern(65536)
    for _, peer in ends:
        assert peer.send(data) == len(data)
    first = driver.wait(0)
    assert len(data) * 4 <= received(first) < len(data) * 16
    assert driver.engine.stats()["left_over"] == 16 - len(first)
    for _, peer in ends[:4]:
        peer.send(b"again")
    records = gather(driver, len(data) * 16 + 5 * 4, first)
    assert sorted(record.token for record in records[:16]) == tokens
    assert [content(records, token) for token in tokens] == [data + b"again"] * 4 + [data] * 12


def test_an_event_left_over_for_a_closed_descriptor_is_dropped(epoll_world: Sockets) -> None:
    driver = Driver(epoll_world.engine())
    ends = [epoll_world.quick_pair() for _ in range(16)]
    tokens = [driver.receive(near) for near, _ in ends]
    for _, peer in ends:
        peer.send(bytes(65536))
    served = {record.token for record in driver.wait(0)}
    late = next(number for number, token in enumerate(tokens) if token not in served)
    near, peer = ends[late]
    driver.cancel_now(tokens[late])
    driver.close(near)
    again, other = epoll_world.quick_pair()
    assert again == near
    token = driver.receive(again)
    records = gather(driver, 65536 * (15 - len(served)))
    assert content(records, token) == content(records, tokens[late]) == b""
    other.send(b"mine")
    assert content(gather(driver, 4), token) == b"mine"


def test_a_descriptor_closed_behind_the_engines_back_is_registered_anew(epoll_world: Sockets) -> None:
    """Against the rules; still the next listener under that number must not wait for ever."""
    driver = Driver(epoll_world.engine())
    near, connect = epoll_world.listener()
    token = driver.accept(near)
    driver.cancel_now(token)
    driver.deliver()
    os.close(near)
    again, connect = epoll_world.listener()
    assert again == near
    token = driver.accept(again)
    connect()
    [record] = driver.collect()
    driver.close(record.result)


def test_a_descriptor_in_use_is_not_closed(epoll_world: Sockets) -> None:
    driver = Driver(epoll_world.engine())
    near, _ = epoll_world.pair()
    token = driver.receive(near)
    with pytest.raises(OSError, match="busy"):
        driver.close(near)
    with pytest.raises(EngineError, match="already"):
        driver.receive(near)
    driver.cancel_now(token)
    driver.close(near)
    token = driver.receive(near)
    assert terminal(driver.end(token), token).result == -errno.EBADF


def test_a_closed_descriptor_that_was_duplicated_tells_nothing_more(epoll_world: Sockets) -> None:
    """A registration belongs to the open file: close() leaves it there while a duplicate lives."""
    driver = Driver(epoll_world.engine())
    near, peer = epoll_world.pair()
    token = driver.receive(near)
    copy = os.dup(near)
    driver.cancel_now(token)
    driver.close(near)
    driver.deliver()
    peer.send(b"x")
    calls = driver.engine.calls
    runs_out(driver)
    assert driver.engine.calls - calls == 1
    os.close(copy)
