"""Compare merging SDXL LoRAs by loramerge, by PEFT, by dense SVDs, and plain reading and writing.

    python benchmarks/merge.py            every case, about 15 minutes
    python benchmarks/merge.py --quick    rank 8 only, one round

Exit code 1 if a goal is missed.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cases
from cases import Bench
from processes import Watch, run
from report import markdown, text

TITLE = "Merging SDXL LoRAs: time, memory, accuracy"
LEGEND = """Ratios are medians over rounds of the ratio within a round, in which the programs ran in turn, each \
with one BLAS thread. *wall* and *CPU* are of the whole process, interpreter and imports included; *run* is \
the work without them, as the program itself measures it; its CPU seconds leave out those of workers. Two workers \
are what the command line takes on two cores unless told. Files are in the page cache. LoRAs are synthetic: \
real module shapes, float16, decaying spectra."""


def main() -> None:
    given = _arguments()
    watch = Watch()
    with folder(given.data) as data:
        run(["-c", "import torch, peft, loramerge.merging.verbs"])  # into the page cache
        bench = Bench(data, 1 if given.quick else given.rounds)
        quick(bench)
        if not given.quick:
            rest(bench)
    print("\n" + text(bench.goals))
    if given.markdown:
        given.markdown.write_text(markdown(TITLE, bench.goals, bench.sections, watch.others(), LEGEND))
    sys.exit(any(goal.met is False for goal in bench.goals))


def quick(bench: Bench) -> None:
    cases.small(bench)
    cases.concatenation(bench, 8)
    cases.optimal(bench, 8)
    cases.lossless(bench, 8)
    cases.same_bytes(bench, 8)
    cases.two_workers(bench, 8)


def rest(bench: Bench) -> None:
    cases.kohya(bench)
    cases.medium(bench, 32)
    cases.concatenation(bench, 32)
    cases.two_workers(bench, 32)
    cases.medium(bench, 64, rounds=1)
    cases.large(bench)
    cases.two_workers(bench, 128, rounds=1)
    for rank in (32, 64, 128):
        cases.optimal(bench, rank)
    cases.lossless(bench, 128)
    cases.same_bytes(bench, 32)
    cases.many(bench, 8)
    cases.many(bench, 32)
    for rank in (8, 32, 128):
        cases.cuda(bench, rank)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="rank 8 only, one round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the smaller cases (default 3)")
    parser.add_argument("--data", type=Path, help="keep the LoRAs here; default: a temporary directory")
    parser.add_argument("--markdown", type=Path, help="write all figures to this file")
    return parser.parse_args()


@contextmanager
def folder(given: Path | None) -> Iterator[Path]:
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


if __name__ == "__main__":
    main()
