"""Measure every merge method's speed, memory and loss by the cut, compared with PEFT, mergekit and dense SVDs.

    python benchmarks/methods.py            every case, about 12 minutes
    python benchmarks/methods.py --quick    two LoRAs, one round

Exit code 1 if a goal is missed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cases import Bench, peer
from merge import folder
from processes import Command, Samples, Watch, in_turn, run
from report import Section, markdown, number, text

HERE = Path(__file__).parent
RANK = 32
MANY = 28
"""Every 20th module of each shape."""
FEW = {2: 10, 8: 5}
"""Modules where every ΔW is formed, by how many LoRAs."""
DENSITY = ("--density", "0.2")

Options = Sequence[str]

ENTRIES: Mapping[str, tuple[str, Options]] = {
    "ties": ("ties", ()),
    "dare": ("dare", ("density=0.2",)),
    "dare, signs elected": ("dare", ("density=0.2", "consensus=ties")),
    "magnitude_prune": ("magnitude_prune", ()),
    "della": ("della", ()),
    "breadcrumbs": ("breadcrumbs", ()),
    "sce": ("sce", ()),
    "magmax": ("magmax", ()),
}
"""Methods that may work on ΔW or in the core, at PEFT's density where PEFT has them."""

FACTORS = (
    "knots",
    "tsv",
    "iso_c",
    "iso_cts",
    "cart",
    "slerp",
    "karcher",
    "model_stock",
    "np_lora",
    "wudi",
    "subtract",
    "factor_average",
)
"""Methods that work on factors only."""

PEFT = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
MERGEKIT = ("ties", "dare_linear", "dare_ties")

WIDEST_MB = 10240 * 1280 * 4 / 1e6
"""The largest ΔW of SDXL as float32."""

TITLE = "Merge methods on SDXL LoRAs: time, memory, accuracy"
LEGEND = f"""*ms a module* is CPU time for reading, merging and cutting to rank {RANK}, of PEFT for \
`add_weighted_adapter` alone, of mergekit for a dense result that is not cut; */ linear* the median over rounds of its \
ratio to the truncated weighted sum in the same round, in which the programs ran in turn, each with one BLAS thread. \
*peak MB* is of the whole process, *lost* the relative error ‖ΔW − kept‖ / ‖ΔW‖ of the cut. LoRAs are synthetic: real \
module shapes, float16, decaying spectra. ties, dare and magnitude_prune have density 0.2, the others their defaults."""

HEAD = ("", "rounds", "ms a module", "/ linear", "peak MB", "lost")


def main() -> None:
    given = _arguments()
    watch = Watch()
    with folder(given.data) as data:
        run(["-c", "import torch, peft, loramerge.merging.verbs"])  # into the page cache
        bench = Bench(data, 1 if given.quick else given.rounds)
        every(bench, given.quick)
        on_gpu = cuda(bench)
    print("\n" + text(bench.goals))
    if given.results:
        for name, found in {"cpu": bench, "cuda": on_gpu}.items():
            if found:
                said = markdown(TITLE, found.goals, found.sections, watch.others(), LEGEND)
                (given.results / f"methods-{name}.md").write_text(said)
    sys.exit(any(goal.met is False for goal in bench.goals))


def every(bench: Bench, quick: bool) -> None:
    for count in (2,) if quick else (2, 8):
        factors(bench, count)
        entries(bench, count)
        knots(bench, count)
    memory(bench)
    cuts(bench, (8,) if quick else (8, 32, 128))


def ours(method: str, files: Sequence[str], count: int, options: Options = (), *more: str) -> Command:
    command = [f"{HERE}/one_method.py", method, "--files", *files, "--rank", str(RANK), "--modules", str(count)]
    return [*command, *_said(options), *more]


def _said(options: Options) -> list[str]:
    return [part for option in options for part in ("--option", option)]


def exactness(question: str, method: str, files: Sequence[str], *more: str) -> Mapping[str, float]:
    return run([f"{HERE}/exactness.py", question, method, "--files", *files, *more]).said


