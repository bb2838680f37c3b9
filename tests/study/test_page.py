"""Charts and pages."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape
from PIL import Image

from loramerge.scoring.bootstrap import Interval
from virtual_tryon.study.content import Figure, Report, Section, Sheet, Table
from virtual_tryon.study.figures import COLOURS, Series, bars, heat
from virtual_tryon.study.page import html, markdown

SVG = "{http://www.w3.org/2000/svg}"
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
    chart = bars([NASTY], [Series(NASTY, (interval(0.3),), "#123456")])
    table = Table(("a", NASTY), (("**0.1**", NASTY),), "note")
    return Report(NASTY, (Section(NASTY, ("text", "- item", table, Figure(chart, NASTY, NASTY), sheet)),))


def test_a_page_fetches_nothing_and_closes_every_tag(report: Report) -> None:
    links = Links()
    links.feed(html(report))

    assert not links.open
    assert links.fetched
    assert all(link.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for link in links.fetched)
    assert "url(" not in html(report)
    assert "@import" not in html(report)


def test_a_large_picture_is_made_smaller_and_a_small_one_stays(report: Report) -> None:
    page = html(report)

    assert 'class="small"' in page
    assert 'width="20" height="20"' in page
    assert 'width="192" height="128"' in page


def test_markdown_has_a_charts_figures_in_its_place() -> None:
    table = Table(("weight", "score"), (("0.5", "0.371"),))
    charts = Figure("<svg/>", "title", "caption", table), Figure("<svg/>", "title", "caption")

    text = markdown(Report("title", (Section("charts", charts),)))

    assert text == "# title\n\n## charts\n\n| weight | score |\n| --- | --- |\n| 0.5 | 0.371 |\n"


def test_markdown_has_the_tables_and_escapes_bars(report: Report) -> None:
    text = markdown(report)

    assert "| **0.1** | &lt;b> &amp; \"quotes\" \\| 'pipes' |" in text
    assert "svg" not in text


def test_what_is_shown_is_escaped_and_stars_are_bold(report: Report) -> None:
    page = html(report)

    assert NASTY not in page
    assert page.count(f"<h2>{escape(NASTY)}</h2>") == 1
    assert f"<td><strong>0.1</strong></td><td>{escape(NASTY)}</td>" in page
    assert f'alt="{escape(NASTY)}: {escape(NASTY)}"' in page


def filled(chart: str, colour: str) -> list[tuple[float, float]]:
    """Where shapes of a colour begin and end, from left to right."""
    paths = [e for e in ET.fromstring(chart).iter(f"{SVG}path") if colour in e.get("style", "")]
    points = [[float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", e.attrib["d"])] for e in paths]
    return [(min(xs), max(xs)) for xs in points]


def test_bars_begin_at_zero_and_are_as_long_as_their_values() -> None:
    values = (interval(0.2), interval(0.4), interval(-0.3))

    first, second, negative = filled(bars(["a", "b", "c"], [Series("s", values, "#123456")]), "#123456")

    assert first[0] == second[0] == negative[1]
    assert second[1] - second[0] == pytest.approx(2 * (first[1] - first[0]), rel=1e-4)
    assert negative[1] - negative[0] == pytest.approx(1.5 * (first[1] - first[0]), rel=1e-4)


def test_a_chart_shows_its_values_and_labels_as_they_are() -> None:
    series = [Series(label, (interval(0.25), Interval(0.5, None, None, 1, 1)), "#123456") for label in (NASTY, "_$x$")]
    texts = ["".join(e.itertext()) for e in ET.fromstring(bars(["a $b$", "c"], series)).iter(f"{SVG}text")]

    assert {NASTY, "_$x$", "a $b$", "c"} <= set(texts)
    assert texts.count("0.250") == texts.count("0.500") == 2


def test_more_groups_than_colours_begin_with_the_first_again() -> None:
    count = len(COLOURS) + 1
    chart = bars([str(i) for i in range(count)], [Series("s", (interval(0.2),) * count, "")], colours=COLOURS)

    assert len(filled(chart, COLOURS[0])) == 2
    assert len(filled(chart, COLOURS[1])) == 1


def test_the_same_values_draw_the_same_bytes() -> None:
    one, other = (bars(["a"], [Series("s", (interval(0.2),), "#123456")]) for _ in range(2))

    assert one == other
    assert "dc:date" not in one


def test_a_grid_shades_from_the_lowest_to_the_highest() -> None:
    grid = heat(["r"], ["a", "b", "c"], [[0.1, 0.2, 0.3]], down="d", across="e")

    (lightest,), (darkest,) = (filled(grid, colour) for colour in ("#ecf3fa", "#084078"))

    assert lightest[1] < darkest[0]
    assert len(filled(heat(["r"], ["a"], [[0.5]], down="", across=""), "#ecf3fa")) == 1
