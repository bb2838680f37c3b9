"""Define what is measured: each case runs commands in turn and compares the results with goals."""

import filecmp
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from processes import Command, Samples, Watch, in_turn, run
from report import Goal, Row, Section

HERE = Path(__file__).parent
SAMPLE = 10
"""Modules on which the dense peers are run."""
UNEVEN = ["--weights", "0.7", "0.45"]
"""Not powers of two: every factor is rounded."""


@dataclass
class Bench:
    """The folder of files, the number of rounds to run, and the results so far."""

    folder: Path
    rounds: int
    goals: list[Goal] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def loras(self, variant: str, rank: int, count: int = 2) -> list[str]:
        """Return synthetic LoRAs, made when they are first asked for."""
        run([f"{HERE}/loras.py", str(self.folder), variant, str(rank), "--count", str(count)])
        return [str(self.folder / f"{variant}-r{rank}-{seed}.safetensors") for seed in range(count)]

    def out(self, name: str) -> str:
        return str(self.folder / f"out-{name}.safetensors")

    def compare(self, title: str, commands: Mapping[str, Command], rounds: int | None = None) -> Samples:
        print(f"{title}", flush=True)
        samples = in_turn(commands, rounds or self.rounds)
        self.sections.append(Section(title, [_row(name, samples).cells for name in commands]))
        return samples

    def want(self, name: str, measured: float | None, wanted: float, *, least: bool = False, note: str = "") -> None:
        self.goals.append(Goal(name, measured, wanted, least, note))


def _row(name: str, samples: Samples) -> Row:
    wall, cpu, run_, run_cpu, rss = (samples.median(name, what) for what in ("wall", "cpu", "run", "run_cpu", "rss"))
    return Row(name, len(samples.by_name[name]), wall, cpu, run_, run_cpu, rss)


def cli(out: str, files: list[str], rank: int | str) -> Command:
    """Merge in one process, as the peers do: memory and CPU time are those of one."""
    options = ["--weights", "uniform", "--rank", str(rank), "--quiet", "-j", "1"]
    return ["-m", "loramerge", "merge", *files, "-o", out, *options]


def ours(out: str, files: list[str], rank: int | str, *options: str) -> Command:
    return [f"{HERE}/ours.py", out, "--files", *files, "--rank", str(rank), *options]


def both(name: str, out: str, files: list[str], rank: int | str) -> dict[str, Command]:
    """Merge with one worker, and with one per core, the command line's default."""
    return {name: ours(out, files, rank), f"{name}, 2 workers": ours(out, files, rank, "--workers", "2")}


def peer(name: str, out: str, files: list[str], *options: str) -> Command:
    return [f"{HERE}/peers/{name}.py", out, *files, *options]


def accuracy(out: str, files: list[str], *options: str) -> Mapping[str, float]:
    return run([f"{HERE}/accuracy.py", out, "--files", *files, *options]).said


def io(bench: Bench, files: list[str], *by: str) -> dict[str, Command]:
    """Read the inputs and write one file of an input's size."""
    titles = {"raw": "read + write, raw", "numpy": "safetensors.numpy", "torch": "safetensors.torch"}
    return {titles[how]: peer("io_only", bench.out(how), files, "--by", how) for how in by}


def small(bench: Bench) -> None:
    """Compare rank 8 with everything."""
    files = bench.loras("attn", 8)
    sample = ["--rank", "8", "--modules", str(SAMPLE)]
    commands = {
        "loramerge": cli(bench.out("cli"), files, 8),
        **both("loramerge, run", bench.out("r8"), files, 8),
        "import torch": ["-c", "import torch"],
        **io(bench, files, "raw", "numpy", "torch"),
        "PEFT linear": peer("peft_merge", bench.out("linear"), files, "--type", "linear"),
        "PEFT cat": peer("peft_merge", bench.out("cat"), files, "--type", "cat"),
        f"PEFT svd, {SAMPLE} modules": peer("peft_merge", bench.out("svd"), files, "--type", "svd", *sample),
        f"torch svd, {SAMPLE} modules": peer("dense_svd", bench.out("dense"), files, *sample),
    }
    took = bench.compare("Two LoRAs of rank 8, 560 attention modules, to rank 8", commands)
    bench.want(
        f"r8: CPU / PEFT svd on {SAMPLE} modules", took.ratio("loramerge", f"PEFT svd, {SAMPLE} modules", "cpu"), 0.1
    )
    bench.want("r8: CPU / PEFT linear", took.ratio("loramerge", "PEFT linear", "cpu"), 0.2)
    bench.want("r8: CPU / PEFT cat", took.ratio("loramerge", "PEFT cat", "cpu"), 0.2)
    bench.want("r8: CPU / import torch", took.ratio("loramerge", "import torch", "cpu"), 1.0)
    _want_run(bench, "r8: run / safetensors.torch", took, "safetensors.torch", 1.5)
    bench.want("r8: peak memory / PEFT linear", took.ratio("loramerge", "PEFT linear", "rss"), 1 / 8)


