"""One BLAS thread per test process, as the command line has it; checked shapes; and the core's tests without torch.

With ``LORAMERGE_TESTS=core`` in the environment, files that import a package that isn't installed are left out, tests that
come upon one are skipped, and shapes are checked only where jaxtyping is installed.  What the core must do without
torch is in ``test_core.py``, where nothing is skipped.
"""

import ast
import ctypes
import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    # Freed memory stays with the process: most of the system time went into mapping the same arrays again and again.
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)

HERE = Path(__file__).parent
CORE = os.environ.get("LORAMERGE_TESTS") == "core"

if not CORE or find_spec("jaxtyping"):
    import shapes

    shapes.install()

from loramerge.errors import MissingExtraError  # noqa: E402 (after shapes, which wrap what is imported)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not CORE:
        return None
    file = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    return True if file.suffix == ".py" and file.exists() and _missing(file) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except (MissingExtraError, ModuleNotFoundError) as error:
        if CORE:
            pytest.skip(str(error))
        raise


@cache
def _missing(path: Path) -> bool:
    """True if a file, or a file of the tests that it imports, needs a package that isn't installed."""
    nodes = ast.parse(path.read_text()).body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    for name in names:
        own = [
            file for folder in (HERE, HERE / "adapters") if (file := folder / f"{name.replace('.', '/')}.py").exists()
        ]
        if own and _missing(own[0]):
            return True
        packages = {name.partition(".")[0], *({"torch"} & {*name.split(".")})}  # safetensors.torch
        if not own and any(find_spec(package) is None for package in packages):
            return True
    return False
