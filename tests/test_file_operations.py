"""File operations as the engine sees them: their life across stops, what becomes of results that nobody takes."""

from __future__ import annotations

import asyncio
import gc
import os

import pytest

import headrace
from headrace import _file
from tests.conftest import descriptors, why_not

pytestmark = pytest.mark.skipif(why_not("uring") is not None, reason=f"needs io_uring: {why_not('uring')}")


@pytest.fixture
def engine_name():
    """For the `loop` fixture."""
    return "uring"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16)
    return path


def begin(loop, function, *arguments):
    """Begins an operation in the last turn of a run: whatever completes meanwhile isn't delivered."""
    begun = []

    def submit():
        begun.append(function(*arguments))
        loop.stop()

    loop.call_soon(submit)
    loop.run_forever()
    return begun[0]


async def wait(operation):
    return await operation


def opening(loop, path):
    return begin(loop, _file.open_file, loop, os.fsencode(path), os.O_RDONLY, 0, path)


def test_engines_say_whether_they_do_files(loop):
    loop.run_until_complete(asyncio.sleep(0))
    assert loop._engine.files
    assert _file.supported(loop)
    assert _file.supported(loop, "read")
    other = headrace.new_event_loop("epoll")
    other.run_until_complete(asyncio.sleep(0))
    assert not other._engine.files
    assert not _file.supported(other)
    assert not _file.supported(other, "read")
    other.close()
    assert not _file.supported(asyncio.SelectorEventLoop)


def test_it_is_awaited_like_a_future(loop, path):
    async def main():
        operation = _file.stat(loop, -1, os.fsencode(path), True, path)
        assert asyncio.isfuture(operation)
        assert not operation.done()
        with pytest.raises(asyncio.InvalidStateError):
            operation.result()
        called = []
        operation.add_done_callback(called.append)
        operation.add_done_callback(called.clear)
        assert operation.remove_done_callback(called.clear) == 1
        assert (await asyncio.wait_for(operation, 10)).st_size == 4096
        await asyncio.sleep(0)
        assert called == [operation]
        assert operation.get_loop() is loop
        assert not operation.cancel()
        operation.add_done_callback(called.append)
        await asyncio.sleep(0)
        assert called == [operation, operation]
        assert await operation == os.stat(path)

    loop.run_until_complete(main())
    with pytest.raises(TypeError):
        _file.FileOperation()


def test_cancelled_with_a_message(loop):
    async def main():
        r, w = os.pipe()
        descriptor = _file.Descriptor(loop, r)
        operation = descriptor.read(10, -1)
        await asyncio.sleep(0)
        assert operation.cancel("enough")
        assert operation.cancel("again")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await operation
        await descriptor.close()
        os.close(w)

    loop.run_until_complete(main())


def test_an_interrupted_operation_raises_that_error(loop):
    async def main():
        r, w = os.pipe()
        descriptor = _file.Descriptor(loop, r)
        operations = [descriptor.read(10, -1) for _ in range(3)]
        closing = descriptor.close()
        with pytest.raises(ValueError, match="closed file"):
            descriptor.read(1, -1)
        with pytest.raises(ValueError, match="closed file"):
            descriptor.close()
        await asyncio.sleep(0)
        assert not closing.done()
        descriptor.interrupt(KeyError("key"))
        for operation in operations:
            with pytest.raises(KeyError):
                await operation
        await closing
        assert descriptor.fd == -1
        os.close(w)

    loop.run_until_complete(main())


def test_a_cancelled_close_closes(loop, path):
    descriptor = _file.Descriptor(loop, os.open(path, os.O_RDONLY))
    before = len(descriptors())

    async def main():
        closing = descriptor.close()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing

    loop.run_until_complete(main())
    assert len(descriptors()) == before - 1
    assert descriptor.fd == -1


def test_an_open_that_is_cancelled_too_late_closes_its_descriptor(loop, path):
    async def open_it():
        return await _file.open_file(loop, os.fsencode(path), os.O_RDONLY, 0, path)

    async def main():
        for count in range(6):
            before = len(descriptors())
            task = asyncio.ensure_future(open_it())
            for _ in range(count):
                await asyncio.sleep(0)
            done = task.done()
            task.cancel()
            try:
                os.close(await task)
            except asyncio.CancelledError:
                assert not done
            del task
            assert len(descriptors()) == before
        return done

    assert loop.run_until_complete(main())  # the last one wasn't cancelled


