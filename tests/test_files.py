"""Files: what they do is compared with what the built-in `open` and `os` do to the same bytes, on both engines."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import hashlib
import io
import os
import random
import socket
import stat
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import headrace
from headrace import _file, files
from tests.conftest import descriptors

DATA = random.Random(7).randbytes(300_000)
# Each example makes files and runs a loop; the fixtures it uses keep no state.
EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def run(loop):
    return loop.run_until_complete


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


def pipe_files(buffering=-1):
    """A pipe, as the two things to open."""
    r, w = os.pipe()
    return files.open(r, "rb"), files.open(w, "wb", buffering)


# ---- opening and closing -----------------------------------------------------------------------------------


def test_async_with_and_await(run, path):
    async def main():
        async with files.open(path, "rb") as file:
            assert await file.read() == DATA
            assert (file.mode, file.name, file.closed) == ("rb", str(path), False)
            assert (file.readable(), file.writable(), file.seekable(), file.isatty()) == (
                True,
                False,
                True,
                False,
            )
            assert os.fstat(file.fileno()).st_ino == path.stat().st_ino
            assert not os.get_inheritable(file.fileno())
        assert file.closed
        assert "closed" in repr(file)
        file = await files.open(str(path), "rb")
        assert await file.read(10) == DATA[:10]
        await file.close()
        await file.aclose()
        for call in (file.read, file.flush, file.tell, file.readline):
            with pytest.raises(ValueError, match="closed file"):
                await call()
        with pytest.raises(ValueError, match="closed file"):
            file.fileno()

    run(main())


@pytest.mark.parametrize("mode", ["", "b", "rw", "rr", "rbt", "q", "r+w", "+b"])
def test_modes_that_open_refuses_are_refused(path, mode):
    with pytest.raises(ValueError):
        open(path, mode)  # noqa: SIM115
    with pytest.raises(ValueError):
        files.open(path, mode)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "rb", "encoding": "utf-8"},
        {"mode": "rb", "errors": "strict"},
        {"mode": "rb", "newline": ""},
        {"mode": "r", "newline": "x", "encoding": "utf-8"},
        {"mode": "r", "buffering": 0, "encoding": "utf-8"},
        {"mode": "rb", "closefd": False},
    ],
)
def test_arguments_that_open_refuses_are_refused(path, arguments):
    with pytest.raises(ValueError):
        open(path, **arguments)  # noqa: SIM115
    with pytest.raises(ValueError):
        files.open(path, **arguments)


def test_encodings_that_do_not_exist_are_refused(path):
    with pytest.raises(LookupError):
        files.open(path, encoding="no-such-encoding")
    with pytest.raises(LookupError):
        files.open(path, encoding="utf-8", errors="no-such-handler")
    with pytest.raises(TypeError):
        files.open(3.5, "rb")
    with pytest.raises(TypeError):
        files.open(path, None)


@pytest.mark.parametrize("mode", ["rb", "r+b", "wb", "w+b", "xb", "ab", "a+b"])
@pytest.mark.parametrize("exists", [True, False])
def test_modes_do_to_files_what_they_do_for_open(run, tmp_path, mode, exists):
    def outcome(name, opening):
        target = tmp_path / name
        if exists:
            target.write_bytes(b"12345")
        try:
            opening(target)
        except OSError as exc:
            return type(exc), exc.errno, exc.filename == os.fspath(target)
        return target.read_bytes(), stat.S_IMODE(target.stat().st_mode)

    def plainly(target):
        with open(target, mode) as file:
            if "w" in mode or "a" in mode:
                file.write(b"ab")

    async def ours(target):
        async with files.open(target, mode) as file:
            if "w" in mode or "a" in mode:
                await file.write(b"ab")

    assert outcome("ours", lambda target: run(ours(target))) == outcome("theirs", plainly)


def test_permissions_opener_and_descriptors(run, path, tmp_path):
    async def main():
        async with files.open(tmp_path / "new", "xb", permissions=0o640) as file:
            pass
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640 & ~umask
        asked = []

        def opener(name, flags):
            asked.append((name, flags & os.O_ACCMODE, threading.current_thread() is threading.main_thread()))
            return os.open(name, flags)

        async with files.open(path, "rb", opener=opener) as file:
            assert await file.read(5) == DATA[:5]
        assert asked == [(str(path), os.O_RDONLY, False)]
        with open(path, "rb") as plain:
            async with files.open(plain.fileno(), "rb", closefd=False) as file:
                assert await file.read(5) == DATA[:5]
            assert plain.read(5) == DATA[:5]  # neither closed nor moved

    umask = os.umask(0o027)
    try:
        run(main())
    finally:
        os.umask(umask)
        umask = 0o027


def test_a_file_that_nobody_closed_warns_and_is_closed(run, path):
    async def main():
        file = await files.open(path, "r+b")
        await file.write(b"never written")
        return file

    file = run(main())
    fd = file.fileno()
    opened = [file]
    del file
    with pytest.warns(ResourceWarning, match=r"unclosed file <headrace.files.BinaryFile.*13 buffered bytes"):
        opened.clear()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_file_belongs_to_the_loop_that_opened_it(run, path, engine_name):
    async def begin():
        return await files.open(path, "rb")

    file = run(begin())

    async def elsewhere():
        with pytest.raises(RuntimeError, match="another event loop"):
            await file.read()

    headrace.run(elsewhere(), engine=engine_name)
    run(file.aclose())


# ---- against the built-in open -----------------------------------------------------------------------------

SIZES = st.integers(0, 40)
CALLS = st.one_of(
    st.tuples(st.just("read"), st.one_of(st.just(-1), SIZES)),
    st.tuples(st.just("readline"), st.one_of(st.just(-1), SIZES)),
    st.tuples(st.just("readinto"), SIZES),
    st.tuples(st.just("read_lease"), SIZES),
    st.tuples(st.just("write"), st.binary(max_size=40)),
    st.tuples(st.just("truncate"), st.one_of(st.none(), SIZES)),
    st.tuples(st.just("seek"), st.tuples(st.integers(-40, 60), st.sampled_from([0, 1, 2]))),
    st.tuples(st.just("pread"), st.tuples(SIZES, SIZES)),
    st.tuples(st.just("pwrite"), st.tuples(st.binary(max_size=20), SIZES)),
    st.tuples(st.just("flush"), st.none()),
    st.tuples(st.just("tell"), st.none()),
)


def call_plainly(file, name, argument):
    """The call on a file of io's; an OSError is its result."""
    try:
        if name == "readinto":
            buffer = bytearray(argument)
            return file.readinto(buffer), bytes(buffer)
        if name == "read_lease":
            return file.read(argument)
        if name == "pread":
            return os.pread(file.fileno(), *argument)
        if name == "pwrite":
            return os.pwrite(file.fileno(), *argument)
        if name == "seek":
            return file.seek(*argument)
        return getattr(file, name)(*([] if argument is None and name != "truncate" else [argument]))
    except OSError as exc:
        return exc.errno


