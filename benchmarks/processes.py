"""Run whole processes in turn, and measure what each takes."""

import compileall
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

# ru_maxrss of a child starts at what its parent held when it forked: keep numpy and torch out of this process.

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | THREADS
"""One BLAS thread, and modules that Python compiles once, as those of an installed package are."""

Command = Sequence[str]
"""Arguments of the Python interpreter."""


@dataclass(frozen=True)
class Sample:
    """One process from its start to its end."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds, user and system."""
    rss: float
    """Peak resident memory, bytes."""
    said: Mapping[str, float] = field(default_factory=dict)
    """The output of the process after ``BENCH``."""

    def __getitem__(self, what: str) -> float:
        return self.said[what] if what in self.said else getattr(self, what)

    def has(self, what: str) -> bool:
        return what in self.said or what in ("wall", "cpu", "rss")


@dataclass(frozen=True)
class Samples:
    """Samples of several commands, by round."""

    by_name: Mapping[str, list[Sample]]

    def median(self, name: str, what: str) -> float:
        """Return the median over the rounds; NaN if the process doesn't report it."""
        samples = self.by_name[name]
        return statistics.median(s[what] for s in samples) if samples[0].has(what) else float("nan")

    def ratio(self, name: str, other: str, what: str) -> float:
        """Return the median of the ratios that were taken in the same round."""
        pairs = zip(self.by_name[name], self.by_name[other], strict=True)
        return statistics.median(mine[what] / its[what] for mine, its in pairs)


def run(command: Command) -> Sample:
    """Run the Python interpreter with one BLAS thread and wait for it.

    Raises:
        RuntimeError: It failed.
    """
    compile_modules()
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=ENVIRONMENT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text[-2000:]}")
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, _said(text))


@cache
def compile_modules() -> None:
    """Compile loramerge's modules, so that no measured process does."""
    for folder in find_spec("loramerge").submodule_search_locations:
        compileall.compile_dir(folder, quiet=1)


def _said(text: str) -> dict[str, float]:
    lines = [line.removeprefix("BENCH ") for line in text.splitlines() if line.startswith("BENCH ")]
    return json.loads(lines[-1]) if lines else {}


def in_turn(commands: Mapping[str, Command], rounds: int) -> Samples:
    """Run commands as A B C, A B C …: whatever else the machine does affects all of them equally."""
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            samples[name].append(run(command))
            _show(name, samples[name][-1])
    return Samples(samples)


def _show(name: str, sample: Sample) -> None:
    print(f"  {name:38s}{sample.wall:8.2f} s{sample.cpu:8.2f} CPU s{sample.rss / 1e6:8.0f} MB", flush=True)


class Watch:
    """A watch over how busy the machine is with other things than the processes run here."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.perf_counter(), _busy(), _own()

    def others(self) -> float:
        """Return how many cores others kept busy since the watch began, on average; NaN if the system doesn't say."""
        return (_busy() - self.busy - (_own() - self.own)) / (time.perf_counter() - self.began)


def _busy() -> float:
    """Return the CPU seconds of all processes since the machine's start."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except OSError:
        return float("nan")
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Return the CPU seconds of this process and of those it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
