"""What is written goes out whole and in order, however it was queued; the queue is bounded; the end is in order."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import threading
import warnings
import weakref
from typing import Any

import pytest

import headrace
from headrace.testing import Faults, simulated_run
from streams import Leases, Recorder, connected, in_thread, receive_all, reports, reset

FAMILIES = [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX]


async def stuffed(protocol: Recorder, family: int = socket.AF_INET) -> tuple[Any, socket.socket, int]:
    """A connection whose socket is full, a send being under way; and how many bytes were written."""
    transport, peer = await connected(protocol, family, receive_buffer=8192)
    written = 0
    while "pause" not in protocol.events:
        transport.write(bytes(1 << 20))
        written += 1 << 20
        await asyncio.sleep(0)
    return transport, peer, written


class Forwarding(Leases):
    """Sends on whatever it receives, as it lies in the pool, and notes the longest queue."""

    longest = 0

    def lease_received(self, lease: headrace.Lease) -> None:
        self.transport.write(lease)
        self.longest = max(self.longest, self.transport.get_write_buffer_size())

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.transport.resume_reading()


# ---- what can be written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_arrives_in_order(loop: headrace.EventLoop, family: int, seed: int) -> None:
    """Sizes from none to more than one send takes, of all types, alone and as lines; a reader that is slow at times."""
    chance = random.Random(seed)
    content = memoryview(chance.randbytes(6 << 20))

    def item(data: memoryview) -> Any:
        return chance.choice([bytes, bytearray, memoryview])(data)

    def slowly(peer: socket.socket) -> bytes:
        got = bytearray()
        pauses = random.Random(seed)
        while data := peer.recv(pauses.choice([1, 1000, 65536, 1 << 20])):
            got += data
        peer.close()
        return bytes(got)

    async def main() -> None:
        protocol = Leases()
        transport, peer = await connected(protocol, family, receive_buffer=8192)
        reading = asyncio.ensure_future(in_thread(slowly, peer))
        at = 0
        while at < len(content):
            for _ in range(chance.choice([1, 3, 200])):
                sizes = [
                    chance.choice([0, 1, 9, 300, 3000, 70_000, 1_500_000])
                    for _ in range(chance.choice([1, 4]))
                ]
                pieces = []
                for size in sizes:
                    pieces.append(content[at : at + size])
                    at += len(pieces[-1])
                if len(pieces) == 1:
                    transport.write(item(pieces[0]))
                else:
                    transport.writelines(item(piece) for piece in pieces)
            await asyncio.sleep(0)
            if chance.random() < 0.3:
                while transport.get_write_buffer_size() > 1 << 20:
                    await protocol.until(lambda: transport.get_write_buffer_size() <= 1 << 20)
        transport.close()
        assert await reading == content
        await protocol.seen("lost")
        assert protocol.error is None

    loop.run_until_complete(main())


def test_leases_go_out_from_where_they_lie_though_they_were_let_go(loop: headrace.EventLoop) -> None:
    """A proxy: what comes on one connection is written to another whose peer is slow."""
    content = os.urandom(4 << 20)

    class Forward(headrace.Protocol):
        def __init__(self, to: Any) -> None:
            self.to = to

        def lease_received(self, lease: headrace.Lease) -> None:
            middle = len(lease) // 2
            self.to.writelines([lease[:middle], b"", lease[middle:]])
            lease.release()

        def eof_received(self) -> None:
            self.to.close()

    async def main() -> None:
        protocol = Leases()
        transport, slow = await connected(protocol, receive_buffer=8192)
        _, fast = await connected(Forward(transport))

        def send() -> None:
            with fast:
                fast.sendall(content)

        sending = asyncio.ensure_future(in_thread(send))
        assert await in_thread(receive_all, slow) == content
        await sending
        await protocol.seen("lost")

    loop.run_until_complete(main())
    pool = loop.stats()["pool"]
    assert pool["outstanding"] == pool["leased"] == 0
    assert pool["leases"] > 0


@pytest.mark.parametrize("how", ["abort", "reset"])
def test_leases_that_were_not_sent_go_back(loop: headrace.EventLoop, how: str) -> None:
    async def main() -> None:
        protocol = Leases()
        transport, slow = await connected(protocol, receive_buffer=8192)
        forwarded = asyncio.Event()

        class Forward(headrace.Protocol):
            def lease_received(self, lease: headrace.Lease) -> None:
                transport.write(lease)
                if transport.get_write_buffer_size() > 500_000:
                    forwarded.set()

        near, fast = await connected(Forward())
        sending = asyncio.ensure_future(in_thread(fast.sendall, bytes(16 << 20)))
        await forwarded.wait()
        assert loop.stats()["pool"]["outstanding"] > 0
        if how == "abort":
            transport.abort()
        else:
            reset(slow)
        await protocol.seen("lost")
        near.abort()
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            await sending
        fast.close()
        slow.close()

    loop.run_until_complete(main())
    gc.collect()
    assert loop.stats()["pool"]["outstanding"] == 0


@pytest.mark.parametrize("line", [b"", bytearray(), memoryview(b"")])
def test_empty_lines_are_no_obstacle(loop: headrace.EventLoop, line: Any) -> None:
    async def main() -> None:
        protocol = Leases()
        transport, peer = await connected(protocol)
        transport.writelines([b"x", line])
        transport.writelines([line])
        transport.writelines([line, b"y"])
        transport.close()
        assert await in_thread(receive_all, peer) == b"xy"
        await protocol.seen("lost")
        assert protocol.events == ["made", "lost"]

    loop.run_until_complete(main())


def test_lines_of_which_one_is_wrong_send_none(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        transport, peer = await connected(Leases())
        for wrong in (None, "text", 7, [b"x"]):
            with pytest.raises(TypeError, match=f"must be a bytes-like object, not '{type(wrong).__name__}'"):
                transport.writelines([b"x", wrong])
        assert transport.get_write_buffer_size() == 0
        transport.close()
        assert await in_thread(receive_all, peer) == b""

    loop.run_until_complete(main())


# ---- flow control --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["write", "writelines"])
def test_a_program_that_minds_pause_writing_is_bounded(loop: headrace.EventLoop, how: str) -> None:
    async def main() -> None:
        protocol = Leases()
        transport, peer = await connected(protocol, receive_buffer=8192)
        written = highest = 0
        reading: Any = None
        while written < 8 << 20:
            paused = protocol.events.count("pause") > protocol.events.count("resume")
            if not paused:
                if how == "write":
                    transport.write(bytes(10_000))
                else:
                    transport.writelines([bytes(4000), bytes(6000)])
                written += 10_000
                highest = max(highest, transport.get_write_buffer_size())
            elif reading is None:
                reading = asyncio.ensure_future(in_thread(receive_all, peer))
            else:
                await protocol.seen("resume", protocol.events.count("pause"))
        transport.close()
        assert len(await reading) == written
        await protocol.seen("lost")
        assert highest <= 65536 + 10_000
        flow = [event for event in protocol.events if event in ("pause", "resume")]
        assert flow[::2] == ["pause"] * len(flow[::2])
        assert flow[1::2] == ["resume"] * len(flow[1::2])

    loop.run_until_complete(main())


@pytest.mark.parametrize("callback", ["pause", "resume"])
@pytest.mark.parametrize("act", ["write", "close", "abort", "limits", "eof"])
def test_anything_may_be_done_from_within_flow_control(
    loop: headrace.EventLoop, callback: str, act: str
) -> None:
    async def main() -> None:
        done: list[bool] = []

        def once(protocol: Recorder) -> None:
            if done:
                return
            done.append(True)
            transport = protocol.transport
            {
                "write": lambda: transport.write(b"more"),
                "close": transport.close,
                "abort": transport.abort,
                "limits": lambda: transport.set_write_buffer_limits(high=0),
                "eof": transport.write_eof,
            }[act]()

        protocol = Leases(**{callback: once})
        transport, peer, written = await stuffed(protocol)
        try:
            reading = asyncio.ensure_future(in_thread(receive_all, peer))
            if callback == "resume" and act != "abort":
                await protocol.seen("resume")
            transport.close()
            got = await reading
        except ConnectionResetError:
            assert act == "abort"
        else:
            assert act == "abort" or len(got) == written + 4 * (act == "write")
        await protocol.seen("lost")
        assert done
        assert protocol.events[-1] == "lost"
        assert protocol.error is None

    loop.run_until_complete(main())


def test_an_error_in_flow_control_is_reported_and_the_connection_goes_on(loop: headrace.EventLoop) -> None:
    found = reports(loop)

    def fail(protocol: Recorder) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        protocol = Leases(pause=fail, resume=fail)
        transport, peer, written = await stuffed(protocol)
        reading = asyncio.ensure_future(in_thread(receive_all, peer))
        await protocol.seen("resume")
        transport.close()
        assert len(await reading) == written
        await protocol.seen("lost")
        assert protocol.error is None

    loop.run_until_complete(main())
    assert [context["message"] for context in found] == [
        "protocol.pause_writing() failed",
        "protocol.resume_writing() failed",
    ]


def test_lowering_the_limit_pauses_at_once(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        protocol = Leases()
        transport, peer = await connected(protocol)
        transport.write(b"0123456789")
        assert protocol.events == ["made"]
        transport.set_write_buffer_limits(high=5)
        assert protocol.events == ["made", "pause"]
        await protocol.seen("resume")
        assert transport.get_write_buffer_size() == 0
        transport.close()
        assert await in_thread(receive_all, peer) == b"0123456789"

    loop.run_until_complete(main())


def test_much_that_is_written_in_one_callback_starts_before_its_end(loop: headrace.EventLoop) -> None:
    """To many connections, each below its own high-water mark: together they don't fill the memory."""

    async def main() -> None:
        pairs = [await connected(Leases()) for _ in range(40)]
        for transport, _ in pairs:
            transport.write(bytes(50_000))
        assert sum(transport.get_write_buffer_size() for transport, _ in pairs) < 40 * 50_000
        for transport, peer in pairs:
            transport.close()
            assert len(await in_thread(receive_all, peer)) == 50_000

    loop.run_until_complete(main())


