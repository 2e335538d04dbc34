"""Which cells of the interoperation matrix run on which engine."""

from __future__ import annotations

import os

import pytest

__all__ = ["is_left_out"]


def is_left_out(item: pytest.Item) -> bool:
    """A peer that takes seconds to start meets each engine in half of its cells; HEADRACE_INTEROP=full: in all."""
    if os.environ.get("HEADRACE_INTEROP") == "full":
        return False
    callspec = getattr(item, "callspec", None)
    if callspec is None or not getattr(callspec.params.get("peer"), "slow", False):
        return False
    values = callspec.params
    odd = sum(repr(values[name]) in ODD for name in ("role", "version", "mutual", "how") if name in values)
    return bool((odd + (values["engine_name"] == "uring")) % 2)


# One value of each parameter: half of the cells have an odd number of these.
ODD = frozenset(map(repr, ("client", "TLSv1.2", True, "bytes")))
