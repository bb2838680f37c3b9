"""Saving by forked processes: the same file, and on failure none, nor a process left.

Each test is a process of its own, as this one has imported torch and so is never forked.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import loramerge as lm
from small import small

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")

BEGIN = """
import dataclasses, os, signal, sys, time
import loramerge as lm
from loramerge.files.storage import workers as processes
assert processes.safe()
source, out = sys.argv[1:]
lora, parent = lm.open(source), os.getpid()
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
def save(compute, workers=2):
    lm.save(dataclasses.replace(lora, compute=compute, layouts=dict(lora.layouts)), out, workers=workers)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return lm.save(small(), tmp_path / "source.safetensors", dialect="kohya")


def run(code: str, source: Path) -> subprocess.CompletedProcess[str]:
    """Run code after `BEGIN`, in a process group of its own, of which nothing may be left."""
    command = [sys.executable, "-c", BEGIN + code, source, source.parent / "out.safetensors"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    said = process.communicate(timeout=300)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return subprocess.CompletedProcess(command, process.returncode, *said)


def leftovers(source: Path) -> list[str]:
    return sorted(path.name for path in source.parent.iterdir() if path != source)


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_are_the_same_for_any_number_of_processes(workers: int, source: Path) -> None:
    result = run(f"seen = set(); save(lambda m: seen.add(m) or lora[m], {workers}); print(len(seen))", source)
    one = lm.save(lm.open(source), source.parent / "one.safetensors")

    assert result.stdout.split() == ["1"], result.stderr  # all but the first module: in other processes
    found, wanted = (safetensors.numpy.load_file(path) for path in (source.parent / "out.safetensors", one))
    assert found.keys() == wanted.keys()
    for key in wanted:
        np.testing.assert_array_equal(found[key], wanted[key])


def test_processes_and_none_write_the_same_file(source: Path) -> None:
    code = """
save(lora.__getitem__, 3)
three = open(out, "rb").read()
save(lora.__getitem__, 1)
assert open(out, "rb").read() == three
"""
    result = run(code, source)

    assert result.returncode == 0, result.stderr


def test_progress_counts_every_group(source: Path) -> None:
    code = "lm.save(lora, out, workers=2, progress=lambda done, total: print(done, total))"
    counts = [tuple(map(int, line.split())) for line in run(code, source).stdout.splitlines()]

    assert counts == [(done, len(counts)) for done in range(1, len(counts) + 1)]
    assert len(counts) > 2


def test_an_error_in_a_process_is_the_callers(source: Path) -> None:
    code = """
def fail(module):
    if os.getpid() != parent:
        raise lm.errors.NumberError("a value is NaN")
    return lora[module]
try:
    save(fail)
except lm.errors.LoRAMergeError as error:
    print(type(error).__name__, error)
"""
    result = run(code, source)

    assert "NumberError" in result.stdout
    assert "a value is NaN" in result.stdout
    assert leftovers(source) == []


def test_a_mistake_in_a_process_shows_where_it_happened(source: Path) -> None:
    result = run("save(lambda m: lora[m] if os.getpid() == parent else {}['lost'])", source)

    assert "KeyError: 'lost'" in result.stderr
    assert "in _write_group" in result.stderr
    assert leftovers(source) == []


def test_a_killed_process_is_an_error(source: Path) -> None:
    result = run("save(lambda m: lora[m] if os.getpid() == parent else os.kill(os.getpid(), signal.SIGKILL))", source)

    assert "FileError: A worker process ended with -9" in result.stderr
    assert leftovers(source) == []


@pytest.mark.parametrize(("name", "code"), [("SIGINT", -2), ("SIGTERM", 143)])
def test_an_interrupt_ends_every_process(name: str, code: int, source: Path) -> None:
    slow = f"""
def slow(module):
    if module == list(lora)[1]:
        os.kill(parent, signal.{name})
    if os.getpid() != parent:
        time.sleep(60)
    return lora[module]
save(slow)
"""
    result = run(slow, source)

    assert result.returncode == code
    assert leftovers(source) == []


@pytest.mark.parametrize(
    "code", ["import torch", "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"]
)
def test_a_process_that_is_not_safe_to_fork_is_not_forked(code: str, source: Path) -> None:
    if "torch" in code:
        pytest.importorskip("torch")
    result = run(
        f"""
{code}
assert not processes.safe()
seen = set()
save(lambda m: seen.add(m) or lora[m])
assert seen == set(lora)
""",
        source,
    )

    assert result.returncode == 0, result.stderr
