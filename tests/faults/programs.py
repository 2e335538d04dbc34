"""Programs that the fault tests run in processes of their own: ``python programs.py NAME ARGUMENTS-AS-JSON``.

Each is a function that takes the arguments and returns what the last line of its output says, as JSON. What the
``headrace`` logger says goes to standard error, where it goes in an application that configures no logging.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 (by asyncio only later, when its file may be out of reach)
import contextlib
import errno
import gc
import json
import multiprocessing
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from restrictions import become_nobody, deny_io_uring, deny_pidfd_open

import headrace

PROGRAMS: dict[str, Callable[..., Any]] = {}


def program(function: Callable[..., Any]) -> Callable[..., Any]:
    PROGRAMS[function.__name__] = function
    return function


class Echo(headrace.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def lease_received(self, lease: headrace.Lease) -> None:
        with lease:
            self.transport.write(lease)


async def echo_once(count: int = 1) -> dict[str, Any]:
    """A server and ``count`` clients on the running loop; every byte comes back."""
    loop: Any = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", 0)
    for number in range(count):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        sent = b"%d" % number * 1000
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
        writer.close()
        await writer.wait_closed()
    server.close()
    await server.wait_closed()
    return {"engine": loop.engine_name, "reason": loop.engine_reason}


def run_or_error(engine: str | None = None) -> dict[str, Any]:
    try:
        return headrace.run(echo_once(), engine=engine)
    except headrace.EngineUnavailable as error:
        return {"error": str(error)}


# ---- io_uring is denied --------------------------------------------------------------------------------------


@program
def denied_by_seccomp(error: int, engine: str | None = None, runs: int = 1) -> list[dict[str, Any]]:
    deny_io_uring(error)
    return [run_or_error(engine) for _ in range(runs)]


@program
def processes_without_pidfds(error: int, engine: str) -> list[int]:
    """The exit codes of child processes under a filter that knows no ``pidfd_open``."""
    deny_pidfd_open(error)

    async def exit_code(code: int) -> int:
        process = await asyncio.create_subprocess_exec("sh", "-c", f"exit {code}")
        return await process.wait()

    async def main() -> list[int]:
        return await asyncio.gather(*(exit_code(code) for code in range(5)))

    return headrace.run(main(), engine=engine)


@program
def denied_by_memlock(locked_memory: int, engine: str | None = None, runs: int = 1) -> list[dict[str, Any]]:
    become_nobody(locked_memory)
    return [run_or_error(engine) for _ in range(runs)]


@program
def many_runs(count: int, locked_memory: int) -> dict[str, int]:
    """Which engines ``count`` sequential runs, each with a loop of its own, were on; as a non-root user."""
    become_nobody(locked_memory)

    async def main() -> str:
        return str((await echo_once())["engine"])

    engines: dict[str, int] = {}
    for _ in range(count):
        with asyncio.Runner(loop_factory=headrace.new_event_loop) as runner:
            name = runner.run(main())
        engines[name] = engines.get(name, 0) + 1
    return engines


@program
def restricted_server(error: int, locked_memory: int) -> dict[str, Any]:
    """Life in a container: no root, a filter like Docker's; servers, streams, subprocesses' pipes, threads, timers."""
    become_nobody(locked_memory)
    deny_io_uring(error)

    async def main() -> dict[str, Any]:
        result = await echo_once(20)
        loop = asyncio.get_running_loop()
        assert await asyncio.to_thread(os.getuid) == os.getuid()
        left, right = socket.socketpair()
        left.setblocking(False)
        right.setblocking(False)
        await loop.sock_sendall(left, b"hello")
        assert await loop.sock_recv(right, 10) == b"hello"
        left.close()
        right.close()
        return result

    return headrace.run(main())


# ---- descriptors run out ---------------------------------------------------------------------------------------


def flood(port: int, count: int, done: Any) -> None:
    """``count`` clients at a time that the server can't all take; says how many were served in the end."""

    async def client() -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"ping")
            return await reader.readexactly(4) == b"ping"
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the server's limit is inherited

    async def main() -> int:
        async with asyncio.timeout(40):
            return sum(await asyncio.gather(*(client() for _ in range(count))))

    done.send(asyncio.run(main()))


def full() -> bool:
    """Whether this process can't open one more descriptor."""
    try:
        os.close(os.dup(0))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return True
    return False


