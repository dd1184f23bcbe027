from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from hico_jax.report import charts

SVG = "{http://www.w3.org/2000/svg}"


def parts(svg: str, tag: str, kind: str = "") -> list[ET.Element]:
    return [e for e in ET.fromstring(svg).iter(SVG + tag) if kind in (e.get("class") or "").split() or not kind]


def words(svg: str) -> list[str]:
    return [e.text or "" for e in parts(svg, "text")]


def points(line: ET.Element) -> list[tuple[float, float]]:
    pairs = [p.split(",") for p in (line.get("points") or "").split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_a_line_is_where_its_numbers_are() -> None:
    svg = charts.line_chart([charts.Series("s", [0, 5, 10], [0.0, 1.0, 0.5])], title="t", y_range=(0, 1))
    (x0, y0), (x1, y1), (x2, y2) = points(parts(svg, "polyline")[0])
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 > y2 > y1  # SVG counts downwards
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.2)
    bottom = float(parts(svg, "line", "axis")[-1].get("y1") or "nan")
    assert y0 == pytest.approx(bottom, abs=0.1)


def test_a_logarithmic_axis_spaces_by_ratio_and_names_the_places_given() -> None:
    svg = charts.line_chart([charts.Series("s", [64, 256, 1024], [0.1, 1, 10])], title="t", log_x=True, log_y=True)
    (x0, y0), (x1, y1), (x2, y2) = points(parts(svg, "polyline")[0])
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert {"64", "256", "1,024", "0.1", "1", "10"} <= set(words(svg))


def test_missing_values_break_the_line_and_are_never_drawn() -> None:
    svg = charts.line_chart([charts.Series("s", range(6), [1, 2, None, float("nan"), 3, 4])], title="t")
    assert [len(points(line)) for line in parts(svg, "polyline")] == [2, 2]
    assert "nan" not in svg


def test_thinning_keeps_every_spike() -> None:
    y = [0.0] * 10_000
    y[6_543] = 9.0
    svg = charts.line_chart([charts.Series("s", range(10_000), y)], title="t", y_range=(0, 10))
    drawn = points(parts(svg, "polyline")[0])
    flat = drawn[0][1]
    assert len(drawn) <= charts.MAX_POINTS + 2
    assert sum(place < flat - 100 for _, place in drawn) == 1
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)


def test_a_faint_line_is_behind_and_not_in_the_legend() -> None:
    series = [
        charts.Series("mean", [0, 1], [1, 2], colour=0),
        charts.Series("raw", [0, 1], [2, 1], faint=True, colour=0),
    ]
    svg = charts.line_chart(series, title="t")
    assert ["faint" in (e.get("class") or "") for e in parts(svg, "polyline")] == [True, False]
    assert "raw" not in words(svg)
    assert "mean" in words(svg)


def test_a_constant_and_a_single_point_can_be_drawn() -> None:
    svg = charts.line_chart([charts.Series("s", [3], [0.5])], title="t")
    assert len(parts(svg, "circle", "dot")) == 1
    assert "inf" not in svg


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [([None, None], {}, "'t' has no finite value"), ([0.0, 1.0], {"log_y": True}, "value 0.0 on a logarithmic axis")],
)
def test_a_chart_that_cannot_be_drawn_says_why(y: list[float | None], options: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        charts.line_chart([charts.Series("s", [0, 1], y)], title="t", **options)


def test_a_heat_map_prints_and_colours_every_value() -> None:
    svg = charts.heatmap([[0, 0.5], [1, None]], title="t", rows=["a", "b"], columns=["c", "d"])
    cells = [e for e in parts(svg, "rect") if e.find(SVG + "title") is not None]
    assert [e.get("class") for e in cells] == ["h0", "h5", "h10", "unknown"]
    assert [e.findtext(SVG + "title") for e in cells] == ["a, c: 0%", "a, d: 50%", "b, c: 100%", "b, d: –"]
    assert [e.text for e in parts(svg, "text", "value")] == ["0%", "50%", "100%", "–"]


def test_a_heat_map_clips_to_its_scale() -> None:
    svg = charts.heatmap([[-5.0, 50.0]], title="t", rows=["a"], columns=["c", "d"], low=0, high=20, percent=False)
    cells = [e.get("class") for e in parts(svg, "rect") if e.find(SVG + "title") is not None]
    assert cells == ["h0", "h10"]
    assert {"-5", "50"} <= set(words(svg))


def test_a_heat_map_whose_labels_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 x \[2\] values for 1 rows and 3 columns"):
        charts.heatmap([[1, 2]], title="t", rows=["a"], columns=["c", "d", "e"])


def test_a_strip_covers_what_is_kept_and_marks_the_second() -> None:
    svg = charts.strip([("row", [0, 1, 1, 0.5])], title="t", seconds=100, marks=[(50, "here")])
    back = parts(svg, "rect", "blank")[0]
    left, wide = float(back.get("x") or 0), float(back.get("width") or 0)
    kept = [(float(e.get("x") or 0), float(e.get("width") or 0)) for e in parts(svg, "rect", "kept")]
    assert kept == [
        pytest.approx((left + wide / 4, wide / 2), abs=0.1),
        pytest.approx((left + wide * 0.75, wide / 4), abs=0.1),
    ]
    assert float(parts(svg, "line", "mark")[0].get("x1") or 0) == pytest.approx(left + wide / 2, abs=0.1)
    assert {"0:00", "0:20", "1:40", "here"} <= set(words(svg))


@pytest.mark.parametrize("seconds", [0.5, 3, 59, 61, 600, 1024, 3600, 7200, 40_000])
def test_a_strip_of_any_length_has_a_readable_axis(seconds: float) -> None:
    times = [w for w in words(charts.strip([("r", [1])], title="t", seconds=seconds)) if ":" in w]
    assert min(2, seconds) <= len(times) <= 8
    assert len(set(times)) == len(times)


def test_an_empty_strip_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value per row"):
        charts.strip([("r", [])], title="t", seconds=4)


def test_a_chart_on_its_own_brings_its_colours() -> None:
    svg = charts.standalone(charts.line_chart([charts.Series("s", [0, 1], [1, 2])], title="a > b"))
    style = ET.fromstring(svg).findtext(SVG + "style") or ""
    used = {name for e in ET.fromstring(svg).iter() for name in (e.get("class") or "").split()}
    unstyled = {name for name in used if not re.search(rf"\.{name}[{{,\s.]", style)}
    assert unstyled == set()
    assert "prefers-color-scheme:dark" in style
