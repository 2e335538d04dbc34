"""A bar chart of ratios as SVG: one group per row, one bar per peer, its interval as a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from bench.judge import estimate
from bench.report import REFERENCE
from bench.rounds import Result

__all__ = ["chart"]

COLORS = (
    "#1b6ca8",
    "#5aa9e6",
    "#2a9d8f",
    "#8ac6a0",
    "#7f7f7f",
    "#b0b0b0",
    "#e9c46a",
    "#f4a261",
    "#e76f51",
    "#b56576",
)
BAR, GAP, LABELS, SCALE_WIDTH, MARGIN = 12, 14, 190, 560, 40
FONT = 'font-family="sans-serif" font-size="11"'


def text(x: float, y: float, content: str, anchor: str = "start", weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {place} {FONT} fill="currentColor">{escape(content)}</text>'


def group(result: Result, colors: dict[str, str], top: float, scale: float) -> Iterator[str]:
    """One row's bars, below its heading."""
    yield text(8, top + BAR, str(result.row), weight="bold")
    y = top + BAR + 6
    for peer in result.peers:
        measured = estimate(result.ratios(peer, REFERENCE))
        if not measured:
            continue
        end = LABELS + measured.median * scale
        middle = y + BAR / 2
        yield text(LABELS - 6, y + BAR - 2, peer, "end")
        yield (
            f'<rect x="{LABELS}" y="{y:.1f}" width="{measured.median * scale:.1f}" height="{BAR - 2}" '
            f'fill="{colors[peer]}"/>'
        )
        yield (
            f'<line x1="{LABELS + measured.low * scale:.1f}" x2="{LABELS + measured.high * scale:.1f}" '
            f'y1="{middle:.1f}" y2="{middle:.1f}" stroke="currentColor"/>'
        )
        yield text(max(end, LABELS + measured.high * scale) + 6, y + BAR - 2, f"{measured.median:.2f}")
        y += BAR


def height(result: Result) -> float:
    return BAR + 6 + BAR * len(result.peers) + GAP


def chart(results: Sequence[Result]) -> str:
    """Cost of uvloop by cost of each peer, per row; empty without rows that uvloop took part in."""
    shown = [result for result in results if REFERENCE in result.peers]
    if not shown:
        return ""
    peers = list(dict.fromkeys(peer for result in shown for peer in result.peers))
    colors = {peer: COLORS[k % len(COLORS)] for k, peer in enumerate(peers)}
    estimates = [estimate(result.ratios(peer, REFERENCE)) for result in shown for peer in result.peers]
    longest = max(each.high for each in estimates if each)
    scale = SCALE_WIDTH / longest
    total = MARGIN + sum(height(result) for result in shown)
    width = LABELS + SCALE_WIDTH + 60
    one = LABELS + scale
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total:.0f}" color="#222">',
        f'<rect width="{width}" height="{total:.0f}" fill="#fff"/>',
        text(8, 18, f"Efficiency, {REFERENCE} = 1 (longer is better; line: 90 % interval of the median)"),
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{MARGIN - 12}" y2="{total:.0f}" stroke="#bbb"/>',
    ]
    top = float(MARGIN)
    for result in shown:
        parts += group(result, colors, top, scale)
        top += height(result)
    return "\n".join([*parts, "</svg>\n"])
