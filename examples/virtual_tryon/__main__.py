"""``python -m examples.virtual_tryon run --preset mini``."""

import os
import signal
import sys


def main() -> int:
    """Run the command, and remove half-written files if it is terminated."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before it is imported: it has advice for importers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        from .study import command
    except KeyboardInterrupt:
        return 130
    return command.main()


if __name__ == "__main__":  # processes that train import this file too
    sys.exit(main())
