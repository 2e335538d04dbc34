"""Tools for testing protocols, transports and engines: public, as ``trio.testing`` is.

A simulated world, where one seed decides everything and time costs nothing::

    from headrace.testing import SimulatedLoop, simulated_run

    async def main():
        loop = asyncio.get_running_loop()
        server = await loop.create_server(MyProtocol, "server", 80)
        transport, client = await loop.create_connection(MyClient, "server", 80)
        ...

    for seed in range(1000):
        simulated_run(main(), seed)      # a failure says which seed replays it

Names are imported when they are first used: importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace._simulated import SimulatedEngine
    from headrace._virtual import (
        NO_FAULTS,
        ContractViolation,
        Deadlock,
        Faults,
        SeededRandom,
        SimulationError,
    )
    from headrace.testing.scenarios import OracleError, run_scenario
    from headrace.testing.simulation import (
        SeedReport,
        SimulatedLoop,
        VirtualSocket,
        replay,
        run_seeds,
        simulated_loop,
        simulated_run,
    )

__all__ = [
    "NO_FAULTS",
    "ContractViolation",
    "Deadlock",
    "Faults",
    "OracleError",
    "SeedReport",
    "SeededRandom",
    "SimulatedEngine",
    "SimulatedLoop",
    "SimulationError",
    "VirtualSocket",
    "replay",
    "run_scenario",
    "run_seeds",
    "simulated_loop",
    "simulated_run",
]

_HOME = {
    "NO_FAULTS": "headrace._virtual",
    "ContractViolation": "headrace._virtual",
    "Deadlock": "headrace._virtual",
    "Faults": "headrace._virtual",
    "OracleError": "headrace.testing.scenarios",
    "SeedReport": "headrace.testing.simulation",
    "SeededRandom": "headrace._virtual",
    "SimulatedEngine": "headrace._simulated",
    "SimulatedLoop": "headrace.testing.simulation",
    "SimulationError": "headrace._virtual",
    "VirtualSocket": "headrace.testing.simulation",
    "replay": "headrace.testing.simulation",
    "run_scenario": "headrace.testing.scenarios",
    "run_seeds": "headrace.testing.simulation",
    "simulated_loop": "headrace.testing.simulation",
    "simulated_run": "headrace.testing.simulation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
