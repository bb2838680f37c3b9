"""Measure loramerge under load: many LoRAs, large files, many merges at once.

    python tools/load.py --folder /tmp/load

Prints the peak memory and the size of the files, and whether merges that run at once, from threads and
from processes, give the same bytes as those that run one by one.  Takes 5 GB of disk on the way;
the small files stay.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import loramerge as lm
from loramerge.testing import random_lora

COUNT, AT_ONCE, MANY = 16, 8, 64

MEASURED = """
import json, sys, time
from pathlib import Path
import loramerge as lm
began = time.process_time()
exec(sys.argv[1])
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([int(line.split()[1]) / 1000, time.process_time() - began]))
"""


def attention(module: str, shape: tuple[int, ...]) -> bool:
    return re.match(r"unet\.(down_blocks.*attn[12]|mid_block.*attn1)\.to_", module) is not None


def middle(module: str, shape: tuple[int, ...]) -> bool:
    return module.startswith("unet.mid_block") and ".attn1.to_" in module


def digest(path: Path) -> str:
    return hashlib.file_digest(path.open("rb"), "sha256").hexdigest()


def measured(code: str) -> tuple[float, float]:
    """Return peak memory in MB and CPU seconds of a process that runs some code."""
    done = subprocess.run([sys.executable, "-c", MEASURED, code], capture_output=True, text=True, check=True)
    peak, seconds = json.loads(done.stdout)
    return peak, seconds


def say(what: str, size: float, code: str) -> None:
    peak, seconds = measured(code)
    print(f"{what}: {size / 1e6:,.0f} MB of files, peak memory {peak:,.0f} MB, {seconds:.1f} s of CPU time", flush=True)


def sixteen(folder: Path) -> None:
    """Merge 16 float16 LoRAs of rank 128 on two fifths of SDXL's attention; convert one file of them all."""
    paths = [folder / f"r128-{i}.safetensors" for i in range(COUNT)]
    for i, path in enumerate(paths):
        lm.save(random_lora("sdxl", rank=128, alpha=64.0, dtype="float16", seed=i, only=attention), path)
    large, target = folder / "large.safetensors", folder / "target.safetensors"
    for count in (2, COUNT):
        some = [str(path) for path in paths[:count]]
        say(
            f"{count} LoRAs of rank 128 to rank 128",
            sum(path.stat().st_size for path in paths[:count]),
            f"lm.save(lm.plan({some}, weights=[1/{count}]*{count}, rank=128).lora(), {str(target)!r})",
        )
    side_by_side(paths, large)
    size = large.stat().st_size
    say("inspecting one of rank 2048", size, f"lm.open({str(large)!r}).summary('rank')")
    say("converting it to diffusers", size, f"lm.convert({str(large)!r}, {str(target)!r}, 'diffusers')")
    large.unlink()
    target.unlink()


def side_by_side(paths: list[Path], large: Path) -> None:
    """Write one LoRA with the factors of several, which are removed."""
    files = [load_file(path) for path in paths]
    for path in paths:
        path.unlink()
    joined = {
        key: np.concatenate([file[key] for file in files], axis=int(".lora_up." in key))
        for key in files[0]
        if not key.endswith(".alpha")
    }
    save_file(joined, large)


def merged(folder: Path, target: str, i: int) -> str:
    path = folder / target / f"{i}.safetensors"
    planned = lm.plan([folder / f"small-{i}.safetensors", folder / f"small-{(i + 1) % MANY}.safetensors"], rank=4)
    lm.save(planned.lora(), path)
    return digest(path)


def at_once(folder: Path) -> None:
    """Run 64 small merges one by one, from threads, and from processes."""
    for i in range(MANY):
        lm.save(random_lora("sdxl", rank=4, seed=100 + i, only=middle), folder / f"small-{i}.safetensors")
    ways: dict[str, Callable[[Callable[[int], str]], list[str]]] = {
        "one": lambda work: list(map(work, range(MANY))),
        "threads": lambda work: list(ThreadPoolExecutor(AT_ONCE).map(work, range(MANY))),
        "processes": lambda work: list(ProcessPoolExecutor(AT_ONCE).map(work, range(MANY))),
    }
    found = {}
    for name, way in ways.items():
        (folder / name).mkdir(exist_ok=True)
        began = time.monotonic()
        found[name] = way(partial(merged, folder, name))
        print(f"{MANY} merges, {name}: {time.monotonic() - began:.1f} s", flush=True)
    same = found["one"] == found["threads"] == found["processes"]
    print(
        f"{MANY} merges from {AT_ONCE} threads and {AT_ONCE} processes: {'the same bytes' if same else 'OTHER BYTES'}"
    )
    sys.exit(not same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", choices=["sixteen", "at_once"], default=None)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.only != "at_once":
        sixteen(options.folder)
    if options.only != "sixteen":
        at_once(options.folder)


if __name__ == "__main__":
    main()
