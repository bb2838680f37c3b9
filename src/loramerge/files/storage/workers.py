"""Sharing work among forked processes: unlike threads, they don't wait for each other's Python."""

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
"""What a child says: one mark for each item that is done, or that it failed and the exception."""

ENDING = (signal.SIGINT, signal.SIGTERM)

PORTIONS = 64
"""In how many portions the work is handed out, about: few messages, which fit into any pipe."""


def safe() -> bool:
    """Whether this process can be forked without harm: on Linux, with one thread only, and without torch.

    A lock that another thread holds at the fork stays locked in the child for ever, and neither
    torch's pool of threads nor a GPU's context outlives a fork.  Threads that are not Python's
    count: OpenBLAS has some unless ``OPENBLAS_NUM_THREADS`` is 1.
    """
    if sys.platform != "linux" or "torch" in sys.modules:
        return False
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def each(items: Sequence[T], work: Callable[[T], None], workers: int) -> Generator[None]:
    """Work on every item, in child processes; yields once for each that is done.

    The children end with the generator, whether it is used up, closed or fails.

    Args:
        items: What to work on; at least one.
        work: Called in a child: of what it does, only files stay.
        workers: How many children.

    Raises:
        Exception: What ``work`` raised.
        FileError: A child was killed.
    """
    work(items[0])  # before the fork, so that what it imports and caches is everyone's
    items = items[1:]
    if not safe():  # the first item imported torch, or something else with threads
        yield
        yield from map(work, items)
        return
    portions = _portions(len(items))
    children: dict[int, int] = {}
    try:
        with _undisturbed():
            for _ in range(min(workers, len(items))):
                heard, said = os.pipe()
                children[heard] = os.fork() or _work(items, work, portions, said)
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
    """Interrupts wait: one that rises inside a fork's own hooks is lost, and so would a child be."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _portions(count: int) -> int:
    """A pipe from which the children take the portions' bounds: each is read by one of them."""
    size = max(1, count // PORTIONS)
    taken, given = os.pipe()
    os.write(given, b"".join(_bounds(first, min(first + size, count)) for first in range(0, count, size)))
    os.close(given)
    return taken


def _bounds(first: int, last: int) -> bytes:
    return first.to_bytes(4, "little") + last.to_bytes(4, "little")


def _work(items: Sequence[T], work: Callable[[T], None], portions: int, said: int) -> NoReturn:
    """A child's life."""
    code = 1
    try:
        # Ctrl-C goes to the whole group of processes: the parent answers it, and ends its children.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        gc.freeze()  # looking for garbage among what was inherited would copy it
        while bounds := os.read(portions, 8):
            first, last = int.from_bytes(bounds[:4], "little"), int.from_bytes(bounds[4:], "little")
            for item in items[first:last]:
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
    except Exception:  # an exception's own constructor may do anything
        return pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))
    return data


def _listen(children: dict[int, int]) -> Generator[None]:
    """Yield for each item that a child has done; a child that is through is taken out."""
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
