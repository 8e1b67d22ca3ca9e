"""Plots as inline SVG, drawn for a phone's width; colours and fonts come from the page's style sheet (`STYLE`)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 400
"""Units across; text of 12 units is readable where the plot is as wide as a phone."""

COLOURS = 6
"""Hues that stay apart in every common colour blindness; see `STYLE`."""

STYLE = """
:root{--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b85c91;--c4:#c98a00;--c5:#3d9bd6;--c6:#777;
--grid:#e3e5e8;--axis:#6a7078}
@media (prefers-color-scheme:dark){:root{--c0:#4ba3e3;--c1:#f0803c;--c2:#2fc99b;--c3:#e29cc4;--c4:#f2b632;--c5:#8fd0f7;
--c6:#a5a5a5;--grid:#30353c;--axis:#9aa2ac}}
svg{display:block;width:100%;height:auto;max-width:600px;overflow:visible}
svg text{font:12px system-ui,sans-serif;fill:var(--ink);font-variant-numeric:tabular-nums;
paint-order:stroke;stroke:var(--card);stroke-width:3px}
svg .value{font-weight:650}svg .small,svg .tick{font-size:11px;fill:var(--axis)}
svg .grid{stroke:var(--grid)}svg .zero{stroke:var(--axis)}
svg .limit{stroke:var(--ink);stroke-width:2}svg .halo{stroke:var(--card);stroke-width:5}
svg .whisker{stroke:var(--ink);stroke-width:1.3;opacity:.75;fill:none}
svg .line{fill:none;stroke-width:2.2}svg .second{stroke-dasharray:5 3}svg .third{stroke-dasharray:2 3}
""" + "".join(
    f".f{i}{{fill:var(--c{i})}}.s{i}{{stroke:var(--c{i})}}svg text.f{i}{{fill:var(--c{i})}}" for i in range(COLOURS + 1)
)
"""Okabe and Ito's palette (Color Universal Design), darkened where it is too faint on white and lightened for dark pages."""

_OPACITY = (1.0, 0.6, 0.35)
_DASH = ("", " second", " third")
_ROW, _HEAD, _BAR = 42, 18, 13
_FOOT = 34


@dataclass(frozen=True)
class Ink:
    """How something that recurs in several plots looks in all of them: a hue for its family, a shade for its member."""

    hue: int
    shade: int = 0

    @property
    def fill(self) -> str:
        """Attributes of a filled shape."""
        return f'class="f{self.hue}" fill-opacity="{_OPACITY[self.shade]}"'

    @property
    def dash(self) -> str:
        """The class that sets a line apart from its family's others."""
        return _DASH[self.shade]


def inks(names: Iterable[str]) -> dict[str, Ink]:
    """An ink for each name: its first word is the family. Families after the sixth share a grey."""
    families: dict[str, list[str]] = {}
    for name in names:
        members = families.setdefault((name.split() or [""])[0], [])
        if name not in members:
            members.append(name)
    return {
        name: Ink(min(hue, COLOURS), min(shade, len(_OPACITY) - 1))
        for hue, members in enumerate(families.values())
        for shade, name in enumerate(members)
    }


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart; all numbers in the chart's unit, from 0."""

    name: str
    ink: Ink
    value: float
    label: str
    """The value in words."""
    detail: str = ""
    """What else stands beside it."""
    middle: float | None = None
    """A tick on the whisker."""
    high: float | None = None
    """The whisker's end."""
    limit: float | None = None
    """A mark across the bar."""


def bars(rows: Sequence[Bar], unit: str) -> str:
    """Horizontal bars from 0, one above the other, each under its name and value.

    The axis ends at twice the longest bar; a whisker that goes on is drawn with an arrow.
    """
    longest = max(max(row.value, row.limit or 0.0) for row in rows)
    reach = max([longest, *(row.high for row in rows if row.high is not None)])
    ticks = zero_based_ticks(min(reach, 2 * longest))
    top, bottom = ticks[-1], _ROW * len(rows)

    def x(value: float) -> float:
        return round(1 + (WIDTH - 8) * value / top, 1)

    parts = _grid([(x(tick), f"{tick:g}") for tick in ticks], bottom, unit)
    for i, row in enumerate(rows):
        y = i * _ROW + _HEAD
        parts.append(f"<g><title>{escape(' '.join((row.name + ':', row.label, row.detail)))}</title>")
        parts.append(_heading(row.name, row.label, row.detail, y - 5))
        parts.append(f'<rect x="1" y="{y}" width="{max(0.5, x(row.value) - 1):.1f}" height="{_BAR}" rx="2" {row.ink.fill}/>')
        if row.high is not None:
            parts.append(_whisker(x(row.value), None if row.middle is None else x(row.middle), x(row.high), x(top), y))
        if row.limit is not None:
            ends = f'x1="{x(row.limit)}" x2="{x(row.limit)}" y1="{y - 2}" y2="{y + _BAR + 2}"'
            parts.append(f'<line class="halo" {ends}/><line class="limit" {ends}/>')
        parts.append("</g>")
    return _svg(parts, bottom + _FOOT, f"bars in {unit}: " + ", ".join(f"{row.name} {row.label}" for row in rows))


def _whisker(start: float, middle: float | None, end: float, edge: float, y: float) -> str:
    centre, low, high = y + _BAR / 2, y + 3, y + _BAR - 3
    path = f"M{start} {centre}H{min(end, edge)}"
    if middle is not None and middle <= edge:
        path += f"M{middle} {low}V{high}"
    path += f"M{edge - 4} {low}L{edge} {centre}L{edge - 4} {high}" if end > edge else f"M{end} {low}V{high}"
    return f'<path class="whisker" d="{path}"/>'


@dataclass(frozen=True)
class Line:
    """A series of a line chart: for each x its value, with the least and the greatest that it was made of."""

    name: str
    ink: Ink
    points: dict[float, tuple[float, float, float]]
    """By x: (least, value, greatest)."""


def lines(series: Sequence[Line], x_title: str, unit: str) -> str:
    """Lines from 0 over evenly spaced x, named at their right ends; a bar through a point spans what it was made of."""
    places = sorted({x for line in series for x in line.points})
    ticks = zero_based_ticks(max(high for line in series for _, _, high in line.points.values()))
    left, right = 34, WIDTH - 12 - 6.2 * max(len(_short(line.name)) for line in series)
    top, bottom = 20.0, max(210.0, 20 + 15.0 * len(series))

    def x(value: float) -> float:
        return round(
            left + 10 + (right - left - 20) * (places.index(value) + 0.5 * (len(places) == 1)) / max(1, len(places) - 1), 1
        )

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * value / ticks[-1], 1)

    parts = [f'<text class="small" x="0" y="8">{escape(unit)}</text>']
    for tick in ticks:
        parts.append(f'<line class="{"grid" if tick else "zero"}" x1="{left}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text class="tick" x="{left - 5}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for place in places:
        parts.append(f'<text class="tick" x="{x(place)}" y="{bottom + 15}" text-anchor="middle">{place:g}</text>')
    parts.append(
        f'<text class="small" x="{(left + right) / 2}" y="{bottom + 31}" text-anchor="middle">{escape(x_title)}</text>'
    )
    ends = [(y(line.points[max(line.points)][1]), line) for line in series]
    names = dict(
        zip([id(line) for _, line in sorted(ends, key=_height)], _apart([at for at, _ in ends], 14, bottom), strict=True)
    )
    for end, line in ends:
        stroke = f"s{line.ink.hue}"
        drawn = " ".join(f"{x(place)},{y(value)}" for place, (_, value, _) in sorted(line.points.items()))
        parts.append(f'<g><title>{escape(line.name)}</title><polyline class="line {stroke}{line.ink.dash}" points="{drawn}"/>')
        for place, (low, value, high) in line.points.items():
            parts.append(f'<line class="{stroke}" x1="{x(place)}" x2="{x(place)}" y1="{y(low)}" y2="{y(high)}"/>')
            parts.append(
                f'<circle class="f{line.ink.hue}" cx="{x(place)}" cy="{y(value)}" r="3.2"><title>{value:.4g}</title></circle>'
            )
        last, at = x(max(line.points)), names[id(line)]
        if abs(at - end) > 5 or last < x(places[-1]):
            parts.append(f'<path class="grid" fill="none" d="M{last + 4} {end}L{right} {at}"/>')
        parts.append(f'<text class="f{line.ink.hue}" x="{right + 3}" y="{at + 4}">{escape(_short(line.name))}</text></g>')
    return _svg(parts, bottom + 36, f"lines: {unit} by {x_title}: " + ", ".join(line.name for line in series))


def _height(end: tuple[float, Line]) -> float:
    return end[0]


@dataclass(frozen=True)
class Spread:
    """A row of ratios: their median, and each of them with the ink of the side that it favours."""

    name: str
    label: str
    detail: str
    median: float
    values: list[tuple[float, Ink]]


def spreads(rows: Sequence[Spread], axis: str) -> str:
    """Ratios as dots on a logarithmic axis with 1 marked, a stroke through each row's median."""
    every = [1.0, *(value for row in rows for value, _ in row.values)]
    low, high = min(every) / 1.06, max(every) * 1.06
    scale = (WIDTH - 28) / math.log(high / low)
    bottom = _ROW * len(rows)

    def x(value: float) -> float:
        return round(14 + scale * math.log(value / low), 1)

    parts = _grid([(x(tick), f"{tick:g}") for tick in ratio_ticks(low, high)], bottom, axis, zero=False)
    parts.append(f'<line class="zero" x1="{x(1)}" x2="{x(1)}" y1="0" y2="{bottom}"/>')
    for i, row in enumerate(rows):
        y = i * _ROW + _HEAD + 7
        parts.append(f"<g><title>{escape(' '.join((row.name + ':', row.label, row.detail)))}</title>")
        parts.append(_heading(row.name, row.label, row.detail, i * _ROW + _HEAD - 5))
        parts += [f'<circle {ink.fill} stroke="var(--card)" cx="{x(value)}" cy="{y}" r="4.5"/>' for value, ink in row.values]
        parts.append(f'<line class="limit" x1="{x(row.median)}" x2="{x(row.median)}" y1="{y - 7}" y2="{y + 7}"/></g>')
    return _svg(parts, bottom + _FOOT, f"{axis}: " + ", ".join(f"{row.name} {row.label}" for row in rows))


def zero_based_ticks(reach: float) -> list[float]:
    """From 0 in steps of 1, 2 or 5 times a power of ten, at most six, the last at `reach` or above it."""
    if not reach > 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(reach / 5))
    step = next(size for size in (power, 2 * power, 5 * power, 10 * power) if math.ceil(round(reach / size, 9)) <= 5)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(round(reach / step, 9)) + 1)]


