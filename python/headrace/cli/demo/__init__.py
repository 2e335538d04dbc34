"""``headrace demo``: a real server and a real load on this machine, measured.

Three processes: the server and the load, both on headrace's loop, and this one, which watches them from
outside on asyncio's own loop. ``server`` and ``load`` are the children, ``child`` what they share,
``traffic`` what they send and how it is checked; ``processes``, ``measure``, ``view``, ``result`` and
``chart`` are this process's.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import signal
import sys
from collections.abc import Coroutine
from time import monotonic, monotonic_ns
from typing import Any, TypeVar

from headrace import __version__
from headrace.cli.demo.chart import draw_chart
from headrace.cli.demo.child import ChildOptions
from headrace.cli.demo.limits import LimitError, ensure_descriptors
from headrace.cli.demo.measure import ProcessMeter, Recorder
from headrace.cli.demo.options import DemoOptions, add_arguments, check
from headrace.cli.demo.processes import Child, ChildError
from headrace.cli.demo.result import RunResult, summarize
from headrace.cli.demo.security import Materials, SecurityError, prepared
from headrace.cli.demo.view import View, choose_view, describe, summary_lines

__all__ = ["register"]

T = TypeVar("T")

_START_TIMEOUT = 30.0  # seconds for a child to be ready
_CONNECT_TIMEOUT = 60.0  # for all connections to stand
_END_TIMEOUT = 30.0  # from the end of sending to the results; the load gives up before
_LEAD = 0.3  # seconds between the command to start and the start, so both children know in time
_SAMPLE_LAG = 0.05  # seconds that a sample is given to arrive


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``demo`` to the commands."""
    parser = subparsers.add_parser(
        "demo",
        help="run a server and 1,000 connections on this machine, and measure them",
        description="Runs a headrace server and a headrace load on this machine, checks every byte, and "
        "shows throughput, latency and processor time. Ends with a summary, demo.json and a chart. The exit "
        "status is 0 only if every connection carried its bytes unharmed at 95 % of the asked rate or more.",
    )
    add_arguments(parser)

    def command(arguments: argparse.Namespace) -> int:
        try:
            options = check(arguments)
        except ValueError as error:
            parser.error(str(error))
        return run(options)

    parser.set_defaults(command=command)


def run(options: DemoOptions) -> int:
    """Runs the demo and writes its files; returns the exit status, see :func:`headrace.cli.main`."""
    try:
        ensure_descriptors(options.connections)
        with asyncio.Runner() as runner:
            result = runner.run(_main(options))
    except LimitError as error:
        print(f"headrace demo: {error}", file=sys.stderr)
        return 2
    except (ChildError, SecurityError) as error:
        print(f"headrace demo: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        print("headrace demo: interrupted; nothing was written", file=sys.stderr)
        return 128 + (signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
    options.json.write_text(json.dumps(result.document, indent=2) + "\n")
    options.chart.write_text(draw_chart(result))
    print("\n".join(["", *summary_lines(result), "", f"written: {options.json}, {options.chart}"]))
    return 1 if result.problems else 0


async def _main(options: DemoOptions) -> RunResult:
    main = asyncio.current_task()
    assert main is not None
    # Ctrl-C cancels the main task already; an ordinary kill shall end the children in order as well.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    children: list[Child] = []
    with choose_view(options) as view, prepared(options.security) as materials:
        options = dataclasses.replace(options, security=materials.kind)
        if materials.notice is not None:
            view.say(materials.notice)
        view.say(f"headrace {__version__} demo: {describe(options)}")
        try:
            return await _run_with_children(options, _child_options(options, materials), view, children)
        finally:
            await asyncio.gather(*(child.stop() for child in children))


def _child_options(options: DemoOptions, materials: Materials) -> ChildOptions:
    life_time = _START_TIMEOUT + _CONNECT_TIMEOUT + options.seconds + 2 * _END_TIMEOUT
    return ChildOptions(
        engine=options.engine,
        protocol=options.protocol,
        mode=options.mode,
        size=options.size,
        connections=options.connections,
        seconds=options.seconds,
        rate=options.rate,
        life_time=life_time,
        security=materials,
    )


async def _unless_dead(children: list[Child], work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; raises :class:`ChildError` as soon as one of the children has died."""
    working = asyncio.ensure_future(work)
    watchers = [asyncio.create_task(child.died()) for child in children]
    try:
        await asyncio.wait((working, *watchers), return_when=asyncio.FIRST_COMPLETED)
        for watcher in watchers:
            if watcher.done() and not working.done():
                watcher.result()
        return await working
    finally:
        tasks = (working, *watchers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run_with_children(
    options: DemoOptions, child_options: ChildOptions, view: View, children: list[Child]
) -> RunResult:
    """Starts the children, which are added to ``children`` at once, and runs the demo with them."""
    sample_sinks: dict[str, Recorder] = {}

    def on_server_sample(sample: dict[str, Any]) -> None:
        if recorder := sample_sinks.get("server"):
            recorder.server_sample(sample)
            if options.mode == "oneway":
                recorder.traffic_sample(sample)

    def on_load_sample(sample: dict[str, Any]) -> None:
        if options.mode == "echo" and (recorder := sample_sinks.get("load")):
            recorder.traffic_sample(sample)

    server = await Child.start("server", child_options, on_server_sample)
    children.append(server)
    ready = await server.expect("ready", _START_TIMEOUT)
    view.say(f"server  process {ready['pid']} on engine {ready['engine']}: {ready['engine_reason']}")

    load = await Child.start("load", dataclasses.replace(child_options, port=ready["port"]), on_load_sample)
    children.append(load)
    began = monotonic()
    connected = await _unless_dead([server], load.expect("connected", _CONNECT_TIMEOUT))
    view.say(
        f"load    process {connected['pid']} on engine {connected['engine']}, "
        f"{connected['connections']:,} connections made in {monotonic() - began:.2f} s"
    )
    recorder = Recorder(ProcessMeter(server.pid), ProcessMeter(load.pid))
    sample_sinks.update(server=recorder, load=recorder)
    result = await _unless_dead(children, _measure(options, view, recorder, server, load, ready))
    for child in children:
        for line in child.said:
            view.say(f"{child.role}: {line}")
    return result


async def _sleep_until(at: int) -> None:
    await asyncio.sleep(max(0.0, (at - monotonic_ns()) / 1e9))


async def _measure(
    options: DemoOptions, view: View, recorder: Recorder, server: Child, load: Child, ready: dict[str, Any]
) -> RunResult:
    start = monotonic_ns() + int(_LEAD * 1e9)
    for child in (server, load):
        child.tell("start", at=start, interval=view.interval)
    await _sleep_until(start)
    recorder.begin(start)
    ends = start + int(options.seconds * 1e9)
    step = int(view.interval * 1e9)
    lag = int(min(_SAMPLE_LAG, view.interval / 4) * 1e9)
    tick = start + step
    while tick + lag < ends:
        await _sleep_until(tick + lag)
        if (interval := recorder.cut()) is not None:
            view.show(interval)
        tick += step
    await _sleep_until(ends)
    before, after = recorder.first[0], recorder.read_server()
    window = ((after.at - before.at) / 1e9, (after.processor - before.processor) / 1e9)
    loaded = await load.expect("result", _END_TIMEOUT)
    server.tell("finish")
    served = await server.expect("result", _END_TIMEOUT)
    last_arrival = max(loaded["last_arrival"], served["last_arrival"])
    if (interval := recorder.cut_last(options.seconds, last_arrival)) is not None:
        view.show(interval)
    return summarize(options, recorder, window, ready, served, loaded)