@program
def descriptors_run_out(engine: str, limit: int, clients: int) -> dict[str, Any]:
    """A server that may have ``limit`` descriptors: full for a second; in the end all are served."""
    # Before the listener: an accept under way keeps the limit that it was submitted with.
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    waiting: list[tuple[Any, bytes]] | None = []

    class Holding(Echo):
        def lease_received(self, lease: headrace.Lease) -> None:
            if waiting is None:
                super().lease_received(lease)
            else:
                waiting.append((self.transport, bytes(lease)))

    async def main() -> dict[str, Any]:
        nonlocal waiting
        loop: Any = asyncio.get_running_loop()
        reports: list[str] = []
        loop.set_exception_handler(lambda _, context: reports.append(str(context["message"])))
        server = await loop.create_server(Holding, "127.0.0.1", 0, backlog=1024)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=flood, args=(server.sockets[0].getsockname()[1], clients, theirs))
        process.start()
        async with asyncio.timeout(20):
            while not full():
                await asyncio.sleep(0.01)
        before, turns = time.process_time(), loop.stats()["turns"]
        await asyncio.sleep(1.0)
        busy, turned = time.process_time() - before, loop.stats()["turns"] - turns
        was_full, held, waiting = full(), waiting, None
        for transport, data in held:
            transport.write(data)
        served = await asyncio.to_thread(lambda: ours.recv() if ours.poll(40) else None)
        process.join(10)
        server.close()
        await server.wait_closed()
        return {
            "busy": busy,
            "turns": turned,
            "full": was_full,
            "held": len(held),
            "served": served,
            "reports": len(reports),
        }

    return headrace.run(main(), engine=engine)


# ---- a completion queue that is far too small -----------------------------------------------------------------


@program
def tiny_completion_queue(connections: int, size: int) -> dict[str, Any]:
    """``connections`` at once through 8 completion entries; returns how many got back exactly what they sent."""

    class Client(headrace.Protocol):
        def __init__(self, number: int, done: Callable[[bool], None]) -> None:
            self.sent = struct.pack("<I", number) * (size // 4)
            self.got = bytearray()
            self.done = done

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport: Any = transport

        def lease_received(self, lease: headrace.Lease) -> None:
            self.got += lease
            if len(self.got) >= len(self.sent):
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self.done(exc is None and self.got == self.sent)

    async def main() -> dict[str, Any]:
        loop: Any = asyncio.get_running_loop()
        server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=connections)
        finished = loop.create_future()
        good: list[bool] = []

        def done(right: bool) -> None:
            good.append(right)
            if len(good) == connections:
                finished.set_result(None)

        clients = []
        for number in range(connections):
            client = Client(number, done)
            await loop.create_connection(lambda client=client: client, *server.sockets[0].getsockname())
            clients.append(client)
        for client in clients:  # in one turn: everybody's data comes at once
            client.transport.write(client.sent)
        await finished
        stats = loop.stats()["engine"]
        server.close()
        await server.wait_closed()
        return {"good": sum(good), "engine": loop.engine_name, "overflows": stats["overflows"]}

    loop = headrace.EventLoop("uring", ring_entries=8, completion_entries=8)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main())


# ---- processes and signals ---------------------------------------------------------------------------------------


@program
def fork_in_callback(engine: str) -> dict[str, Any]:
    """A fork while a connection is in mid-stream: the child can't use the loop, the parent's goes on."""

    def child_says(loop: Any, write_end: int) -> None:
        said = {}
        for name, use in {
            "call_soon": lambda: loop.call_soon(print),
            "call_soon_threadsafe": lambda: loop.call_soon_threadsafe(print),
            "run_forever": loop.run_forever,
        }.items():
            try:
                use()
            except RuntimeError as error:
                said[name] = str(error)
            else:
                said[name] = ""
        os.write(write_end, json.dumps(said).encode())
        os._exit(0)

    async def main() -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"before")
        assert await reader.readexactly(6) == b"before"
        read_end, write_end = os.pipe()
        forked: asyncio.Future[int] = loop.create_future()

        def fork() -> None:
            pid = os.fork()
            if pid == 0:
                child_says(loop, write_end)
            forked.set_result(pid)

        loop.call_soon(fork)
        pid = await forked
        os.close(write_end)
        said = json.loads(os.read(read_end, 65536))
        os.close(read_end)
        _, status = os.waitpid(pid, 0)
        sent = b"after" * 100_000
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        return {"child": said, "status": status}

    return headrace.run(main(), engine=engine)


