"""The command line: the verbs of the library."""

import errno
import gc
import io
import os
import signal
import sys
from typing import NoReturn

UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EBADF, getattr(errno, "EDQUOT", errno.EIO))
"""Errors of printing.  Those of files are `FileError` by then, or name the file."""


def main() -> None:
    """Run a command; an error of loramerge is printed as one readable block, and the exit code is 1."""
    done = False
    try:
        try:
            _prepare()
            _run()
            done = True
        except SystemExit as exit:
            done = not exit.code
            raise
        finally:
            sys.stdout.flush()
    except (KeyboardInterrupt, OSError, SystemExit) as error:
        _explain(error, done)
    finally:
        gc.freeze()


def _prepare() -> None:
    # Threads work on modules; BLAS with threads of its own below them would only spin.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: the next file that is opened would take its number, and what is printed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
        elif isinstance(stream, io.TextIOWrapper):  # a redirect may not know every character
            stream.reconfigure(errors="replace")
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that half-written files are removed
    # A command ends before it leaves enough garbage to be worth a collection.
    gc.disable()


def _run() -> None:
    from .output import guarded

    # `inspect FILE` reads a header and is done before the parser of options would be loaded.
    if len(sys.argv) == 3 and sys.argv[1] == "inspect" and not sys.argv[2].startswith("-"):
        from .inspection import show

        guarded(lambda: show(sys.argv[2]))
    else:
        from .app import app

        guarded(app)


def _explain(error: BaseException, done: bool) -> NoReturn:
    """End after Ctrl-C, or where standard output can't be written to; raise any other error."""
    # typer exits by itself in both cases, in silence; what happened is the context, or the cause of that.
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if KeyboardInterrupt in (type(cause), type(getattr(cause, "__cause__", None))):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing to stop
        print("Interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)
    if not isinstance(cause, OSError) or cause.filename is not None or cause.errno not in UNWRITABLE:
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(cause, BrokenPipeError):  # the reader of our output has seen enough
        sys.exit(141)
    rest = "The command's work is done all the same." if done else "The command was ended by that."
    print(f"Error: Can't write to standard output: {cause.strerror}. {rest}", file=sys.stderr)
    sys.exit(1)
