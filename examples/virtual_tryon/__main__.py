"""``python -m examples.virtual_tryon run --preset mini``."""

import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before it is imported: it has advice for importers

from .study.command import main

if __name__ == "__main__":  # processes that train import this file too
    sys.exit(main())
