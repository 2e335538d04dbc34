"""Reader and writer: over plain connections and over TLS, on both engines."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import headrace
from authorities import ca_file, issued
from headrace.errors import IncompleteReadError, LimitOverrunError, MessageError, TruncatedError
from headrace.messages import Delimited, LengthPrefixed

Handler = Callable[[headrace.Reader, headrace.Writer], Awaitable[None]]

NAME = "a.example"
BIG = random.Random(6).randbytes(1_000_000)


@pytest.fixture(params=["plain", "tls"])
def secured(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "tls")


@contextlib.asynccontextmanager
async def connected(
    handler: Handler, secured: bool = False, limit: int = 65536, server_limit: int = 65536
) -> AsyncIterator[tuple[headrace.Reader, headrace.Writer]]:
    """A client of a server with that handler; both ends are closed at the end, whatever happens."""
    options: dict[str, Any] = {}
    server_options: dict[str, Any] = {}
    if secured:
        files = issued(NAME)
        server_options["security"] = headrace.TLS(certificate=files.chain, private_key=files.key)
        options = {"security": headrace.TLS(ca=ca_file()), "server_hostname": NAME}
    served: list[asyncio.Task[Any] | None] = []

    async def noting(reader: headrace.Reader, writer: headrace.Writer) -> None:
        served.append(asyncio.current_task())
        await handler(reader, writer)

    server = await headrace.start_server(noting, "127.0.0.1", 0, limit=server_limit, **server_options)
    async with server:
        address = server.sockets[0].getsockname()
        reader, writer = await headrace.open_connection(*address, limit=limit, **options)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            for task in served:
                assert task is not None
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait_for(asyncio.shield(task), 10)


def run(loop: headrace.EventLoop, main: Any) -> Any:
    return loop.run_until_complete(asyncio.wait_for(main, 30))


async def echo(reader: headrace.Reader, writer: headrace.Writer) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


def saying(*pieces: bytes) -> Handler:
    """Says these, a turn or two apart, and ends."""

    async def handler(reader: headrace.Reader, writer: headrace.Writer) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.002)

    return handler


# ---- reading -----------------------------------------------------------------------------------------------------


def test_everything_comes_back(loop: headrace.EventLoop, secured: bool) -> None:
    async def main() -> None:
        async with connected(echo, secured) as (reader, writer):
            writer.write(BIG)
            assert await reader.readexactly(len(BIG)) == BIG
            writer.write(b"more")
            assert await reader.read(100) == b"more"
            writer.write_eof()
            assert await reader.read() == b""
            assert reader.at_eof()

    run(loop, main())


@pytest.mark.parametrize("way", ["read", "read_all", "read_lease", "readinto", "readexactly", "messages"])
def test_ways_to_read_a_stream(loop: headrace.EventLoop, secured: bool, way: str) -> None:
    async def read_all(reader: headrace.Reader) -> AsyncIterator[bytes]:
        buffer = bytearray(3001)
        if way == "read_all":
            yield await reader.read()
        elif way == "messages":
            async for message in reader.messages(Delimited(BIG[-4:], limit=len(BIG))):
                yield message + BIG[-4:]
        elif way == "readexactly":
            for _ in range(len(BIG) // 1000):
                yield await reader.readexactly(1000)
        elif way == "read_lease":
            while lease := await reader.read_lease():
                with lease:
                    yield bytes(lease)
        elif way == "readinto":
            while count := await reader.readinto(buffer):
                yield bytes(buffer[:count])
        else:
            while data := await reader.read(70_000):
                assert len(data) <= 70_000
                yield data

    async def main() -> None:
        async with connected(saying(BIG), secured) as (reader, _):
            assert b"".join([data async for data in read_all(reader)]) == BIG
            assert await reader.read(1) == b""

    run(loop, main())


def test_reads_of_all_kinds_in_turn(loop: headrace.EventLoop, secured: bool) -> None:
    """What one leaves is the next one's, wherever it lies."""
    chance = random.Random(1)

    async def one(reader: headrace.Reader) -> bytes:
        size = chance.choice([1, 3, 100, 5000, 70_000])
        kind = chance.randrange(5)
        if kind == 0:
            return await reader.read(size)
        if kind == 1:
            buffer = bytearray(size)
            return bytes(buffer[: await reader.readinto(buffer)])
        if kind == 2:
            lease = await reader.read_lease()
            return b"" if lease is None else bytes(lease)
        try:
            return await (reader.readexactly(size) if kind == 3 else reader.readuntil(BIG[100:101]))
        except IncompleteReadError as end:
            return end.partial

    async def main() -> None:
        async with connected(saying(*(BIG[at : at + 9973] for at in range(0, 500_000, 9973))), secured) as (
            reader,
            _,
        ):
            got = b""
            while not reader.at_eof():
                got += await one(reader)
            assert got == BIG[: len(got)]
            assert len(got) >= 500_000

    run(loop, main())


