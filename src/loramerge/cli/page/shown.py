"""The texts, tables and pictures of the page, as HTML: every text that comes from a file or a person is escaped here."""

import base64
import traceback
from collections.abc import Iterable, Sequence
from html import escape

from ...comparing import Comparison
from ...errors import LoRAMergeError, MissingExtraError, first_line, need
from ...files import LoRA
from ...files.storage.texts import visible
from ..inspection import Block, summary
from ..output import explained

MOST = 60
"""The most blocks that are drawn; of an unknown family every module may be one."""

FACTS = ("architecture", "dialect", "ranks", "trigger words", "base model", "note")
"""The lines of a summary that are shown first."""


def card(lora: LoRA, name: str, blocks: Sequence[Block]) -> str:
    """Return the facts of a LoRA as a table, and its blocks as bars."""
    lines = [line.partition(":")[::2] for line in summary(lora).splitlines()]
    facts = [(fact, value.strip()) for fact, value in lines if fact != "file"]
    first = [fact for fact in facts if fact[0] in FACTS]
    rest = [fact for fact in facts if fact[0] not in FACTS]
    return (
        f"<div class='lora'><h3>{text(name)}</h3>{_table(first)}"
        f"<details><summary>Blocks and details</summary>{_table(rest)}{_bars(blocks)}</details></div>"
    )


def _table(facts: Iterable[tuple[str, str]]) -> str:
    rows = (f"<tr><th scope='row'>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in facts)
    return f"<table class='facts'>{''.join(rows)}</table>"


def _bars(found: Sequence[Block]) -> str:
    largest = max((block.norm for block in found), default=0.0) or 1.0
    rows = (
        f"<tr><th scope='row'>{text(f'{block.component} {block.name}')}</th><td>{block.norm:.3g}</td>"
        f"<td class='bar'><span style='width:{100 * block.norm / largest:.1f}%'></span></td></tr>"
        for block in found[:MOST]
    )
    more = f"<p>… and {len(found) - MOST} more</p>" if len(found) > MOST else ""
    caption = "<caption>Norm of the update by block: where this LoRA changes most</caption>"
    return f"<table class='bars'>{caption}{''.join(rows)}</table>{more}"


def comparison(found: Comparison, advice: str, table: str) -> str:
    """Return a comparison: the advice, the heat map if matplotlib is there to draw it, the table."""
    try:
        picture = f"<img alt='Heat map: {text(advice)}' src='{_heatmap(found)}'>"
    except MissingExtraError as error:
        picture = f"<p>{text(str(error))}</p>"
    return f"<p><strong>{text(advice)}</strong></p>{picture}<details><summary>Table</summary>{lines(table)}</details>"


def _heatmap(found: Comparison) -> str:
    from ...comparing.plots import drawn, heatmap

    need("A heat map", "matplotlib")
    return f"data:image/png;base64,{base64.b64encode(drawn(heatmap(found), 'png', 110)).decode()}"


def lines(printed: str) -> str:
    """Return what the command line prints."""
    return f"<pre tabindex='0'>{escape(printed)}</pre>"


def note(message: str) -> str:
    """Return a message that asks for nothing."""
    return f"<p class='note' role='status'>{text(message)}</p>"


def problem(*messages: str) -> str:
    """Return what went wrong."""
    return "".join(f"<p class='problem' role='alert'>{text(message)}</p>" for message in messages)


def message(error: Exception) -> str:
    """Return an error as people read it; one that isn't loramerge's own is printed for whoever runs the page."""
    if isinstance(error, LoRAMergeError | MemoryError):
        return explained(error)
    traceback.print_exception(error)
    return f"Something went wrong that loramerge didn't foresee: {type(error).__name__}: {first_line(error)}"


def text(given: str) -> str:
    """Return a text as it is shown: no markup, no control characters."""
    return escape(visible(given))
