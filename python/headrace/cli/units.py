"""Sizes, rates and times as people write and read them."""

from __future__ import annotations

import re

__all__ = ["format_rate", "format_size", "format_time", "parse_rate", "parse_size"]

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_PREFIXES = _DECIMAL | _BINARY
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*((?P<prefix>[kmgt]?i?)b)?", re.IGNORECASE)
_RATE = re.compile(
    r"(?P<number>\d+(\.\d+)?)\s*(?P<prefix>[kmgt]?i?)(?P<unit>bits?|bps|b)(/s|ps)?", re.IGNORECASE
)
_UNLIMITED = {"0", "max", "unpaced", "unlimited"}


def _multiplier(prefix: str | None, text: str) -> int:
    try:
        return _PREFIXES[(prefix or "").lower()]
    except KeyError:
        raise ValueError(f"{text!r} has an unknown unit; write it like 64KiB, 10MB or 1Gbit") from None


def parse_size(text: str) -> int:
    """Bytes: ``"65536"``, ``"64KiB"`` (1,024s), ``"64kB"`` (1,000s). ``ValueError`` tells how."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write it like 65536, 64KiB or 1MB")
    return round(float(match["number"]) * _multiplier(match["prefix"], text))


def parse_rate(text: str) -> float | None:
    """Bytes a second: ``"1Gbit"``, ``"1Gbit/s"``, ``"125MB"`` are 125e6; ``"0"`` and ``"max"`` are ``None``.

    A bare number is refused (``ValueError``): bits and bytes are both usual, and a factor of 8 apart.
    """
    text = text.strip()
    if text.lower() in _UNLIMITED:
        return None
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no rate; write it like 1Gbit, 125MB/s, or max for unpaced")
    unit = match["unit"]
    # "b" alone is a bit and "B" a byte, as everywhere in networking.
    bits = unit.lower() != "b" or unit == "b"
    rate = float(match["number"]) * _multiplier(match["prefix"], text) / (8 if bits else 1)
    if rate <= 0:
        raise ValueError(f"{text!r} is no rate; write max for unpaced")
    return rate


def _scaled(value: float, base: int, units: tuple[str, ...], digits: int = 3) -> str:
    index = 0
    # Compare as it will be shown: 999.9995 is "1.00 k", not "1000".
    while index < len(units) - 1 and float(f"{value:.{digits}g}") >= base:
        value /= base
        index += 1
    shown = f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"
    return f"{shown} {units[index]}"


def format_rate(bytes_per_second: float) -> str:
    """``125e6`` -> ``"1 Gbit/s"``."""
    return _scaled(bytes_per_second * 8, 1000, ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"))


def format_size(size: float) -> str:
    """``65536`` -> ``"64 KiB"``."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"), digits=4)


def format_time(seconds: float) -> str:
    """``0.00125`` -> ``"1.25 ms"``."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return _scaled(seconds * 1e9, 1000, ("ns", "us", "ms", "s"))
