"""The shapes in annotations are checked in the test run, and nowhere else."""

import subprocess
import sys

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from loramerge import linalg
from loramerge.merging.methods.spaces import core
from loramerge.testing import random_layer

UP, DOWN = np.ones((4, 2), np.float32), np.ones((1, 5), np.float32)
"""Factors that disagree on the rank: numpy repeats the one row of ``down``."""

PRODUCTION = """
import sys
sys.modules["jaxtyping"] = sys.modules["beartype"] = None  # an import of them would fail
import numpy as np
import loramerge as lm
from loramerge import linalg
from loramerge.testing import random_lora
assert lm.merge([random_lora("sd15", seed=seed) for seed in range(2)], method="tsv")
print(linalg.norm(np.ones((4, 2), np.float32), np.ones((1, 5), np.float32)))
"""


def test_a_wrong_shape_is_an_error_in_the_test_run() -> None:
    with pytest.raises(TypeCheckError, match="norm, down: "):
        linalg.norm(UP, DOWN)


def test_a_wrong_dtype_is_an_error_in_the_test_run() -> None:
    with pytest.raises(TypeCheckError, match="spectrum, gram_up: "):
        linalg.spectrum(UP.T @ UP, UP.T @ UP)


def test_fields_of_a_dataclass_must_fit_each_other() -> None:
    found = linalg.spectrum(*linalg.grams(UP, UP.T))

    with pytest.raises(TypeCheckError, match="left: "):
        linalg.Spectrum(np.ones(2), found.left, found.right)


def test_a_wrong_shape_is_caught_after_a_right_one() -> None:
    space = core([random_layer((26, 18), rank=3, seed=seed) for seed in range(2)])
    space.layer(space.parts[0])

    with pytest.raises(TypeCheckError, match="merged: "):
        space.layer(space.parts[0][:, 0])


def test_production_neither_checks_shapes_nor_needs_what_checks_them() -> None:
    done = subprocess.run([sys.executable, "-c", PRODUCTION], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(np.sqrt(80))
