"""Time one of loramerge's methods from inside, on a sample of modules: read, merge and cut.

python benchmarks/one_method.py ties --files FILE FILE … --rank 32 --modules 10 --option density=0.2
"""

import argparse
import json
import time
from typing import Any

from peers.sampling import modules

ENOUGH = 0.3
"""CPU seconds: the modules are repeated until they have taken so long."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge with one method and print the times.")
    parser.add_argument("method")
    parser.add_argument("--files", nargs="+", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--modules", type=int)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--device")
    given = parser.parse_args()
    if given.device:
        import torch  # noqa: F401

    import loramerge as lm
    from loramerge.merging import Kept

    chosen = list(modules(given.files[0], given.modules))
    options = parsed(given.method, given.option)
    planned = lm.plan(
        given.files, weights="uniform", method=given.method, rank=given.rank, device=given.device, **options
    )
    planned.merger.outcome(chosen[0])  # lazy imports, and a GPU's start
    began, began_cpu, passes = time.perf_counter(), time.process_time(), 0
    while not passes or time.process_time() - began_cpu < ENOUGH:
        kept, passes = Kept(chosen), passes + 1
        for module in chosen:
            kept.add(planned.merger.outcome(module))
    count = passes * len(chosen)
    report = {
        "ms": 1e3 * (time.perf_counter() - began) / count,
        "cpu_ms": 1e3 * (time.process_time() - began_cpu) / count,
        "error": kept.error,
    }
    print("BENCH " + json.dumps(report))


def parsed(method: str, texts: list[str]) -> dict[str, Any]:
    """Parse options as typed on a command line."""
    from loramerge.merging.methods import METHODS

    pairs = (text.partition("=") for text in texts)
    return {name: METHODS[method].options[name].parse(value) for name, _, value in pairs}


if __name__ == "__main__":
    main()
