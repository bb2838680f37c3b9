"""Measure what every command costs beside its limit: the same bytes moved, and the same arithmetic.

    python benchmarks/limits.py                       every command, on SDXL
    python benchmarks/limits.py --small               the same on narrow modules, in a minute
    python benchmarks/limits.py --only files kinds    some of: start, files, models, sweep, kinds

Exit code 1 if a goal is missed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from costs import HERE, LEGEND, Case, Costs, arguments, measured, remove
from processes import run
from report import Section, number

TITLE = "Costs and limits of the commands"
RANK = 32
KIND_RANK = 8
SWEEP = 100
QUIET = ["-j", "1", "--quiet"]
KOHYA = ("--modules", "kohya")
FAMILY = ["--architecture", "sdxl"]
KINDS = ("lora", "dora", "loha", "lokr")
INSPECTED = 60.0
"""Milliseconds of `inspect` beyond Python's start."""
IMPORTED = 15.0


def main() -> None:
    given = arguments(__doc__.splitlines()[0], ROWS).parse_args()
    measured(given, TITLE, LEGEND.format(dtypes="float16"), ROWS)


def start(costs: Costs) -> None:
    """Measure Python's imports of loramerge, and `inspect` on the files of today's tools."""
    print("Start, and inspect", flush=True)
    bench, names = costs.bench, ["sdxl__kohya", "flux1__diffusers"] if costs.small else []
    said = run([f"{HERE}/inspecting.py", "--summary", "--runs", str(bench.rounds), *names]).said
    bench.want("import loramerge: CPU ms beyond Python's start", said["imported"], IMPORTED)
    for name in ("median", "most"):
        title = f"inspect, {name} of {said['files']:.0f} files: CPU ms beyond Python's start"
        bench.want(title, said[name], INSPECTED)