async def call_ours(file, name, argument):
    try:
        if name == "readinto":
            buffer = bytearray(argument)
            return await file.readinto(buffer), bytes(buffer)
        if name == "read_lease":
            with await file.read_lease(argument) as lease:
                return bytes(lease)
        if name in ("seek", "pread", "pwrite"):
            return await getattr(file, name)(*argument)
        return await getattr(file, name)(*([] if argument is None and name != "truncate" else [argument]))
    except OSError as exc:
        return exc.errno


@EXAMPLES
@given(
    mode=st.sampled_from(["r+b", "a+b", "w+b"]),
    buffering=st.sampled_from([0, 2, 7, 16, 65536]),
    contents=st.binary(max_size=60) | st.lists(st.sampled_from([b"ab\n", b"\n", b"x"])).map(b"".join),
    calls=st.lists(CALLS, max_size=25),
)
def test_any_sequence_of_calls_does_what_it_does_to_an_unbuffered_file(
    run, tmp_path, mode, buffering, contents, calls
):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(contents)
    theirs.write_bytes(contents)

    async def main():
        async with files.open(ours, mode, buffering) as file:
            for name, argument in calls:
                assert await call_ours(file, name, argument) == call_plainly(plain, name, argument), name
                assert await file.tell() == plain.tell(), name

    with open(theirs, mode, 0) as plain:
        run(main())
    assert ours.read_bytes() == theirs.read_bytes()


TEXTS = st.text(st.sampled_from("aä€😀\n\r "), max_size=60)


@EXAMPLES
@given(
    text=TEXTS,
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "shift_jis"]),
    newline=st.sampled_from([None, "", "\n", "\r", "\r\n"]),
    buffering=st.sampled_from([2, 3, 5, 65536]),
    calls=st.lists(
        st.tuples(st.sampled_from(["read", "readline"]), st.integers(-1, 12)) | st.just(("back", 0)),
        max_size=12,
    ),
)
def test_text_is_read_as_the_built_in_open_reads_it(run, tmp_path, text, encoding, newline, buffering, calls):
    path = tmp_path / "text"
    path.write_bytes(text.encode(encoding, "ignore"))

    async def main():
        async with files.open(path, "r", buffering, encoding, newline=newline) as file:
            for name, size in calls:
                if name != "back":
                    assert await getattr(file, name)(size) == getattr(plain, name)(size)
                    continue
                told = await file.tell()
                rest = await file.read()
                assert await file.seek(told) == told
                assert await file.read() == rest
                await file.seek(told)
            assert await file.read() == plain.read()
            await file.seek(0)
            plain.seek(0)
            assert [line async for line in file] == list(plain)

    with open(path, encoding=encoding, newline=newline) as plain:
        run(main())


