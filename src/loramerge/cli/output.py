"""Printing that every command shares: errors as text, tables, notes, progress."""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import LoRAMergeError, first_line, needed, size
from ..files.storage.texts import finite, visible

if TYPE_CHECKING:
    from pathlib import Path


class Block(str):
    """Lines of text, each of which is `visible`: only here a line ends where it was meant to."""


def joined(lines: Iterable[str]) -> Block:
    """Join lines; those that aren't blocks themselves are made visible, as they may have strings out of a file."""
    return Block("\n".join(line if isinstance(line, Block) else visible(line) for line in lines))


def spaced(parts: Iterable[str]) -> Block:
    """Join lines and blocks like `joined`, with a blank line between any two."""
    return joined([line for part in parts for line in ("", part)][1:])


def say(*lines: str, end: str = "\n", file: TextIO | None = None) -> None:
    """Print lines: every text of the command line passes here."""
    print(joined(lines), end=end, file=file, flush=file is not None)


def guarded(command: Callable[[], object]) -> None:
    """Run a command; errors that loramerge raises on purpose are shown without a traceback."""
    try:
        with needed("This command"):
            command()
    except LoRAMergeError as error:
        say(f"Error: {explained(error)}", file=sys.stderr)
        sys.exit(1)
    except MemoryError as error:
        say(f"Error: {explained(error)}", file=sys.stderr)
        sys.exit(1)


def explained(error: LoRAMergeError | MemoryError) -> str:
    """Return an error as people read it: not too long, with arguments as they are typed."""
    if isinstance(error, MemoryError):
        return f"out of memory: {first_line(error)}"
    return as_typed(_short(str(error)))


@contextmanager
def resumable(what: str) -> Iterator[None]:
    """On Ctrl-C, say what is kept, and exit."""
    try:
        yield
    except KeyboardInterrupt:
        from typer import Exit

        say(f"Interrupted; {what} is kept, and the same command goes on from there.", file=sys.stderr)
        raise Exit(130) from None


def _short(message: str) -> str:
    """Shorten a message that lists more than anyone reads."""
    return message if len(message) <= 2 * MOST else f"{message[:MOST]} … {message[-MOST:]}"


MOST = 2000
"""The most characters of an error's beginning and end that are shown."""

ARGUMENT = re.compile(
    r"(?<![^\s(])(?:\((exclude|allow_[a-z]+)\)|(?:(max_error|max_size)|(energy)(?= is a |=))\b(=?))(?!\S*\.[A-Za-z])"
)
"""Matches what a message of the library calls by its name in Python; not a file's name, in which a sweep puts the same words."""


def as_typed(message: str) -> str:
    """Return a message that names arguments as they are typed: ``--max-error 0.1`` for ``max_error=0.1``."""

    def typed(found: re.Match[str]) -> str:
        inner, *outer, equals = found.groups()
        name = "--" + (inner or outer[0] or outer[1]).replace("_", "-")
        if inner and not _has(name):
            name = f"loramerge convert … {name}"
        return f"({name})" if inner else name + " " * bool(equals)

    if sys.argv[1:2] == ["sweep"]:  # settings have the names of Python
        return message.replace("weights=[0.7, 0.5]", "--set weights=0.7/0.5")
    if ".toml: " in message:  # as the entries of recipes have
        return message
    return ARGUMENT.sub(typed, message).replace("weights=[0.7, 0.5]", "-w 0.7 -w 0.5")