def test_an_operation_that_nobody_awaits_gives_its_result_back(loop, path):
    before = len(descriptors())
    operation = opening(loop, path)
    loop.run_until_complete(asyncio.sleep(0))
    assert operation.done()
    assert len(descriptors()) == before + 1
    operation.discard()
    assert len(descriptors()) == before
    operation = opening(loop, path)
    loop.run_until_complete(asyncio.sleep(0))
    del operation
    assert len(descriptors()) == before


def test_a_descriptor_whose_completion_was_never_delivered_is_closed(loop, path):
    """The stop of the run reaps the completion; the loop is closed before it's delivered."""
    loop.run_until_complete(asyncio.sleep(0))
    before = len(descriptors())
    operation = opening(loop, path)
    assert not operation.done()
    assert len(descriptors()) == before + 1
    loop.close()
    assert str(path) not in descriptors().values()


def test_a_close_whose_completion_was_never_delivered_is_not_done_again(loop, path):
    fd = os.open(path, os.O_RDONLY)
    descriptor = _file.Descriptor(loop, fd)
    closing = begin(loop, descriptor.close)
    assert not closing.done()
    loop.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    # The number belongs to another file from now on.
    other = os.open(path, os.O_RDONLY)
    os.dup2(other, fd)
    del closing, descriptor
    gc.collect()
    assert os.fstat(fd).st_size == 4096
    if fd != other:
        os.close(other)
    os.close(fd)


def test_a_read_goes_on_in_another_run_and_its_buffer_lives_as_long(loop):
    r, w = os.pipe()
    descriptor = _file.Descriptor(loop, r)
    buffer = bytearray(10)
    operation = begin(loop, descriptor.readinto, buffer, -1)
    loop.run_until_complete(asyncio.sleep(0))
    with pytest.raises(BufferError):
        buffer.append(1)
    os.write(w, b"later")
    assert loop.run_until_complete(wait(operation)) == 5
    assert buffer[:5] == b"later"
    buffer.append(1)
    loop.run_until_complete(wait_for_close(descriptor))
    os.close(w)


async def wait_for_close(descriptor):
    await descriptor.close()


def test_a_loop_that_is_closed_lets_go_of_what_was_in_flight(loop):
    r, w = os.pipe()
    buffer = bytearray(10)
    descriptor = _file.Descriptor(loop, r)
    operation = begin(loop, descriptor.readinto, buffer, -1)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    del operation, descriptor
    gc.collect()
    buffer.append(1)
    with pytest.raises(OSError):
        os.fstat(r)
    os.close(w)


def test_a_descriptor_that_is_not_owned_stays_open(loop, path):
    fd = os.open(path, os.O_RDONLY)
    descriptor = _file.Descriptor(loop, fd, False)

    async def main():
        reading = descriptor.read(10, 0)
        await descriptor.close()
        assert await reading == bytes(range(10))

    loop.run_until_complete(main())
    os.close(fd)


def test_pieces(loop, tmp_path):
    """More than 1 MiB goes in several submissions; a short one ends a read, or a guess of the size does."""
    path = tmp_path / "big"
    path.write_bytes(bytes(3 << 20))

    async def main():
        descriptor = _file.Descriptor(loop, os.open(path, os.O_RDWR))

        async def cost(operation):
            """The result, and the submissions beyond the first."""
            before = loop.stats()["engine"]["submitted"]
            result = await operation
            return result, loop.stats()["engine"]["submitted"] - before

        assert await cost(descriptor.read(3 << 20, 0)) == (bytes(3 << 20), 2)
        assert await cost(descriptor.read(100, 0)) == (bytes(100), 0)
        assert await cost(descriptor.read(100, (3 << 20) - 50)) == (bytes(50), 1)
        assert await cost(descriptor.read(100, (3 << 20) - 50, 50)) == (bytes(50), 0)
        assert await cost(descriptor.write(bytes(5 << 19), 1)) == (5 << 19, 2)
        assert await cost(descriptor.readinto(bytearray(4 << 20), 0)) == (3 << 20, 3)
        await descriptor.close()

    loop.run_until_complete(main())
