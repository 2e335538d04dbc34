"""The private names of CPython's asyncio that headrace uses: all of them, and each exists on this interpreter.

headrace's loop inherits asyncio's and fills in for its private methods, so a CPython release may break it by renaming
one. This is the list to read when a new version comes out. It can't rot: what the sources use is collected from
them and compared with the list.
"""

from __future__ import annotations

import ast
import asyncio
import asyncio.base_events
import asyncio.base_subprocess
import asyncio.constants
import asyncio.events
import asyncio.format_helpers
import asyncio.futures
import asyncio.protocols
import asyncio.selector_events
import asyncio.sslproto
import asyncio.streams
import asyncio.transports
import asyncio.unix_events
import inspect
import re
import ssl
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/headrace"

# On an instance of asyncio.SelectorEventLoop: inherited, called or overridden.
LOOP = {
    "_add_reader",
    "_add_writer",
    "_check_callback",
    "_check_closed",
    "_check_running",
    "_check_thread",
    "_closed",
    "_csock",
    "_current_handle",
    "_debug",
    "_ensure_fd_no_transport",
    "_make_datagram_transport",
    "_make_socket_transport",
    "_make_ssl_transport",
    "_make_subprocess_transport",
    "_process_events",
    "_ready",
    "_remove_writer",
    "_run_once",
    "_scheduled",
    "_selector",
    "_sendfile_native",
    "_signal_handlers",
    "_ssock",
    "_start_serving",
    "_stop_serving",
    "_stopping",
    "_timer_cancelled_count",
    "_timer_handle_cancelled",
    "_transports",
    "_write_to_self",
}
# On asyncio.TimerHandle, which the loop's own handles stand in for.
HANDLE = {
    "_args",
    "_callback",
    "_cancelled",
    "_context",
    "_loop",
    "_repr",
    "_repr_info",
    "_run",
    "_scheduled",
    "_source_traceback",
    "_when",
}
# On asyncio's own selector transport, which ours stand in for.
TRANSPORT = {
    "_call_connection_lost",
    "_extra",
    "_fatal_error",
    "_force_close",
    "_loop",
    "_make_empty_waiter",
    "_protocol",
    "_protocol_paused",
    "_reset_empty_waiter",
    "_sendfile_compatible",
    "_sock",
    "_sock_fd",
    "_start_tls_compatible",
}
SERVER = {"_attach", "_detach"}
# On asyncio's transport of a child process.
PROCESS = {"_proc", "_process_exited", "_wait"}
MODULES = {
    asyncio.base_events: {"_format_handle"},
    asyncio.constants: {"_SendfileMode"},
    asyncio.events: {"_event_loop_policy"},
    asyncio.format_helpers: {"_format_callback_source"},
    asyncio.futures: {"_set_result_unless_cancelled"},
    asyncio.transports: {"_FlowControlMixin"},
    asyncio.unix_events: {"_UnixSubprocessTransport"},
}
# On asyncio.StreamReader and its protocol.
READER = {"_buffer", "_eof", "_paused", "_stream_reader", "_transport"}
# On an ssl.SSLObject; asyncio's TLS calls its own so, too.
TLS = {"_sslobj"}
# On asyncio's own policy, until 3.13.
POLICY = {"_watcher"}

# What makes an object one that a task can wait for.
FUTURE = {"_asyncio_future_blocking"}

LISTED = (
    LOOP
    | HANDLE
    | TRANSPORT
    | SERVER
    | PROCESS
    | READER
    | TLS
    | POLICY
    | FUTURE
    | set().union(*MODULES.values())
)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_by(module: ModuleType) -> set[str]:
    """The private names that a module defines, or assigns as attributes."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return {name for name in names if is_private(name)}


def names_of_asyncio() -> set[str]:
    modules = [module for name, module in sys.modules.items() if name.startswith("asyncio.")]
    return set().union(*(defined_by(module) for module in modules))


def used_in(source: str) -> set[str]:
    """Private names in Python or Cython source; those of headrace's own modules aside."""
    source = re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    source = re.sub(r"#.*", "", source)
    source = re.sub(r"\bheadrace\._\w+", "", source)
    return {name for name in re.findall(r"\b_\w+", source) if is_private(name)}


def sources() -> list[Path]:
    """What touches asyncio: the loop with its transports, and their declarations."""
    return [*(ROOT / "pyx").glob("*.pyx"), *PACKAGE.glob("*.pxd"), *PACKAGE.glob("*.py")]


def test_the_list_is_complete():
    used = set().union(*(used_in(path.read_text("utf-8")) for path in sources()))
    assert used & names_of_asyncio() == LISTED


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.SelectorEventLoop()
    yield loop
    loop.close()


@pytest.mark.parametrize("name", sorted(LOOP))
def test_loop(loop, name):
    assert hasattr(loop, name)


@pytest.mark.parametrize("name", sorted(HANDLE))
def test_handle(loop, name):
    assert hasattr(asyncio.TimerHandle(0.0, print, (), loop), name)


@pytest.mark.parametrize("name", sorted(TRANSPORT))
def test_transport(name):
    transport = asyncio.selector_events._SelectorSocketTransport
    # What an __init__ assigns is an attribute of instances only.
    assigned = defined_by(asyncio.selector_events) | defined_by(asyncio.transports)
    assert hasattr(transport, name) or name in assigned


@pytest.mark.parametrize("name", sorted(FUTURE))
def test_future(name):
    assert hasattr(asyncio.Future, name)


@pytest.mark.parametrize("name", sorted(SERVER))
def test_server(name):
    assert hasattr(asyncio.base_events.Server, name)


@pytest.mark.parametrize("name", sorted(READER))
def test_reader(name):
    assert name in defined_by(asyncio.streams)


@pytest.mark.parametrize("name", sorted(TLS))
def test_tls(name):
    assert name in defined_by(asyncio.sslproto)


def test_the_ssl_object():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
    assert type(made._sslobj).__name__ == "_SSLSocket"


@pytest.mark.parametrize("name", sorted(PROCESS))
def test_process(name):
    assert name in defined_by(asyncio.base_subprocess)


@pytest.mark.parametrize("name", sorted(POLICY))
def test_policy(name):
    assert name in defined_by(asyncio.unix_events)


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in MODULES.items() for name in sorted(names)]
)
def test_module(module, name):
    assert hasattr(module, name)