def concatenation(bench: Bench, rank: int) -> None:
    """Measure the exact sum, whose file is as large as its inputs."""
    files = bench.loras("attn", rank)
    commands = {
        **both("loramerge, run", bench.out(f"sum{rank}"), files, "sum"),
        "safetensors.numpy": peer("io_only", bench.out("numpy"), files, "--by", "numpy", "--all"),
    }
    took = bench.compare(f"Two LoRAs of rank {rank}, 560 attention modules, exact sum of rank {2 * rank}", commands)
    _want_run(bench, f"r{rank}: exact sum, run / safetensors.numpy", took, "safetensors.numpy", 2.0)


def medium(bench: Bench, rank: int, rounds: int | None = None) -> None:
    """Compare ranks 32 and 64 with reading and writing."""
    files = bench.loras("attn", rank)
    commands = {
        "loramerge": cli(bench.out("cli"), files, rank),
        **both("loramerge, run", bench.out(f"r{rank}"), files, rank),
        **io(bench, files, "raw", "torch"),
    }
    title = f"Two LoRAs of rank {rank}, 560 attention modules, to rank {rank}"
    took = bench.compare(title, commands, rounds)
    if rank == 32:
        _want_run(bench, "r32: run / safetensors.torch", took, "safetensors.torch", 6.0)
    _want_below_input(bench, rank, took, files)


def large(bench: Bench) -> None:
    """Measure rank 128 in one round."""
    files = bench.loras("attn", 128)
    sample = ["--rank", "128", "--modules", str(SAMPLE)]
    commands = {
        "loramerge": cli(bench.out("r128"), files, 128),
        **io(bench, files, "raw", "torch"),
        "PEFT linear": peer("peft_merge", bench.out("linear"), files, "--type", "linear"),
        "PEFT cat": peer("peft_merge", bench.out("cat"), files, "--type", "cat"),
        f"PEFT svd, {SAMPLE} modules": peer("peft_merge", bench.out("svd"), files, "--type", "svd", *sample),
    }
    took = bench.compare("Two LoRAs of rank 128, 560 attention modules, to rank 128", commands, 1)
    bench.want("r128: peak memory / PEFT linear", took.ratio("loramerge", "PEFT linear", "rss"), 1 / 25)
    _want_below_input(bench, 128, took, files)


def _want_run(bench: Bench, name: str, took: Samples, peer: str, wanted: float) -> None:
    """Measure the work without the imports: CPU seconds of one worker, and wall seconds of two."""
    bench.want(f"{name}, CPU of one worker", took.ratio("loramerge, run", peer, "run_cpu"), wanted)
    bench.want(f"{name}, wall of two workers", took.ratio("loramerge, run, 2 workers", peer, "run"), wanted)


def _want_below_input(bench: Bench, rank: int, took: Samples, files: list[str]) -> None:
    measured = took.median("loramerge", "rss") / Path(files[0]).stat().st_size
    bench.want(f"r{rank}: peak memory / one input file", measured, 1.0)


def kohya(bench: Bench) -> None:
    """Measure all modules that kohya's trainer adapts, under kohya's names."""
    files = bench.loras("kohya", 8)
    commands = {
        "loramerge": cli(bench.out("cli"), files, 8),
        **both("loramerge, run", bench.out("kohya"), files, 8),
        "import torch": ["-c", "import torch"],
        **io(bench, files, "raw", "torch"),
    }
    took = bench.compare("Two LoRAs of rank 8, kohya's 986 modules, to rank 8", commands)
    bench.want("kohya r8: CPU / import torch", took.ratio("loramerge", "import torch", "cpu"), 1.0)
    _want_run(bench, "kohya r8: run / safetensors.torch", took, "safetensors.torch", 1.5)


