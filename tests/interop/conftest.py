"""Which cells of the matrix run on which engine."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A peer that takes seconds to start meets each engine in half of the cells; HEADRACE_INTEROP=full: in all."""
    if os.environ.get("HEADRACE_INTEROP") == "full":
        return
    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_left_out(item)]


def is_left_out(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    if callspec is None or not getattr(callspec.params.get("peer"), "slow", False):
        return False
    values = callspec.params
    odd = sum(repr(values[name]) in ODD for name in ("role", "version", "mutual", "how") if name in values)
    return bool((odd + (values["engine_name"] == "uring")) % 2)


# One value of each parameter: half of the cells have an odd number of these.
ODD = frozenset(map(repr, ("client", "TLSv1.2", True, "bytes")))
