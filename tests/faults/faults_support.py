"""How a fault test runs one of ``programs.py`` in a process of its own, and what it may need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headrace._uring import UringEngine
from headrace.errors import EngineUnavailable

__all__ = ["Outcome", "needs_root", "needs_uring", "run_program"]

PROGRAMS = Path(__file__).parent / "programs.py"


def _why_no_uring() -> str:
    engine = UringEngine()
    try:
        engine.start()
        engine.stop()
    except EngineUnavailable as error:
        return str(error)
    finally:
        engine.close()
    return ""


_no_uring = _why_no_uring()
needs_uring = pytest.mark.skipif(bool(_no_uring), reason=f"needs io_uring: {_no_uring}")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@dataclass(frozen=True)
class Outcome:
    """What a program returned, and the lines that it wrote to standard error."""

    result: Any
    said: list[str]


def run_program(name: str, *, environment: dict[str, str] | None = None, **arguments: Any) -> Outcome:
    """Runs ``programs.py``'s program of that name; fails with its output unless it ends with status 0."""
    inherited = {name: value for name, value in os.environ.items() if name != "HEADRACE_ENGINE"}
    process = subprocess.run(
        [sys.executable, "-X", "faulthandler", PROGRAMS, name, json.dumps(arguments)],
        env=inherited | {"PYTHONWARNINGS": "error"} | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert process.returncode == 0, f"{name}: status {process.returncode}\n{process.stdout}{process.stderr}"
    return Outcome(json.loads(process.stdout.splitlines()[-1]), process.stderr.splitlines())