@EXAMPLES
@given(
    pieces=st.lists(TEXTS, max_size=5),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    newline=st.sampled_from([None, "", "\n", "\r", "\r\n"]),
    mode=st.sampled_from(["w", "a"]),
)
def test_text_is_written_as_the_built_in_open_writes_it(run, tmp_path, pieces, encoding, newline, mode):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"

    async def main():
        for piece in pieces:
            async with files.open(ours, mode, encoding=encoding, newline=newline) as file:
                assert await file.write(piece) == len(piece)
                await file.writelines(["1\n", "2"])

    for path in (ours, theirs):
        path.write_bytes(b"")
    for piece in pieces:
        with open(theirs, mode, encoding=encoding, newline=newline) as file:
            file.write(piece)
            file.writelines(["1\n", "2"])
    run(main())
    assert ours.read_bytes() == theirs.read_bytes()


def test_text_file(run, tmp_path):
    async def main():
        async with files.open(tmp_path / "t", "w+", 1, encoding="utf-8", errors="replace") as file:
            assert (file.mode, file.encoding, file.errors) == ("w+", "utf-8", "replace")
            assert (file.readable(), file.writable(), file.seekable(), file.isatty()) == (
                True,
                True,
                True,
                False,
            )
            await file.write("no end")
            assert (tmp_path / "t").read_bytes() == b""
            await file.write(" of line\n")
            assert (tmp_path / "t").read_bytes() == b"no end of line\n"
            with pytest.raises(TypeError, match="bytes"):
                await file.write(b"bytes")
            with pytest.raises(io.UnsupportedOperation):
                await file.seek(3, os.SEEK_CUR)
            assert await file.seek(0, os.SEEK_END) == 15
            assert await file.truncate(6) == 6
            await file.fsync()
            await file.flush()
            await file.seek(0)
            assert await file.readlines() == ["no end"]
        assert file.closed

    run(main())


def test_much_text(run, tmp_path):
    """A long line, and much at a time: neither piece by piece, nor more than there is."""
    text = "zwölf €\n" + "ä" * 1_000_000 + "\nend"
    path = tmp_path / "t"
    path.write_text(text, encoding="utf-8")

    async def main():
        async with files.open(path, encoding="utf-8") as file:
            assert await file.read() == text
            assert await file.read() == ""
            await file.seek(0)
            assert await file.read(600_000) == text[:600_000]
            assert await file.readline() == text[600_000:-3]
            told = await file.tell()
            assert await file.readline() == "end"
            await file.seek(told)
            assert await file.read(2_000_000) == "end"
        r, w = os.pipe()
        async with files.open(r, encoding="utf-8") as reader:

            async def write():
                async with files.open(w, "w", encoding="utf-8") as writer:
                    await writer.write(text)

            task = asyncio.create_task(write())
            assert await reader.readline() == "zwölf €\n"
            assert await reader.read(100_000) == "ä" * 100_000
            assert await reader.readline() == "ä" * 900_000 + "\n"
            assert await reader.read() == "end"
            await task

    run(main())


def test_undecodable_text_is_an_error(run, path):
    async def main():
        async with files.open(path, encoding="utf-8") as file:
            with pytest.raises(UnicodeDecodeError):
                await file.read()

    run(main())


# ---- reading -----------------------------------------------------------------------------------------------


def test_lines_cost_few_operations(run, tmp_path, loop):
    path = tmp_path / "lines"
    path.write_bytes(b"".join(b"line %d\n" % i for i in range(10_000)))

    async def main():
        async with files.open(path, "rb") as file:
            before = loop.stats()["engine"]["submitted"]
            lines = [line async for line in file]
            return lines, loop.stats()["engine"]["submitted"] - before

    lines, operations = run(main())
    assert lines == path.read_bytes().splitlines(True)
    assert operations < 20  # 64 KiB each; on epoll, the executor's wake-ups


def test_large_transfers(run, tmp_path):
    """More than one operation moves: 1 MiB pieces."""
    big = random.Random(1).randbytes(5_300_001)

    async def main():
        async with files.open(tmp_path / "big", "w+b") as file:
            assert await file.write(memoryview(big)) == len(big)
            assert await file.tell() == len(big)
            await file.seek(0)
            buffer = bytearray(len(big) + 100)
            assert await file.readinto(buffer) == len(big)
            assert buffer[: len(big)] == big
            assert await file.pread(len(big), 17) == big[17:]
            await file.seek(5)
            assert await file.read() == big[5:]
            await file.seek(5)
            with await file.read_lease(len(big)) as lease:
                assert lease == big[5:]

    run(main())


