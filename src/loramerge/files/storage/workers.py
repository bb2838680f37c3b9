"""A fork-based worker pool: unlike threads, workers don't share the GIL."""

import gc
import os
import pickle
import select
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from ...errors import FileError, LoRAMergeError

T = TypeVar("T")

DONE, FAILED = b".", b"!"
"""Protocol bytes from worker to parent: one mark per item that is done; on failure a mark and the pickled exception."""

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
ENDING = (signal.SIGINT, signal.SIGTERM, HANGUP)

PORTIONS = 64
"""Approximate number of portions that the work is split into: few enough that their bounds fit into any pipe."""


def safe() -> bool:
    """Return whether this process can be forked safely: on Linux, with one thread only, and without torch.

    Nobody else may wait for its children: where SIGCHLD is ignored the system does, and a handler may.  A lock
    that another thread holds during the fork is never released in the child, and neither torch's thread pool nor
    a GPU's context survives a fork.  Threads that Python didn't start count too: OpenBLAS has some unless
    ``OPENBLAS_NUM_THREADS`` is 1.
    """
    if sys.platform != "linux" or "torch" in sys.modules or signal.getsignal(signal.SIGCHLD) != signal.SIG_DFL:
        return False
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(items: Sequence[T], work: Callable[[T], None], workers: int) -> Generator[None]:
    """Work on every item in child processes; yield once per item that is done.

    The children end with the generator: when it is exhausted, closed, or fails.  If this process is killed, each ends
    with the item that it is at.

    Args:
        items: The items; at least one.
        work: Called in a child, so only what it writes to files lasts.
        workers: Number of children, at most; there are no more than items and cores.

    Raises:
        Exception: What ``work`` raised.
        FileError: A child was killed.
    """
    work(items[0])  # before the fork, so that the children share what it imports and caches
    items = items[1:]
    if not safe():  # the first item imported torch, or something else with threads
        yield
        yield from map(work, items)
        return
    portions = _portions(len(items))
    children: dict[int, int] = {}
    parent = os.getpid()
    try:
        with _undisturbed():
            for _ in range(min(workers, len(items), cores())):
                heard, said = os.pipe()
                children[heard] = os.fork() or _work(items, work, portions, said, parent)
                os.close(said)
        yield
        yield from _listen(children)
    finally:
        with _undisturbed():
            os.close(portions)
            for heard, pid in children.items():
                os.close(heard)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Block interrupts: a KeyboardInterrupt raised inside fork's hooks is lost, and the child would never be ended."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _portions(count: int) -> int:
    """Return the read end of a pipe with the portions' bounds; each is read by one child."""
    size = max(1, count // PORTIONS)
    taken, given = os.pipe()
    os.write(given, b"".join(_bounds(first, min(first + size, count)) for first in range(0, count, size)))
    os.close(given)
    return taken


def _bounds(first: int, last: int) -> bytes:
    return first.to_bytes(4, "little") + last.to_bytes(4, "little")


def _work(items: Sequence[T], work: Callable[[T], None], portions: int, said: int, parent: int) -> NoReturn:
    """Worker main loop."""
    code = 1
    try:
        # Ctrl-C and a hangup go to the whole process group: the parent handles them and kills its children.
        signal.signal(HANGUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        gc.freeze()  # a collection would write to inherited memory pages, and so copy them
        while bounds := os.read(portions, 8):
            first, last = int.from_bytes(bounds[:4], "little"), int.from_bytes(bounds[4:], "little")
            for item in items[first:last]:
                if os.getppid() != parent:
                    os._exit(code)
                work(item)
            os.write(said, DONE * (last - first))
        code = 0
    except BaseException as error:
        with open(said, "wb") as file:
            file.write(FAILED + _pickled(error))
    finally:
        os._exit(code)


def _pickled(error: BaseException) -> bytes:
    if not isinstance(error, LoRAMergeError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # an exception's own constructor may need other arguments
        return pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))
    return data


def _listen(children: dict[int, int]) -> Generator[None]:
    """Yield once per item that a child has done; remove children that have ended."""
    poll = select.poll()
    for heard in children:
        poll.register(heard, select.POLLIN)
    while children:
        for heard, _ in poll.poll():
            marks, failed, error = os.read(heard, 1 << 16).partition(FAILED)
            yield from (None for _ in marks)
            if failed:
                with open(heard, "rb", closefd=False) as file:
                    raise pickle.loads(error + file.read())
            if not marks:
                poll.unregister(heard)
                os.close(heard)
                _, status = os.waitpid(children.pop(heard), 0)
                if status:
                    raise FileError(
                        f"A worker process ended with {os.waitstatus_to_exitcode(status)} before its work was done; "
                        "perhaps memory ran out. Way out: fewer workers."
                    )
