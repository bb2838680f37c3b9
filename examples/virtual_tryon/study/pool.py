"""Pieces of work one after the other, or in several processes: one thread each, so that results are the same."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

import torch

from .job import Job

T = TypeVar("T")
Work = Callable[[Job, T], bool]
"""Does a piece; says whether there was anything to do."""


def each(
    work: Work[T], job: Job, pieces: Sequence[T], processes: int, done: Callable[[T, bool], None] = lambda *_: None
) -> None:
    """Do every piece; ``done`` is called after each, in the order in which they end."""
    if min(processes, len(pieces)) <= 1:
        with one_thread():
            for piece in pieces:
                done(piece, work(job, piece))
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(
        min(processes, len(pieces)), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(work, job, piece): piece for piece in pieces}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch on the CPU: sums are then always taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
