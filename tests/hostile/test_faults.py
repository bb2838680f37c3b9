"""What a fault leaves behind: the old file whole, and no litter that stays."""

import ctypes
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loramerge as lm
from loramerge.files.storage import scratch
from small import MODULES, small

WRITERS: dict[str, Callable[[Path], Path]] = {
    "a file": lambda folder: lm.save(small(seed=5), folder / "new.safetensors", dialect="kohya"),
    "a directory": lambda folder: lm.save(small(seed=5), folder / "new", dialect="peft"),
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(work: Callable[[], object], ready: Callable[[], bool]) -> None:
    """Do some work in a child that is killed as soon as it is ready for that."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    assert child.pid is not None
    while not ready():
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def begin(write: Callable[[Path], Path], folder: Path) -> None:
    """Write half of it, and wait."""

    def halt(done: int, total: int) -> None:
        (folder / "half").touch()
        time.sleep(60)

    lora = small(seed=1)
    target = folder / ("new" if write is WRITERS["a directory"] else "new.safetensors")
    lm.save(lora, target, dialect="peft" if target.suffix == "" else "kohya", progress=halt)


@pytest.mark.parametrize("what", WRITERS)
def test_a_killed_write_leaves_the_old_whole_and_the_next_clears_its_litter(what: str, tmp_path: Path) -> None:
    write = WRITERS[what]
    write(tmp_path)
    whole = files(tmp_path)

    killed(lambda: begin(write, tmp_path), (tmp_path / "half").exists)
    (tmp_path / "half").unlink()
    left = files(tmp_path)
    assert {path: data for path, data in left.items() if ".part" not in path} == whole
    assert left.keys() > whole.keys()

    write(tmp_path)
    assert files(tmp_path) == whole


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    fd, name = scratch.file(target)

    child = multiprocessing.get_context("fork").Process(target=lm.save, args=(small(), target))
    child.start()
    child.join()

    assert child.exitcode == 0
    assert os.path.exists(name)
    os.close(fd)
    lm.save(small(), target)
    assert not os.path.exists(name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_whole_file_that_waits_for_its_name_is_not_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace = tmp_path / "x.safetensors", os.replace

    def overtaken(source: str, place: Path) -> None:
        scratch.clear(place.parent, place.name)
        replace(source, place)

    monkeypatch.setattr(os, "replace", overtaken)
    lm.save(small(), target)

    assert lm.load(target)


def test_a_peft_directory_between_old_and_new_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = lm.save(small(rank=2), tmp_path / "adapter", dialect="peft")
    replace, calls = os.replace, []

    def stop(source: object, place: object) -> None:
        if str(place).startswith(str(target / "")) and calls:
            raise KeyboardInterrupt
        calls.append(place) if str(place).startswith(str(target / "adapter")) else None
        replace(source, place)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        lm.save(small(rank=4), target, dialect="peft")

    with pytest.raises(lm.errors.FileError, match="It holds the adapter's scale"):
        lm.load(target)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def command(*words: str, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "loramerge", *words], capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two LoRAs, and an old file where the merge of them will go."""
    chosen = MODULES["sdxl"][:2]
    for i, name in enumerate("ab"):
        lm.save(small(modules=chosen, seed=i), tmp_path / f"{name}.safetensors", dialect="kohya")
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "out" / "m.safetensors")
    return tmp_path


MERGE = ("merge", "a.safetensors", "b.safetensors", "-o", "out/m.safetensors")


def test_a_disk_that_is_full_for_real_leaves_the_old_file_and_a_reason(inputs: Path) -> None:
    before = files(inputs)

    done = command(*MERGE, cwd=inputs, preexec_fn=limited)

    assert done.returncode == 1
    assert done.stderr.startswith("Error: Can't write out/m.safetensors")
    assert done.stderr.count("\n") == 1
    assert files(inputs) == before


def obedient() -> None:
    """Have root give up what lets it write where it may not."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_read_only_target_leaves_the_old_file_and_a_reason(inputs: Path) -> None:
    before = files(inputs)
    (inputs / "out").chmod(0o555)

    done = command(*MERGE, cwd=inputs, preexec_fn=obedient)

    (inputs / "out").chmod(0o755)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert files(inputs) == before


@pytest.mark.parametrize("how", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_an_input_that_goes_leaves_the_old_file(how: Callable[[Path], object], inputs: Path) -> None:
    planned = lm.plan([inputs / "a.safetensors", inputs / "b.safetensors"])
    before = files(inputs / "out")
    how(inputs / "b.safetensors")

    try:
        lm.save(planned.lora(), inputs / "out" / "m.safetensors")
    except lm.errors.FileError:
        assert files(inputs / "out") == before
    else:  # who has a removed file open has it still
        assert lm.load(inputs / "out" / "m.safetensors")
    assert [path.name for path in (inputs / "out").iterdir()] == ["m.safetensors"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_gpu_that_is_not_there_is_refused_with_the_way_out() -> None:
    with pytest.raises(lm.errors.OptionError, match=r"'cuda'.*Way out"):
        lm.plan([small()], device="cuda")