def files(costs: Costs) -> None:
    """Measure the commands that read and write LoRAs."""
    rank, out = costs.rank(RANK), costs.bench.out("limits")
    loras = costs.loras("sdxl", RANK, *KOHYA, count=4)
    one, two = loras[:1], loras[:2]
    merge = ["merge", *two, "-o", out, *QUIET]
    resize = ["resize", *one, "-o", out, "--rank", str(rank // 2), *QUIET]
    average = ["average", *loras, "-o", out, "--rank", str(rank), *QUIET]

    def of(task: str, total: int, rank: int = 1) -> list[str]:
        return [task, loras[0], "--total", str(total), "--rank", str(rank)]

    cases = [
        Case(name="inspect", verb=["inspect", *one], reads=one, header=True),
        Case(name="check", verb=["check", *one, "--for", "comfyui", "--quiet"], reads=one, header=True),
        Case(name="metadata", verb=["metadata", *one, "--set", "modelspec.title=limits"], reads=one, in_place=True),
        Case(name="load and state_dict", verb=["state_dict", *one], reads=one),
        Case(name="convert", verb=["convert", *one, "-o", out, "--to", "comfyui", *QUIET], reads=one, writes=out),
        Case(name="merge, exact", verb=merge, reads=two, writes=out),
        Case(
            name=f"merge to rank {rank}",
            verb=[*merge, "--rank", str(rank)],
            reads=two,
            writes=out,
            arithmetic=of("cut", 2 * rank, rank),
        ),
        Case(
            name=f"resize to rank {rank // 2}",
            verb=resize,
            reads=one,
            writes=out,
            arithmetic=of("cut", rank, rank // 2),
        ),
        Case(
            name=f"average of 4 to rank {rank}",
            verb=average,
            reads=loras,
            writes=out,
            arithmetic=of("cut", 4 * rank, rank),
        ),
        Case(name="compare", verb=["compare", *two, "--quiet"], reads=two, arithmetic=of("compare", 2 * rank)),
        Case(name="diff", verb=["diff", *two, "--tolerance", "9", "--quiet"], reads=two, arithmetic=of("qr", 2 * rank)),
    ]
    costs.section(f"SDXL's 986 kohya modules, LoRAs of rank {rank}", cases)


def models(costs: Costs) -> None:
    """Measure `bake` into a file and into shards, and `extract` of what was baked."""
    rank, bench = costs.rank(RANK), costs.bench
    lora = costs.loras("sdxl", RANK, *KOHYA, count=1)
    dense = ["dense", *lora, "--total", str(rank)]
    tuned = bench.out("tuned")
    file, shards = (costs.made("base", "sdxl", folder=folder) for folder in (False, True))
    size = Path(file).stat().st_size / 1e9

    def bake(base: str, out: str, name: str) -> Case:
        verb = ["bake", *lora, "--base", base, "-o", out, *QUIET, *FAMILY]
        return Case(name=name, verb=verb, reads=[base, *lora], writes=out, arithmetic=dense)

    run([f"{HERE}/verb.py", *bake(file, tuned, "").verb])
    extract = ["extract", tuned, "--base", file, "-o", bench.out("limits"), "--rank", str(rank), *QUIET, *FAMILY]
    fit = ["fit", *lora, "--total", str(rank), "--rank", str(rank)]
    cases = [
        Case(name="extract", verb=extract, reads=[tuned, file], writes=bench.out("limits"), arithmetic=fit),
        bake(file, tuned, "bake into one file"),
        bake(shards, str(bench.folder / "out-shards"), "bake into shards"),
    ]
    costs.section(f"SDXL's weights, {size:.2f} GB of float16, and a LoRA of rank {rank}", cases)


def sweep(costs: Costs) -> None:
    """Measure a hundred merges of one recipe beside one of them."""
    rank, bench, count = costs.rank(KIND_RANK), costs.bench, 10 if costs.small else SWEEP
    loras = costs.loras("sdxl", RANK, "--modules", "attn")
    recipe, out, folder = bench.folder / "sweep.toml", bench.out("limits"), bench.folder / "out-sweep"
    inputs = "".join(f'[[loras]]\npath = "{Path(lora).name}"\n' for lora in loras)
    recipe.write_text(f'rank = {rank}\n{inputs}[output]\nto = "kohya"\n')
    weights = ",".join(f"{i / count:.2f}/{1 - i / count:.2f}" for i in range(1, count + 1))
    cut = ["cut", loras[0], "--total", str(2 * costs.rank(RANK)), "--rank", str(rank)]
    both = ["sweep", str(recipe), "-o", str(folder), "--set", f"weights={weights}", *QUIET]
    one = Case(
        name="one merge", verb=["merge", str(recipe), "-o", out, *QUIET], reads=loras, writes=out, arithmetic=cut
    )
    hundred = [*cut, "--times", str(count)]
    many = Case(name=f"sweep of {count}", verb=both, reads=loras, writes=str(folder), arithmetic=hundred)
    title = f"Two LoRAs of rank {costs.rank(RANK)} on SDXL's 560 attention modules, merged to rank {rank}"
    found = costs.section(title, [one, many], rounds=1)
    times = found[many.name].median("run") / found[one.name].median("run")
    bench.want(f"sweep of {count}: wall / one merge", times, 12.0)


def kinds(costs: Costs) -> None:
    """Measure merges of DoRAs, LoHas and LoKrs beside one of LoRAs of their rank."""
    rank, bench = costs.rank(KIND_RANK), costs.bench
    out, base = bench.out("limits"), costs.made("base", "sdxl")
    pairs = {kind: costs.loras("sdxl", KIND_RANK, *KOHYA, "--kind", kind) for kind in KINDS}
    cases = []
    for kind, pair in pairs.items():
        verb = ["merge", *pair, "-o", out, "--rank", str(rank), *QUIET]
        needs = ["--base", base] if kind == "dora" else []
        cases.append(Case(name=kind, verb=[*verb, *needs], reads=[*pair, *needs[1:]], writes=out))
    lone = ["merge", pairs["lokr"][0], "-o", out, "--weight", "0.5", *QUIET]
    cases.append(Case(name="one lokr, scaled", verb=lone, reads=pairs["lokr"][:1], writes=out))
    title = f"Two of a kind of rank {rank} on SDXL's 986 kohya modules, merged to rank {rank}"
    found = costs.section(title, cases)
    plain = found["lora"]
    rows = [
        [kind, *(number(found[kind].median(what) / plain.median(what)) for what in ("run", "run_cpu", "rss"))]
        for kind in KINDS[1:]
    ]
    bench.sections.append(Section("Beside LoRA", rows, ("", "wall", "CPU", "peak")))
    run([f"{HERE}/verb.py", *lone])
    bench.want("one LoKr, scaled: modules that are none any more", run(["-c", OTHERS, out]).said["others"], 0)
    remove(out)


OTHERS = """
import json, sys, loramerge as lm
kinds = [layer.kind_name for layer in lm.open(sys.argv[1]).layouts.values()]
print("BENCH", json.dumps({"others": sum(kind != "lokr" for kind in kinds)}))
"""

ROWS: Mapping[str, Callable[[Costs], None]] = {
    "start": start,
    "files": files,
    "models": models,
    "sweep": sweep,
    "kinds": kinds,
}

if __name__ == "__main__":
    main()
