"""A report as one page of HTML that fetches nothing from the network, and as Markdown; its lines as CSV."""

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from loramerge.files import visible
from loramerge.scoring import read

from .content import Figure, Report, Sheet, Table

SIDE = 192
"""Pixels of the longer side of a picture in the page, at most."""


def html(report: Report) -> str:
    """Render the page from ``page.html.jinja``."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    pages.globals |= {"zip": zip, "Table": Table, "Figure": Figure, "Sheet": Sheet}
    pages.tests["instance_of"] = isinstance
    pages.filters |= {"marked": _marked, "picture": _picture, "svg_source": _svg_source}
    return pages.get_template("page.html.jinja").render(report=report)


def _marked(text: str) -> Markup:
    """Escape a text and set what stands in ``**`` in bold."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text))))


def _picture(file: Path) -> dict[str, Any]:
    """Read a picture, scaled down to ``SIDE`` if it is larger, as the attributes of its ``img``."""
    image = read(file)
    small = max(image.size) < SIDE
    if not small:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return {"source": _source("png", data.getvalue()), "small": small, "width": image.width, "height": image.height}


def _svg_source(svg: str) -> str:
    return _source("svg+xml", svg.encode())


def _source(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def markdown(report: Report) -> str:
    """Write the texts and tables, and the figures of charts that have a table."""
    lines = [f"# {_text(report.title)}", ""]
    for one in report.sections:
        parts = [part.table if isinstance(part, Figure) else part for part in one.parts]
        shown = [part for part in parts if isinstance(part, str | Table)]
        if shown:
            lines += [f"## {_text(one.title)}", ""]
        for part in shown:
            lines += [_text(part), ""] if isinstance(part, str) else [*_rows(part), ""]
    return "\n".join(lines).rstrip() + "\n"


def _text(text: str) -> str:
    """Escape what Markdown would take for HTML: names come from protocols and files."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _rows(table: Table) -> list[str]:
    rows = [table.head, tuple("---" for _ in table.head), *table.rows]
    lines = ["| " + " | ".join(_text(visible(cell)).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*lines, "", _text(table.note)] if table.note else lines


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return lines as CSV, with a column for every name in any of them."""
    columns = list(dict.fromkeys(column for line in lines for column in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
