"""Charts as SVG text: lines, a heat-map, a strip along a film. No dependency, no script.

In: numbers and labels. Out: one `<svg>` element. Colours are classes, and `STYLE` gives them for light and
dark; a chart that leaves the page takes it along (`standalone`).
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

Number = float | int | None

SERIES_LIGHT = ("#2a6f97", "#c8553d", "#4f8a4c", "#8a63ad", "#a67c00", "#59607a")
SERIES_DARK = ("#74b9e0", "#f0906f", "#92c98d", "#bf9fe0", "#dfb94f", "#aab0cc")
HEAT_LIGHT, HEAT_DARK = ("#eef3f6", "#12506f"), ("#22303c", "#8fd3f4")
LEVELS = 10  # steps of the heat-map's scale
CHAR_PX = 6.3  # mean width of a character of the 12 px label font
MAX_POINTS = 400  # points drawn of a line; more only fatten it


@dataclasses.dataclass(frozen=True)
class Series:
    """One line. Points whose value is None or not finite break it."""

    label: str
    x: Sequence[float]
    y: Sequence[Number]
    faint: bool = False  # a thin background line: raw values behind their running mean
    colour: int | None = None  # index into the palette; its own place in the list unless given

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.label!r} has {len(self.x)} x and {len(self.y)} y; give as many of each")


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    log_y: bool = False,
    log_x: bool = False,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    width: int = 460,
    height: int = 280,
) -> str:
    """Lines over a common x, with a legend above and `marks` as vertical lines with a word.

    Raises:
      ValueError: nothing finite to draw, or values at or below zero on a logarithmic axis.
    """
    points = [(x, y) for s in series for x, y in _finite(s)]
    if not points:
        raise ValueError(f"chart {title!r} has no finite value to draw")
    x_axis = _Axis.over([x for x, _ in points] + [x for x, _ in marks], log=log_x, chart=title)
    y_axis = _Axis.over(list(y_range or [y for _, y in points]), log=log_y, pad=y_range is None, chart=title)
    shown = [(s, i if s.colour is None else s.colour) for i, s in enumerate(series)]
    legend = _legend([(s.label, c) for s, c in shown if not s.faint], width - 16)
    top, left, bottom, right = 12 + legend.height + 14 * bool(marks), 56, height - 44, width - 22

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x_axis.place(x) * (right - left), bottom - y_axis.place(min(max(y, y_axis.low), y_axis.high)) * (
            bottom - top
        )

    parts = [legend.svg]
    for tick in y_axis.ticks(5):
        y = at(x_axis.low, tick)[1]
        parts.append(_line(left, y, right, y, "grid") + _text(left - 7, y + 4, _number(tick, percent), "end"))
    places = sorted({x for x, _ in points})
    for tick in places if log_x and len(places) <= 8 else x_axis.ticks(6):
        x = at(tick, y_axis.low)[0]
        parts.append(_line(x, bottom, x, bottom + 4, "axis") + _text(x, bottom + 17, _number(tick), "middle"))
    parts.append(_line(left, bottom, right, bottom, "axis"))
    for x, word in marks:
        place = at(x, y_axis.low)[0]
        anchor = "end" if place > (left + right) / 2 else "start"
        parts.append(_line(place, top - 4, place, bottom, "mark"))
        parts.append(_text(place + (-4 if anchor == "end" else 4), top - 4, word, anchor, "word"))
    for s, colour in sorted(shown, key=lambda pair: not pair[0].faint):
        kind = f"line s{colour % len(SERIES_LIGHT)}" + (" faint" if s.faint else "")
        for run in _runs(s):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in _thin(run)))
            parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if len(s.x) <= 12 and not s.faint:
            for px, py in (at(*p) for p in _finite(s)):
                parts.append(f'<circle class="dot s{colour % len(SERIES_LIGHT)}" cx="{px:.1f}" cy="{py:.1f}" r="3.2"/>')
    parts.append(_text((left + right) / 2, height - 8, x_label, "middle", "label"))
    middle = (top + bottom) / 2
    parts.append(f'<g transform="rotate(-90 13 {middle:.0f})">{_text(13, middle, y_label, "middle", "label")}</g>')
    return _svg(width, height, title, parts)


def heatmap(
    values: Sequence[Sequence[Number]],
    *,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    x_label: str = "",
    y_label: str = "",
    low: float = 0.0,
    high: float = 1.0,
    percent: bool = True,
) -> str:
    """A table of numbers, each printed in a cell coloured by it between `low` and `high`; None is left blank.

    Raises:
      ValueError: the values do not fit the labels.
    """
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        shape = f"{len(values)} x {sorted({len(row) for row in values})}"
        raise ValueError(
            f"heat-map {title!r} has {shape} values for {len(rows)} rows and {len(columns)} columns of labels"
        )
    cell_w = max(56.0, min(92.0, 480 / max(1, len(columns))), max((len(c) for c in columns), default=0) * CHAR_PX + 8)
    cell_h = 34.0
    left = 30 + max((len(r) for r in rows), default=0) * CHAR_PX
    width, top = left + cell_w * len(columns) + 8, 10.0
    bottom = top + cell_h * len(rows)
    parts: list[str] = []
    for i, row in enumerate(values):
        y = top + i * cell_h
        parts.append(_text(left - 8, y + cell_h / 2 + 4, rows[i], "end"))
        for j, value in enumerate(row):
            x = left + j * cell_w
            known = value is not None and math.isfinite(value)
            level = _level(value, low, high) if value is not None and known else None
            kind = "unknown" if level is None else f"h{level}"
            shown = _number(value, percent) if value is not None and known else "–"
            hover = html.escape(f"{rows[i]}, {columns[j]}: {shown}")
            box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell_w - 2:.1f}" height="{cell_h - 2:.1f}" rx="3"'
            parts.append(f'<rect class="{kind}" {box}><title>{hover}</title></rect>')
            ink = "" if level is None else f"t{level}"
            parts.append(_text(x + cell_w / 2, y + cell_h / 2 + 4, shown, "middle", f"value {ink}"))
    for j, name in enumerate(columns):
        parts.append(_text(left + (j + 0.5) * cell_w, bottom + 16, name, "middle"))
    parts.append(_text(left + cell_w * len(columns) / 2, bottom + 35, x_label, "middle", "label"))
    middle = (top + bottom) / 2
    parts.append(f'<g transform="rotate(-90 11 {middle:.0f})">{_text(11, middle, y_label, "middle", "label")}</g>')
    parts.extend(_scale(left, bottom + 46, _number(low, percent), _number(high, percent)))
    return _svg(math.ceil(width), math.ceil(bottom + 66), title, parts)


def strip(
    rows: Sequence[tuple[str, Sequence[float]]],
    *,
    title: str,
    seconds: float,
    marks: Sequence[tuple[float, str]] = (),
    width: int = 560,
) -> str:
    """Rows of shares (0 to 1) along a film of `seconds`: how much of each clip is kept, one row per place.

    Raises:
      ValueError: a film of no length, or a row without values.
    """
    if seconds <= 0 or any(not len(values) for _, values in rows):
        raise ValueError(
            f"strip {title!r} needs a film longer than 0 s and at least one value per row; got {seconds} s"
        )
    left = 12 + max((len(label) for label, _ in rows), default=0) * CHAR_PX
    right, top, tall = width - 20.0, 12.0 + 18 * bool(marks), 26.0
    bottom = top + tall * len(rows)
    parts: list[str] = []
    for i, (label, values) in enumerate(rows):
        y = top + i * tall
        parts.append(_text(left - 8, y + tall / 2 + 4, label, "end"))
        parts.append(
            f'<rect class="blank" x="{left:.1f}" y="{y + 2:.1f}" width="{right - left:.1f}" height="{tall - 5:.1f}"/>'
        )
        step = (right - left) / len(values)
        for begin, end, share in _equal_runs(values):
            if share <= 0:
                continue
            x, wide = left + begin * step, max((end - begin) * step, 0.4)
            share = min(share, 1.0)
            box = f'x="{x:.2f}" y="{y + 2:.1f}" width="{wide:.2f}" height="{tall - 5:.1f}"'
            parts.append(f'<rect class="kept" {box} fill-opacity="{0.12 + 0.88 * share:.2f}"/>')
    for at, word in marks:
        x = left + (right - left) * min(max(at / seconds, 0), 1)
        anchor = "end" if x > (left + right) / 2 else "start"
        parts.append(_line(x, top - 8, x, bottom + 2, "mark"))
        parts.append(_text(x + (-5 if anchor == "end" else 5), top - 3, word, anchor, "word"))
    for tick in _Axis(0.0, seconds, log=False).ticks(6, base=60):
        x = left + (right - left) * tick / seconds
        parts.append(_line(x, bottom, x, bottom + 4, "axis") + _text(x, bottom + 18, clock(tick), "middle"))
    return _svg(width, math.ceil(bottom + 26), title, parts)


def clock(seconds: float) -> str:
    """Seconds as a player shows them.

    Example:
      >>> clock(167), clock(3725)
      ('2:47', '1:02:05')
    """
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def standalone(svg: str) -> str:
    """The chart as a file of its own, with its colours."""
    head, rest = svg.split(">", 1)
    return f"{head}><style>{STYLE}</style>{rest}\n"


@dataclasses.dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], *, log: bool, chart: str, pad: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if log and low <= 0:
            raise ValueError(f"chart {chart!r} has the value {low} on a logarithmic axis; values there must be above 0")
        if log:
            return cls(low / 1.15, high * 1.15, log) if pad or low == high else cls(low, high, log)
        if low == high:
            low, high = low - 0.5, high + 0.5
        if pad:
            margin = 0.04 * (high - low)
            low, high = (0.0 if 0 <= low < 0.25 * high else low - margin), high + margin
        return cls(low, high, log)

    def place(self, value: float) -> float:
        """Where a value lies between 0 and 1."""
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return (value - low) / (high - low)

    def ticks(self, about: int, base: int = 10) -> list[float]:
        """Round values inside the axis, about as many as asked. Times are round in base 60."""
        if self.log:
            return self._log_ticks(about)
        rough = (self.high - self.low) / about
        unit = float(base) ** math.floor(math.log(rough, base) + 1e-9)
        unit = max(unit, 1.0) if base == 60 else unit  # a clock shows whole seconds
        steps = (1, 2, 5, 10) if base == 10 else (1, 2, 5, 10, 15, 20, 30, 60)
        step = next(s * unit for s in steps if s * unit >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, about: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            found = [f * 10.0**d for d in decades for f in factors]
            found = [t for t in found if self.low <= t <= self.high]
            if len(found) >= min(about - 2, 3):
                return found[:: math.ceil(len(found) / (about + 1))]
        return [self.low, self.high]


@dataclasses.dataclass(frozen=True)
class _Legend:
    svg: str
    height: int


def _legend(entries: Sequence[tuple[str, int]], width: float) -> _Legend:
    x, row, parts = 0.0, 0, []
    for label, colour in entries:
        wide = 24 + len(label) * CHAR_PX + 14
        if x and x + wide > width:
            x, row = 0.0, row + 1
        y = 16 + 18 * row
        parts.append(_line(10 + x, y - 4, 26 + x, y - 4, f"line s{colour % len(SERIES_LIGHT)}"))
        parts.append(_text(31 + x, y, label, "start"))
        x += wide
    return _Legend("".join(parts), 18 * (row + 1) if entries else 0)


def _scale(x: float, y: float, low: str, high: str) -> Iterable[str]:
    yield _text(x, y + 10, low, "start")
    begin = x + len(low) * CHAR_PX + 8
    for level in range(LEVELS + 1):
        yield f'<rect class="h{level}" x="{begin + level * 11:.1f}" y="{y:.1f}" width="11" height="11"/>'
    yield _text(begin + (LEVELS + 1) * 11 + 6, y + 10, high, "start")


def _finite(series: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None and math.isfinite(y)]


def _runs(series: Series) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if y is not None and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS points: the lowest and the highest of each bucket, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = [points[0]]
    for i in range(0, len(points), size):
        bucket = points[i : i + size]
        kept.extend(sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}))
    return [*kept, points[-1]]


def _equal_runs(values: Sequence[float]) -> Iterable[tuple[int, int, float]]:
    begin = 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[begin]:
            yield begin, i, values[begin]
            begin = i


def _level(value: float, low: float, high: float) -> int:
    return round(LEVELS * min(max((value - low) / (high - low), 0), 1)) if high > low else LEVELS


def _number(value: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.3g}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind.strip()}"' if kind.strip() else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>' if text else ""


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    name = html.escape(title)
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    head = f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{name}">'
    return f"{head}<title>{name}</title>{''.join(parts)}</svg>"


def _mix(ends: tuple[str, str], level: int) -> str:
    low, high = ([int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in ends)
    return "#" + "".join(f"{round(a + (b - a) * level / LEVELS):02x}" for a, b in zip(low, high, strict=True))


def _palette(
    series: Sequence[str], heat: tuple[str, str], ink: str, bright: str, quiet: str, rule: str, blank: str
) -> str:
    colours = [f".chart .s{i}{{stroke:{c}}}.chart .dot.s{i}{{fill:{c}}}" for i, c in enumerate(series)]
    for level in range(LEVELS + 1):
        colours.append(f".chart .h{level}{{fill:{_mix(heat, level)}}}")
        colours.append(f".chart .t{level}{{fill:{bright if level > 0.55 * LEVELS else ink}}}")
    colours.append(
        f".chart text{{fill:{quiet}}}.chart .label,.chart .word{{fill:{ink}}}.chart .grid{{stroke:{rule}}}"
        f".chart .axis{{stroke:{quiet}}}.chart .mark{{stroke:{series[1]}}}.chart .kept{{fill:{series[0]}}}"
        f".chart .blank{{fill:{blank}}}.chart .unknown{{fill:none;stroke:{rule};stroke-dasharray:3 3}}"
    )
    return "".join(colours)


STYLE = (
    '.chart{max-width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}'
    ".chart text{font-variant-numeric:tabular-nums}"
    ".chart .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}"
    ".chart .faint{stroke-width:1;stroke-opacity:.3}.chart .dot{stroke:none}"
    ".chart .mark{stroke-width:1.5;stroke-dasharray:3 3}"
    + _palette(SERIES_LIGHT, HEAT_LIGHT, "#1d2733", "#ffffff", "#5c6773", "#e4e7ea", "#eceff1")
    + "@media(prefers-color-scheme:dark){"
    + _palette(SERIES_DARK, HEAT_DARK, "#e8ecf0", "#0f1820", "#9aa5b1", "#2b3641", "#26303a")
    + "}"
)
