"""Drawings are XML, say the numbers that they show where they belong, and escape what they are told."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from data_mixing import drawing
from data_mixing.drawing import Curve

NS = "{http://www.w3.org/2000/svg}"
EVIL = "a<b>&\"c'"


def parsed(svg):
    return ET.fromstring(svg)


def texts(root):
    return [t.text or "" for t in root.iter(f"{NS}text")]


def of_class(root, name):
    return [e for e in root.iter() if name in (e.get("class") or "").split()]


def bar_widths(root, name):
    """Of bars proper: the squares of the legend are 10 wide and have no tooltip."""
    groups = [g for g in root.iter(f"{NS}g") if g.find(f"{NS}title") is not None]
    return [float(e.get("width")) for g in groups for e in of_class(g, name)]


def test_bars_are_as_long_as_their_values():
    series = {"one": {"x": 0.5, "y": 0.25}, "two": {"x": 0.0, "y": 0.125}}
    root = parsed(drawing.bars("shares", series, {"one": {"x": 0.25, "y": 0.25}}))
    full, (hollow,) = bar_widths(root, "full"), bar_widths(root, "hollow")
    np.testing.assert_allclose(full, hollow * np.array([2, 0, 1, 0.5]), atol=0.1)
    assert {"x", "y", "one", "two", "25.0% → 50.0%", "25.0%", "0.0%", "12.5%"} <= set(texts(root))


def test_points_lie_on_one_scale_and_intervals_without_end_are_cut_at_the_edge():
    series = {"m": {"x": (1.0, 0.5, 1.5), "y": (-1.0, -np.inf, np.inf), "z": (np.nan, 0, 0)}}
    root = parsed(drawing.points("t", series))
    at = {c.get("cy"): float(c.get("cx")) for c in root.iter(f"{NS}circle")}
    (zero,) = (float(re.match(r"M([\d.]+)", e.get("d"))[1]) for e in of_class(root, "zero"))
    assert len(at) == 2
    assert np.mean(list(at.values())) == pytest.approx(zero, abs=0.1)
    ends = [
        re.match(r"M([\d.]+) \S+H([\d.]+)", e.get("d")).groups() for e in of_class(root, "line")
    ]
    (a, b), (c, d) = ((float(p), float(q)) for p, q in ends)
    assert c < a < b < d <= drawing.WIDTH
    assert "1 (0.5 to 1.5)" in texts(root) and "-1" in texts(root)


def test_a_histogram_says_the_share_above_0_and_its_areas_are_those_of_the_values():
    rng = np.random.default_rng(0)
    samples = {"round 1": rng.normal(0.3, 1, 4000), "round 2": rng.normal(-1, 0.5, 1000)}
    root = parsed(drawing.histograms("Fig. 8", samples))
    for name, values in samples.items():
        assert f"{name}: {np.mean(values > 0):.1%} above 0" in texts(root)
    areas = []
    for path in of_class(root, "band"):
        x, area = float(re.match(r"M([\d.]+)", path.get("d"))[1]), 0.0
        base = float(re.match(r"M\S+ ([\d.]+)", path.get("d"))[1])
        for y, end in re.findall(r"V([\d.]+)H([\d.]+)", path.get("d")):
            area += (base - float(y)) * (float(end) - x)
            x = float(end)
        areas.append(area)
    assert areas[0] == pytest.approx(areas[1], rel=0.02)  # each has about all of its values drawn
    assert any("lie beyond" in t for t in texts(root))


def test_equal_values_make_a_histogram_as_well():
    assert "c: 0.0% above 0" in texts(parsed(drawing.histograms("t", {"c": np.zeros(5)})))


def test_lines_go_through_their_points_and_bands_around_them():
    x = np.array([0.0, 1.0, 2.0, 3.0])
    y = np.array([3.0, 2.0, np.nan, 1.0])
    root = parsed(drawing.lines("t", {"loss": Curve(x, y, y - 0.5, y + 0.5)}, "steps", "NLL"))
    (line,), (band,) = of_class(root, "line"), of_class(root, "band")
    xy = np.array(re.findall(r"([\d.]+) ([\d.]+)", line.get("d")), float)
    assert len(xy) == 3 and len(re.findall(r"[\d.]+ [\d.]+", band.get("d"))) == 6
    assert (xy[1:, 0] - xy[0, 0]) / (xy[-1, 0] - xy[0, 0]) == pytest.approx([1 / 3, 1], abs=1e-3)
    assert (xy[:, 1] - xy[0, 1]) / (xy[-1, 1] - xy[0, 1]) == pytest.approx([0, 0.5, 1], abs=1e-2)
    assert {"loss: 1", "NLL; over steps"} <= set(texts(root))


def test_every_text_is_escaped():
    drawn = [
        drawing.bars(EVIL, {EVIL: {EVIL: 0.5}}, note=EVIL),
        drawing.points(EVIL, {EVIL: {EVIL: (1.0, 0.0, 2.0)}}, note=EVIL),
        drawing.histograms(EVIL, {EVIL: np.array([1.0, 2.0])}, note=EVIL),
        drawing.lines(EVIL, {EVIL: Curve(np.arange(2.0), np.arange(2.0))}, EVIL, EVIL),
    ]
    for svg in drawn:
        assert any(EVIL in text for text in texts(parsed(svg)))
        assert "prefers-color-scheme: dark" in svg
    html = drawing.page(EVIL, [*drawn, drawing.preformatted(EVIL)])
    assert EVIL not in html and html.count("<svg") == 4


def test_series_have_colours_of_their_own():
    root = parsed(drawing.bars("t", {n: {"x": 0.1} for n in "abc"}))
    assert all(len(of_class(root, f"c{i}")) == 2 for i in (1, 2, 3))  # legend and bar