def ratio_ticks(low: float, high: float) -> list[float]:
    """Round ratios within [low, high], 1 among them; at most seven."""
    fine = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.7, 2)
    coarse = (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 8)
    for candidates in (fine, coarse):
        if candidates[0] <= low and high <= candidates[-1]:
            inside = [tick for tick in candidates if low <= tick <= high]
            if len(inside) <= 7:
                return inside
    reach = max(-math.log2(low), math.log2(high))
    step = math.ceil(reach / 3)
    return [2.0**i for i in range(-3 * step, 3 * step + 1, step) if low <= 2.0**i <= high]


def _grid(ticks: list[tuple[float, str]], bottom: float, title: str, zero: bool = True) -> list[str]:
    parts = []
    for i, (x, words) in enumerate(ticks):
        kind, anchor = ("zero", "start") if zero and i == 0 else ("grid", "end" if zero and i == len(ticks) - 1 else "middle")
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 14}" text-anchor="{anchor}">{words}</text>')
    parts.append(f'<text class="small" x="{WIDTH / 2}" y="{bottom + 29}" text-anchor="middle">{escape(title)}</text>')
    return parts


def _heading(name: str, label: str, detail: str, y: float) -> str:
    """A row's name at the left, its value and the detail at the right."""
    beside = f'<tspan class="small"> {escape(detail)}</tspan>' if detail else ""
    return (
        f'<text x="5" y="{y}">{escape(_short(name))}</text>'
        f'<text x="{WIDTH - 6}" y="{y}" text-anchor="end"><tspan class="value">{escape(label)}</tspan>{beside}</text>'
    )


def _apart(places: list[float], gap: float, most: float) -> list[float]:
    """The places in order, moved so that each is at least `gap` after the one before it and none is beyond `most`."""
    moved: list[float] = []
    for place in sorted(places):
        moved.append(max(place, moved[-1] + gap) if moved else place)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], most - gap * (len(moved) - 1 - i))
    return moved


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _svg(parts: Iterable[str], height: float, words: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(words)}" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(parts)}</svg>"
    )
