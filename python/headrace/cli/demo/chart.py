"""The picture of a run: an SVG of its own, without a plotting library.

Three panels over time (throughput, processor time, latency percentiles) under a row of the run's figures.
Plain SVG 1.1 with every style inline, so it looks the same in a browser, in a README and in an image viewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

from headrace.cli.demo.result import RunResult
from headrace.cli.demo.view import describe
from headrace.cli.units import format_rate, format_time

__all__ = ["draw_chart"]

_WIDTH, _HEIGHT = 960, 756
_LEFT, _RIGHT = 92, 928  # of the panels
_TEXT, _FAINT, _GRID, _CARD = "#0f172a", "#64748b", "#e2e8f0", "#f8fafc"
_BLUE, _ORANGE, _RED, _VIOLET, _GREEN = "#2563eb", "#ea580c", "#dc2626", "#7c3aed", "#059669"
_FONT = "ui-sans-serif, system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"


class _Svg:
    """The few shapes that are needed."""

    def __init__(self, title: str) -> None:
        self.root = ElementTree.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {_WIDTH} {_HEIGHT}",
                "width": str(_WIDTH),
                "height": str(_HEIGHT),
                "role": "img",
                "font-family": _FONT,
            },
        )
        self.shape("title").text = title
        self.shape("rect", width=_WIDTH, height=_HEIGHT, rx=12, fill="#ffffff")

    def shape(self, name: str, **attributes: object) -> ElementTree.Element:
        named = {key.replace("_", "-"): _number(value) for key, value in attributes.items()}
        return ElementTree.SubElement(self.root, name, named)

    def text(
        self, x: float, y: float, text: str, size: float = 12, fill: str = _TEXT, **attributes: object
    ) -> None:
        self.shape("text", x=x, y=y, font_size=size, fill=fill, **attributes).text = text

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, **attributes: object) -> None:
        self.shape("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, **attributes)

    def curve(self, points: Sequence[tuple[float, float]], stroke: str, floor: float | None = None) -> None:
        """A line through the points; with ``floor``, the area down to it is tinted."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        if floor is not None and points:
            area = f"{points[0][0]:.1f},{floor} {path} {points[-1][0]:.1f},{floor}"
            self.shape("polygon", points=area, fill=stroke, fill_opacity="0.12")
        self.shape(
            "polyline", points=path, fill="none", stroke=stroke, stroke_width=2, stroke_linejoin="round"
        )

    def to_text(self) -> str:
        ElementTree.indent(self.root)
        return ElementTree.tostring(self.root, encoding="unicode") + "\n"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _linear_ticks(top: float) -> list[float]:
    """Three to six round numbers from 0 to at least ``top``."""
    top = top or 1.0
    magnitude = 10.0 ** math.floor(math.log10(top))
    step = next(m * magnitude / 10 for m in (2, 2.5, 5, 10, 20) if top / (m * magnitude / 10) <= 5)
    return [step * index for index in range(math.ceil(top / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around the values."""
    first = math.floor(math.log10(max(low, 1e-9)))
    last = max(math.ceil(math.log10(max(high, 1e-9))), first + 1)
    return [10.0**exponent for exponent in range(first, last + 1)]


class _Panel:
    """A plot's frame: axes with ticks, and where a value lies."""

    def __init__(
        self,
        svg: _Svg,
        top: float,
        height: float,
        seconds: float,
        title: str,
        ticks: list[float],
        label: Callable[[float], str],
        *,
        logarithmic: bool = False,
    ) -> None:
        self.svg = svg
        self.top, self.bottom = top, top + height
        self._seconds = seconds
        self._scale: Callable[[float], float] = math.log10 if logarithmic else float
        self._low, self._high = self._scale(ticks[0]), self._scale(ticks[-1])
        self._smallest = ticks[0]
        svg.text(_LEFT - 68, top - 14, title, 13, font_weight=600)
        for tick in ticks:
            y = self.y(tick)
            svg.line(_LEFT, y, _RIGHT, y, _GRID)
            svg.text(_LEFT - 8, y + 4, label(tick), 11, _FAINT, text_anchor="end")
        for tick in _linear_ticks(seconds):
            if tick <= seconds * 1.001:
                svg.text(self.x(tick), self.bottom + 16, f"{tick:g} s", 11, _FAINT, text_anchor="middle")

    def x(self, seconds: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * seconds / self._seconds

    def y(self, value: float) -> float:
        share = (self._scale(max(value, self._smallest)) - self._low) / (self._high - self._low)
        return self.bottom - (self.bottom - self.top) * share

    def plot(
        self, ends: Sequence[float], values: Sequence[float], color: str, *, filled: bool = False
    ) -> None:
        points = [(self.x(end), self.y(value)) for end, value in zip(ends, values, strict=True)]
        if points:  # a figure belongs to the whole interval before it
            points.insert(0, (self.x(0), points[0][1]))
        self.svg.curve(points, color, self.bottom if filled else None)

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        x: float = _RIGHT
        for name, color in reversed(entries):
            x -= 6.6 * len(name)
            self.svg.text(x, self.top - 14, name, 12, _FAINT)
            x -= 22
            self.svg.line(x, self.top - 18, x + 16, self.top - 18, color, stroke_width=3)
            x -= 12


def _figures(svg: _Svg, result: RunResult) -> None:
    """The row of figures at the top."""
    document = result.document
    latency = document["latency_seconds"]
    core = document["server_cpu_percent_of_core"]
    good = not result.problems
    figures = (
        (format_rate(document["throughput_bytes_per_second"]), "throughput", _BLUE),
        (f"{document['connections']:,}", "connections", _TEXT),
        (
            f"{document['errors']:,}" if good else "failed",
            f"errors ({document['errors']:,})" if not good else "errors",
            _GREEN if good else _RED,
        ),
        (f"{core:.1f} %", "server, of one core", _ORANGE),
        (format_time(latency["p50"]), "latency p50", _VIOLET),
        (format_time(latency["p99"]), "latency p99", _VIOLET),
        (format_time(latency["p999"]), "latency p99.9", _VIOLET),
    )
    width = (_RIGHT - 24 - 6 * 8) / len(figures)
    for index, (figure, name, color) in enumerate(figures):
        x = 24 + index * (width + 8)
        svg.shape("rect", x=x, y=76, width=width, height=58, rx=8, fill=_CARD, stroke=_GRID)
        svg.text(x + width / 2, 101, figure, 17, color, text_anchor="middle", font_weight=700)
        svg.text(x + width / 2, 122, name, 11, _FAINT, text_anchor="middle")


def _heading(svg: _Svg, result: RunResult) -> None:
    document, options = result.document, result.options
    machine = document["machine"]
    parts = (
        f"headrace {document['headrace']}",
        f"engine {document['engine']}",
        f"protocol {options.protocol}",
        f"security {options.security}",
        f"Linux {machine['kernel']}",
        f"{machine['processors']} processors",
        f"Python {machine['python']}",
    )
    svg.text(24, 36, describe(options), 15, font_weight=700)
    svg.text(24, 58, ", ".join(parts), 12, _FAINT)


def _draw_throughput(svg: _Svg, result: RunResult, ends: list[float], seconds: float) -> None:
    rates = [interval.throughput for interval in result.recorder.intervals]
    target = result.options.rate
    ticks = _linear_ticks(max([*rates, target or 0.0]) * 8 * 1.05)
    panel = _Panel(svg, 188, 140, seconds, "throughput", ticks, lambda bits: format_rate(bits / 8))
    panel.plot(ends, [rate * 8 for rate in rates], _BLUE, filled=True)
    if target is not None:
        y = panel.y(target * 8)
        svg.line(_LEFT, y, _RIGHT, y, _FAINT, stroke_dasharray="4 4")
        panel.legend((("measured", _BLUE), ("target", _FAINT)))


def _draw_processor(svg: _Svg, result: RunResult, ends: list[float], seconds: float) -> None:
    server = [interval.server_core_percent for interval in result.recorder.intervals]
    load = [interval.load_core_percent for interval in result.recorder.intervals]
    ticks = _linear_ticks(max([*server, *load, 1.0]))
    panel = _Panel(svg, 392, 110, seconds, "processor time, % of one core", ticks, "{:g} %".format)
    panel.plot(ends, load, _FAINT)
    panel.plot(ends, server, _ORANGE, filled=True)
    panel.legend((("server", _ORANGE), ("load", _FAINT)))


def _draw_latency(svg: _Svg, result: RunResult, seconds: float) -> None:
    shown = [interval for interval in result.recorder.intervals if interval.latencies[0] > 0]
    ends = [interval.ends for interval in shown]
    values = [value for interval in shown for value in interval.latencies]
    ticks = _log_ticks(min(values, default=1e-4), max(values, default=1e-3))
    panel = _Panel(svg, 566, 140, seconds, "latency", ticks, format_time, logarithmic=True)
    colors = (("p50", "#a78bfa"), ("p99", _VIOLET), ("p99.9", "#4c1d95"))
    for index, (_, color) in enumerate(colors):
        panel.plot(ends, [interval.latencies[index] for interval in shown], color)
    panel.legend(colors)


def draw_chart(result: RunResult) -> str:
    """The run as an SVG document."""
    ends = [interval.ends for interval in result.recorder.intervals]
    seconds = max([*ends, result.options.seconds])
    svg = _Svg(describe(result.options))
    _heading(svg, result)
    _figures(svg, result)
    _draw_throughput(svg, result, ends, seconds)
    _draw_processor(svg, result, ends, seconds)
    _draw_latency(svg, result, seconds)
    return svg.to_text()
