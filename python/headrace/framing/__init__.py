"""Framings without I/O: bytes in, messages out. No socket, no loop, no clock; of headrace, only its errors."""

from __future__ import annotations

__all__: list[str] = []