def test_a_file_that_grows_is_read_to_its_end(run, path):
    async def main():
        async with files.open(path, "rb") as file:
            assert await file.read() == DATA
            assert await file.read() == b""
            with open(path, "ab") as plain:
                plain.write(DATA)
            assert await file.read(10) == DATA[:10]
            assert await file.read() == DATA[10:]
            os.truncate(path, 5)
            assert await file.read() == b""
            assert await file.pread(10, 0) == DATA[:5]

    run(main())


def test_files_whose_size_says_nothing(run):
    async def main():
        return await files.read_bytes("/proc/self/mountinfo"), await files.read_bytes("/proc/version")

    mountinfo, version = run(main())
    with open("/proc/version", "rb") as plain:
        assert version == plain.read()
    assert mountinfo.endswith(b"\n")


def test_positions_beyond_4_gib(run, tmp_path):
    far = (5 << 30) + 3

    async def main():
        async with files.open(tmp_path / "sparse", "w+b") as file:
            assert await file.seek(far) == far
            await file.write(b"far away")
            assert await file.pread(8, far) == b"far away"
            assert await file.pread(4, 1 << 30) == bytes(4)
            assert await file.seek(-4, os.SEEK_END) == far + 4
            assert await file.read() == b"away"
            assert await file.truncate(far + 3) == far + 3
            assert await file.seek(0, os.SEEK_END) == far + 3
            assert await file.seek(0, os.SEEK_HOLE) <= far
        assert (await files.stat(tmp_path / "sparse")).st_size == far + 3

    run(main())


def test_refusals(run, path, tmp_path):
    async def main():
        async with files.open(path, "rb") as file:
            with pytest.raises(io.UnsupportedOperation, match="not writable"):
                await file.write(b"x")
            with pytest.raises(io.UnsupportedOperation, match="not writable"):
                await file.truncate()
            with pytest.raises(ValueError):
                await file.seek(0, 9)
            with pytest.raises(ValueError):
                await file.pread(-1, 0)
            with pytest.raises(ValueError):
                await file.read_lease(-1)
            with pytest.raises(TypeError):
                await file.readinto(b"read-only")
        async with files.open(tmp_path / "w", "wb") as file:
            with pytest.raises(io.UnsupportedOperation, match="not readable"):
                await file.read()
            with pytest.raises(io.UnsupportedOperation, match="not readable"):
                aiter(file)
            with pytest.raises(ValueError):
                await file.pwrite(b"x", -1)
            with pytest.raises(TypeError):
                await file.write("text")

    run(main())


# ---- the system's own errors -------------------------------------------------------------------------------


def test_errors_of_open_are_those_of_the_built_in(run, path, tmp_path):
    os.symlink("loop", tmp_path / "loop")
    cases = [
        (tmp_path / "missing", "rb"),
        (tmp_path / "missing" / "file", "wb"),
        (tmp_path, "rb"),
        (tmp_path, "wb"),
        (path / "below", "rb"),
        (path, "xb"),
        (tmp_path / "loop", "rb"),
        (tmp_path / ("x" * 300), "wb"),
        (sys.executable, "r+b"),
        (b"/missing", "rb"),
    ]

    async def main():
        for name, mode in cases:
            with pytest.raises(OSError) as theirs:
                open(name, mode)  # noqa: SIM115
            with pytest.raises(OSError) as ours:
                await files.open(name, mode)
            assert type(ours.value) is type(theirs.value)
            assert ours.value.errno == theirs.value.errno
            assert ours.value.filename == os.fspath(name)
        with pytest.raises(ValueError, match="null"):
            await files.open("a\0b", "rb")

    run(main())


def test_permission_denied(run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"")
    secret.chmod(0)

    async def main():
        with pytest.raises(PermissionError) as info:
            await files.open(secret, "rb")
        assert (info.value.errno, info.value.filename) == (errno.EACCES, str(secret))

    user = os.geteuid()
    if user == 0:  # whom nothing is denied
        os.seteuid(65534)
    try:
        if user == 0:
            tmp_path_is_reachable = os.access(secret.parent, os.X_OK, effective_ids=True)
            if not tmp_path_is_reachable:
                with pytest.raises(PermissionError):
                    run(files.stat(secret))
                return
        run(main())
    finally:
        os.seteuid(user)


def test_no_space_left(run):
    async def main():
        file = await files.open("/dev/full", "wb")
        assert await file.write(b"x" * 10) == 10  # collected
        with pytest.raises(OSError) as info:
            await file.flush()
        assert (info.value.errno, info.value.filename) == (errno.ENOSPC, None)
        with pytest.raises(OSError):
            await file.write(b"x" * 100_000)
        with pytest.raises(OSError) as info:
            await file.aclose()
        assert info.value.errno == errno.ENOSPC
        assert file.closed

    run(main())