def many(bench: Bench, rank: int) -> None:
    """Measure 2 to 16 LoRAs in one round."""
    files = bench.loras("attn", rank, 16)
    counts = (2, 4, 8, 16)
    commands = {f"{n} LoRAs": cli(bench.out(f"many{n}"), files[:n], rank) for n in counts}
    took = bench.compare(f"2 to 16 LoRAs of rank {rank}, 560 attention modules, to rank {rank}", commands, 1)
    if rank == 8:
        bench.want("r8: peak memory, 16 LoRAs / 2", took.ratio("16 LoRAs", "2 LoRAs", "rss"), 1.5)
    _want_optimal(bench, f"r{rank}, 16 LoRAs", bench.out("many16"), files)


def optimal(bench: Bench, rank: int) -> None:
    """Measure how near a truncated merge comes to the best of its rank."""
    files, out = bench.loras("attn", rank), bench.out(f"optimal{rank}")
    run(ours(out, files, rank))
    _want_optimal(bench, f"r{rank}", out, files)


def _want_optimal(bench: Bench, name: str, out: str, files: list[str]) -> None:
    found = accuracy(out, files)
    note = f"error {found['error']:.6f}, optimum {found['optimum']:.6f}"
    bench.want(f"{name}: error / optimum − 1", found["error"] / found["optimum"] - 1, 1e-4, note=note)


def lossless(bench: Bench, rank: int) -> None:
    """Measure the error of the exact sum stored in float16."""
    files, out = bench.loras("attn", rank), bench.out(f"lossless{rank}")
    run(ours(out, files, "sum", *UNEVEN))
    bench.want(f"r{rank}: error of the exact sum in float16", accuracy(out, files, *UNEVEN)["error"], 5e-4)


def same_bytes(bench: Bench, rank: int) -> None:
    """Compare the files that 1, 2 and 5 workers write."""
    files = bench.loras("attn", rank)
    outs = {workers: bench.out(f"workers{workers}") for workers in (1, 2, 5)}
    for workers, out in outs.items():
        run(ours(out, files, rank, "--workers", str(workers)))
    different = sum(not filecmp.cmp(outs[1], out, shallow=False) for out in outs.values())
    bench.want(f"r{rank}: files that differ between 1, 2 and 5 workers", different, 0)


def two_workers(bench: Bench, rank: int, rounds: int | None = None) -> None:
    """Measure wall time, which is meaningful on idle cores only."""
    files = bench.loras("attn", rank)
    commands = {
        f"{workers} workers": ours(bench.out(f"workers{workers}"), files, rank, "--workers", str(workers))
        for workers in (1, 2)
    }
    watch = Watch()
    took = bench.compare(f"One and two workers, rank {rank}", commands, rounds)
    note = f"others used {watch.others():.2f} cores"
    bench.want(
        f"r{rank}: wall of 1 worker / 2 workers",
        took.ratio("1 workers", "2 workers", "run"),
        1.5,
        least=True,
        note=note,
    )


def cuda(bench: Bench, rank: int) -> None:
    """Compare a merge on a GPU with one on the CPU."""
    if not run(["-c", "import torch; print('BENCH', '{\"found\": %d}' % torch.cuda.is_available())"]).said["found"]:
        bench.want(f"r{rank}: run on cuda / CPU", None, 1.0, note="no GPU at hand")
        return
    files, out = bench.loras("attn", rank), bench.out("cuda")
    commands = {
        "CPU": ours(bench.out("cpu"), files, rank, "--again"),
        "cuda": ours(out, files, rank, "--again", "--device", "cuda"),
    }
    took = bench.compare(f"CPU and GPU, rank {rank}, second merge of a process", commands)
    bench.want(f"r{rank}: run on cuda / CPU", took.ratio("cuda", "CPU", "run"), 1.0)
    _want_optimal(bench, f"r{rank} on cuda", out, files)