def _has(option: str) -> bool:
    """Return whether the command that was typed has an option; the page has those of a merge, but reads no pickles."""
    from .app import VERBS, real

    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb == "ui":
        return option != "--allow-pickle"
    return verb not in VERBS or any(option in each.opts for each in real(verb).params)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Block:
    """Return a plain table; columns of numbers are aligned to the right."""
    head, rows = list(map(visible, head)), [list(map(visible, row)) for row in rows]
    widths = [max(len(str(cell)) for cell in column) for column in zip(head, *rows, strict=True)]
    right = [all(is_number(row[i]) for row in rows) and bool(rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return joined([line(head), line(["─" * w for w in widths]), *map(line, rows)])


def is_number(text: str) -> bool:
    """Return whether a cell's text is a number, or none."""
    return text.replace(".", "", 1).replace("-", "").replace("e", "").replace("+", "").isdigit() or text in ("", "–")


def bar(value: float, largest: float, width: int = 30) -> str:
    """Return a bar as long as a value's share of the largest, in eighths of a character."""
    eighths = round(8 * width * value / largest) if largest > 0 else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def written(path: "Path", dialect: str) -> str:
    """Return the name of a written LoRA for messages: ``both.safetensors (kohya, 12.3 MB)``."""
    from ..files.reading import PEFT_FILE

    file = path if path.is_file() else path / PEFT_FILE
    length = f", {size(file.stat().st_size)}" if file.exists() else ""
    return f"{path} ({dialect}{length})"


def more(count: int, said: str) -> str:
    """Return the line below a table that was cut short; empty if it was not."""
    return f"… and {count} more, {said}" if count > 0 else ""


def print_json(data: Any) -> None:
    """Print plain data for programs."""
    import json

    say(Block(json.dumps(finite(data), indent=2, allow_nan=False).replace("\x7f", "\\u007f")))


def print_notes(notes: Sequence[str], lost: Sequence[str]) -> None:
    """Say what is unusual about a file, and what was left out of it."""
    for line in note_lines(notes, lost):
        say(line)


def note_lines(notes: Sequence[str], lost: Sequence[str]) -> list[str]:
    """Return the printed lines of `print_notes`."""
    lines = [f"  note: {note}" for note in notes]
    reasons: dict[str, list[str]] = {}
    for line in lost:
        module, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(module)
    for reason, modules in reasons.items():
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        lines.append(f"  left out: {modules[0]}{more}: {as_typed(reason)}".removesuffix(": "))
    return lines


def note_left_out(folders: "Iterable[Path]") -> None:
    """Say which files in folders of pictures are left out."""
    from ..scoring.pictures import ignored_in

    for folder in folders:
        told = ignored_in(folder) if folder.is_dir() else ""
        if told:
            say(f"Note: {told}", file=sys.stderr)


def as_directory(asked: "Path", written: "Path") -> list[str]:
    """Return a note if a directory was written where a file was asked for."""
    if asked.suffix == written.suffix:
        return []
    return [f"PEFT's layout is a directory: {written.name}, not {asked.name}"]


@contextmanager
def replacing(outputs: "Iterable[Path]", quiet: bool = False) -> Iterator[None]:
    """Say afterwards which of the files that are there were replaced; an adapter's directory stands for its file."""
    files = [file for path in outputs for file in _outputs(path)]
    before = {file: found for file in files if (found := _file_at(file))}
    try:
        yield
    finally:
        for file, found in before.items():
            if not quiet and _file_at(file) not in (None, found):
                say(f"replaced {file}", file=sys.stderr)


def _outputs(path: "Path") -> "list[Path]":
    """Return the files that may be written where a path was asked for: it, and those of a PEFT adapter's directory."""
    from ..files.reading import PEFT_FILE

    beside = [path.with_suffix("") / PEFT_FILE] if path.suffix == ".safetensors" else []
    return [path, path / PEFT_FILE, *beside]


def _file_at(path: "Path") -> tuple[int, int] | None:
    """Return the number and time by which a file differs from one that has replaced it; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns) if path.is_file() else None


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
            say(f"Going on from {self.state} at step {step - 1}.", file=sys.stderr)
        now = time.monotonic()
        number, began = self.first = self.first or (step, now)
        pace = f"  {(now - began) / (step - number):.2g} s per step" if step > number else ""
        line = f"step {step}/{total}  {text}{pace}"
        last = step == total
        if sys.stderr.isatty():
            shown = Block(f"\r\x1b[K{bar(step, total, 20):20s} {visible(line)}")
            say(shown, end="\n" if last else "", file=sys.stderr)
        elif last or step % max(1, total // 10) == 0:
            say(line, file=sys.stderr)


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
