"""Inputs that fuzzing found worth keeping are answered as they should be: see `tools/fuzz.py`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
INPUTS = sorted(path for path in (HERE / "corpus").glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", HERE.parents[1] / "tools" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", sorted({path.parent.name for path in INPUTS}))
def test_every_input_of_the_corpus_is_refused_clearly_or_read_right(target: str, fuzz: ModuleType) -> None:
    for path in INPUTS:
        if path.parent.name == target:
            fuzz.attempt(fuzz.TARGETS[target], path.read_bytes(), slow=float("inf"))