# ---- writing -----------------------------------------------------------------------------------------------


def test_two_writers_append(run, tmp_path):
    path = tmp_path / "log"

    async def write(letter):
        async with files.open(path, "ab", 0) as file:
            for i in range(100):
                await file.write(b"%c%d\n" % (letter, i))
                assert await file.tell() <= os.path.getsize(path)

    async def main():
        await asyncio.gather(write(65), write(66))

    run(main())
    lines = path.read_bytes().splitlines()
    for letter in (65, 66):
        assert [line for line in lines if line[0] == letter] == [b"%c%d" % (letter, i) for i in range(100)]
    assert len(lines) == 200


def test_small_writes_are_collected_and_flushed(run, tmp_path):
    path = tmp_path / "out"

    async def main():
        async with files.open(path, "wb", 10) as file:
            await file.write(b"1234")
            assert path.read_bytes() == b""
            await file.writelines([b"5678", bytearray(b"9"), memoryview(b"0")])
            assert path.read_bytes() == b"123456789"
            await file.flush()
            assert path.read_bytes() == b"1234567890"
            await file.write(b"x")
            await file.fsync()
            await file.fsync(data_only=True)
            assert path.read_bytes() == b"1234567890x"
            await file.write(b"y")
            assert await file.pwrite(b"PP", 1) == 2
            assert await file.tell() == 12
            assert path.read_bytes() == b"1PP4567890xy"
        async with files.open(path, "wb") as file:
            await file.write(b"closed")
        assert path.read_bytes() == b"closed"

    run(main())


def test_truncate_without_a_ring_operation_for_it(run, path, monkeypatch):
    supported = _file.supported
    monkeypatch.setattr(
        _file, "supported", lambda loop, name=None: name != "truncate" and supported(loop, name)
    )

    async def main():
        async with files.open(path, "r+b") as file:
            assert await file.truncate(7) == 7

    run(main())
    assert path.read_bytes() == DATA[:7]


# ---- tasks -------------------------------------------------------------------------------------------------


def test_tasks_take_turns_at_the_position(run, tmp_path):
    path = tmp_path / "lines"
    expected = [b"line %d\n" % i for i in range(500)]
    path.write_bytes(b"".join(expected))

    async def collect(file, lines):
        while line := await file.readline():
            lines.append(line)
            await asyncio.sleep(0)

    async def main():
        lines = []
        async with files.open(path, "rb", 64) as file:
            await asyncio.gather(*(collect(file, lines) for _ in range(5)))
        assert sorted(lines) == sorted(expected)
        async with files.open(path, "wb", 16) as file:
            await asyncio.gather(*(file.write(b"%03d" % i) for i in range(100)))
        assert sorted(path.read_bytes()[i : i + 3] for i in range(0, 300, 3)) == [
            b"%03d" % i for i in range(100)
        ]

    run(main())


def test_reads_at_offsets_overlap(run, path):
    async def main():
        offsets = [random.Random(i).randrange(len(DATA)) for i in range(200)]
        async with files.open(path, "rb") as file:
            pieces = await asyncio.gather(*(file.pread(4096, offset) for offset in offsets))
            assert await file.tell() == 0
        assert pieces == [DATA[offset : offset + 4096] for offset in offsets]

    run(main())


def test_closing_waits_for_what_is_in_flight(run, path):
    async def main():
        file = await files.open(path, "rb")
        fd = file.fileno()
        reads = [asyncio.create_task(file.pread(10_000, i)) for i in range(20)]
        await asyncio.sleep(0)
        await file.aclose()
        results = await asyncio.gather(*reads)
        assert results == [DATA[i : i + 10_000] for i in range(20)]
        with pytest.raises(OSError):
            os.fstat(fd)

    run(main())


# ---- cancelling --------------------------------------------------------------------------------------------


async def scenario(path, other, leases=True):
    async with files.open(path, "r+b", 64) as file:
        await file.write(b"x" * 100)
        await file.seek(0)
        await file.read(50)
        await file.readline()
        if leases:
            (await file.read_lease(70_000)).release()
        await file.pread(4096, 9)
        await file.truncate(1000)
        await file.fsync()
    async with files.open(other, "w", encoding="utf-8") as file:
        await file.write("text")
    await files.stat(other)
    await files.rename(other, f"{other}2")
    await files.unlink(f"{other}2")
    await files.mkdir(other)
    async with files.scandir(path.parent) as entries:
        async for _ in entries:
            break
    await files.rmdir(other)


