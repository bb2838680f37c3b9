"""Measure what files of 0.5 to 2.5 GB cost: sums, cuts, TIES, another dialect, a size.

    python benchmarks/big.py            two LoRAs each of FLUX.1, Qwen-Image and Wan 14B
    python benchmarks/big.py --small    the same on narrow modules, in a minute

Exit code 1 if a goal is missed.
"""

from functools import partial
from pathlib import Path

from cases import Bench, peer
from costs import LEGEND, Case, Cost, Costs, arguments, measured
from processes import Command, run
from report import Section, number

TITLE = "Big files: time and memory beside the same bytes and the same arithmetic"
ROWS = {
    "flux": ("FLUX.1", 64, "float16", "diffusers"),
    "qwen-image": ("Qwen-Image", 64, "bfloat16", "comfyui"),
    "wan-14b": ("Wan 14B", 128, "float16", "comfyui"),
}
"""By family its title, the rank and dtype of the files, and a dialect that has the same tensors under other names."""
SAMPLE = 2
"""Modules that PEFT merges; its time is multiplied by the modules of the file."""
PEFT = {"exact sum": "cat", "cut": "svd", "ties": "ties_svd"}
PEERS_HEAD = ("instead of", "", "modules run", "modules", "CPU s a module", "CPU s of all, by these", "/ loramerge's")
PEERS = """PEFT's `add_weighted_adapter` was run on {} modules of each file, on weights that take no memory, and its \
time multiplied by the number of modules. The merge scripts of sd-scripts and musubi-tuner were not run: they are no \
packages, and their repositories are not here. Of *ties* and *resize* the arithmetic counted is that of the cut."""


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], ROWS)
    parser.add_argument("--peers", type=int, default=SAMPLE, help="modules that PEFT merges; 0 leaves it out")
    given = parser.parse_args()
    legend = f"{LEGEND.format(dtypes='float16, Qwen-Image in bfloat16')}\n\n{PEERS.format(given.peers)}"
    measured(given, TITLE, legend, {row: partial(family, row, given.peers) for row in ROWS})


def family(row: str, sample: int, costs: Costs) -> None:
    """Measure one family: every command, then PEFT in their place."""
    title, full, dtype, dialect = ROWS[row]
    rank, bench = costs.rank(full), costs.bench
    files = costs.loras(row, full, "--dtype", dtype, "--to", "diffusers-peft")
    size = Path(files[0]).stat().st_size
    out = bench.out("big")
    cut = ["cut", files[0], "--total", str(2 * rank), "--rank", str(rank)]
    half = ["cut", files[0], "--total", str(rank), "--rank", str(rank // 2)]
    to_rank = ["--rank", str(rank)]

    def case(name: str, verb: str, reads: list[str], options: Command, arithmetic: Command = ()) -> Case:
        command = [verb, *reads, "-o", out, *options, "-j", "1", "--quiet"]
        return Case(name=name, verb=command, reads=reads, writes=out, arithmetic=arithmetic)

    cases = [
        case("exact sum", "merge", files, []),
        case("cut", "merge", files, to_rank, cut),
        case("ties", "merge", files, ["--method", "ties", "--option", "space=core", *to_rank], cut),
        case("convert", "convert", files[:1], ["--to", dialect]),
        case("resize", "resize", files[:1], ["--max-size", f"{size // 2000}kB"], half),
    ]
    found = costs.section(f"{title}, two LoRAs of rank {rank}, {size / 1e6:.0f} MB each", cases)
    goals(bench, title, found, size)
    if sample:
        peers(bench, title, found, files, rank, sample)


def goals(bench: Bench, title: str, found: dict[str, Cost], size: int) -> None:
    """Compare with the bytes and the arithmetic; what is asked of 1 GB is asked of any file here."""
    for name in ("exact sum", "convert"):
        bench.want(f"{title}, {name}: wall / read + write", found[name].ratio("run", 0), 1.25)
    bench.want(f"{title}, cut: CPU / BLAS", found["cut"].ratio("run_cpu", 1), 2.0)
    most = max(found, key=lambda name: found[name].median("rss"))
    peak, note = found[most].median("rss") / 1e6, f"most: {most}; files of {size / 1e9:.2f} GB"
    bench.want(f"{title}: peak memory, MB", peak, 150.0, note=note)


def peers(bench: Bench, title: str, found: dict[str, Cost], files: list[str], rank: int, sample: int) -> None:
    """Run PEFT on a few modules, each method in place of ours."""
    rows = []
    for ours, theirs in PEFT.items():
        print(f"  PEFT {theirs}", flush=True)
        options = ["--rank", str(rank), *["--density", "0.2"] * (ours == "ties"), "--modules", str(sample)]
        said = run(peer("peft_merge", bench.out("peft"), files, "--type", theirs, *options)).said
        modules = found["cut"].limits[0][1]["modules"]
        a_module = said["cpu_ms"] / 1000
        figures = map(number, (a_module, a_module * modules, a_module * modules / found[ours].median("run_cpu")))
        rows.append([ours, f"PEFT `{theirs}`", f"{said['modules']:.0f}", f"{modules:.0f}", *figures])
    rows += [[name, "sd-scripts, musubi-tuner", "not run", "", "", "", ""] for name in ("exact sum", "cut")]
    bench.sections.append(Section(f"{title}: what a user would run instead", rows, PEERS_HEAD))


if __name__ == "__main__":
    main()
