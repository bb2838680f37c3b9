"""Time a merge by loramerge from inside: the imports, and the work without them.

python benchmarks/ours.py OUT --files FILE FILE … --rank 8 --workers 2
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge with loramerge and print the times.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", nargs="+", required=True)
    parser.add_argument("--rank", type=_rank, default="sum")
    parser.add_argument("--weights", type=float, nargs="+")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--again", action="store_true", help="merge twice, time the second: a GPU's start apart")
    given = parser.parse_args()
    if given.device:
        import torch  # noqa: F401
    import loramerge.merging.verbs  # noqa: F401

    imported = time.perf_counter()
    if given.again:
        merge(given)
    began, began_cpu = time.perf_counter(), time.process_time()
    merge(given)
    report = {
        "import_s": imported - START,
        "run": time.perf_counter() - began,
        "run_cpu": time.process_time() - began_cpu,
    }
    print("BENCH " + json.dumps(report))


def merge(given: argparse.Namespace) -> None:
    import loramerge as lm

    planned = lm.plan(given.files, weights=given.weights or "uniform", rank=given.rank, device=given.device)
    lm.save(planned.lora(), given.out, workers=given.workers)


def _rank(text: str) -> Any:
    return int(text) if text.isdigit() else text


if __name__ == "__main__":
    main()