def test_cancelled_at_every_point(run, path, tmp_path, engine_name):
    """Nothing is left open, whenever the cancel comes; unclosed files would warn, which is an error here."""
    other = tmp_path / "other"

    def ours():
        return [what for what in descriptors().values() if what.startswith(str(tmp_path))]

    async def main():
        finished = count = 0
        while not finished and count < 1000:
            path.write_bytes(DATA)
            for left in (other, tmp_path / "other2"):
                with contextlib.suppress(FileNotFoundError):
                    left.rmdir() if left.is_dir() else left.unlink()
            task = asyncio.create_task(scenario(path, other))
            await turns(count)
            count += (
                1 if engine_name == "uring" else 1 + count // 10
            )  # a turn does little where threads do the work
            finished = task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            # Opening in a thread isn't waited for: the thread closes what it has opened for nobody.
            assert ours() == [] or engine_name == "epoll"
        assert count > 10
        await asyncio.get_running_loop().shutdown_default_executor()
        assert ours() == []

    run(main())


def test_cancelled_read_does_not_move_the_position(run, path):
    async def main():
        async with files.open(path, "rb", 0) as file:
            for call in (file.read, lambda n: file.readinto(bytearray(n)), file.read_lease):
                await file.seek(1000)
                task = asyncio.create_task(call(200_000))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await file.tell() == 1000
                assert await file.read(10) == DATA[1000:1010]

    run(main())


def test_the_buffer_of_a_cancelled_read_is_left_alone_afterwards(run, path):
    async def main():
        async with files.open(path, "rb", 0) as file:
            for _ in range(30):
                buffer = bytearray(200_000)
                task = asyncio.create_task(file.readinto(buffer))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                buffer.clear()  # would raise BufferError if it were still in use

    run(main())


def test_cancelled_write_has_moved_the_position_by_what_it_wrote(run, tmp_path):
    big = DATA * 20

    async def main():
        async with files.open(tmp_path / "w", "w+b", 0) as file:
            for count in range(8):
                await file.seek(0)
                await file.truncate()
                task = asyncio.create_task(file.write(big))
                await turns(count)
                if task.done():
                    break
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                written = await file.tell()
                assert (tmp_path / "w").read_bytes() == big[:written]

    run(main())


def test_cancelled_flush_keeps_what_was_not_written(run, tmp_path):
    async def main():
        async with files.open(tmp_path / "w", "wb") as file:
            for _ in range(20):
                await file.write(b"0123456789" * 100)
                task = asyncio.create_task(file.flush())
                await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            assert await file.tell() == 20_000

    run(main())
    assert (tmp_path / "w").read_bytes() == b"0123456789" * 2000


def test_a_timeout_ends_a_read(run):
    async def main():
        reading, writing = pipe_files()
        async with reading as reader, writing:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await reader.read(1)

    run(main())


def test_a_cancelled_call_that_fails_is_cancelled(run):
    async def main():
        async with files.open("/dev/full", "wb", 0) as file:
            for count in range(20):
                task = asyncio.create_task(file.write(b"x"))
                await turns(count)
                if task.done():
                    with pytest.raises(OSError, match="space"):
                        await task
                    break
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    run(main())


# ---- pipes and other streams -------------------------------------------------------------------------------


def test_streams(run):
    async def main():
        reading, writing = pipe_files(0)
        async with reading as reader:
            async with writing as writer:
                assert not reader.seekable()
                for call in (reader.tell, lambda: reader.seek(0), lambda: reader.pread(1, 0)):
                    with pytest.raises(io.UnsupportedOperation):
                        await call()
                await writer.write(b"one\ntwo\nthree")
                assert await reader.readline() == b"one\n"
                assert await reader.read(2) == b"tw"
                assert await reader.read1() == b"o\nthree"
                waiting = asyncio.create_task(reader.read(6))
                await writer.write(b"abc")
                await asyncio.sleep(0)
                assert not waiting.done()
                await writer.write(b"defghi")
                assert await waiting == b"abcdef"
                buffer = bytearray(3)
                assert await reader.readinto(buffer) == 3
                assert buffer == b"ghi"
                await writer.write(b"lease")
                with await reader.read_lease(3) as lease:
                    assert lease == b"lea"
            assert await reader.read() == b"se"
            assert await reader.read(5) == b""
            with await reader.read_lease(5) as lease:
                assert lease == b""

    run(main())


def test_more_than_a_pipe_holds(run):
    async def main():
        reading, writing = pipe_files()
        async with reading as reader:

            async def write():
                async with writing as writer:
                    await writer.write(DATA * 3)

            task = asyncio.create_task(write())
            assert await reader.read() == DATA * 3
            await task

    run(main())


def test_broken_pipe(run):
    async def main():
        reading, writing = pipe_files(0)
        async with writing as writer:
            async with reading:
                pass
            with pytest.raises(BrokenPipeError):
                await writer.write(b"nobody")

    run(main())


