"""Charts and pages."""

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from loramerge.scoring.bootstrap import Interval
from virtual_tryon.study.content import Figure, Report, Section, Sheet, Table
from virtual_tryon.study.figures import LETTER, Axis, Series, bars, heat, ticks
from virtual_tryon.study.page import html, markdown

NASTY = "<b> & \"quotes\" | 'pipes'"


def interval(mean: float) -> Interval:
    return Interval(mean, mean - 0.1, mean + 0.1, 8, 40)


class Links(HTMLParser):
    """Everything that a browser would fetch, and every tag that is left open."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def report(tmp_path: Path) -> Report:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "small.png")
    Image.new("RGB", (900, 600), "blue").save(tmp_path / "large.png")
    sheet = Sheet((NASTY, "b"), ((NASTY, (tmp_path / "small.png", tmp_path / "large.png")),), "pictures")
    chart = bars([NASTY], [Series(NASTY, (interval(0.3),), "#123456")], title=NASTY)
    table = Table(("a", NASTY), (("**0.1**", NASTY),), "note")
    return Report(NASTY, (Section(NASTY, ("text", "- item", table, Figure(chart, NASTY), sheet)),))


def test_a_page_fetches_nothing_and_closes_every_tag(report: Report) -> None:
    links = Links()
    links.feed(html(report))

    assert not links.open
    assert links.fetched
    assert all(link.startswith("data:image/png;base64,") for link in links.fetched)
    assert "url(" not in html(report)
    assert "@import" not in html(report)


def test_a_large_picture_is_made_smaller_and_a_small_one_stays(report: Report) -> None:
    page = html(report)

    assert 'class="small"' in page
    assert 'width="20" height="20"' in page
    assert 'width="192" height="128"' in page


def test_markdown_has_the_tables_and_escapes_bars(report: Report) -> None:
    text = markdown(report)

    assert "| **0.1** | <b> & \"quotes\" \\| 'pipes' |" in text
    assert "svg" not in text


def test_charts_are_well_formed_and_bars_are_as_long_as_their_values() -> None:
    chart = bars(["a", "b"], [Series("s", (interval(0.2), interval(0.4)), "#123456")], title=NASTY)

    widths = [float(e.attrib["width"]) for e in ET.fromstring(chart).iter("rect")]

    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)


def test_negative_values_begin_at_zero_too() -> None:
    axis = Axis.of([interval(-0.3), interval(0.5)], 50)
    chart = bars(["a"], [Series("s", (interval(-0.3),), "#1")], title="")

    rect = next(ET.fromstring(chart).iter("rect"))

    assert axis.low == pytest.approx(-0.4)
    assert float(rect.attrib["x"]) + float(rect.attrib["width"]) == pytest.approx(
        Axis(-0.4, 1e-6, 16 + LETTER).x(0), abs=1
    )


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0, 0.7), (-0.13, 0.55), (0, 31), (0, 1e-6)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 8
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_a_grid_shades_from_the_lowest_to_the_highest() -> None:
    grid = heat(["r"], ["a", "b", "c"], [[0.1, 0.2, 0.3]], title="", down="d", across="e")

    fills = [e.attrib["fill"] for e in ET.fromstring(grid).iter("rect")]

    assert fills[0] == "#ecf3fa"
    assert fills[2] == "#084078"
    assert heat(["r"], ["a"], [[0.5]], title="", down="", across="").count("<rect") == 1
