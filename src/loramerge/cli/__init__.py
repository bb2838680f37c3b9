"""The command line: the verbs of the library."""

import gc
import io
import os
import signal
import sys


def main() -> None:
    """Run a command; an error of loramerge is printed as one readable block, and the exit code is 1."""
    # Threads work on modules; BLAS with threads of its own below them would only spin.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    for stream in (sys.stdout, sys.stderr):  # a redirect may not know every character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are removed
    # A command ends before it leaves enough garbage to be worth a collection.
    gc.disable()
    try:
        _run()
    finally:
        gc.freeze()


def _run() -> None:
    from .output import guarded

    # `inspect FILE` reads a header and is done before the parser of options would be loaded.
    if len(sys.argv) == 3 and sys.argv[1] == "inspect" and not sys.argv[2].startswith("-"):
        from .inspection import show

        guarded(lambda: show(sys.argv[2]))
    else:
        from .app import app

        guarded(app)