def run_in_child(engine: str) -> str:
    return str(headrace.run(echo_once(), engine=engine)["engine"])


@program
def multiprocessing_children(engine: str, method: str) -> dict[str, Any]:
    """Worker processes that run loops of their own, started from inside and outside of a running loop."""
    context = multiprocessing.get_context(method)

    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            calls = [loop.run_in_executor(pool, run_in_child, engine) for _ in range(4)]
            results = await asyncio.gather(*calls)
        await echo_once()
        return results

    inside = headrace.run(main(), engine=engine)
    with context.Pool(2) as pool:
        outside = pool.map(run_in_child, [engine] * 2)
        pool.close()
        pool.join()
    return {"inside": inside, "outside": outside}


@program
def interrupted_when_idle(engine: str, handler: bool) -> dict[str, Any]:
    """How long after SIGINT an idle loop answers: by KeyboardInterrupt, or by a handler that was added."""
    sent = 0.0

    def interrupt() -> None:
        nonlocal sent
        idle.wait()
        time.sleep(0.05)  # until the loop waits in the kernel; nothing can tell from outside
        sent = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    idle = threading.Event()

    async def main() -> float:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[float] = loop.create_future()
        if handler:
            loop.add_signal_handler(signal.SIGINT, lambda: answered.set_result(time.monotonic()))
        threading.Thread(target=interrupt).start()
        loop.call_soon(idle.set)
        return await answered

    times = []
    for _ in range(5):
        idle.clear()
        try:
            ended = headrace.run(main(), engine=engine)
        except KeyboardInterrupt:
            ended = time.monotonic()
        times.append(ended - sent)
    return {"seconds": times}


# ---- churn ---------------------------------------------------------------------------------------------------


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def counts(loop: Any) -> dict[str, int]:
    """Everything that must be as it was once all connections are gone."""
    gc.collect()
    pool = loop.stats()["pool"]
    # A closed loop's sockets are gone; objects by type, for what a count alone can't tell.
    kinds: dict[str, int] = {}
    for thing in gc.get_objects():
        kinds[type(thing).__name__] = kinds.get(type(thing).__name__, 0) + 1
    watched = ("StreamTransport", "Lease", "Echo", "socket", "Task", "Future", "TimerHandle")
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "leased": pool["leased"],
        "outstanding": pool["outstanding"],
        "pinned": pool["pinned"],
        **{name: kinds.get(name, 0) for name in watched},
        "objects": sum(kinds.values()),
    }


@program
def churn(engine: str, rounds: int, connections: int) -> dict[str, Any]:
    """Rounds of connections that end in order and of ones that are reset; what is left after each."""

    def orderly(address: tuple[str, int]) -> None:
        with socket.create_connection(address) as sock:
            sock.sendall(b"hello")
            assert sock.recv(5, socket.MSG_WAITALL) == b"hello"

    def abrupt(address: tuple[str, int]) -> None:
        with socket.create_connection(address) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(b"x" * 100)

    def touch_pool(address: tuple[str, int]) -> None:
        """The pool's memory becomes resident as it's first written to: all of it, before anything is compared."""
        with socket.create_connection(address) as sock:
            for _ in range(128):
                sock.sendall(bytes(65536))
                received = 0
                while received < 65536:
                    received += len(sock.recv(65536))

    ended = 0

    class Counting(Echo):
        def connection_lost(self, exc: Exception | None) -> None:
            nonlocal ended
            ended += 1

    def clients(address: tuple[str, int]) -> None:
        for _ in range(connections):
            orderly(address)
        for _ in range(connections):
            abrupt(address)

    async def main() -> dict[str, Any]:
        nonlocal ended
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Counting, "127.0.0.1", 0, backlog=1024)
        address = server.sockets[0].getsockname()
        await asyncio.to_thread(touch_pool, address)
        left, memory = [], []
        for _ in range(rounds):
            ended = 0
            await asyncio.to_thread(clients, address)
            async with asyncio.timeout(20):
                while ended < 2 * connections:
                    await asyncio.sleep(0.01)
            left.append(counts(loop))
            memory.append(resident())
        server.close()
        await server.wait_closed()
        return {"left": left, "memory": memory}

    return headrace.run(main(), engine=engine)


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    result = PROGRAMS[name](**arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
