"""Printing that every command shares: errors as text, tables, notes, progress."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import LoRAMergeError, first_line, needed, size

if TYPE_CHECKING:
    from pathlib import Path


def guarded(command: Callable[[], object]) -> None:
    """Run a command; errors that loramerge raises on purpose are shown without a traceback."""
    try:
        with needed("This command"):
            command()
        sys.stdout.flush()
    except LoRAMergeError as error:
        print(f"Error: {as_typed(str(error))}", file=sys.stderr)
        sys.exit(1)
    except MemoryError as error:
        print(f"Error: out of memory: {first_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


ARGUMENT = re.compile(r"\((exclude|allow_[a-z]+)\)|\b(?:(max_error|max_size)|(energy)(?= is a |=))\b(=?)")
"""Matches what a message of the library calls by its name in Python."""


def as_typed(message: str) -> str:
    """Return a message that names arguments as they are typed: ``--max-error 0.1`` for ``max_error=0.1``."""

    def typed(found: re.Match[str]) -> str:
        inner, *outer, equals = found.groups()
        name = "--" + (inner or outer[0] or outer[1]).replace("_", "-")
        return f"({name})" if inner else name + " " * bool(equals)

    if ".toml: " in message:  # a recipe's entries have the names of Python
        return message
    return ARGUMENT.sub(typed, message).replace("weights=[0.7, 0.5]", "-w 0.7 -w 0.5")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain table; columns of numbers are aligned to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(head, *rows, strict=True)]
    right = [all(_is_number(row[i]) for row in rows) and bool(rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), line(["─" * w for w in widths]), *map(line, rows)])


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "").replace("e", "").replace("+", "").isdigit() or text in ("", "–")


def bar(value: float, largest: float, width: int = 30) -> str:
    """Return a bar as long as a value's share of the largest, in eighths of a character."""
    eighths = round(8 * width * value / largest) if largest > 0 else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def written(path: "Path", dialect: str) -> str:
    """Return the name of a written LoRA for messages: ``both.safetensors (kohya, 12.3 MB)``."""
    file = path if path.is_file() else path / "adapter_model.safetensors"
    length = f", {size(file.stat().st_size)}" if file.exists() else ""
    return f"{path} ({dialect}{length})"


def more(count: int, said: str) -> str:
    """Return the line below a table that was cut short; empty if it was not."""
    return f"… and {count} more, {said}" if count > 0 else ""


def print_json(data: Any) -> None:
    """Print plain data for programs."""
    import json

    print(json.dumps(data, indent=2))


def print_notes(notes: Sequence[str], lost: Sequence[str]) -> None:
    """Say what is unusual about a file, and what was left out of it."""
    for note in notes:
        print(f"  note: {note}")
    reasons: dict[str, list[str]] = {}
    for line in lost:
        module, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(module)
    for reason, modules in reasons.items():
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        print(f"  left out: {modules[0]}{more}: {as_typed(reason)}".removesuffix(": "))


def note_left_out(folders: "Iterable[Path]") -> None:
    """Say which files in folders of pictures are left out."""
    from ..scoring.pictures import ignored_in

    for folder in folders:
        told = ignored_in(folder) if folder.is_dir() else ""
        if told:
            print(f"Note: {told}", file=sys.stderr)


def as_directory(asked: "Path", written: "Path") -> list[str]:
    """Return a note if a directory was written where a file was asked for."""
    if asked.suffix == written.suffix:
        return []
    return [f"PEFT's layout is a directory: {written.name}, not {asked.name}"]


class Pace:
    """Shows the steps of a run: one line that changes on a terminal, about every tenth step elsewhere.

    Args:
        state: The file that the run goes on from, if it has been interrupted before.
    """

    def __init__(self, state: "Path | None" = None) -> None:
        self.state = state
        self.first: tuple[int, float] | None = None

    def show(self, step: int, total: int, text: str) -> None:
        """Show a step, from 1."""
        if self.first is None and step > 1 and self.state:
            print(f"Going on from {self.state} at step {step - 1}.", file=sys.stderr)
        now = time.monotonic()
        number, began = self.first = self.first or (step, now)
        pace = f"  {(now - began) / (step - number):.2g} s per step" if step > number else ""
        line = f"step {step}/{total}  {text}{pace}"
        last = step == total
        if sys.stderr.isatty():
            shown = f"{bar(step, total, 20):20s} {line}"
            print(f"\r\x1b[K{shown}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or step % max(1, total // 10) == 0:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on the terminal once the work has taken half a second."""
    began = time.monotonic()
    shown: list[Any] = []

    def report(done: int, total: int) -> None:
        if not shown and time.monotonic() - began > 0.5 and sys.stderr.isatty() and not quiet:
            from rich.console import Console
            from rich.progress import MofNCompleteColumn, Progress

            live = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True))
            live.start()
            shown.extend([live, live.add_task(label, total=total)])
        if shown:
            shown[0].update(shown[1], completed=done)

    try:
        yield report
    finally:
        if shown:
            shown[0].stop()