def compare(bench: Bench, title: str, commands: Mapping[str, Command], rounds: int) -> Samples:
    """Run commands in turn; the others' ratios are to the first."""
    print(title, flush=True)
    samples = in_turn(commands, rounds)
    bench.sections.append(Section(title, [_cells(name, samples) for name in commands], HEAD))
    return samples


def _cells(name: str, samples: Samples) -> list[str]:
    ratio = samples.ratio(name, next(iter(samples.by_name)), "cpu_ms")
    ms, lost = (samples.median(name, what) for what in ("cpu_ms", "error"))
    rounds, peak = len(samples.by_name[name]), samples.median(name, "rss") / 1e6
    return [name, str(rounds), number(ms), number(ratio), f"{peak:.0f}", number(lost)]


def factors(bench: Bench, count: int) -> None:
    """Compare methods that form no ΔW with the truncated weighted sum."""
    files = bench.loras("attn", RANK, 8)[:count]
    names = [name for name in FACTORS if count == 2 or name != "slerp"]
    commands = {
        "linear": ours("linear", files, MANY),
        **{name: ours(name, files, MANY) for name in names},
        **{
            f"{name}, in the core": ours(method, files, MANY, ("space=core", *options))
            for name, (method, options) in ENTRIES.items()
        },
    }
    title = f"{count} LoRAs of rank {RANK} to rank {RANK}, on factors, {MANY} modules"
    took = compare(bench, title, commands, bench.rounds)
    ratios = {name: took.ratio(name, "linear", "cpu_ms") for name in commands if name != "linear"}
    slowest = sorted(ratios, key=lambda name: -ratios[name])
    note = ", ".join(f"{name} {number(ratios[name])}" for name in slowest[:3])
    bench.want(f"N={count}: slowest method on factors / linear", ratios[slowest[0]], 5.0, note=note)


def entries(bench: Bench, count: int) -> None:
    """Compare methods that form every ΔW with PEFT and mergekit, in one round."""
    files = bench.loras("attn", RANK, 8)[:count]
    modules = FEW[count]
    sample = [*DENSITY, "--modules", str(modules)]
    commands = {
        "linear": ours("linear", files, modules),
        **{f"{name}, on ΔW": ours(method, files, modules, options) for name, (method, options) in ENTRIES.items()},
        **{
            f"PEFT {name}": peer("peft_merge", bench.out("peft"), files, "--type", name, *sample, "--rank", str(RANK))
            for name in PEFT
        },
    }
    if _found("importlib.util.find_spec('mergekit')"):
        for name in MERGEKIT:
            command = peer("mergekit_sparse", bench.out("mergekit"), files, "--type", name, *sample)
            commands[f"mergekit {name}, dense"] = command
    title = f"{count} LoRAs of rank {RANK} to rank {RANK}, on entries, {modules} modules"
    took = compare(bench, title, commands, 1)
    for name in ("ties", "dare"):
        ratio = took.ratio(f"{name}, on ΔW", "PEFT ties_svd", "cpu_ms")
        bench.want(f"N={count}: {name} on ΔW / PEFT ties_svd", ratio, 0.2)


def knots(bench: Bench, count: int) -> None:
    """Compare KnOTS with a dense SVD, in one round."""
    files, modules = bench.loras("attn", RANK, 8)[:count], 4 if count == 2 else 2
    dense = bench.out("knots")
    commands = {
        "linear": ours("linear", files, modules),
        "knots": ours("knots", files, modules),
        "dense SVD in float64": peer("dense_knots", dense, files, *DENSITY, "--modules", str(modules)),
    }
    took = compare(bench, f"KnOTS of {count} LoRAs of rank {RANK}, {modules} modules", commands, 1)
    bench.want(f"N={count}: knots / its dense SVD", took.ratio("knots", "dense SVD in float64", "cpu_ms"), 0.01)
    difference = exactness("same", "knots", files, "--against", dense)["difference"]
    bench.want(f"N={count}: difference of knots from its dense SVD", difference, 1e-6)