def test_lines(loop: headrace.EventLoop, secured: bool) -> None:
    async def main() -> None:
        async with connected(saying(b"one\ntw", b"o\n\nthree\n", b"rest"), secured) as (reader, _):
            assert [line async for line in reader] == [b"one\n", b"two\n", b"\n", b"three\n", b"rest"]

    run(loop, main())


def test_a_separator_in_pieces(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with connected(saying(b"a-", b"=", b"-=-b-=", b"-c")) as (reader, _):
            assert await reader.readuntil(b"-=-=-") == b"a-=-=-"
            assert await reader.readuntil(b"-=-") == b"b-=-"
            with pytest.raises(IncompleteReadError) as end:
                await reader.readuntil(b"-=-")
            assert end.value.partial == b"c"
            assert isinstance(end.value, asyncio.IncompleteReadError)
            with pytest.raises(ValueError):
                await reader.readuntil(b"")

    run(loop, main())


def test_a_line_that_is_too_long(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with connected(saying(b"x" * 300, b"\nshort\n"), limit=100) as (reader, _):
            with pytest.raises(LimitOverrunError):
                await reader.readline()
            assert (
                await reader.readexactly(301) == b"x" * 300 + b"\n"
            )  # nothing was consumed, and more is read
            assert await reader.readline() == b"short\n"

    run(loop, main())


def test_the_end_within_what_was_asked_for(loop: headrace.EventLoop, secured: bool) -> None:
    async def main() -> None:
        async with connected(saying(b"12345"), secured) as (reader, _):
            with pytest.raises(IncompleteReadError) as end:
                await reader.readexactly(6)
            assert (end.value.partial, end.value.expected) == (b"12345", 6)
            assert await reader.readexactly(0) == b""

    run(loop, main())


def test_an_error_comes_behind_the_data(loop: headrace.EventLoop) -> None:
    async def resetting(reader: headrace.Reader, writer: headrace.Writer) -> None:
        writer.write(b"said")
        await reader.readexactly(1)
        writer.transport.get_extra_info("socket").setsockopt(
            1, 13, b"\1\0\0\0\0\0\0\0"
        )  # SO_LINGER 0: a reset
        writer.abort()

    async def main() -> None:
        async with connected(resetting) as (reader, writer):
            assert await reader.readexactly(4) == b"said"
            writer.write(b"x")
            for _ in range(2):
                with pytest.raises(ConnectionResetError):
                    await reader.read(1)
            with pytest.raises(ConnectionResetError):
                await writer.drain()
            with pytest.raises(ConnectionResetError):
                await writer.wait_closed()

    run(loop, main())


def test_a_truncated_stream(loop: headrace.EventLoop) -> None:
    async def cutting(reader: headrace.Reader, writer: headrace.Writer) -> None:
        writer.write(b"not all")
        await reader.readexactly(1)
        writer.abort()  # no close_notify

    async def main() -> None:
        async with connected(cutting, secured=True) as (reader, writer):
            assert await reader.readexactly(7) == b"not all"
            writer.write(b"x")
            with pytest.raises(TruncatedError):
                await reader.read()

    run(loop, main())


# ---- waiting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_a_read_that_gives_up_has_taken_nothing(loop: headrace.EventLoop, how: str) -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        async def handler(reader: headrace.Reader, writer: headrace.Writer) -> None:
            writer.write(b"123")
            await go_on.wait()
            writer.write(b"456\n")

        async with connected(handler) as (reader, _):
            reads: list[Callable[..., Any]] = [
                lambda **more: reader.readexactly(6, **more),
                lambda **more: reader.readuntil(b"\n", **more),
                lambda **more: reader.read(-1, **more),
                lambda **more: reader.readline(**more),
            ]
            for read in reads:
                if how == "timeout":
                    with pytest.raises(TimeoutError):
                        await read(timeout=0.02)
                else:
                    task = asyncio.ensure_future(read())
                    await asyncio.sleep(0.01)
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
            go_on.set()
            assert await reader.readline(timeout=10) == b"123456\n"

    run(loop, main())


def test_two_readers_at_once_are_refused(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with connected(echo) as (reader, writer):
            first = asyncio.ensure_future(reader.read(10))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another coroutine"):
                await reader.readexactly(1)
            writer.write(b"hello")
            assert await first == b"hello"

    run(loop, main())


def test_nothing_read_stops_the_peer(loop: headrace.EventLoop, secured: bool) -> None:
    """Backpressure both ways: a limit of bytes wait to be read, and drain() waits."""

    async def main() -> None:
        written = 0

        async def pouring(reader: headrace.Reader, writer: headrace.Writer) -> None:
            nonlocal written
            for _ in range(64):
                writer.write(BIG)
                written += len(BIG)
                await writer.drain()

        async with connected(pouring, secured, limit=10_000) as (reader, _):
            assert await reader.readexactly(1)
            before = -1
            while written != before:
                before = written
                await asyncio.sleep(0.05)
            assert written < 32 * len(BIG)
            assert reader._size < 10_000 + 2 * 262_144
            got = 1
            while data := await reader.read(1 << 20):
                got += len(data)
            assert got == written == 64 * len(BIG)

    run(loop, main())


def test_more_than_the_limit_at_a_time(loop: headrace.EventLoop, secured: bool) -> None:
    async def main() -> None:
        async with connected(saying(BIG), secured, limit=1000) as (reader, _):
            assert await reader.readexactly(900_000) == BIG[:900_000]
            assert await reader.read() == BIG[900_000:]

    run(loop, main())


def test_drain_with_a_time_limit(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        never = asyncio.Event()

        async def deaf(reader: headrace.Reader, writer: headrace.Writer) -> None:
            await never.wait()

        async with connected(deaf, server_limit=1000) as (_, writer):
            for _ in range(30):
                writer.write(BIG)
            with pytest.raises(TimeoutError):
                await writer.drain(timeout=0.05)
            waiting = asyncio.ensure_future(writer.drain())
            await asyncio.sleep(0)
            writer.abort()
            with contextlib.suppress(ConnectionError):
                await waiting
            never.set()
            await writer.wait_closed()
            with pytest.raises(ConnectionResetError):
                await writer.drain()

    run(loop, main())


# ---- messages ----------------------------------------------------------------------------------------------------


def test_messages_both_ways(loop: headrace.EventLoop, secured: bool) -> None:
    framing = LengthPrefixed(2)
    sent = [BIG[at : at + at % 977] for at in range(0, 100_000, 137)]

    async def handler(reader: headrace.Reader, writer: headrace.Writer) -> None:
        async for message in reader.messages(framing):
            writer.write_message(framing, message[::-1])
            await writer.drain()

    async def main() -> None:
        async with connected(handler, secured) as (reader, writer):

            async def send() -> None:
                for message in sent:
                    writer.write_message(framing, message)
                    await writer.drain()
                writer.write_eof()

            sending = asyncio.ensure_future(send())
            assert [message async for message in reader.messages(framing)] == [each[::-1] for each in sent]
            await sending

    run(loop, main())


def test_messages_that_break_off_or_are_too_long(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with connected(saying(b"\0\3abc\0\3ab")) as (reader, _):
            messages = reader.messages(LengthPrefixed(2))
            assert await anext(messages) == b"abc"
            with pytest.raises(IncompleteReadError) as end:
                await anext(messages)
            assert end.value.partial == b"\0\3ab"
        async with connected(saying(b"\7\0")) as (reader, _):
            with pytest.raises(MessageError):
                await anext(reader.messages(LengthPrefixed(2, limit=100)))

    run(loop, main())


# ---- servers -----------------------------------------------------------------------------------------------------


def test_a_handler_that_fails(loop: headrace.EventLoop) -> None:
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))

    async def failing(reader: headrace.Reader, writer: headrace.Writer) -> None:
        writer.write(b"hello")
        await reader.readexactly(5)
        raise KeyError("a mistake")

    async def main() -> None:
        async with connected(failing) as (reader, writer):
            assert await reader.readexactly(5) == b"hello"
            writer.write(b"world")
            assert await reader.read() == b""
        assert [type(each["exception"]) for each in told] == [KeyError]

    run(loop, main())


@pytest.mark.parametrize("leaves", ["abort", "eof"])
def test_a_peer_that_leaves_is_no_mistake(loop: headrace.EventLoop, leaves: str) -> None:
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))

    async def handler(reader: headrace.Reader, writer: headrace.Writer) -> None:
        writer.write(b"hello")
        await reader.readexactly(100)

    async def main() -> None:
        async with connected(handler) as (reader, writer):
            assert await reader.readexactly(5) == b"hello"
            writer.write(b"only a part")
            if leaves == "abort":
                writer.abort()
            else:
                writer.write_eof()
                assert await reader.read() == b""
        assert told == []

    run(loop, main())


def test_a_handler_that_is_cancelled(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        tasks: list[Any] = []

        async def handler(reader: headrace.Reader, writer: headrace.Writer) -> None:
            tasks.append(asyncio.current_task())
            writer.write(b"hello")
            await reader.read()

        async with connected(handler) as (reader, _):
            assert await reader.readexactly(5) == b"hello"
            tasks[0].cancel()
            assert await reader.read() == b""
            assert tasks[0].cancelled()

    run(loop, main())


def test_with_a_writer(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with connected(echo) as (reader, writer):
            async with writer:
                writer.writelines([b"a", b"b"])
                assert await reader.readexactly(2) == b"ab"
            assert writer.is_closing()
            assert "Writer" in repr(writer)
            assert "ended" in repr(reader)
        async with connected(echo) as (_, writer):
            with pytest.raises(KeyError):
                async with writer:
                    raise KeyError
            assert writer.is_closing()

    run(loop, main())


def test_unix(loop: headrace.EventLoop, tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "socket")
        async with await headrace.start_unix_server(echo, path):
            reader, writer = await headrace.open_unix_connection(path)
            async with writer:
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"

    run(loop, main())


# ---- security ----------------------------------------------------------------------------------------------------


def test_who_the_peer_is(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        async with connected(echo, secured=True) as (_, writer):
            assert writer.security is not None
            assert writer.security.is_encrypted
            assert writer.security.remote_identity is not None
            assert f"dns:{NAME}" in writer.security.remote_identity.names
        async with connected(echo) as (_, writer):
            assert writer.security is None

    run(loop, main())


@pytest.mark.parametrize("ahead", [False, True], ids=["asked", "ahead"])
def test_security_from_the_middle_on(loop: headrace.EventLoop, ahead: bool) -> None:
    """Also where the client's first record comes with the line that asks for it."""
    files = issued(NAME)
    server_side = headrace.TLS(certificate=files.chain, private_key=files.key)

    async def handler(reader: headrace.Reader, writer: headrace.Writer) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        if not ahead:
            writer.write(b"go on\n")
        else:
            await asyncio.sleep(0.05)  # until the ClientHello is here
        await writer.start_security(server_side, server_side=True)
        assert writer.security is not None
        await echo(reader, writer)

    async def main() -> None:
        async with connected(handler) as (reader, writer):
            writer.write(b"STARTTLS\n")
            if not ahead:
                assert await reader.readline() == b"go on\n"
            await writer.start_security(headrace.TLS(ca=ca_file()), server_hostname=NAME)
            assert writer.security is not None
            writer.write(BIG)
            assert await reader.readexactly(len(BIG)) == BIG

    run(loop, main())


def test_plain_bytes_behind_the_request_do_not_get_in(loop: headrace.EventLoop) -> None:
    """CVE-2011-0411's kind: they go to the handshake, and fail it."""
    files = issued(NAME)
    server_side = headrace.TLS(certificate=files.chain, private_key=files.key)
    failures: list[BaseException] = []

    async def handler(reader: headrace.Reader, writer: headrace.Writer) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        try:
            await writer.start_security(server_side, server_side=True)
        except BaseException as exc:
            failures.append(exc)
        assert await reader.read() == b""

    async def main() -> None:
        async with connected(handler) as (reader, writer):
            writer.write(b"STARTTLS\nDELETE EVERYTHING\n")
            with contextlib.suppress(ConnectionError):
                await reader.read()
        assert len(failures) == 1

    run(loop, main())


def test_another_loop_is_refused() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"headrace\.run"):
            await headrace.open_connection("127.0.0.1", 1)

    asyncio.run(main())


def test_a_limit_that_makes_no_sense(loop: headrace.EventLoop) -> None:
    with pytest.raises(ValueError, match="limit"):
        headrace.Reader(loop, 0)
