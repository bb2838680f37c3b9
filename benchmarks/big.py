"""Measure what files of 0.5 to 2.5 GB cost: sums, cuts, TIES, another dialect, a size.

    python benchmarks/big.py            two LoRAs each of FLUX.1, Qwen-Image and Wan 14B
    python benchmarks/big.py --small    the same on narrow modules, in a minute

Exit code 1 if a goal is missed.
"""

import argparse
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
PEFT_MORE = {"ties": ("--density", "0.2")}
PEERS_HEAD = ("instead of", "", "modules run", "modules", "CPU s per module", "CPU s of all, by these", "/ loramerge's")
PEERS = """PEFT's `add_weighted_adapter` was run on {} modules of each file, on weights that take no memory, and its \
time multiplied by the number of modules; so was the SVD of sd-scripts. The other script of sd-scripts is for FLUX.1 \
alone, and was run on the whole file. musubi-tuner merges LoRAs only into a model. Of *ties* and *resize* the arithmetic \
counted is that of the cut."""
SCRIPTS = {"exact sum": ("flux_merge_lora.py", "--concat"), "cut": ("svd_merge_lora.py",)}
"""The script of sd-scripts, with its options, that runs in place of ours."""


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], ROWS)
    parser.add_argument("--peers", type=int, default=SAMPLE, help="modules that PEFT merges; 0 leaves it out")
    parser.add_argument(
        "--sd-scripts", type=Path, help="a checkout of sd-scripts; without it, its scripts are left out"
    )
    given = parser.parse_args()
    legend = f"{LEGEND.format(dtypes='float16, Qwen-Image in bfloat16')}\n\n{PEERS.format(given.peers)}"
    measured(given, TITLE, legend, {row: partial(family, row, given) for row in ROWS})


def family(row: str, given: argparse.Namespace, costs: Costs) -> None:
    """Measure one family: every command, then PEFT and sd-scripts in their place."""
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
    if given.peers:
        out, options = bench.out("peer"), ["--rank", str(rank), "--modules", str(given.peers)]
        runs = [
            (ours, f"PEFT `{how}`", peer("peft_merge", out, files, "--type", how, *options, *PEFT_MORE.get(ours, ())))
            for ours, how in PEFT.items()
        ]
        if given.sd_scripts and row == "flux":
            runs += [scripts(ours, out, files, given, rank) for ours in SCRIPTS]
        peers(bench, title, found, runs)


def scripts(ours: str, out: str, files: list[str], given: argparse.Namespace, rank: int) -> tuple[str, str, Command]:
    """Return what sd-scripts runs in place of ours: the concatenation of the whole files, or an SVD of some modules."""
    script, *options = SCRIPTS[ours]
    if ours == "cut":
        options += ["--new_rank", str(rank), "--precision", "float", "--modules", str(given.peers)]
    said = ["--checkout", str(given.sd_scripts), "--script", script, *options]
    return ours, f"sd-scripts `{' '.join(SCRIPTS[ours])}`", peer("sd_scripts", out, files, *said)


def goals(bench: Bench, title: str, found: dict[str, Cost], size: int) -> None:
    """Compare with the bytes and the arithmetic; what is asked of 1 GB is asked of any file here."""
    for name in ("exact sum", "convert"):
        bench.want(f"{title}, {name}: wall / read + write", found[name].ratio("run", 0), 1.25)
    bench.want(f"{title}, cut: CPU / BLAS", found["cut"].ratio("run_cpu", 1), 2.0)
    most = max(found, key=lambda name: found[name].median("rss"))
    peak, note = found[most].median("rss") / 1e6, f"most: {most}; files of {size / 1e9:.2f} GB"
    bench.want(f"{title}: peak memory, MB", peak, 150.0, note=note)


def peers(bench: Bench, title: str, found: dict[str, Cost], runs: list[tuple[str, str, Command]]) -> None:
    """Run what others have in place of ours; a few modules stand for all of the file."""
    rows = []
    for ours, name, command in runs:
        print(f"  {name}", flush=True)
        said = run(command).said
        modules = found["cut"].limits[0][1]["modules"]
        each = said["cpu_ms"] / 1000
        figures = map(number, (each, each * modules, each * modules / found[ours].median("run_cpu")))
        rows.append([ours, name, f"{said['modules']:.0f}", f"{modules:.0f}", *figures])
    bench.sections.append(Section(f"{title}: what a user would run instead", rows, PEERS_HEAD))


if __name__ == "__main__":
    main()
