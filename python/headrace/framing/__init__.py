"""Framings without I/O: bytes in, messages out. No socket, no loop, no clock; nothing of headrace is imported."""

from __future__ import annotations

__all__: list[str] = []
