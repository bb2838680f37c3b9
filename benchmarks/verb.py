"""Time a command of loramerge from inside: its own work without Python's start and its imports.

python benchmarks/verb.py merge a.safetensors b.safetensors -o both.safetensors
python benchmarks/verb.py state_dict a.safetensors
"""

import json
import resource
import sys
import time

import numpy  # noqa: F401

import loramerge as lm
import loramerge.cli
import loramerge.cli.app


def main() -> None:
    if sys.argv[1] == "state_dict":
        import torch  # noqa: F401
    began, began_cpu = time.perf_counter(), cpu()
    if sys.argv[1] == "state_dict":
        lm.load(sys.argv[2]).state_dict()
    else:
        try:
            loramerge.cli.main()
        except SystemExit as end:
            if end.code:
                raise
    print("\nBENCH " + json.dumps({"run": time.perf_counter() - began, "run_cpu": cpu() - began_cpu}))


def cpu() -> float:
    """Return the CPU seconds of this process and of workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
