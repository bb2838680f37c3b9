"""A report as one page of HTML that asks nothing of the network, and as Markdown."""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from loramerge.scoring import read

from .content import Figure, Part, Report, Sheet, Table

SIDE = 192
"""Pixels of the longer side of a picture in the page, at most."""
STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: #fff; color: #111; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
thead th { border-bottom: 2px solid #888; }
.wide > table:not(.sheet) { min-width: 36rem; }
.wide > table:not(.sheet) td:first-child { min-width: 9rem; }
.sheet td, .sheet th { padding: 2px 3px; border: 0; font-weight: normal; font-size: 0.8rem; }
.sheet thead th { min-width: 6rem; max-width: 9rem; }
.sheet tbody th { min-width: 6rem; }
.sheet img { display: block; width: 6rem; height: auto; }
.sheet img.small { image-rendering: pixelated; }
figure { margin: 1rem 0; } figcaption, .note { color: #444; font-size: 0.9rem; }
svg { display: block; width: 100%; max-width: 36rem; height: auto; }
"""


def html(report: Report) -> str:
    """The page."""
    sections = "\n".join(
        f"<section><h2>{escape(one.title)}</h2>\n{_parts(one.parts)}</section>" for one in report.sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(report.title)}</h1>\n{sections}\n</main></body></html>\n"
    )


def _parts(parts: Sequence[Part]) -> str:
    return "\n".join(_part(part) for part in parts) + "\n"


def _part(part: Part) -> str:
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Figure):
        return f"<figure>{part.svg}<figcaption>{escape(part.caption)}</figcaption></figure>"
    if isinstance(part, Sheet):
        return _sheet(part)
    return f"<ul><li>{_marked(part[2:])}</li></ul>" if part.startswith("- ") else f"<p>{_marked(part)}</p>"


def _marked(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = "\n".join("<tr>" + "".join(f"<td>{_marked(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{_marked(table.note)}</p>' if table.note else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'


def _sheet(sheet: Sheet) -> str:
    head = "<th></th>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in sheet.columns)
    rows = []
    for label, files in sheet.rows:
        cells = "".join(
            f"<td>{_image(file, f'{label}: {name}')}</td>" for file, name in zip(files, sheet.columns, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    return (
        f'<figure><div class="wide"><table class="sheet"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f"</table></div><figcaption>{escape(sheet.caption)}</figcaption></figure>"
    )


def _image(file: Path, alt: str) -> str:
    from PIL import Image

    image = read(file)
    small = max(image.size) < SIDE
    if not small:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    kind = ' class="small"' if small else ""
    return f'<img{kind} src="{source}" alt="{escape(alt, quote=True)}" width="{image.width}" height="{image.height}">'


def markdown(report: Report) -> str:
    """The texts and tables, without charts and pictures."""
    lines = [f"# {report.title}", ""]
    for one in report.sections:
        shown = [part for part in one.parts if isinstance(part, str | Table)]
        if shown:
            lines += [f"## {one.title}", ""]
        for part in shown:
            lines += [part, ""] if isinstance(part, str) else [*_rows(part), ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(table: Table) -> list[str]:
    rows = [table.head, tuple("---" for _ in table.head), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*lines, "", table.note] if table.note else lines