def test_cancelled_reads_of_a_stream_lose_nothing(run, engine_name):
    data = DATA[:100_000]
    longest = 5 if engine_name == "uring" else 50  # turns in which a thread may get something done
    dice = random.Random(3)

    async def main():
        reading, writing = pipe_files(0)
        received = bytearray()
        cancelled = 0

        async def write():
            async with writing as writer:
                for i in range(0, len(data), 1500):
                    await writer.write(data[i : i + 1500])
                    await asyncio.sleep(0)

        async with reading as reader:
            task = asyncio.create_task(write())
            while True:
                piece = asyncio.create_task(reader.read1(1000))
                await turns(dice.randrange(longest))
                if dice.random() < 0.7:  # not always: threads would starve beside a loop that only cancels
                    piece.cancel()
                try:
                    part = await piece
                except asyncio.CancelledError:
                    cancelled += 1
                    continue
                if not part:
                    break
                received += part
            await task
        assert cancelled > 10
        assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()

    run(main())


def test_closing_ends_a_read_that_waits(run):
    async def main():
        reading, writing = pipe_files()
        async with writing:
            reader = await reading
            task = asyncio.create_task(reader.read(1))
            await turns(3)
            await reader.aclose()
            with pytest.raises(ValueError, match="closed"):
                await task

    run(main())