def memory(bench: Bench) -> None:
    """Measure elementwise methods on the largest module, with 2 and with 8 LoRAs."""
    files = bench.loras("widest", RANK, 8)
    print(f"Peak memory on {WIDEST_MB:.0f} MB", flush=True)
    linear = {count: run(ours("linear", files[:count], 1)).rss for count in (2, 8)}
    extra = {}
    for name, (method, options) in ENTRIES.items():
        peaks = {count: run(ours(method, files[:count], 1, options)).rss for count in (2, 8)}
        extra[name] = [(peak - linear[count]) / 1e6 / WIDEST_MB for count, peak in peaks.items()]
        print(f"  {name:38s}{extra[name][0]:8.2f}{extra[name][1]:8.2f}", flush=True)
    title = f"Peak memory above that of linear on 10240 × 1280, in units of its {WIDEST_MB:.0f} MB"
    rows = [[name, *map(number, measured)] for name, measured in extra.items()]
    bench.sections.append(Section(title, rows, ("", "N=2", "N=8")))
    most = max(extra, key=lambda name: extra[name][0])
    bench.want("elementwise: peak memory above linear, in dense modules", extra[most][0], 10.0, note=f"most: {most}")
    grown = max(extra, key=lambda name: extra[name][1] - extra[name][0])
    growth = extra[grown][1] - extra[grown][0]
    bench.want("elementwise: the same, N=8 minus N=2", growth, 0.5, note=f"most: {grown}")


def cuts(bench: Bench, ranks: Sequence[int]) -> None:
    """Measure how near a merged ΔW's cut comes to the best fit, what it keeps, and how far it is from linear."""
    rows = []
    for name in ("ties", "dare"):
        method, options = ENTRIES[name]
        for rank in ranks:
            found = exactness("cut", method, bench.loras("attn", rank), "--rank", str(rank), *_said(options))
            rows.append([name, str(rank), *(number(found[what]) for what in ("kept", "noise", "noise_after"))])
            wanted = 1e-3 if rank == 8 else 5e-3
            bench.want(f"r{rank}: {name} on ΔW, error of the cut / optimum − 1", found["excess"], wanted)
    title = "Two LoRAs of a rank at density 0.2, cut to that rank: the energy kept, and the distance from linear"
    bench.sections.append(Section(title, rows, ("", "rank", "energy kept", "distance before the cut", "after it")))


def cuda(bench: Bench) -> Bench | None:
    """Measure wall times on a GPU; None without one."""
    names = {name: ENTRIES[name] for name in ("ties", "dare")} | {name: (name, ()) for name in ("knots", "tsv")}
    if not _found("__import__('torch').cuda.is_available()"):
        for name in names:
            bench.want(f"{name} on cuda / CPU", None, 1.0, note="no GPU at hand")
        return None
    found = Bench(bench.folder, bench.rounds)
    files = bench.loras("attn", RANK, 8)[:2]
    for name, (method, options) in names.items():
        commands = {
            "CPU": ours(method, files, MANY, options),
            "cuda": ours(method, files, MANY, options, "--device", "cuda"),
        }
        took = in_turn(commands, bench.rounds)
        rows = [[place, number(took.median(place, "ms")), number(took.median(place, "error"))] for place in commands]
        found.sections.append(Section(name, rows, ("", "wall ms a module", "lost")))
        found.want(f"{name} on cuda / CPU", took.ratio("cuda", "CPU", "ms"), 1.0)
    bench.goals += found.goals
    return found


def _found(expression: str) -> bool:
    """Return whether an expression is true in another process: this one imports nothing that is measured."""
    code = f"import importlib.util, json; print('BENCH', json.dumps({{'found': int(bool({expression}))}}))"
    return bool(run(["-c", code]).said["found"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two LoRAs, one round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of what is fast (default 2)")
    parser.add_argument("--data", type=Path, help="keep the LoRAs here; default: a temporary directory")
    parser.add_argument("--results", type=Path, help="write the tables into this folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
