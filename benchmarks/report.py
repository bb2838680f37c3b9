"""Report measurements and goals, as text and as Markdown."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("loramerge", "numpy", "torch", "safetensors", "peft", "mergekit")


@dataclass(frozen=True)
class Goal:
    """A bound on a measured number."""

    name: str
    measured: float | None
    """None where it could not be measured."""
    wanted: float
    least: bool = False
    """True if the bound is from below."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.wanted if self.least else self.measured <= self.wanted

    @property
    def cells(self) -> list[str]:
        verdict = {True: "yes", False: "**no**", None: "not run"}[self.met]
        measured = "–" if self.measured is None else number(self.measured)
        return [self.name, measured, f"{'≥' if self.least else '≤'} {number(self.wanted)}", verdict, self.note]


@dataclass(frozen=True)
class Row:
    """Medians of one command."""

    name: str
    rounds: int
    wall: float
    cpu: float
    run: float
    run_cpu: float
    rss: float

    @property
    def cells(self) -> list[str]:
        times = [number(seconds) for seconds in (self.wall, self.cpu, self.run, self.run_cpu)]
        return [self.name, str(self.rounds), *times, f"{self.rss / 1e6:.0f}"]


ROW_HEAD = ("", "rounds", "wall s", "CPU s", "run s", "run CPU s", "peak MB")


@dataclass(frozen=True)
class Section:
    """Commands that were run in turn."""

    title: str
    rows: Sequence[Sequence[str]]
    """Cells."""
    head: Sequence[str] = ROW_HEAD


GOAL_HEAD = ["goal", "measured", "wanted", "met", ""]


def text(goals: Sequence[Goal]) -> str:
    """Return the table of goals for a terminal."""
    cells = [GOAL_HEAD, *[[cell.replace("**", "") for cell in goal.cells] for goal in goals]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(GOAL_HEAD))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def markdown(title: str, goals: Sequence[Goal], sections: Sequence[Section], others: float, legend: str) -> str:
    """Return everything measured, with a description of the machine."""
    asked = [table(GOAL_HEAD, [goal.cells for goal in goals])] if goals else []
    parts = [f"# {title}", *machine(others), *asked, legend]
    for section in sections:
        parts += [f"## {section.title}", table(section.head, section.rows)]
    return "\n\n".join(parts) + "\n"


def machine(others: float) -> list[str]:
    """Describe the machine and the versions, without names or paths."""
    packages = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    return [
        f"{date.today()}. {os.cpu_count()} cores, {_processor()}, {_memory():.0f} GiB; {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}, {packages}.",
        f"Other programs kept {others:.1f} cores busy on average during the run.",
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = found.get("model name", platform.processor())
    family = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    return model + family


def _memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    if value != value:
        return ""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.3g}"
    return f"{value:.1e}"