# ---- the end -------------------------------------------------------------------------------------------------


def test_what_is_written_behind_a_send_of_the_same_turn_goes_out(loop: headrace.EventLoop) -> None:
    """A send that nothing waits for tells nobody when it's out; bytes behind it must not wait for something else."""

    async def main() -> None:
        def resumed(recorder: Recorder) -> None:
            recorder.transport.write(b"first")
            loop.call_soon(recorder.transport.write, b"second")

        recorder = Leases(resume=resumed)
        transport, peer, written = await stuffed(recorder)
        # The loop has nothing else to do, and wakes for nothing, until the peer has read all.
        data = await loop.run_in_executor(None, receive_exactly, peer, written + len(b"firstsecond"))
        assert data.endswith(b"firstsecond")
        transport.abort()
        peer.close()
        await recorder.seen("lost")

    loop.run_until_complete(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", ["close", "write_eof"])
def test_an_end_behind_a_send_that_is_under_way(loop: headrace.EventLoop, family: int, end: str) -> None:
    async def main() -> None:
        protocol = Leases()
        transport, peer, written = await stuffed(protocol, family)
        transport.write(b"the last words")
        getattr(transport, end)()
        received = await in_thread(receive_all, peer)
        assert received == bytes(written) + b"the last words"
        await protocol.seen("lost")
        assert protocol.error is None

    loop.run_until_complete(main())


def test_after_half_closing_the_other_direction_goes_on(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        protocol = Leases()
        transport, peer, written = await stuffed(protocol)
        transport.write_eof()

        def talk() -> int:
            got = 0
            while data := peer.recv(65536):
                got += len(data)
            peer.sendall(b"answer")
            peer.close()
            return got

        assert await in_thread(talk) == written
        await protocol.seen("lost")
        assert protocol.data == b"answer"
        assert [event for event in protocol.events if event not in ("pause", "resume")] == [
            "made",
            "received",
            "eof",
            "lost",
        ]

    loop.run_until_complete(main())


def test_a_connection_that_was_closed_with_bytes_queued_is_freed(loop: headrace.EventLoop) -> None:
    """The watch on a peer that takes nothing doesn't keep what is over."""

    async def main() -> None:
        protocol = Leases()
        transport, peer = await connected(protocol)
        transport.write(b"x")
        transport.close()
        await protocol.seen("lost")
        gone = weakref.ref(transport)
        protocol.transport = None
        del transport
        await asyncio.sleep(0)
        gc.collect()
        assert gone() is None
        peer.close()

    loop.run_until_complete(main())


def test_a_closing_connection_is_not_given_up_while_its_peer_takes_a_little() -> None:
    """Less than one send of 1 MiB in the 30 s in which a peer must take something; in virtual time."""

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def slow(protocol: Recorder) -> None:
            protocol.transport.pause_reading()
            loop.call_later(5, protocol.transport.resume_reading)

        reader = Leases(made=slow, received=slow)
        server = await loop.create_server(lambda: reader, "slow", 1)
        writer = Leases()
        transport, _ = await loop.create_connection(lambda: writer, "slow", 1)
        transport.write(bytes(4 << 20))
        await asyncio.sleep(1)
        began = loop.time()
        transport.close()
        await writer.seen("lost")
        assert writer.error is None
        assert loop.time() - began > 100
        await reader.seen("lost")
        assert len(reader.data) == 4 << 20
        server.close()

    calm = Faults(**dict.fromkeys(Faults.NAMES, 0))
    simulated_run(main(), 1, faults=calm, send_limit=65536, receive_limit=65536)


def test_leases_that_go_on_wait_for_a_slow_peer(loop: headrace.EventLoop) -> None:
    """Leases wait for the turn's end even above the high-water mark; a full socket pauses the protocol all the same."""

    async def main() -> None:
        protocol = Forwarding()
        _, peer = await connected(protocol, receive_buffer=8192)
        data = random.Random(1).randbytes(8 << 20)
        sending = asyncio.ensure_future(in_thread(peer.sendall, data))
        await protocol.seen("pause")
        received = await in_thread(receive_exactly, peer, len(data))
        await sending
        assert received == data
        assert protocol.longest <= 256 * 1024 + 256 * 1024  # the slack, and what one receive brings
        peer.close()
        await protocol.seen("lost")
        assert protocol.events.count("pause") == protocol.events.count("resume") > 0

    loop.run_until_complete(main())


def receive_exactly(peer: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        piece = peer.recv(65536)
        assert piece, f"the stream ended after {len(received)} of {size} bytes"
        received += piece
    return bytes(received)


@pytest.mark.parametrize("closed", ["before", "after"])
def test_a_transport_outlives_its_loop(engine_name: str, closed: str) -> None:
    """Its methods do no harm then; its descriptor goes with it."""
    loop = headrace.new_event_loop(engine=engine_name)

    async def main() -> tuple[Any, socket.socket]:
        transport, peer, _ = await stuffed(Leases())
        if closed == "before":
            transport.close()
        return transport, peer

    transport, peer = loop.run_until_complete(main())
    loop.close()
    transport.write(b"too late")
    transport.pause_reading()
    assert "StreamTransport" in repr(transport)
    if closed == "after":
        with pytest.raises(RuntimeError, match="closed"):
            transport.resume_reading()
        with pytest.raises(RuntimeError, match="closed"):
            transport.close()
    assert transport.is_closing()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del transport, loop
        gc.collect()
    warned = "unclosed transport" in "".join(str(warning.message) for warning in caught)
    assert warned == (closed == "after")
    assert set(receive_all(peer)) <= {0}
    peer.close()


def test_a_socket_that_its_owner_closed_is_not_closed_again(loop: headrace.EventLoop) -> None:
    """The number may be another file's by then."""

    async def main() -> None:
        protocol = Leases()
        near, peer = socket.socketpair()
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, near)
        transport.pause_reading()
        descriptor = near.fileno()
        near.close()
        others = [open(os.devnull, "rb") for _ in range(10)]  # noqa: SIM115
        assert descriptor in [other.fileno() for other in others]
        transport.abort()
        await protocol.seen("lost")
        await asyncio.sleep(0)
        for other in others:
            os.fstat(other.fileno())
            other.close()
        peer.close()
        # Whatever gets the number next can be waited for.
        near, peer = socket.socketpair()
        late = Leases()
        await loop.connect_accepted_socket(lambda: late, near)
        peer.sendall(b"x")
        await late.seen("received")
        peer.close()
        await late.seen("lost")

    loop.run_until_complete(main())


def test_threads_that_read_see_the_end(loop: headrace.EventLoop) -> None:
    """Twenty connections to blocking readers, closed in one turn with bytes queued: each gets all, and its FIN."""

    async def main() -> None:
        pairs = [await connected(Leases()) for _ in range(20)]
        results: dict[int, bytes] = {}

        def read(number: int, peer: socket.socket) -> None:
            results[number] = receive_all(peer)

        threads = [threading.Thread(target=read, args=(n, peer)) for n, (_, peer) in enumerate(pairs)]
        for thread in threads:
            thread.start()
        for number, (transport, _) in enumerate(pairs):
            transport.write(bytes([number]) * 100_000)
            transport.close()
        for thread in threads:
            await in_thread(thread.join)
        assert results == {number: bytes([number]) * 100_000 for number in range(20)}

    loop.run_until_complete(main())
