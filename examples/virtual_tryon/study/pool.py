"""Do pieces of work one by one, or in several processes: one thread each, so that results are the same."""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeAlias

import torch

from .job import Job

Work: TypeAlias = Callable[[Job, Any], bool]
"""Does a piece; returns False if it was done already."""
Done: TypeAlias = Callable[[Any, bool], None]
"""Called after each piece, in the order in which they finish."""
Each: TypeAlias = Callable[[Work, Job, Sequence[Any], Done], None]


def in_turn(work: Work, job: Job, pieces: Sequence[Any], done: Done) -> None:
    """Do every piece in this process."""
    for piece in pieces:
        done(piece, work(job, piece))


@contextmanager
def workers(processes: int) -> Iterator[Each]:
    """Give a function that does pieces in a number of processes; for one it uses this process."""
    if processes == 1:
        yield in_turn
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))

    def shared(work: Work, job: Job, pieces: Sequence[Any], done: Done) -> None:
        futures = {pool.submit(work, job, piece): piece for piece in pieces}
        for future in as_completed(futures):
            done(futures[future], future.result())

    try:
        yield shared
    except KeyboardInterrupt:
        print("\nInterrupted: what is under way is brought to an end first.", file=sys.stderr, flush=True)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread on the CPU, so that sums are always taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
