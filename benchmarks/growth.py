"""Measure how a merge's time grows with the number of LoRAs, their rank, and the number of modules, and draw it.

    python benchmarks/growth.py growth.svg --markdown benchmarks/results/growth.md
    python benchmarks/growth.py growth.svg --small    narrow modules and small ranks, in a minute

One of the three grows at a time, on SDXL's attention modules; the merges are the exact sum, and the cut to the inputs'
rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import Bench
from costs import Case, Cost, Costs, arguments
from merge import folder
from processes import Watch, run
from report import Section, markdown, number

TITLE = "How a merge's cost grows"
LEGEND = """One of the three grows at a time. *CPU* is of the merge's own work in one process, *peak* of the whole \
process; medians over the rounds. *cut* is to the inputs' rank. LoRAs are random: SDXL's attention modules, float16."""
HEAD = ("LoRAs", "rank", "modules", "MB of the inputs", "exact sum: CPU s", "peak MB", "cut: CPU s", "peak MB")
MODULES = 560


@dataclass(frozen=True)
class Size:
    """What is merged."""

    count: int = 2
    rank: int = 16
    every: int = 1
    """One in so many of the modules is there."""

    @property
    def modules(self) -> int:
        return -(-MODULES // self.every)


GROWN: Mapping[str, tuple[str, Sequence[Size]]] = {
    "count": ("LoRAs", [Size(count=n) for n in (2, 4, 8, 16)]),
    "rank": ("rank", [Size(rank=rank) for rank in (4, 8, 16, 32, 64, 128)]),
    "modules": ("modules", [Size(every=every) for every in (16, 8, 4, 2, 1)]),
}
"""By the attribute of a size, its name and the sizes."""


@dataclass(frozen=True)
class Point:
    """The costs of both merges of a size."""

    size: Size
    exact: Cost
    cut: Cost


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], GROWN)
    parser.add_argument("plot", type=Path, help="a .png or .svg file")
    given = parser.parse_args()
    watch = Watch()
    with folder(given.data) as data:
        run(["-c", "import loramerge.merging.verbs"])  # into the page cache
        costs = Costs(Bench(data, given.rounds), given.small)
        chosen = {name: GROWN[name] for name in given.only or GROWN}
        found = {name: [point(costs, size) for size in sizes] for name, (_, sizes) in chosen.items()}
        sections = [
            Section(f"By {chosen[name][0]}", [cells(costs, point) for point in points], HEAD)
            for name, points in found.items()
        ]
    said = markdown(TITLE, [], sections, watch.others(), LEGEND)
    print(said)
    if given.markdown:
        given.markdown.write_text(said)
    draw(costs, found, given.plot)


def point(costs: Costs, size: Size) -> Point:
    """Measure both merges of a size."""
    files = costs.loras("sdxl", size.rank, "--modules", "attn", "--every", str(size.every), count=size.count)
    rank, out = str(costs.rank(size.rank)), costs.bench.out("growth")
    verb = ["merge", *files, "-o", out, "-j", "1", "--quiet"]
    name = f"{size.count} of rank {rank}, {size.modules} modules"
    both = {"exact": verb, "cut": [*verb, "--rank", rank]}
    exact, cut = (
        costs.measure(Case(name=f"{name}, {how}", verb=verb, reads=files, writes=out)) for how, verb in both.items()
    )
    return Point(size, exact, cut)


def cells(costs: Costs, point: Point) -> list[str]:
    size, inputs = point.size, sum(Path(path).stat().st_size for path in point.exact.case.reads) / 1e6
    figures = [cost.median(what) for cost in (point.exact, point.cut) for what in ("run_cpu", "rss")]
    figures = [figure / 1e6 if i % 2 else figure for i, figure in enumerate(figures)]
    return [str(size.count), str(costs.rank(size.rank)), str(size.modules), *map(number, (inputs, *figures))]


def draw(costs: Costs, found: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw a panel for each of the three, with the CPU time of both merges on logarithmic axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "loramerge", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(3 * len(found), 3), layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (name, points) in zip(panels, found.items(), strict=True):
            sizes = [point.size for point in points]
            at = [costs.rank(size.rank) if name == "rank" else getattr(size, name) for size in sizes]
            lines = {"exact sum": [p.exact for p in points], "cut to the inputs' rank": [p.cut for p in points]}
            for (label, line), colour in zip(lines.items(), ("#0072b2", "#d55e00"), strict=True):
                axes.loglog(at, [cost.median("run_cpu") for cost in line], "o-", label=label, color=colour)
            axes.set_xticks(at, map(str, at))
            axes.set_xticks([], minor=True)
            axes.set_xlabel(GROWN[name][0])
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("CPU seconds")
        figure.axes[0].legend(frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


if __name__ == "__main__":
    main()
