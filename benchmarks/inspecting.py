"""Measure what ``loramerge inspect`` costs: processor time beyond Python's own start, for the files of today's tools.

python benchmarks/inspecting.py [--runs 10] [NAME …] > benchmarks/results/inspect-cpu.md

The files have the keys, shapes and metadata of tests/data/families.json.xz, and holes for values, which `inspect` doesn't
read.  The least of several runs is taken, as other processes only ever add to one.
"""

import argparse
import json
import lzma
import os
import platform
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from processes import ENVIRONMENT, compile_modules

HERE = Path(__file__).resolve().parent
SIZES = {"F32": 4, "F16": 2, "BF16": 2}
COMMAND = "import sys; from loramerge.cli import main; sys.exit(main())"
"""The code of the installed script."""


def write(path: Path, listing: dict[str, Any]) -> None:
    """Write a safetensors file of a listing, whose values take no space on the disk."""
    header: dict[str, Any] = {"__metadata__": listing["metadata"]} if listing["metadata"] else {}
    at = 0
    for key, (dtype, shape) in listing["keys"].items():
        size = SIZES[dtype]
        for axis in shape:
            size *= axis
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def cpu(runs: int, code: str, *arguments: str) -> float:
    """Return the least processor time of a Python process, in milliseconds."""
    compile_modules()
    times = []
    for _ in range(runs):
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{code} {arguments} ended with {process.returncode}")
        times.append(1000 * (used.ru_utime + used.ru_stime))
    return min(times)


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the processor time of `loramerge inspect` for every listing.")
    parser.add_argument("names", nargs="*", help="names of listings; all by default")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--summary", action="store_true", help="print nothing but the figures that limits.py takes")
    given = parser.parse_args()
    listings = json.loads(lzma.decompress((HERE.parent / "tests" / "data" / "families.json.xz").read_bytes()))
    start, imported = cpu(given.runs, "pass"), cpu(given.runs, "import loramerge")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names or listings:
            path = Path(folder, f"{name}.safetensors")
            write(path, listings[name])
            rows.append((cpu(given.runs, COMMAND, "inspect", str(path)) - start, name, len(listings[name]["keys"])))
            path.unlink()
    times = sorted(time for time, *_ in rows)
    if given.summary:
        figures = {"imported": imported - start, "median": median(times), "most": times[-1], "files": len(times)}
        print("BENCH " + json.dumps(figures))
        return
    print("# `loramerge inspect`: processor time beyond Python's start\n")
    print(f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()};")
    print(f"the least of {given.runs} runs.\n")
    print(f"Python's start takes {start:.0f} ms, and `import loramerge` {imported - start:.0f} ms beyond it.")
    print(f"`inspect`: median {median(times):.0f} ms, {times[0]:.0f} to {times[-1]:.0f} ms, {len(times)} files.\n")
    print("| file | keys | ms |\n|---|---|---|")
    for time, name, keys in sorted(rows, reverse=True):
        print(f"| {name} | {keys} | {time:.0f} |")


if __name__ == "__main__":
    main()
