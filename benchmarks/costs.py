"""Measure commands beside their limits: reading and writing the same bytes, and the arithmetic alone."""

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from cases import Bench
from merge import folder
from processes import Command, Sample, Watch, run
from report import Section, markdown, number, text

HERE = Path(__file__).parent
HEAD = (
    "",
    "rounds",
    "MB moved",
    "wall s",
    "CPU s",
    "read + write: wall s",
    "CPU s",
    "BLAS: CPU s",
    "wall / limit",
    "CPU / limit",
    "peak MB",
    "peak / largest file",
)
LEGEND = """*wall* and *CPU* are of the command's own work, without Python's start and the imports of numpy and of the \
options' parser, with those of the command itself; the limit is reading and writing the same bytes in blocks, plus, where a figure is there, the BLAS and \
LAPACK calls of the arithmetic on arrays in memory (`benchmarks/arithmetic.py`). Ratios are medians over rounds, in \
which the programs ran in turn, each in one process with one BLAS thread. *peak* is of the whole process, *largest \
file* the largest that is read or written. Files are in the page cache where they fit. Values are random, in the real \
shapes and {dtypes}."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command, the files that it moves, and the arithmetic that it can't do without."""

    name: str
    verb: Command
    reads: Sequence[str]
    writes: str | None = None
    """A file or folder; it is removed after every round."""
    header: bool = False
    """True if only the headers are needed of what is read."""
    in_place: bool = False
    """True if the first file that is read is written anew."""
    arithmetic: Command = ()
    """Arguments of ``arithmetic.py``; none if there is nothing to compute."""


@dataclass(frozen=True)
class Cost:
    """The time and memory of a command and of its limits, by round."""

    case: Case
    verb: list[Sample] = field(default_factory=list)
    limits: list[list[Sample]] = field(default_factory=list)
    largest: list[int] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)

    def median(self, what: str) -> float:
        return statistics.median(sample[what] for sample in self.verb)

    def limit(self, place: int, what: str) -> float:
        """Return the median of reading and writing (0) or of the arithmetic (1); NaN where there is none."""
        return statistics.median(ran[place][what] if place < len(ran) else float("nan") for ran in self.limits)

    def ratio(self, what: str, *places: int) -> float:
        """Return the median ratio to the limits at some places, all of them unless given."""
        pairs = zip(self.verb, self.limits, strict=True)
        return statistics.median(
            mine[what] / sum(ran[what] for i, ran in enumerate(limits) if not places or i in places)
            for mine, limits in pairs
        )

    @property
    def cells(self) -> list[str]:
        figures = [self.median("run"), self.median("run_cpu"), self.limit(0, "run"), self.limit(0, "run_cpu")]
        figures += [self.limit(1, "run_cpu"), self.ratio("run"), self.ratio("run_cpu")]
        peak = self.median("rss")
        moved = number(statistics.median(self.moved) / 1e6)
        last = [f"{peak / 1e6:.0f}", number(peak / statistics.median(self.largest))]
        return [self.case.name, str(len(self.verb)), moved, *map(number, figures), *last]


@dataclass(frozen=True)
class Costs:
    """A bench whose files may be small, for trying a program."""

    bench: Bench
    small: bool

    def rank(self, full: int) -> int:
        return max(full // 8, 2) if self.small else full

    def made(self, what: str, family: str, *options: str, folder: bool = False) -> str:
        """Return a file of random values, made when it is first asked for."""
        options = (*options, "--narrow", "16" if self.small else "1")
        name = "-".join([what, family, *(option.strip("-") for option in options)])
        path = self.bench.folder / (name if folder else f"{name}.safetensors")
        run([f"{HERE}/made.py", what, str(path), family, *options])
        return str(path)

    def loras(self, family: str, rank: int, *options: str, count: int = 2) -> list[str]:
        given = ("--rank", str(self.rank(rank)), *options)
        return [self.made("lora", family, *given, "--seed", str(seed)) for seed in range(count)]

    def measure(self, case: Case, rounds: int | None = None) -> Cost:
        """Run a command and its limits in turn, and remove what they write.

        Before each turn as many bytes as are read are moved and thrown away, and everything is written to the disk: else
        the kernel's work for files of before, and for room in its cache, would count for whoever comes first.
        """
        cost, raw = Cost(case), self.bench.out("raw")
        io = [f"{HERE}/moving.py", raw, "--read", *case.reads, *["--headers"] * case.header]
        blas = [[f"{HERE}/arithmetic.py", *case.arithmetic]] if case.arithmetic else []
        for _ in range(rounds or self.bench.rounds):
            remove(case.writes)
            run([*io, "--write", str(sum(size for path in case.reads for size in sizes(path)))])
            remove(raw)
            os.sync()
            cost.verb.append(run([f"{HERE}/verb.py", *case.verb]))
            written = sizes(case.reads[0] if case.in_place else case.writes)
            cost.largest.append(max(size for path in (*case.reads, case.writes) for size in sizes(path)))
            remove(case.writes)  # the disk holds one of the two outputs at a time
            os.sync()
            cost.limits.append([run(command) for command in ([*io, "--write", str(sum(written))], *blas)])
            remove(raw)
            cost.moved.append(int(cost.limits[-1][0]["bytes"]))
        print(f"  {case.name:44s}{cost.median('run'):8.2f} s", flush=True)
        return cost

    def section(self, title: str, cases: Sequence[Case], rounds: int | None = None) -> dict[str, Cost]:
        """Measure cases one after the other, and add their table."""
        print(title, flush=True)
        found = {case.name: self.measure(case, rounds) for case in cases}
        self.bench.sections.append(Section(title, [cost.cells for cost in found.values()], HEAD))
        return found


def sizes(path: str | None) -> list[int]:
    """Return the sizes of a file, or of the files in a folder."""
    place = Path(path or "")
    return [file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*") if path else ())]


def remove(path: str | None) -> None:
    """Remove a file or folder, if it is there."""
    if path and Path(path).is_dir():
        shutil.rmtree(path)
    elif path:
        Path(path).unlink(missing_ok=True)


def measured(
    given: argparse.Namespace, title: str, legend: str, rows: Mapping[str, Callable[[Costs], None]]
) -> NoReturn:
    """Measure the rows chosen, report them, and end: with exit code 1 if a goal is missed."""
    watch = Watch()
    with folder(given.data) as data:
        run(["-c", "import torch, peft, loramerge.merging.verbs"])  # into the page cache
        costs = Costs(Bench(data, given.rounds), given.small)
        for row in given.only or rows:
            rows[row](costs)
    bench = costs.bench
    print("\n" + text(bench.goals))
    if given.markdown:
        given.markdown.write_text(markdown(title, bench.goals, bench.sections, watch.others(), legend))
    sys.exit(any(goal.met is False for goal in bench.goals))


def arguments(about: str, rows: Collection[str]) -> argparse.ArgumentParser:
    """Return the options that programs of costs share."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--small", action="store_true", help="narrow modules and small ranks, to try this program")
    parser.add_argument("--only", nargs="+", choices=rows, help="rows to run; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="keep the files here; default: a temporary directory")
    parser.add_argument("--markdown", type=Path, help="write all figures to this file")
    return parser
