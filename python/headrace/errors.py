"""The errors that headrace raises: one small hierarchy.

What the operating system says about a connection or a file stays what Python users know: ``OSError`` and its
subclasses. What asyncio's contract demands (``RuntimeError`` for a closed loop, ``ValueError`` and ``TypeError``
for bad arguments) stays that as well.
"""

from __future__ import annotations

__all__ = ["EngineError", "EngineUnavailable", "HeadraceError", "StalledError"]


class HeadraceError(Exception):
    """The base of every error of headrace's own."""


class EngineError(HeadraceError, RuntimeError):
    """An engine was used in a way, a process or a thread it can't be used in."""


class EngineUnavailable(EngineError):  # noqa: N818  # a state of the machine, not a mistake
    """An engine that was asked for by name can't start here; the text says why and what to change."""


class StalledError(HeadraceError, ConnectionError):
    """A connection was given up because its peer accepted no byte for too long while data was queued."""