def test_a_fifo_that_nobody_writes_to(run, tmp_path):
    """Opening one sleeps. Cancelling that is prompt, and a descriptor that comes late is closed."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def main():
        before = len(descriptors())
        task = asyncio.create_task(open_only())
        await asyncio.sleep(0.02)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Whoever still sleeps in open is let go; with nobody there, this one is refused.
        with contextlib.suppress(OSError):
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        await asyncio.get_running_loop().shutdown_default_executor()
        assert len(descriptors()) == before

    async def open_only():
        return await files.open(fifo, "rb")

    run(main())


def test_streams_cannot_be_read_and_written(run):
    near, far = socket.socketpair()

    async def main():
        with pytest.raises(io.UnsupportedOperation):
            await files.open(near.fileno(), "r+b", closefd=False)

    with near, far:
        run(main())


def test_devices(run):
    async def main():
        async with files.open("/dev/null", "r+b") as null:
            await null.write(b"x" * 100_000)
            assert await null.read() == b""
        async with files.open("/dev/zero", "rb") as zero:
            assert await zero.read(100_000) == bytes(100_000)

    run(main())


# ---- leases ------------------------------------------------------------------------------------------------


def test_a_file_goes_out_by_leases(run, path, loop, engine_name):
    class Sink(asyncio.Protocol):
        def __init__(self):
            self.hash = hashlib.sha256()
            self.ended = asyncio.get_running_loop().create_future()

        def data_received(self, data):
            self.hash.update(data)

        def connection_lost(self, exc):
            self.ended.set_result(self.hash.digest())

    async def main():
        near, far = socket.socketpair()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=near)
        _, sink = await loop.create_connection(Sink, sock=far)
        in_place = 0
        async with files.open(path, "rb") as file:
            while lease := await file.read_lease(128 * 1024):
                in_place += not lease.copied
                transport.write(lease)
                lease.release()
        transport.close()
        assert await sink.ended == hashlib.sha256(DATA).digest()
        assert loop.stats()["pool"]["copies"] == 0 or engine_name == "epoll"
        return in_place

    in_place = run(main())
    assert in_place == (3 if engine_name == "uring" else 0)
    pool = loop.stats()["pool"]
    assert (pool["outstanding"], pool["pinned"]) == (0, 0)


def test_leases_that_are_kept_leave_half_of_the_pool_to_receives(path, engine_name):
    pool = headrace.BufferPool(block_size=65536, target=2, maximum=8)
    loop = headrace.new_event_loop(engine_name, pool=pool)

    path.write_bytes(DATA * 5)

    async def main():
        async with files.open(path, "rb") as file:
            return await asyncio.gather(*(file.read_lease(65536) for _ in range(20)))

    leases = loop.run_until_complete(main())
    assert b"".join(leases) == (DATA * 5)[: 20 * 65536]
    assert pool.pinned <= 4
    for lease in leases:
        lease.release()
    assert pool.pinned == pool.outstanding == 0
    loop.close()


# ---- paths -------------------------------------------------------------------------------------------------

STAT_FIELDS = [name for name in dir(os.stat_result) if name.startswith("st_")]


def test_stat(run, path, tmp_path):
    (tmp_path / "link").symlink_to(path)

    async def main():
        for target, follow in (
            (path, True),
            (tmp_path, True),
            (tmp_path / "link", True),
            (tmp_path / "link", False),
            ("/dev/null", True),
            (b"/", True),
        ):
            ours, theirs = (
                await files.stat(target, follow_symlinks=follow),
                os.stat(target, follow_symlinks=follow),
            )
            assert ours == theirs
            for name in STAT_FIELDS:
                assert getattr(ours, name) == getattr(theirs, name), name
        assert await files.lstat(tmp_path / "link") == os.lstat(tmp_path / "link")
        with open(path, "rb") as plain:
            assert await files.stat(plain.fileno()) == os.stat(path)
        with pytest.raises(FileNotFoundError) as info:
            await files.stat(tmp_path / "missing")
        assert info.value.filename == str(tmp_path / "missing")

    run(main())


def test_renaming_and_removing(run, tmp_path):
    a, b, d = tmp_path / "a", tmp_path / "b", tmp_path / "d"

    async def main():
        assert await files.write_bytes(a, b"1") == 1
        await files.write_bytes(b, b"2")
        await files.rename(a, b)
        assert await files.read_bytes(b) == b"1"
        assert not a.exists()
        await files.replace(b, a)
        with pytest.raises(FileNotFoundError) as info:
            await files.rename(b, a)
        assert (info.value.filename, info.value.filename2) == (str(b), str(a))
        await files.mkdir(d, 0o700)
        assert stat.S_IMODE(d.stat().st_mode) == 0o700
        with pytest.raises(FileExistsError):
            await files.mkdir(d)
        with pytest.raises(IsADirectoryError):
            await files.unlink(d)
        with pytest.raises(NotADirectoryError):
            await files.rmdir(a)
        await files.makedirs(d / "e" / "f")
        with pytest.raises(OSError) as info:
            await files.rmdir(d)
        assert info.value.errno == errno.ENOTEMPTY
        await files.makedirs(d / "e" / "f", exist_ok=True)
        for directory in (d / "e" / "f", d / "e", d):
            await files.rmdir(directory)
        await files.remove(a)
        assert list(tmp_path.iterdir()) == []

    run(main())


def test_scandir(run, tmp_path):
    for i in range(600):
        (tmp_path / str(i)).touch()

    async def main():
        names = [entry.name async for entry in files.scandir(tmp_path)]
        assert sorted(names, key=int) == [str(i) for i in range(600)]
        entries = [entry async for entry in files.scandir(os.fsencode(tmp_path))]
        assert {type(entry.name) for entry in entries} == {bytes}
        assert entries[0].is_file()
        async with files.scandir(tmp_path) as directory:
            assert [entry async for entry in directory]
            assert [entry async for entry in directory] == []
        async with files.scandir(tmp_path) as directory:
            async for _ in directory:
                break
        assert [entry async for entry in directory] == []
        with pytest.raises(FileNotFoundError):
            async for _ in files.scandir(tmp_path / "missing"):
                pass

    run(main())


def test_audit_events(run, path, tmp_path):
    seen = []
    watching = True
    sys.addaudithook(lambda event, args: seen.append(event) if watching else None)

    async def main():
        async with files.open(path, "rb"):
            pass
        await files.rename(path, tmp_path / "x")
        await files.unlink(tmp_path / "x")
        await files.mkdir(tmp_path / "d")
        await files.rmdir(tmp_path / "d")

    run(main())
    watching = False
    expected = ["open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"]
    assert [event for event in seen if event in expected] == expected


# ---- other loops, and the loop's life ----------------------------------------------------------------------


def test_a_loop_of_another_library(path, tmp_path):
    async def main():
        async with files.open(path, "rb") as file:
            assert await file.read() == DATA
            with pytest.raises(RuntimeError, match="read\\(\\)"):
                await file.read_lease(10)
        await scenario(path, tmp_path / "other", leases=False)
        reading, writing = pipe_files()
        async with reading as reader:
            async with writing as writer:
                await writer.write(b"through")
            assert await reader.read() == b"through"

    asyncio.run(main())


def test_operations_go_on_in_the_next_run(loop, run):
    async def begin():
        reading, writing = pipe_files(0)
        reader, writer = await reading, await writing
        task = asyncio.ensure_future(reader.read(7))
        await turns(3)
        return reader, writer, task

    async def finish():
        await writer.write(b"go on..")
        assert await task == b"go on.."
        await reader.aclose()
        await writer.aclose()

    reader, writer, task = run(begin())
    assert not task.done()
    run(finish())


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_loop_that_is_closed_meanwhile_leaves_nothing_open(loop, run, path):
    async def begin():
        reading, writing = pipe_files(0)
        reader, writer = await reading, await writing
        file = await files.open(path, "rb")
        tasks = [asyncio.ensure_future(call) for call in (reader.read(1), file.pread(10_000, 0))]
        await turns(2)
        return [reader, writer, file], tasks

    opened, tasks = run(begin())
    loop.close()
    for thread in threading.enumerate():
        if thread.name.startswith("asyncio_"):
            thread.join(20)  # a call that a thread has begun holds the descriptor until it's done
    for task in tasks:
        task._log_destroy_pending = False
    opened.clear()
    tasks.clear()
    gc.collect()  # the fixture looks for descriptors
